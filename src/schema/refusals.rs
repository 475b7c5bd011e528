//! Texts that `change` refuses, whatever they would lock.

use super::Env;
use crate::error::Error;
use crate::postgres::TableName;
use crate::postgres::statement::{TokenKind, spans};
use crate::schema::sql::index;

/// Why a text is not one that the server reads as statements, if so.
pub(super) fn file_flaw(sql: &str) -> Option<&'static str> {
    if sql.starts_with('\u{feff}') {
        return Some(
            "the text begins with a byte-order mark (U+FEFF), which the server takes for part of the first word; remove \
             it, or save the file as UTF-8 without one",
        );
    }
    is_copy_from_stdin(sql).then_some(
        "COPY … FROM STDIN reads rows from the client, which only psql takes from the same file; use COPY with the \
         driver's copy_in, or INSERT",
    )
}

/// Whether a statement of the text is a COPY from the client. What follows it is data, so only what comes before it was
/// certainly read correctly.
fn is_copy_from_stdin(sql: &str) -> bool {
    let mut depth = 0_u32;
    let mut is_copy = None;
    let mut after_from = false;
    for (_, kind) in spans(sql) {
        match kind {
            TokenKind::Symbol(';') => (is_copy, after_from) = (None, false),
            TokenKind::Symbol('(') => depth += 1,
            TokenKind::Symbol(')') => depth = depth.saturating_sub(1),
            TokenKind::Word(word) if depth == 0 => {
                let copies = *is_copy.get_or_insert(word.eq_ignore_ascii_case("copy"));
                if copies && after_from && word.eq_ignore_ascii_case("stdin") {
                    return true;
                }
                after_from = word.eq_ignore_ascii_case("from");
            }
            _ => {
                is_copy.get_or_insert(false);
                after_from = false;
            }
        }
    }
    false
}

/// Refuses CREATE INDEX … IF NOT EXISTS over an index that is INVALID: the server reports success and leaves it so.
///
/// Cancel safety: only reads the catalogs.
pub(super) async fn check_index(env: &Env, statement: &str) -> Result<(), Error> {
    let Some((name, table)) = index_if_not_exists(statement) else {
        return Ok(());
    };
    if !env.is_yes(&index::is_invalid(&table, &name)).await? {
        return Ok(());
    }
    Err(Error::config(format!(
        "the index {name:?} on {table} exists and is INVALID, of a build that failed or is running, and IF NOT EXISTS \
         would leave it as it is; better by create_index, which drops the remains and builds it, or DROP INDEX \
         CONCURRENTLY first"
    )))
}

/// The index and the table of CREATE INDEX … IF NOT EXISTS.
fn index_if_not_exists(statement: &str) -> Option<(String, TableName)> {
    let mut tokens = spans(statement).map(|(_, kind)| kind).peekable();
    let mut eat = |words: &[&str]| {
        let is_it = |kind: &TokenKind<'_>| matches!(kind, TokenKind::Word(word) if words.iter().any(|one| word.eq_ignore_ascii_case(one)));
        tokens.next_if(is_it).is_some()
    };
    if !eat(&["create"]) {
        return None;
    }
    eat(&["unique"]);
    if !eat(&["index"]) {
        return None;
    }
    eat(&["concurrently"]);
    if !(eat(&["if"]) && eat(&["not"]) && eat(&["exists"])) {
        return None;
    }
    let name = identifier(tokens.next()?)?;
    let mut word = |expected: &str| {
        let is_it = |kind: &TokenKind<'_>| matches!(kind, TokenKind::Word(word) if word.eq_ignore_ascii_case(expected));
        tokens.next_if(is_it).is_some()
    };
    if !word("on") {
        return None;
    }
    word("only");
    let first = identifier(tokens.next()?)?;
    let table = match tokens.next_if_eq(&TokenKind::Symbol('.')) {
        Some(_) => TableName::in_schema(first, identifier(tokens.next()?)?),
        None => TableName::new(first),
    };
    Some((name, table))
}

/// A name as the server reads it.
fn identifier(kind: TokenKind<'_>) -> Option<String> {
    match kind {
        TokenKind::Word(word) => Some(word.to_ascii_lowercase()),
        TokenKind::Quoted(text) => Some(text.replace("\"\"", "\"")),
        _ => None,
    }
}

