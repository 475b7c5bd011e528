//! Parses the DETAIL of a deadlock: the waits, and in the server's log also the statements.

use std::collections::HashSet;

use super::lock_tag::LockTag;
use super::number::numbers;

/// The DETAIL of SQLSTATE 40P01, line by line; see `DeadLockReport` in PostgreSQL's
/// `src/backend/storage/lmgr/deadlock.c`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeadlockDetail {
    pub(crate) lines: Vec<DetailLine>,
}

/// A line, or a statement of several lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetailLine {
    /// As the server wrote it.
    pub(crate) raw: String,
    pub(crate) kind: LineKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LineKind {
    Wait(DetailWait),
    /// The statement of a backend, only in the server's log. It contains the literals, and is cut at
    /// `track_activity_query_size` bytes.
    Statement {
        pid: i32,
        statement: String,
    },
    Unparsed,
}

/// A backend that waits for another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetailWait {
    pub(crate) waiter: i32,
    pub(crate) blocker: i32,
    /// The requested mode, as in `pg_locks.mode`: `ShareLock`.
    pub(crate) mode: String,
    pub(crate) object: LockTag,
}

impl DeadlockDetail {
    pub(crate) fn waits(&self) -> impl Iterator<Item = &DetailWait> {
        self.lines.iter().filter_map(|line| match &line.kind {
            LineKind::Wait(wait) => Some(wait),
            _ => None,
        })
    }

    /// The statement of each backend, by process id.
    #[cfg(feature = "server-log")]
    pub(crate) fn statements(&self) -> impl Iterator<Item = (i32, &str)> {
        self.lines.iter().filter_map(|line| match &line.kind {
            LineKind::Statement { pid, statement } => Some((*pid, statement.as_str())),
            _ => None,
        })
    }

    #[cfg(test)]
    fn statement_of(&self, pid: i32) -> Option<&str> {
        self.statements()
            .find_map(|(of, statement)| (of == pid).then_some(statement))
    }

    /// Whether each backend waits for the backend of the next line, and the last one for the first, as the server
    /// always writes it. This proves that all lines were parsed correctly.
    pub(crate) fn is_cycle(&self) -> bool {
        let waits: Vec<_> = self.waits().collect();
        let next = waits.iter().cycle().skip(1);
        let mut waiters = HashSet::new();
        // In this order, because a text that was made long on purpose is usually not a cycle.
        waits.len() > 1
            && waits
                .iter()
                .zip(next)
                .all(|(wait, next)| wait.blocker == next.waiter)
            && waits.iter().all(|wait| waiters.insert(wait.waiter))
    }
}

/// Parses the DETAIL of a deadlock, as a client receives it or as the server logs it.
///
/// In every language the first number of a line is the waiter and the last one the blocker, and the mode is not
/// translated (test `every_language::a_deadlock_is_parsed_in_every_language_of_the_server`). A line that cannot be parsed is
/// kept unchanged.
pub(crate) fn deadlock_detail(detail: &str) -> DeadlockDetail {
    let without_tabs = without_log_tabs(detail);
    let mut lines = without_tabs.split('\n').peekable();
    let mut read = DeadlockDetail::default();
    if detail.is_empty() {
        return read;
    }
    let mut heads = Heads::default();
    while let Some(line) = lines.next_if(|line| heads.head(line).is_none()) {
        let kind = wait(line).map_or(LineKind::Unparsed, LineKind::Wait);
        if let LineKind::Wait(wait) = &kind {
            heads.wait(wait);
        }
        read.lines.push(DetailLine {
            raw: line.to_owned(),
            kind,
        });
    }
    for line in lines {
        if let Some((pid, text)) = heads.next(line) {
            read.lines.push(DetailLine {
                raw: line.to_owned(),
                kind: LineKind::Statement {
                    pid,
                    statement: text.to_owned(),
                },
            });
        } else if let Some(last) = read.lines.last_mut() {
            last.raw.push('\n');
            last.raw.push_str(line);
            if let LineKind::Statement { statement, .. } = &mut last.kind {
                statement.push('\n');
                statement.push_str(line);
            }
        }
    }
    read
}

/// `log_destination = stderr` puts a tab before every line except the first (`append_with_tabs` in PostgreSQL's
/// `src/backend/utils/error/elog.c`).
fn without_log_tabs(detail: &str) -> String {
    let mut behind_first = detail.split('\n').skip(1).peekable();
    if behind_first.peek().is_some() && behind_first.all(|line| line.starts_with('\t')) {
        detail.replace("\n\t", "\n")
    } else {
        detail.to_owned()
    }
}

