//! The labels with which lines of the server's log begin, in all its languages (`error_severity` and
//! `send_message_to_server_log` in PostgreSQL's `src/backend/utils/error/elog.c`, translated in `src/backend/po`).

/// The meaning of a label in the format `stderr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Label {
    /// Begins a message of severity LOG.
    Log,
    /// Begins a message of severity ERROR.
    Error,
    /// Begins a message that is not about locks.
    Other,
    /// Continues the message before it, as do `Context` and `Statement`.
    Detail,
    Context,
    Statement,
    /// Continues the message before it with a part that is not used.
    More,
}

/// The names of each label, separated by `|`.
const LABELS: [(Label, &str); 7] = [
    (
        Label::Log,
        "LOG|LOGG|로그|СООБЩЕНИЕ|ЗАПИСУВАННЯ|日志|ჟურნალი|DZIENNIK|ЖУРНАЛ|LOGI",
    ),
    (
        Label::Error,
        "ERROR|FEHLER|ERREUR|ERRORE|შეცდომა|오류|ОШИБКА|FEL|ПОМИЛКА|错误|BŁĄD|ERRO|HATA|CHYBA|KESALAHAN|エラー",
    ),
    (
        Label::Other,
        "FATAL|PANIC|WARNING|NOTICE|INFO|DEBUG|DEBUG1|DEBUG2|DEBUG3|DEBUG4|DEBUG5|PANIK|WARNUNG|HINWEIS|\
         ATTENTION|FATALE|PANICO|ATTENZIONE|NOTIFICA|ფატალური|პანიკა|გაფრთხილება|ინფორმაცია|გამართვა|\
         치명적오류|손상|경고|알림|정보|디버그|ВАЖНО|ПАНИКА|ПРЕДУПРЕЖДЕНИЕ|ЗАМЕЧАНИЕ|ИНФОРМАЦИЯ|ОТЛАДКА|FATALT|VARNING|\
         NOTIS|ФАТАЛЬНО|ПАНІКА|ПОПЕРЕДЖЕННЯ|ПОВІДОМЛЕННЯ|ІНФОРМАЦІЯ|НАЛАГОДЖЕННЯ|致命错误|比致命错误还过分的错误|警告|注意|\
         信息|调试",
    ),
    (
        Label::Detail,
        "DETAIL|DETALLE|DÉTAIL|DETTAGLI|詳細|დეტალები|상세정보|ПОДРОБНОСТИ|DETALJ|ВІДОМОСТІ|详细信息|SZCZEGÓŁY|\
         DETALHE|AYRINTI",
    ),
    (
        Label::Context,
        "CONTEXT|ZUSAMMENHANG|CONTEXTO|CONTEXTE|CONTESTO|文脈|コンテキスト|კონტექსტი|내용|КОНТЕКСТ|KONTEXT|上下文|\
         KONTEKST|BAĞLAM",
    ),
    (
        Label::Statement,
        "STATEMENT|ANWEISUNG|SENTENCIA|INSTRUCTION|ISTRUZIONE|文|ステートメント|ოპერატორი|명령 구문|ОПЕРАТОР|SATS|\
         ІНСТРУКЦІЯ|语句|WYRAŻENIE|COMANDO|İFADE",
    ),
    (
        Label::More,
        "HINT|QUERY|LOCATION|BACKTRACE|TIPP|ANFRAGE|ORT|CONSULTA|UBICACIÓN|ASTUCE|REQUÊTE|EMPLACEMENT|\
         SUGGERIMENTO|POSIZIONE|ヒント|問い合わせ|場所|მინიშნება|მოთხოვნა|힌트|쿼리|위치|ПОДСКАЗКА|ЗАПРОС|ПОЛОЖЕНИЕ|TIPS|\
         FRÅGA|PLATS|УКАЗІВКА|ЗАПИТ|提示|查询|位置|PODPOWIEDŹ|ZAPYTANIE|DICA|İPUCU|SORGU",
    ),
];

/// The label at the beginning of a text, and the text after it.
pub(super) fn label(text: &str) -> Option<(Label, &str)> {
    // No label is longer than 24 characters.
    let head = text.char_indices().nth(24).map_or(text.len(), |(at, _)| at);
    let colon = text[..head].find(':')?;
    let name = text[..colon].trim_end_matches([' ', '\u{a0}', '\u{202f}']);
    let (found, _) = LABELS
        .iter()
        .find(|(_, names)| names.split('|').any(|one| one == name))?;
    let rest = &text[colon + 1..];
    let rest = rest.strip_prefix([' ', '\u{a0}']).unwrap_or(rest);
    Some((*found, rest.strip_prefix(' ').unwrap_or(rest)))
}

