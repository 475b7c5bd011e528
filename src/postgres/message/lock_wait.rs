//! Parses the messages of `log_lock_waits`: which session waits, for which lock, how long, and behind which sessions
//! (`ProcSleep` in PostgreSQL's `src/backend/storage/lmgr/proc.c`).

use super::deadlock::only_mode;
use super::lock_tag::LockTag;
use super::number::numbers;

/// A message about a lock wait.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LockWait {
    pub(crate) what: WaitNews,
    pub(crate) pid: i32,
    /// As in `pg_locks.mode`: `ShareLock`.
    pub(crate) mode: String,
    pub(crate) object: LockTag,
    pub(crate) micros: Option<u64>,
}

/// What happened to the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitNews {
    /// After `deadlock_timeout`; the wait continues.
    StillWaiting,
    Acquired,
    /// The wait ended without the lock.
    Failed,
    /// Other waiters were moved behind it in the queue.
    DeadlockAvoided,
    /// The session will fail.
    DeadlockDetected,
    /// The session did not wait (`log_lock_failures`, PostgreSQL 18 and later).
    NotAvailable,
}

/// The holders and waiters of the lock, in the DETAIL of such a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LockQueue {
    pub(crate) holders: Vec<i32>,
    pub(crate) waiters: Vec<i32>,
}

/// Words of each kind of message in the languages of [`languages`](super::languages), in lower case, separated by
/// `|`. The first kind with a matching word is used.
const NEWS_WORDS: [(WaitNews, &str); 6] = [
    (WaitNews::NotAvailable, "could not obtain"),
    (
        WaitNews::DeadlockAvoided,
        "avoided deadlock|vermied|evitó|évité|evitato|防ぎました|다시 조정|избежал|undvek|уникнув|避免",
    ),
    (
        WaitNews::DeadlockDetected,
        "detected deadlock|festgestellt|detectó|détecté|individuato|検知|감지|обнаружил|upptäckte|виявив|监测到",
    ),
    (
        WaitNews::Failed,
        "failed to acquire|nicht erlangen|no pudo|échoué|fallito|失敗|못함|не смог|misslyckades|не зміг|失败",
    ),
    (
        WaitNews::Acquired,
        "acquired|erlangte|adquirió|acquis |acquisito|獲得しました|취득함|получил| fick |отримав|获取",
    ),
    (
        WaitNews::StillWaiting,
        "still waiting|immer noch|aún espera|toujours en attente|ancora|待機しています|여전히|продолжает|fortfarande|\
         все ще|仍然等待",
    ),
];

/// The unit after the time: milliseconds, in any language.
const UNITS: [&str; 4] = ["ms", "мс", "ミリ秒", "毫秒"];

/// The maximum number of characters before the process id: the server's sentences have no more.
const MAX_CHARS_BEFORE_PID: usize = 24;

/// The maximum number of bytes of such a message.
const MAX_BYTES: usize = 1000;

