//! SQL text: redaction of literals, fingerprints, the kind of a statement, and the relations that it names.
//!
//! There is no parser: the text may be cut off anywhere, be of any server version, or not be SQL at all (`<insufficient
//! privilege>`). What holds for every input is that no part of a literal remains, as the server itself reads it (test
//! `server_literals::what_the_server_reads_as_data_is_redacted`); everything else is best effort.

#[cfg(feature = "incidents")]
mod fingerprint;
mod idle_timeout;
#[cfg(feature = "incidents")]
mod kind;
mod lexer;
#[cfg(feature = "incidents")]
mod mention;
#[cfg(feature = "incidents")]
mod own;
mod refused;

#[cfg(feature = "incidents")]
pub(crate) use fingerprint::{StatementFingerprint, fingerprint};
pub(crate) use idle_timeout::idle_timeout_set_by;
#[cfg(feature = "incidents")]
pub(crate) use kind::{StatementKind, kind};
#[cfg(feature = "schema")]
pub(crate) use lexer::{TokenKind, ambiguous_string, spans};
#[cfg(feature = "incidents")]
pub(crate) use mention::mentions;
#[cfg(feature = "incidents")]
pub(crate) use own::is_own;
pub(crate) use refused::{may_begin, transaction_end, unlocks_all};

/// The statement with `?` for each literal, without comments, on one line.
///
/// Literals are strings of every form, dollar quotes and numbers; quoted identifiers and parameters (`$1`) are kept. A
/// literal that is cut off at the end of the text is replaced as a whole. If the end of a string depends on a setting
/// that the text does not show (`'a\'b'`), all following text counts as part of it.
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) fn redact(sql: &str) -> String {
    use lexer::TokenKind;

    let mut redacted = String::with_capacity(sql.len().min(1024));
    for token in lexer::tokens(sql) {
        if token.spaced && !redacted.is_empty() {
            redacted.push(' ');
        }
        match token.kind {
            TokenKind::Word(text) | TokenKind::Parameter(text) => redacted.push_str(text),
            TokenKind::Quoted(text) => {
                redacted.push('"');
                redacted.push_str(text);
                redacted.push('"');
            }
            TokenKind::Literal => redacted.push('?'),
            TokenKind::Symbol(c) => redacted.push(c),
        }
    }
    redacted
}

#[cfg(all(test, any(feature = "incidents", feature = "server-log")))]
mod server_literals;

