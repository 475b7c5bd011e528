//! Statements that take away what this crate guards: the end of a transaction, and the release of all session locks.

use super::lexer::{TokenKind, after_space, tokens};

/// The first statement of a text that ends the transaction it is run in, if the text shows one.
///
/// `ROLLBACK TO SAVEPOINT` does not. `COMMIT PREPARED` and `ROLLBACK PREPARED` end another one, and the server refuses
/// them inside a transaction.
pub(crate) fn transaction_end(sql: &str) -> Option<String> {
    let first = after_space(sql).bytes().next()?.to_ascii_lowercase();
    // Almost every text is a single statement that begins otherwise.
    if !b"acepr".contains(&first) && !sql.contains(';') {
        return None;
    }
    let mut at = 0;
    let (mut first, mut previous) = ("", "");
    // Behind `BEGIN ATOMIC`, in the body of a function, which has an END of its own.
    let mut in_body = false;
    let mut found = None;
    for token in tokens(sql) {
        let word = match token.kind {
            TokenKind::Symbol(';') if found.is_some() => break,
            TokenKind::Symbol(';') => {
                at = 0;
                continue;
            }
            TokenKind::Word(word) => word,
            _ => "",
        };
        let is = |text: &str, keyword| text.eq_ignore_ascii_case(keyword);
        if at == 0 {
            first = word;
            found = ["commit", "rollback", "abort", "end"]
                .into_iter()
                .find(|keyword| is(word, keyword));
            if found == Some("end") && in_body {
                (found, in_body) = (None, false);
            }
        } else if at == 1 && is(first, "prepare") && is(word, "transaction") {
            found = Some("prepare transaction");
        } else if at <= 2 && is(word, "to") || at == 1 && is(word, "prepared") {
            found = None;
        }
        in_body |= is(first, "create") && is(previous, "begin") && is(word, "atomic");
        previous = word;
        at += 1;
    }
    found.map(str::to_ascii_uppercase)
}

/// What in a text releases all session locks, if the text shows it.
pub(crate) fn unlocks_all(sql: &str) -> Option<&'static str> {
    // Almost every text has neither word.
    let may = |word: &str| {
        let mut windows = sql.as_bytes().windows(word.len());
        windows.any(|window| window.eq_ignore_ascii_case(word.as_bytes()))
    };
    if !may("unlock_all") && !may("discard") {
        return None;
    }
    let mut at = 0;
    let mut first = "";
    let mut is_function = false;
    for token in tokens(sql) {
        let (TokenKind::Word(word) | TokenKind::Quoted(word)) = token.kind else {
            if let (true, TokenKind::Symbol('(')) = (is_function, token.kind) {
                return Some("pg_advisory_unlock_all()");
            }
            is_function = false;
            at = match token.kind {
                TokenKind::Symbol(';') => 0,
                _ => at + 1,
            };
            continue;
        };
        // Whoever defines, grants or describes the function does not call it.
        let calls = ["create", "alter", "grant", "revoke", "comment"]
            .iter()
            .all(|other| !first.eq_ignore_ascii_case(other));
        is_function = calls && at > 0 && word.eq_ignore_ascii_case("pg_advisory_unlock_all");
        if at == 0 {
            first = word;
        } else if at == 1
            && first.eq_ignore_ascii_case("discard")
            && word.eq_ignore_ascii_case("all")
        {
            return Some("DISCARD ALL");
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_a_transaction() {
        for (sql, end) in [
            ("COMMIT", "COMMIT"),
            ("commit and chain;", "COMMIT"),
            (" -- done\n/* and */ End", "END"),
            ("END TRANSACTION", "END"),
            ("Abort WORK", "ABORT"),
            ("ROLLBACK", "ROLLBACK"),
            ("rollback work;", "ROLLBACK"),
            ("ROLLBACK AND CHAIN", "ROLLBACK"),
            ("INSERT INTO t VALUES (';'); COMMIT; BEGIN", "COMMIT"),
            ("ROLLBACK TO s; ROLLBACK; BEGIN", "ROLLBACK"),
            (";;COMMIT", "COMMIT"),
            ("PREPARE TRANSACTION 'x'", "PREPARE TRANSACTION"),
            (
                "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END; END",
                "END",
            ),
            ("SELECT begin atomic FROM t; END", "END"),
        ] {
            assert_eq!(transaction_end(sql).as_deref(), Some(end), "{sql}");
        }
    }

    #[test]
    fn what_does_not_end_it() {
        for sql in [
            "",
            ";",
            "SELECT 1",
            "SELECT 'COMMIT'; SELECT '; COMMIT'",
            "SELECT 1; -- COMMIT",
            "SELECT commit FROM t; SELECT \"end\"",
            "\"commit\"",
            "ROLLBACK TO s",
            "ROLLBACK TO SAVEPOINT s; INSERT INTO t VALUES (1)",
            "ROLLBACK WORK TO s",
            "ROLLBACK TRANSACTION TO SAVEPOINT s",
            "COMMIT PREPARED 'x'",
            "ROLLBACK PREPARED 'x'",
            "PREPARE p AS SELECT 1",
            "SAVEPOINT commit",
            "RELEASE s",
            "DO $$ BEGIN NULL; END $$",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC END; SELECT 1",
            "EXPLAIN SELECT 1; CASE",
            "COPY t TO STDOUT",
            "SELECT 'it''s \\'; COMMIT",
        ] {
            assert_eq!(transaction_end(sql), None, "{sql}");
        }
    }

    #[test]
    fn what_unlocks_all() {
        for (sql, what) in [
            (
                "SELECT pg_advisory_unlock_all()",
                Some("pg_advisory_unlock_all()"),
            ),
            (
                "SELECT pg_catalog.\"pg_advisory_unlock_all\"()",
                Some("pg_advisory_unlock_all()"),
            ),
            ("discard all", Some("DISCARD ALL")),
            ("SELECT 1; DISCARD /* all */ ALL", Some("DISCARD ALL")),
            ("DISCARD PLANS", None),
            ("SELECT 'DISCARD ALL'", None),
            (
                "GRANT EXECUTE ON FUNCTION pg_advisory_unlock_all() TO a",
                None,
            ),
            ("SELECT 1 AS pg_advisory_unlock_all", None),
            ("SELECT discard all", None),
            ("-- pg_advisory_unlock_all()\nSELECT 1", None),
        ] {
            assert_eq!(unlocks_all(sql), what, "{sql}");
        }
    }
}