/// Parses `Process 1 waits for ShareLock on transaction 2; blocked by process 3.` in any language.
fn wait(line: &str) -> Option<DetailWait> {
    let numbers = numbers(line);
    let [first, .., last] = numbers.as_slice() else {
        return None;
    };
    let pid = |value: Option<u32>| value.and_then(|value| i32::try_from(value).ok());
    let mode = only_mode(line)?;
    let (before, behind) = line[first.at.end..last.at.start].split_once(mode)?;
    Some(DetailWait {
        waiter: pid(first.value)?,
        blocker: pid(last.value)?,
        mode: mode.to_owned(),
        object: LockTag::parse(&format!("{before} {behind}")),
    })
}

/// The lock mode that the text names. Two modes mean that two lines were joined.
pub(super) fn only_mode(text: &str) -> Option<&str> {
    let mut modes = text
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|word| word.len() > 4 && word.ends_with("Lock"));
    modes.next().filter(|_| modes.next().is_none())
}

/// Finds the beginnings of statements. A statement's text may contain any lines, so only a line about the next backend
/// counts, and only with the same words before its number.
///
/// It keeps the results needed for each line, because any function can raise an error with a DETAIL of very many lines.
#[derive(Default)]
struct Heads {
    waiters: Vec<i32>,
    distinct: HashSet<i32>,
    /// The waiters and blockers.
    known: HashSet<i32>,
    last_blocker: Option<i32>,
    /// Whether a wait is not for the next backend, or a backend waits twice.
    broken: bool,
    label: Option<String>,
    seen: HashSet<i32>,
}

impl Heads {
    fn wait(&mut self, wait: &DetailWait) {
        let is_next = self.last_blocker.is_none_or(|last| last == wait.waiter);
        let is_new = self.distinct.insert(wait.waiter);
        self.broken |= !is_next || !is_new;
        self.known.extend([wait.waiter, wait.blocker]);
        self.waiters.push(wait.waiter);
        self.last_blocker = Some(wait.blocker);
    }

    /// As [`DeadlockDetail::is_cycle`].
    fn is_closed(&self) -> bool {
        !self.broken && self.waiters.len() > 1 && self.last_blocker == self.waiters.first().copied()
    }