/// How to add a column of a type that would rewrite the table; `None` for other types.
pub(super) fn column_advice(ty: &str, column: &str) -> Option<String> {
    let words: Vec<_> = spans(ty)
        .filter_map(|(_, kind)| match kind {
            TokenKind::Word(word) => Some(word.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    let has = |word: &str| words.iter().any(|one| one == word);
    let integer = match words.first().map(String::as_str) {
        Some("serial" | "serial4") => Some("integer"),
        Some("bigserial" | "serial8") => Some("bigint"),
        Some("smallserial" | "serial2") => Some("smallint"),
        _ => None,
    };
    let numbered = |ty: &str| {
        format!(
            "change(\"CREATE SEQUENCE s\"), add_column(…, {column:?}, {ty:?}).default(\"nextval('s')\"), which fills new \
             rows, backfill() for the rows there are, set_not_null()"
        )
    };
    if let Some(integer) = integer {
        return Some(format!(
            "{} and change(\"ALTER SEQUENCE s OWNED BY …\") do the same without it",
            numbered(integer)
        ));
    }
    if has("identity") {
        let ty = words.first().map_or("bigint", String::as_str);
        return Some(format!(
            "{} and, in one change, ALTER COLUMN … DROP DEFAULT and ALTER COLUMN … ADD GENERATED … AS IDENTITY with a START \
             that is free do the same without it",
            numbered(ty)
        ));
    }
    (has("generated") && !has("virtual")).then(|| {
        format!(
            "add_column() of {column:?} as a plain column, a trigger BEFORE INSERT OR UPDATE that computes it, and \
             backfill() for the rows there are do without it; from PostgreSQL 18 on, so does GENERATED … VIRTUAL, which \
             is computed by readers"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_for_psql_are_refused() {
        for sql in [
            "\u{feff}ALTER TABLE t ADD a int",
            "COPY t FROM STDIN;\n1\t2\n\\.\n",
            "CREATE TABLE t (a int); copy t (a) from stdin with (format csv);",
            "-- a comment\nCOPY \"T\" (\"from\") FROM stdin",
        ] {
            assert!(file_flaw(sql).is_some(), "{sql}");
        }
        for sql in [
            "COPY t FROM '/tmp/x'; CREATE TABLE stdin (a int)",
            "COPY t TO STDOUT",
            "COPY (SELECT 1 FROM stdin) TO '/tmp/x'",
            "INSERT INTO t SELECT a FROM stdin",
            "SELECT 'COPY t FROM STDIN'",
            "",
        ] {
            assert_eq!(file_flaw(sql), None, "{sql}");
        }
    }

    #[test]
    fn the_index_of_if_not_exists_is_read() {
        for (sql, name, table) in [
            (
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS I ON t (a)",
                "i",
                TableName::new("t"),
            ),
            (
                "create unique index if not exists \"I\"\"x\" on only S.\"T\" (a)",
                "I\"x",
                TableName::in_schema("s", "T"),
            ),
        ] {
            assert_eq!(
                index_if_not_exists(sql),
                Some((name.to_owned(), table)),
                "{sql}"
            );
        }
        for sql in [
            "CREATE INDEX i ON t (a)",
            "CREATE INDEX IF NOT EXISTS",
            "CREATE",
            "",
        ] {
            assert_eq!(index_if_not_exists(sql), None, "{sql}");
        }
    }

    #[test]
    fn columns_that_rewrite_have_advice() {
        for (ty, word) in [
            ("serial", "\"integer\""),
            ("BIGSERIAL", "OWNED BY"),
            ("bigint GENERATED ALWAYS AS IDENTITY", "AS IDENTITY"),
            ("int GENERATED ALWAYS AS (a + 1) STORED", "trigger"),
        ] {
            let advice = column_advice(ty, "c").unwrap_or_else(|| panic!("{ty}"));
            assert!(advice.contains(word), "{ty}: {advice}");
        }
        for ty in [
            "int",
            "text DEFAULT 'serial'",
            "int GENERATED ALWAYS AS (a) VIRTUAL",
        ] {
            assert_eq!(column_advice(ty, "c"), None, "{ty}");
        }
    }
}