#[cfg(all(test, any(feature = "incidents", feature = "server-log")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn literals_become_question_marks() {
        for (sql, expected) in [
            ("", ""),
            ("SELECT 1", "SELECT ?"),
            (
                "UPDATE \"T 1\" SET a1 = 'x', b=-1_000 WHERE c = $1 AND d = 0x1F",
                "UPDATE \"T 1\" SET a1 = ?, b=-? WHERE c = $1 AND d = ?",
            ),
            (
                "  SELECT\n\ta , b--x\nFROM t/* 'y' /* */ */WHERE a=.5e-3  ",
                "SELECT a , b FROM t WHERE a=?",
            ),
            (
                "SELECT 'a' 'b', E'\\'x', U&'\\0041' UESCAPE '!'",
                "SELECT ? ?, ?, ? UESCAPE ?",
            ),
            (
                "DO $f$ BEGIN PERFORM 'x'; END $f$ LANGUAGE plpgsql",
                "DO ? LANGUAGE plpgsql",
            ),
            ("SELECT t1.a2, date'2020-01-01'", "SELECT t1.a2, date?"),
            ("ALTER ROLE r PASSWORD 'secret'", "ALTER ROLE r PASSWORD ?"),
            (
                "SELECT a[1:2], b ? 'k', U&\"d\\0061t\"",
                "SELECT a[?:?], b ? ?, U&\"d\\0061t\"",
            ),
            ("<insufficient privilege>", "<insufficient privilege>"),
        ] {
            assert_eq!(redact(sql), expected);
        }
    }

    #[test]
    fn a_truncated_text_loses_its_unterminated_end() {
        for (sql, expected) in [
            ("UPDATE t SET a = 'sec", "UPDATE t SET a = ?"),
            ("UPDATE t SET a = '", "UPDATE t SET a = ?"),
            ("UPDATE t SET a = $x$ sec", "UPDATE t SET a = ?"),
            ("UPDATE t SET a = $x", "UPDATE t SET a ="),
            ("UPDATE t SET a = 12", "UPDATE t SET a = ?"),
            ("UPDATE t -- sec", "UPDATE t"),
            ("UPDATE t /* sec", "UPDATE t"),
            ("UPDATE \"t", "UPDATE"),
        ] {
            assert_eq!(redact(sql).trim_end(), expected);
        }
    }

    /// With `standard_conforming_strings` off, `'a\'b'` is one string, and `secret` would be inside the next.
    #[test]
    fn ambiguous_text_is_redacted() {
        assert_eq!(redact(r"SELECT 'a\'b', secret, 'c'"), "SELECT ?");
        assert_eq!(redact(r"SELECT 'a\\', b"), "SELECT ?, b");
    }

    /// A piece of a statement, and the part of it that may remain. All parts that must not remain contain a `Z` or a
    /// `7`.
    fn piece() -> impl Strategy<Value = String> {
        let text = "[Z7 a$\"/*é-]{0,6}";
        let tag = "(|[a-c_é][a-c_0-9]{0,2})";
        prop_oneof![
            "[a-y_][a-y0-6_]{0,5}",
            Just("\"q '\"".to_owned()),
            "[-+*/<>=(),.;:?@]",
            Just("$1".to_owned()),
            text.prop_map(|text| format!("'{text}''{text}'")),
            "([Z7 a$\"/*é-]|\\\\.|''){0,6}".prop_map(|text| format!("E'{text}'")),
            "[xXbBnN]".prop_flat_map(move |prefix| text.prop_map(move |text| format!("{prefix}'{text}'"))),
            text.prop_map(|text| format!("U&'{text}'")),
            (tag, "[Z7 a\"'/*é-]{0,6}").prop_map(|(tag, text)| format!("${tag}${text}${tag}$")),
            "7[0-9_]{0,3}(\\.[0-9]{0,2})?(e[-+]?7{1,2})?",
            "0x[7A-F]{1,4}",
            "[Z7 '\"$]{0,6}".prop_map(|text| format!("/* {text} /* {text} */ {text} */")),
            "[Z7 '\"$/*]{0,6}".prop_map(|text| format!("-- {text}\n")),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn nothing_of_a_literal_is_left_wherever_the_text_ends(
            pieces in prop::collection::vec(piece(), 0..12),
            keep in any::<prop::sample::Index>(),
        ) {
            let whole = pieces.join(" ");
            let ends: Vec<_> = whole.char_indices().map(|(at, _)| at).chain([whole.len()]).collect();
            let cut = &whole[..ends[keep.index(ends.len())]];
            for sql in [&whole, cut] {
                let redacted = redact(sql);
                prop_assert!(!redacted.contains(['Z', '7']), "{} → {}", sql, redacted);
            }
        }

        /// With the setting off, strings end elsewhere: here they are built as such a server reads them.
        #[test]
        fn nothing_is_left_of_strings_with_backslashes(
            texts in prop::collection::vec(r"([Z7 a-]|\\.|''){0,6}", 0..6),
        ) {
            let whole = texts.iter().map(|text| format!("a = '{text}'")).collect::<Vec<_>>().join(" AND ");
            let redacted = redact(&whole);
            prop_assert!(!redacted.contains(['Z', '7']), "{} → {}", whole, redacted);
        }

        #[test]
        fn any_text_is_redacted_once_and_for_all(text in any::<String>()) {
            let once = redact(&text);
            // The text after a `$` may be gone; then the `$` looks like a tag that is cut off.
            prop_assert!(once.starts_with(&redact(&once)), "{}", once);
            prop_assert!(!once.contains("  ") || once.contains('"'));
        }
    }
}