    fn next<'a>(&mut self, line: &'a str) -> Option<(i32, &'a str)> {
        let (label, pid, text) = self.head(line)?;
        self.label.get_or_insert_with(|| label.to_owned());
        self.seen.insert(pid);
        Some((pid, text))
    }

    fn head<'a>(&self, line: &'a str) -> Option<(&'a str, i32, &'a str)> {
        let number = numbers(line).into_iter().next()?;
        let pid = i32::try_from(number.value?).ok()?;
        let label = &line[..number.at.start];
        let text = line[number.at.end..].trim_start().strip_prefix(':')?;
        let text = text.strip_prefix(' ').unwrap_or(text);
        let expected = if self.is_closed() {
            self.waiters.get(self.seen.len()) == Some(&pid)
        } else {
            self.known.contains(&pid) && !self.seen.contains(&pid)
        };
        let same_label = self.label.as_ref().is_none_or(|seen| seen == label);
        (expected && same_label).then_some((label, pid, text))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::languages::{LANGUAGES, Language, damage, format};
    use super::*;

    const MODES: [&str; 8] = [
        "AccessShareLock",
        "RowShareLock",
        "RowExclusiveLock",
        "ShareUpdateExclusiveLock",
        "ShareLock",
        "ShareRowExclusiveLock",
        "ExclusiveLock",
        "AccessExclusiveLock",
    ];

    fn language() -> impl Strategy<Value = &'static Language> {
        prop::sample::select(LANGUAGES.iter().collect::<Vec<_>>())
    }

    /// The server's text for a cycle of these backends, which wait for transactions.
    fn detail(language: &Language, pids: &[i32], mode: &str) -> String {
        let lines: Vec<_> = pids
            .iter()
            .zip(pids.iter().cycle().skip(1))
            .map(|(waiter, blocker)| {
                let object = format(language.transaction, &[&(waiter.unsigned_abs() * 2)]);
                format(language.waits, &[waiter, &mode, &object, blocker])
            })
            .collect();
        lines.join("\n")
    }

    /// The expected waits for [`detail`].
    fn waits(pids: &[i32], mode: &str) -> Vec<DetailWait> {
        let next = pids.iter().cycle().skip(1);
        pids.iter()
            .zip(next)
            .map(|(&waiter, &blocker)| DetailWait {
                waiter,
                blocker,
                mode: mode.to_owned(),
                object: LockTag::Transaction {
                    xid: waiter.unsigned_abs() * 2,
                },
            })
            .collect()
    }

    fn with_statements(language: &Language, detail: &str, statements: &[(i32, &str)]) -> String {
        let mut text = detail.to_owned();
        for (pid, statement) in statements {
            text.push('\n');
            text.push_str(&format(language.statement, &[pid, statement]));
        }
        text
    }

    #[test]
    fn each_wait_is_parsed_in_every_language() {
        for language in &LANGUAGES {
            for mode in MODES {
                let text = detail(language, &[4711, 1, i32::MAX], mode);
                let read = deadlock_detail(&text);
                let expected = waits(&[4711, 1, i32::MAX], mode);
                assert_eq!(
                    read.waits().cloned().collect::<Vec<_>>(),
                    expected,
                    "{text}"
                );
                assert!(read.is_cycle());
                let raw: Vec<_> = read.lines.iter().map(|line| line.raw.as_str()).collect();
                assert_eq!(raw.join("\n"), text);
            }
        }
    }

    /// All kinds of objects, within the sentence.
    #[test]
    fn the_sentence_around_it_does_not_change_an_object() {
        for language in &LANGUAGES {
            for (template, numbers) in [
                (language.relation, &[1, 2][..]),
                (language.extension, &[1, 2]),
                (language.frozen_ids, &[1]),
                (language.page, &[1, 2, 3]),
                (language.tuple, &[1, 2, 3, 4]),
                (language.transaction, &[1]),
                (language.virtual_transaction, &[1, 2]),
                (language.speculative_token, &[1, 2]),
                (language.object, &[1, 2, 3]),
                (language.user_lock, &[1, 2, 3]),
                (language.advisory_lock, &[1, 2, 3, 1]),
                (language.remote_transaction, &[1, 2, 3]),
            ] {
                let numbers: Vec<&dyn std::fmt::Display> = numbers
                    .iter()
                    .map(|number| number as &dyn std::fmt::Display)
                    .collect();
                let object = format(template, &numbers);
                let line = format(language.waits, &[&10, &"ExclusiveLock", &object, &20]);
                let wait = wait(&line).expect("a sentence that can be read");
                assert_eq!(wait.object, LockTag::parse(&object), "{line}");
                assert!(!matches!(wait.object, LockTag::Unknown { .. }), "{line}");
                assert_eq!(
                    (wait.waiter, wait.blocker, wait.mode.as_str()),
                    (10, 20, "ExclusiveLock")
                );
            }
        }
    }

    #[test]
    fn the_log_has_statements() {
        for language in &LANGUAGES {
            let text = with_statements(
                language,
                &detail(language, &[10, 20], "ShareLock"),
                &[
                    (10, "UPDATE a\n SET x = 1\n10: y\n20: z\n"),
                    (20, "DELETE: 10"),
                ],
            );
            for text in [text.clone(), text.replace('\n', "\n\t")] {
                let read = deadlock_detail(&text);
                assert!(read.is_cycle(), "{text}");
                assert_eq!(
                    read.statement_of(10),
                    Some("UPDATE a\n SET x = 1\n10: y\n20: z\n"),
                    "{text}"
                );
                assert_eq!(read.statement_of(20), Some("DELETE: 10"), "{text}");
                assert_eq!(read.statement_of(30), None);
            }
        }
    }

    #[test]
    fn a_line_that_cannot_be_parsed_leaves_the_others() {
        let good = detail(&LANGUAGES[0], &[10, 20, 30], "ShareLock");
        let text = good.replacen("\n", "\nProcess ? waits.\n", 1);
        let read = deadlock_detail(&text);
        assert_eq!(read.waits().count(), 3);
        assert_eq!(read.lines[1].raw, "Process ? waits.");
        assert_eq!(read.lines[1].kind, LineKind::Unparsed);
        assert!(read.is_cycle());

        // Without one of the lines there is no cycle, but statements are still found.
        let bad = good.replacen("ShareLock", "a lock", 1);
        let read = deadlock_detail(&with_statements(
            &LANGUAGES[0],
            &bad,
            &[(10, "A"), (30, "C: 5")],
        ));
        assert_eq!(read.waits().count(), 2);
        assert!(!read.is_cycle());
        assert_eq!(read.statement_of(10), Some("A"));
        assert_eq!(read.statement_of(30), Some("C: 5"));
        assert_eq!(deadlock_detail(""), DeadlockDetail::default());
    }

    #[test]
    fn two_lines_in_one_are_not_parsed() {
        let text = detail(&LANGUAGES[0], &[10, 20, 30], "ShareLock").replacen('\n', " ", 1);
        let read = deadlock_detail(&text);
        assert!(!read.is_cycle());
        assert_eq!(read.waits().count(), 1);
    }

    #[test]
    fn a_backend_is_in_a_cycle_once() {
        let once = detail(&LANGUAGES[0], &[10, 20], "ShareLock");
        assert!(!deadlock_detail(&format!("{once}\n{once}")).is_cycle());
        assert!(!deadlock_detail(&detail(&LANGUAGES[0], &[10], "ShareLock")).is_cycle());
    }

    /// The object is unknown, but the backends are parsed.
    #[test]
    fn an_unknown_object_keeps_its_text() {
        let read =
            deadlock_detail("Process 1 waits for ShareLock on thing 5 of 6; blocked by process 2.");
        let wait = read.waits().next().expect("a sentence that can be read");
        let text = "waits for   on thing 5 of 6; blocked by process".to_owned();
        assert_eq!((wait.waiter, wait.blocker), (1, 2));
        assert_eq!(wait.object, LockTag::Unknown { text });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_cycle_is_found_again(
            language in language(),
            pids in prop::collection::hash_set(1..=i32::MAX, 2..6),
            mode in prop::sample::select(&MODES[..]),
        ) {
            let pids: Vec<_> = pids.into_iter().collect();
            let read = deadlock_detail(&detail(language, &pids, mode));
            prop_assert!(read.is_cycle());
            prop_assert_eq!(read.waits().cloned().collect::<Vec<_>>(), waits(&pids, mode));
        }

        #[test]
        fn any_statements_are_kept(language in language(), a in "[^\0\r\t]{0,40}", b in any::<String>()) {
            prop_assume!(!a.contains("20"));
            let text = with_statements(
                language,
                &detail(language, &[10, 20], "ShareLock"),
                &[(10, &a), (20, &b)],
            );
            let read = deadlock_detail(&text);
            prop_assert_eq!(read.statement_of(10), Some(a.as_str()));
            prop_assert_eq!(read.statement_of(20), Some(b.as_str()));
        }

        /// The state kept line by line agrees with all lines.
        #[test]
        fn a_cycle_is_known_as_soon_as_it_is_complete(pairs in prop::collection::vec((1..5_i32, 1..5_i32), 0..6)) {
            let mut heads = Heads::default();
            let mut read = DeadlockDetail::default();
            for (waiter, blocker) in pairs {
                let wait = DetailWait {
                    waiter,
                    blocker,
                    mode: "ShareLock".into(),
                    object: LockTag::Transaction { xid: 1 },
                };
                heads.wait(&wait);
                read.lines.push(DetailLine { raw: String::new(), kind: LineKind::Wait(wait) });
                prop_assert_eq!(heads.is_closed(), read.is_cycle());
            }
        }

        #[test]
        fn any_text_is_kept(text in any::<String>()) {
            let raw: Vec<_> = deadlock_detail(&text).lines.into_iter().map(|line| line.raw).collect();
            prop_assert_eq!(raw.join("\n"), without_log_tabs(&text));
        }

        /// After damage in one place, with the lines intact, there is either no cycle, which callers detect, or the
        /// same backends as before.
        #[test]
        fn damage_never_gives_a_wrong_backend_unnoticed(
            language in language(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..4),
        ) {
            let pids = [471, 1_234_567, 89];
            let text = detail(language, &pids, "ShareLock");
            let damaged = damage(&text, &edits);
            let read = deadlock_detail(&damaged);
            let raw: Vec<_> = read.lines.iter().map(|line| line.raw.as_str()).collect();
            prop_assert_eq!(raw.join("\n"), damaged.clone());
            let is_intact = edits.len() == 1 && damaged.matches('\n').count() == 2;
            if read.is_cycle() && is_intact {
                let found: Vec<_> = read.waits().map(|wait| (wait.waiter, wait.blocker)).collect();
                prop_assert_eq!(found, [(471, 1_234_567), (1_234_567, 89), (89, 471)], "{}", damaged);
            }
        }
    }
}
