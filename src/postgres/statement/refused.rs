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
    // Behind `BEGIN ATOMIC`, in the body of a function, which has an END of its own.
    let mut in_body = false;
    let mut found = None;
    for place in places(sql) {
        let is = |token, keyword| unquoted(token).eq_ignore_ascii_case(keyword);
        let word = place.token;
        if place.at == 0 {
            if found.is_some() {
                break;
            }
            found = ["commit", "rollback", "abort", "end"]
                .into_iter()
                .find(|keyword| is(word, keyword));
            if found == Some("end") && in_body {
                (found, in_body) = (None, false);
            }
        } else if place.at == 1 && is(place.first, "prepare") && is(word, "transaction") {
            found = Some("prepare transaction");
        } else if place.at <= 2 && is(word, "to") || place.at == 1 && is(word, "prepared") {
            found = None;
        }
        in_body |= is(place.first, "create") && is(place.previous, "begin") && is(word, "atomic");
    }
    found.map(str::to_ascii_uppercase)
}

/// Whether a text may begin a transaction. A body of PL/pgSQL counts too.
pub(crate) fn may_begin(sql: &str) -> bool {
    has(sql, "begin") || has(sql, "start")
}

fn has(sql: &str, word: &str) -> bool {
    let mut windows = sql.as_bytes().windows(word.len());
    windows.any(|window| window.eq_ignore_ascii_case(word.as_bytes()))
}

/// What in a text releases all session locks, if the text shows it.
pub(crate) fn unlocks_all(sql: &str) -> Option<&'static str> {
    // Almost every text has neither word.
    if !has(sql, "unlock_all") && !has(sql, "discard") {
        return None;
    }
    for place in places(sql) {
        let is = |token, keyword| name(token).eq_ignore_ascii_case(keyword);
        // Whoever defines, grants or describes the function does not call it.
        let calls = ["create", "alter", "grant", "revoke", "comment"]
            .iter()
            .all(|other| !is(place.first, other));
        if calls
            && place.at > 1
            && place.token == TokenKind::Symbol('(')
            && is(place.previous, "pg_advisory_unlock_all")
        {
            return Some("pg_advisory_unlock_all()");
        }
        if place.at == 1 && is(place.first, "discard") && is(place.token, "all") {
            return Some("DISCARD ALL");
        }
    }
    None
}

/// The text of a keyword or an identifier without quotes; empty for any other token.
fn unquoted(token: TokenKind<'_>) -> &str {
    match token {
        TokenKind::Word(word) => word,
        _ => "",
    }
}

/// The same, and of a quoted identifier.
fn name(token: TokenKind<'_>) -> &str {
    match token {
        TokenKind::Quoted(word) => word,
        token => unquoted(token),
    }
}

/// A token, and where in its statement it stands.
struct Place<'a> {
    at: usize,
    token: TokenKind<'a>,
    /// The statement's first; itself, where it is that.
    first: TokenKind<'a>,
    /// The one just before; a `;` where there is none.
    previous: TokenKind<'a>,
}

/// The tokens of all statements of a text.
fn places(sql: &str) -> impl Iterator<Item = Place<'_>> {
    const END: TokenKind<'_> = TokenKind::Symbol(';');
    let (mut at, mut first, mut previous) = (0, END, END);
    tokens(sql).filter_map(move |token| {
        let token = token.kind;
        if token == END {
            (at, previous) = (0, END);
            return None;
        }
        if at == 0 {
            first = token;
        }
        let place = Place {
            at,
            token,
            first,
            previous,
        };
        (at, previous) = (at + 1, token);
        Some(place)
    })
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