/// What the prefix contains in place of a missing value: without a session, or with an empty `application_name`.
const PLACEHOLDERS: [&str; 11] = [
    "[desconocido]",
    "[inconnu]",
    "[okänd]",
    "[sconosciuto]",
    "[unbekannt]",
    "[unknown]",
    "[н/д]",
    "[უცნობი]",
    "[不明]",
    "[未知]",
    "[알수없음]",
];

/// The text of a prefix field; `None` if it is empty or a placeholder.
pub(super) fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty() && !PLACEHOLDERS.contains(text))
}

/// The texts around the number with which a message tells a position in its statement.
const POSITIONS: [(&str, &str); 12] = [
    (" at character ", ""),
    (" bei Zeichen ", ""),
    (" en carácter ", ""),
    (" au caractère ", ""),
    (" al carattere ", ""),
    ("(", "文字目)"),
    (" სიმბოლოსთან ", ""),
    (" ", " 번째 문자 부근"),
    (" (символ ", ")"),
    (" vid tecken ", ""),
    (" символ ", ""),
    (" 第 ", " 个字符处"),
];

/// The message without that position, which the other formats have in a column of its own.
pub(super) fn without_position(message: &str) -> &str {
    let mut shorter = POSITIONS.iter().filter_map(|(before, after)| {
        let number = message.strip_suffix(after)?;
        let rest = number.trim_end_matches(|c: char| c.is_ascii_digit());
        (rest.len() < number.len())
            .then(|| rest.strip_suffix(before))
            .flatten()
    });
    shorter.next().unwrap_or(message)
}

/// The first label in a line that does not begin within a word, with its position, which is at most `max_position`.
pub(super) fn first_label(line: &str, max_position: usize) -> Option<(usize, Label, &str)> {
    let mut starts = line
        .char_indices()
        .take_while(|(at, _)| *at <= max_position)
        .scan(true, |may_start, (at, c)| {
            let starts = std::mem::replace(may_start, !c.is_alphanumeric() && c != '_');
            Some(starts.then_some(at))
        })
        .flatten();
    starts.find_map(|at| {
        let (found, rest) = label(&line[at..])?;
        Some((at, found, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_recognized_in_all_languages() {
        for (text, expected, rest) in [
            ("LOG:  x", Label::Log, "x"),
            ("FEHLER:  x", Label::Error, "x"),
            ("INSTRUCTION :  x", Label::Statement, "x"),
            ("쿼리:x", Label::More, "x"),
            ("DETAIL:    x", Label::Detail, "  x"),
            ("文:  x", Label::Statement, "x"),
        ] {
            assert_eq!(label(text), Some((expected, rest)), "{text}");
        }
        for text in [
            "",
            "LOG",
            "LOGS:  x",
            "log:  x",
            "x LOG:  y",
            ":",
            "日本語日本語日本語日本語日本語日本語日本語日本語日本語:",
        ] {
            assert_eq!(label(text), None, "{text}");
        }
        assert_eq!(
            first_label("2026-01-31 [7] u@d LOG:  x", 19),
            Some((19, Label::Log, "x"))
        );
        assert_eq!(first_label("2026-01-31 [7] u@d LOG:  x", 18), None);
        assert_eq!(first_label("CATALOG:  x", 99), None);
    }

    #[test]
    fn positions_in_statements_are_removed() {
        for text in [
            "x at character 7",
            "x(12文字目)",
            "x 7 번째 문자 부근",
            "x (символ 7)",
            "x 第 7 个字符处",
            "x",
        ] {
            assert_eq!(without_position(text), "x");
        }
        for text in ["x 7", "x at character ", "x at character 7.", ""] {
            assert_eq!(without_position(text), text);
        }
    }

    #[test]
    fn labels_are_unambiguous() {
        let all: Vec<_> = LABELS
            .iter()
            .flat_map(|(_, names)| names.split('|'))
            .collect();
        for (at, name) in all.iter().enumerate() {
            assert!(!all[..at].contains(name), "{name}");
            assert!(name.chars().count() < 23, "{name}");
        }
    }
}