/// Parses `process 1 still waiting for ShareLock on transaction 2 after 1000.123 ms` in any language. `detail` is the
/// message's DETAIL, whose queue decides if the words are unknown.
pub(crate) fn lock_wait(message: &str, detail: Option<&str>) -> Option<LockWait> {
    if message.len() > MAX_BYTES {
        return None;
    }
    let pid = numbers(message).into_iter().next()?;
    let before = &message[..pid.at.start];
    // In other messages, the text of a client's statement follows a colon or a quote.
    if before.chars().count() > MAX_CHARS_BEFORE_PID || before.contains([':', '\'', '"', '«', '»'])
    {
        return None;
    }
    let mode = only_mode(message)?;
    let mode_at = message.find(mode)?;
    let time = time(message);
    let lower = message.to_lowercase();
    let known = NEWS_WORDS
        .iter()
        .find(|(_, words)| words.split('|').any(|word| lower.contains(word)));
    let what = match (known, &time, detail.and_then(lock_queue)) {
        (Some((what, _)), Some(_), _) => *what,
        (Some((WaitNews::NotAvailable, _)), None, _) => WaitNews::NotAvailable,
        (None, Some(_), Some(_)) => WaitNews::StillWaiting,
        _ => return None,
    };
    // The rest of the sentence around the object must not contain other numbers.
    let mut cuts = vec![pid.at.clone(), mode_at..mode_at + mode.len()];
    cuts.extend(time.as_ref().map(|(at, _)| at.clone()));
    cuts.sort_by_key(|cut| cut.start);
    let mut rest = String::new();
    let mut from = 0;
    for cut in cuts {
        rest.push_str(message.get(from..cut.start)?);
        rest.push(' ');
        from = cut.end;
    }
    rest.push_str(&message[from..]);
    Some(LockWait {
        what,
        pid: i32::try_from(pid.value?).ok()?,
        mode: mode.to_owned(),
        object: LockTag::parse(&rest),
        micros: time.map(|(_, micros)| micros),
    })
}

/// `1000.123 ms`, with a comma in some languages: its position, and the microseconds.
fn time(message: &str) -> Option<(std::ops::Range<usize>, u64)> {
    let numbers = numbers(message);
    let mut pairs = numbers.windows(2);
    pairs.find_map(|pair| {
        let [whole, thousandths] = pair else {
            return None;
        };
        let between = &message[whole.at.end..thousandths.at.start];
        let behind = &message[thousandths.at.end..];
        let is_time = matches!(between, "." | ",")
            && thousandths.at.len() == 3
            && UNITS.iter().any(|unit| {
                let rest = behind
                    .trim_start_matches([' ', '\u{a0}'])
                    .strip_prefix(unit);
                rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphabetic()))
            });
        // A wait may be longer than a u32 of milliseconds.
        let millis: u64 = message[whole.at.clone()].parse().ok()?;
        let micros = millis
            .checked_mul(1000)?
            .checked_add(u64::from(thousandths.value?))?;
        is_time.then_some((whole.at.start..thousandths.at.end, micros))
    })
}

/// Parses `Process holding the lock: 1. Wait queue: 2, 3.` The text between the two lists separates them.
pub(crate) fn lock_queue(detail: &str) -> Option<LockQueue> {
    let is_list = |c: char| c.is_ascii_digit() || matches!(c, ',' | ' ');
    let mut lists = Vec::new();
    for (colons, part) in detail.split([':', '：']).enumerate().skip(1) {
        let list = part.trim_start();
        let end = list.find(|c| !is_list(c)).unwrap_or(list.len());
        let pids: Option<Vec<i32>> = list[..end]
            .split(',')
            .map(str::trim)
            .filter(|pid| !pid.is_empty())
            .map(|pid| pid.parse().ok())
            .collect();
        lists.push((colons, pids?));
    }
    match lists.as_mut_slice() {
        [(1, holders), (2, waiters)] => Some(LockQueue {
            holders: std::mem::take(holders),
            waiters: std::mem::take(waiters),
        }),
        _ => None,
    }
}

