//! Recognizes errors about locks by their text, for logs without SQLSTATEs, in the languages of the server's message
//! catalogs (`src/backend/po` of PostgreSQL).

/// `could not obtain lock on row in relation "%s"` and `could not obtain lock on relation "%s"`: what stands before and
/// behind the name.
const NOWAIT: [(&str, &str); 20] = [
    ("could not obtain lock on row in relation \"", "\""),
    ("could not obtain lock on relation \"", "\""),
    ("konnte Sperre für Zeile in Relation »", "« nicht setzen"),
    ("konnte Sperre für Relation »", "« nicht setzen"),
    (
        "no se pudo bloquear un candado en la fila de la relación «",
        "»",
    ),
    ("no se pudo bloquear un candado en la relación «", "»"),
    ("n'a pas pu obtenir un verrou sur la relation «", "»"),
    ("lock di riga nella relazione \"", "\" fallito"),
    ("lock della relazione \"", "\" fallito"),
    ("リレーション\"", "\"の行ロックを取得できませんでした"),
    ("リレーション\"", "\"のロックを取得できませんでした"),
    ("ურთიერთობაში \"", "\" მწკრივის დაბლოკვის შეცდომა"),
    ("ბლოკის მიღების შეცდომა ურთიერთობაზე ", "\""),
    ("\"", "\" 릴레이션의 잠금 정보를 구할 수 없음"),
    ("не удалось получить блокировку строки в таблице \"", "\""),
    ("не удалось получить блокировку таблицы \"", "\""),
    ("kunde inte ", "\""),
    ("не вдалося отримати блокування ", "\""),
    ("无法在关系 \"", "\"中的记录上获得锁"),
    ("无法在关系 \"", "\" 上获得锁"),
];

/// `deadlock detected`
const DEADLOCK: [&str; 12] = [
    "deadlock detected",
    "Verklemmung (Deadlock) entdeckt",
    "se ha detectado un deadlock",
    "interblocage (deadlock) détecté",
    "rilevato deadlock",
    "デッドロックを検出しました",
    "ნაპოვნია ურთიერთბლოკირება",
    "deadlock 발생했음",
    "обнаружена взаимоблокировка",
    "deadlock upptäckt",
    "виявлено взаємне блокування",
    "检测到死锁",
];

/// The maximum number of bytes of a message with a name.
const MAX_BYTES: usize = 500;

/// Whether it is the error of a statement with NOWAIT whose lock was not available.
pub(crate) fn is_nowait(message: &str) -> bool {
    // Swedish and Ukrainian have these words for the lock.
    let names_lock = |before: &str| match before {
        "kunde inte " => ["låsa rad i relationen \"", "ta lås på relationen \""]
            .iter()
            .any(|words| message[before.len()..].starts_with(words)),
        "не вдалося отримати блокування " => {
            ["у рядку стосовно \"", "зв'язку \""]
                .iter()
                .any(|words| message[before.len()..].starts_with(words))
        }
        _ => true,
    };
    message.len() <= MAX_BYTES
        && (message.starts_with("could not obtain lock on relation with OID ")
            || NOWAIT.iter().any(|(before, behind)| {
                let name = message.strip_prefix(before);
                name.is_some_and(|name| name.len() > behind.len() && name.ends_with(behind))
                    && names_lock(before)
            }))
}

/// Whether it is the message of a deadlock.
pub(crate) fn is_deadlock_message(message: &str) -> bool {
    DEADLOCK.contains(&message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_nowait_are_recognized_in_every_language() {
        for message in [
            "could not obtain lock on row in relation \"a\"",
            "could not obtain lock on relation \"a\"",
            "could not obtain lock on relation with OID 7",
            "konnte Sperre für Zeile in Relation »a« nicht setzen",
            "n'a pas pu obtenir un verrou sur la relation « a »",
            "\"a\" 릴레이션의 잠금 정보를 구할 수 없음",
            "kunde inte låsa rad i relationen \"a\"",
            "не вдалося отримати блокування зв'язку \"a\"",
            "无法在关系 \"a\" 上获得锁",
        ] {
            assert!(is_nowait(message), "{message}");
        }
        for message in [
            "",
            "kunde inte öppna filen \"a\"",
            "could not obtain lock on relation \"",
            "could not open relation \"a\"",
        ] {
            assert!(!is_nowait(message), "{message}");
        }
        assert!(DEADLOCK.iter().all(|message| is_deadlock_message(message)));
        assert!(!is_deadlock_message("deadlock"));
    }
}