/// Whether it is the message of a lock timeout: `canceling statement due to lock timeout`, in any language.
pub(crate) fn is_lock_timeout(message: &str) -> bool {
    const TIMEOUT_WORDS: &str = "due to lock timeout|zeitüberschreitung einer sperre|espera de candados|\
         délai écoulé pour l'obtention des verrous|a causa di timeout di lock|ロックのタイムアウト|\
         ბლოკის მოლოდინის ვადის|잠금 대기 시간 초과|тайм-аута блокировки|lås-timeout|тайм-аут блокування|锁超时|锁定超时";
    if message.len() > MAX_BYTES {
        return false;
    }
    let lower = message.to_lowercase();
    TIMEOUT_WORDS.split('|').any(|word| lower.contains(word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::languages::{LANGUAGES, damage, format};
    use super::*;

    /// Avoided, detected, still waiting, acquired, failed, and the timeout, in the order of [`LANGUAGES`]
    /// (`src/backend/po` of 15). The last argument is the whole time.
    const TEMPLATES: [[&str; 6]; 12] = [
        [
            "process %d avoided deadlock for %s on %s by rearranging queue order after %s ms",
            "process %d detected deadlock while waiting for %s on %s after %s ms",
            "process %d still waiting for %s on %s after %s ms",
            "process %d acquired %s on %s after %s ms",
            "process %d failed to acquire %s on %s after %s ms",
            "canceling statement due to lock timeout",
        ],
        [
            "Prozess %d vermied Verklemmung wegen %s-Sperre auf %s durch Umordnen der Queue nach %s ms",
            "Prozess %d hat Verklemmung festgestellt beim Warten auf %s-Sperre auf %s nach %s ms",
            "Prozess %d wartet immer noch auf %s-Sperre auf %s nach %s ms",
            "Prozess %d erlangte %s-Sperre auf %s nach %s ms",
            "Prozess %d konnte %s-Sperre auf %s nach %s ms nicht erlangen",
            "storniere Anfrage wegen Zeitüberschreitung einer Sperre",
        ],
        [
            "el proceso %d evitó un deadlock para %s en %s reordenando la cola después de %s ms",
            "el proceso %d detectó un deadlock mientras esperaba %s en %s después de %s ms",
            "el proceso %d aún espera %s en %s después de %s ms",
            "el proceso %d adquirió %s en %s después de %s ms",
            "el proceso %d no pudo adquirir %s en %s después de %s ms",
            "cancelando la sentencia debido a que se agotó el tiempo de espera de candados (locks)",
        ],
        [
            "le processus %d a évité un verrou mortel pour %s sur %s en modifiant l'ordre\nde la queue après %s ms",
            "le processus %d a détecté un verrou mortel alors qu'il était en attente de\n%s sur %s après %s ms",
            "le processus %d est toujours en attente de %s sur %s après %s ms",
            "le processus %d a acquis %s sur %s après %s ms",
            "le processus %d a échoué pour l'acquisition de %s sur %s après %s ms",
            "annulation de la requête à cause du délai écoulé pour l'obtention des verrous",
        ],
        [
            "il processo %d ha evitato un deadlock per %s su %s modificando l'ordine della coda dopo %s ms",
            "il processo %d ha individuato un deadlock mentre era in attesa di %s su %s dopo %s ms",
            "il processo %d è ancora un attesa di %s su %s dopo %s ms",
            "il processo %d ha acquisito %s su %s dopo %s ms",
            "il processo %d ha fallito l'acquisizione di %s su %s dopo %s ms",
            "annullamento dell'istruzione a causa di timeout di lock",
        ],
        [
            "プロセス%1$dは、%4$s ms後にキューの順番を再調整することで、%3$s上の%2$sに対するデッドロックを防ぎました。",
            "プロセス%1$dは、%3$s上の%2$sに対し%4$s ms待機するデッドロックを検知しました",
            "プロセス%dは%sを%sで待機しています。%sミリ秒後",
            "プロセス%1$dは%4$s ms後に%3$s上の%2$sを獲得しました",
            "プロセス%1$dは%4$s ms後に%3$s上で%2$sを獲得することに失敗しました",
            "ロックのタイムアウトのためステートメントをキャンセルしています",
        ],
        [
            "process %d avoided deadlock for %s on %s by rearranging queue order after %s ms",
            "process %d detected deadlock while waiting for %s on %s after %s ms",
            "process %d still waiting for %s on %s after %s ms",
            "process %d acquired %s on %s after %s ms",
            "process %d failed to acquire %s on %s after %s ms",
            "გამოსახულება გაუქმდება ბლოკის მოლოდინის ვადის ამოწურვის გამო",
        ],
        [
            "%d PID 프로세스는 %s(%s)에 대해 교착 상태가 발생하지 않도록 %sms 후에 대기열 순서를 다시 조정함",
            "%d PID 프로세스에서 %s(%s) 대기중 %sms 후에 교착 상태를 감지함",
            "%d PID 프로세스에서 여전히 %s(%s) 작업을 기다리고 있음(%sms 후)",
            "%d PID 프로세스가 %s(%s) 작업을 위해 잠금 취득함(%sms 후)",
            "프로세스 %d에서 %s(%s)을(를) 취득하지 못함(%sms 후)",
            "잠금 대기 시간 초과로 작업을 취소합니다.",
        ],
        [
            "процесс %d избежал взаимоблокировки, ожидая в режиме %s блокировку \"%s\", изменив порядок очереди через %s мс",
            "процесс %d обнаружил взаимоблокировку, ожидая в режиме %s блокировку \"%s\" в течение %s мс",
            "процесс %d продолжает ожидать в режиме %s блокировку \"%s\" в течение %s мс",
            "процесс %d получил в режиме %s блокировку \"%s\" через %s мс",
            "процесс %d не смог получить в режиме %s блокировку \"%s\" за %s мс",
            "выполнение оператора отменено из-за тайм-аута блокировки",
        ],
        [
            "process %d undvek deadlock på %s för %s genom att kasta om köordningen efter %s ms",
            "process %d upptäckte deadlock medan den väntade på %s för %s efter %s ms",
            "process %d väntar fortfarande på %s för %s efter %s ms",
            "process %d fick %s på %s efter %s ms",
            "process %d misslyckades att ta %s på %s efter %s ms",
            "avbryter sats på grund av lås-timeout",
        ],
        [
            "процес %d уникнув взаємного блокування, чекаючи в режимі %s блокування %s змінивши порядок черги після %s мс",
            "процес %d виявив взаємне блокування, чекаючи в режимі %s блокування %s після %s мс",
            "процес %d все ще чекає в режимі %s блокування %s після %s мс",
            "процес %d отримав в режимі %s блокування %s після %s мс",
            "процес %d не зміг отримати в режимі %s блокування %s після %s мс",
            "виконання оператора скасовано через тайм-аут блокування",
        ],
        [
            "进程%1$d在%4$s ms通过重新安排序列顺序来避免在%3$s上的%2$s的死锁",
            "进程%1$d在%4$s ms等待在%3$s上的%2$s同时监测到死锁",
            "进程%1$d在%4$s ms仍然等待在%3$s上的%2$s",
            "进程%1$d在%4$s ms后获取在%3$s上的%2$s",
            "进程%1$d在%4$s ms后获取在%3$s上的%2$s失败",
            "由于锁超时，取消语句操作",
        ],
    ];

    const NEWS: [WaitNews; 5] = [
        WaitNews::DeadlockAvoided,
        WaitNews::DeadlockDetected,
        WaitNews::StillWaiting,
        WaitNews::Acquired,
        WaitNews::Failed,
    ];

    #[test]
    fn every_message_is_parsed_in_every_language() {
        for (language, templates) in LANGUAGES.iter().zip(TEMPLATES) {
            let objects: [(&str, &[u32]); 8] = [
                (language.relation, &[1, 2]),
                (language.extension, &[1, 2]),
                (language.tuple, &[11, 12, 13, 14]),
                (language.transaction, &[733]),
                (language.virtual_transaction, &[3, 15]),
                (language.object, &[1, 2, 3]),
                (language.speculative_token, &[1, 2]),
                (language.advisory_lock, &[5, 0, 7, 1]),
            ];
            for (template, what) in templates.into_iter().zip(NEWS) {
                for (object, numbers) in objects {
                    let numbers: Vec<&dyn std::fmt::Display> = numbers
                        .iter()
                        .map(|number| number as &dyn std::fmt::Display)
                        .collect();
                    let object = format(object, &numbers);
                    let point = if language.code == "de" { "," } else { "." };
                    let time = format!("1000{point}012");
                    let text = format(template, &[&4711, &"ShareLock", &object, &time]);
                    let read = lock_wait(&text, None).unwrap_or_else(|| panic!("{text}"));
                    let expected = LockWait {
                        what,
                        pid: 4711,
                        mode: "ShareLock".into(),
                        object: LockTag::parse(&object),
                        micros: Some(1_000_012),
                    };
                    assert_eq!(read, expected, "{text}");
                }
            }
            assert!(is_lock_timeout(templates[5]), "{}", templates[5]);
        }
    }

    #[test]
    fn the_queue_is_parsed() {
        for (detail, holders, waiters) in [
            (
                "Process holding the lock: 1. Wait queue: 2, 3.",
                &[1][..],
                &[2, 3][..],
            ),
            (
                "Processes holding the lock: 1, 4. Wait queue: 2.",
                &[1, 4],
                &[2],
            ),
            ("Process holding the lock: 7, Wait queue: .", &[7], &[]),
            ("Processes holding the lock: . Wait queue: .", &[], &[]),
            ("ロックを保持：1。待ち行列：2", &[1], &[2]),
        ] {
            let queue = lock_queue(detail).unwrap_or_else(|| panic!("{detail}"));
            assert_eq!(
                (&*queue.holders, &*queue.waiters),
                (holders, waiters),
                "{detail}"
            );
        }
        for detail in ["", "a: 1", "a: 99999999999. b: 2", "a: 1. b: 2. c: 3"] {
            assert_eq!(lock_queue(detail), None, "{detail}");
        }
    }

    #[test]
    fn an_unknown_language_is_parsed_by_its_queue() {
        let message = "wątek 12 zzz ShareLock zzz 5 zzz 1000.123 ms";
        assert_eq!(lock_wait(message, None), None);
        let read = lock_wait(message, Some("a: 1. b: 12.")).expect("a queue");
        assert_eq!((read.what, read.pid), (WaitNews::StillWaiting, 12));
        let now = "process 5 could not obtain ShareLock on relation 1 of database 2";
        let read = lock_wait(now, None).expect("a message of 18");
        assert_eq!((read.what, read.micros), (WaitNews::NotAvailable, None));
    }

    #[test]
    fn statements_are_not_mistaken_for_messages() {
        for message in [
            "statement: SELECT 'process 5 acquired ShareLock on transaction 7 after 1.000 ms'",
            "duration: 5.000 ms  statement: SELECT 'acquired ShareLock' -- 1.000 ms",
            "duration: 1000.123 ms",
            "process 5 acquired",
            "process 5 acquired ShareLock on transaction 7",
            "process 5 acquired ShareLock and ShareLock after 1.000 ms",
            "process 5 acquired ShareLock on transaction 7 after 1.00 ms",
            "process 5 acquired ShareLock on transaction 7 after 1.000 miles",
            "process 99999999999 acquired ShareLock on transaction 7 after 1.000 ms",
            "",
        ] {
            assert_eq!(lock_wait(message, None), None, "{message}");
        }
        assert!(!is_lock_timeout(
            "canceling statement due to statement timeout"
        ));
        assert!(!is_lock_timeout("deadlock detected"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_text_is_parsed(text in any::<String>(), detail in any::<Option<String>>()) {
            lock_wait(&text, detail.as_deref());
            is_lock_timeout(&text);
        }

        #[test]
        fn damage_is_no_panic(
            language in 0..12_usize,
            at in 0..5_usize,
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
        ) {
            let object = format(LANGUAGES[language].tuple, &[&1, &2, &3, &4]);
            let text = format(TEMPLATES[language][at], &[&4711, &"ShareLock", &object, &"1000.012"]);
            lock_wait(&damage(&text, &edits), Some(&damage("a: 1. b: 2, 3.", &edits)));
        }
    }
}
