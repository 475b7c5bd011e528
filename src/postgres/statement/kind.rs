//! What a statement does, as far as its locks depend on it.

use super::lexer::{self, TokenKind};

/// What a statement does, as far as its locks depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub(crate) enum StatementKind {
    /// Reads without row locks, including `TABLE` and `VALUES`.
    Select,
    SelectForUpdate,
    SelectForNoKeyUpdate,
    SelectForShare,
    SelectForKeyShare,
    Insert,
    Update,
    Delete,
    Merge,
    Copy,
    Truncate,
    LockTable,
    /// `ALTER` of a table, an index, a sequence or a view.
    AlterTable,
    CreateIndex,
    CreateIndexConcurrently,
    Reindex,
    /// `DROP` of anything.
    Drop,
    Vacuum,
    RefreshMaterializedView,
    /// A `SELECT` that calls `pg_advisory_lock` or one of its variants, including `pg_try_…`.
    AdvisoryLock,
    Begin,
    Commit,
    /// Of the whole transaction, not to a savepoint.
    Rollback,
    Other,
}

impl StatementKind {
    pub(crate) fn builds_index(self) -> bool {
        matches!(
            self,
            Self::CreateIndex | Self::CreateIndexConcurrently | Self::Reindex
        )
    }

    /// Whether the kind determines no locks, so that in a text of several statements another one counts.
    fn is_without_locks(self) -> bool {
        matches!(
            self,
            Self::Begin | Self::Commit | Self::Rollback | Self::Other
        )
    }
}

/// The kind of a statement.
///
/// In a `WITH`, the main verb counts, or the first writing verb inside if the main one only reads. Of several
/// statements in one text, the first that takes locks counts.
pub(crate) fn kind(sql: &str) -> StatementKind {
    let words = lexer::tokens(sql).filter_map(|token| match token.kind {
        TokenKind::Word(text) => Some(Item::Word(text.to_ascii_lowercase())),
        TokenKind::Symbol(c @ ('(' | ')' | ',' | ';')) => Some(Item::Symbol(c)),
        // A quoted name, which is none of the words below.
        TokenKind::Quoted(_) => Some(Item::Word("\"\"".to_owned())),
        _ => None,
    });
    let items: Vec<Item> = words.collect();
    let mut first = None;
    for statement in items.split(|item| *item == Item::Symbol(';')) {
        if statement.is_empty() {
            continue;
        }
        let kind = kind_of_one(statement);
        // The body of an SQL function contains statements that do not run now.
        if !kind.is_without_locks() || begins(statement, &["create"]) {
            return kind;
        }
        first.get_or_insert(kind);
    }
    first.unwrap_or(StatementKind::Other)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    Word(String),
    Symbol(char),
}

impl Item {
    fn word(&self) -> &str {
        match self {
            Self::Word(word) => word,
            Self::Symbol(_) => "",
        }
    }
}

fn begins(items: &[Item], words: &[&str]) -> bool {
    items.len() >= words.len()
        && items
            .iter()
            .zip(words)
            .all(|(item, word)| item.word() == *word)
}

fn kind_of_one(items: &[Item]) -> StatementKind {
    let start = items
        .iter()
        .position(|item| *item != Item::Symbol('('))
        .unwrap_or(0);
    let items = &items[start..];
    let has = |word: &str| items.iter().any(|item| item.word() == word);
    let second = items.get(1).map_or("", Item::word);
    match items.first().map_or("", Item::word) {
        "select" | "table" | "values" => select(items),
        "with" => with(items),
        "insert" => StatementKind::Insert,
        "update" => StatementKind::Update,
        "delete" => StatementKind::Delete,
        "merge" => StatementKind::Merge,
        "copy" => StatementKind::Copy,
        "truncate" => StatementKind::Truncate,
        "lock" => StatementKind::LockTable,
        "vacuum" => StatementKind::Vacuum,
        "reindex" => StatementKind::Reindex,
        "drop" => StatementKind::Drop,
        "refresh" => StatementKind::RefreshMaterializedView,
        "alter" if is_relation(second, items) => StatementKind::AlterTable,
        "create" if second == "index" || begins(items, &["create", "unique", "index"]) => {
            // The word comes before the index's own name, which may be any word.
            let concurrently = items
                .iter()
                .take(4)
                .any(|item| item.word() == "concurrently");
            if concurrently {
                StatementKind::CreateIndexConcurrently
            } else {
                StatementKind::CreateIndex
            }
        }
        "begin" => StatementKind::Begin,
        "start" if second == "transaction" => StatementKind::Begin,
        "commit" | "end" => StatementKind::Commit,
        "abort" => StatementKind::Rollback,
        "rollback" if !has("to") => StatementKind::Rollback,
        "declare" | "explain" => behind_prefix(items),
        _ => StatementKind::Other,
    }
}

fn is_relation(what: &str, items: &[Item]) -> bool {
    match what {
        "table" | "index" | "sequence" | "view" => true,
        "materialized" | "foreign" => {
            matches!(items.get(2).map_or("", Item::word), "view" | "table")
        }
        _ => false,
    }
}

/// `DECLARE c CURSOR … FOR statement` and `EXPLAIN (…) statement`.
fn behind_prefix(items: &[Item]) -> StatementKind {
    let verb = items.iter().position(|item| {
        matches!(
            item.word(),
            "with" | "select" | "insert" | "update" | "delete" | "merge" | "table" | "values"
        )
    });
    // `DECLARE … WITH HOLD FOR statement`.
    let verb = match verb {
        Some(at) if begins(&items[at..], &["with", "hold"]) => Some(at + 3),
        verb => verb,
    };
    match verb.and_then(|at| items.get(at..)) {
        Some(statement) if !statement.is_empty() => kind_of_one(statement),
        _ => StatementKind::Other,
    }
}

/// The main verb is outside all parentheses, and not the name of a part of the list.
fn with(items: &[Item]) -> StatementKind {
    let mut depth = 0_usize;
    let mut writes = None;
    for at in 1..items.len() {
        let before = &items[at - 1];
        match &items[at] {
            Item::Symbol('(') => depth += 1,
            Item::Symbol(')') => depth = depth.saturating_sub(1),
            Item::Word(word) => {
                let is_name = matches!(before, Item::Symbol(','))
                    || matches!(before.word(), "with" | "recursive");
                let verb = matches!(
                    word.as_str(),
                    "select" | "table" | "values" | "insert" | "update" | "delete" | "merge"
                );
                if depth == 0 && verb && !is_name {
                    let main = kind_of_one(&items[at..]);
                    return match (main, writes) {
                        (StatementKind::Select, Some(inside)) => inside,
                        _ => main,
                    };
                }
                let as_before = at >= 2
                    && *before == Item::Symbol('(')
                    && matches!(items[at - 2].word(), "as" | "materialized");
                if depth == 1 && verb && as_before && writes.is_none() {
                    let inside = kind_of_one(&items[at..end_of_group(items, at)]);
                    writes = (inside != StatementKind::Select).then_some(inside);
                }
            }
            Item::Symbol(_) => {}
        }
    }
    writes.unwrap_or(StatementKind::Other)
}

/// The position of the parenthesis that closes the group around `from`.
fn end_of_group(items: &[Item], from: usize) -> usize {
    let mut depth = 1_usize;
    for (at, item) in items.iter().enumerate().skip(from) {
        match item {
            Item::Symbol('(') => depth += 1,
            Item::Symbol(')') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    items.len()
}

/// The strongest row lock counts; an advisory lock counts only without one.
fn select(items: &[Item]) -> StatementKind {
    let mut found = StatementKind::Select;
    let strength = |kind| match kind {
        StatementKind::SelectForUpdate => 5,
        StatementKind::SelectForNoKeyUpdate => 4,
        StatementKind::SelectForShare => 3,
        StatementKind::SelectForKeyShare => 2,
        StatementKind::AdvisoryLock => 1,
        _ => 0,
    };
    for at in 0..items.len() {
        let here = &items[at..];
        let candidate = if begins(here, &["for", "update"]) {
            StatementKind::SelectForUpdate
        } else if begins(here, &["for", "no", "key", "update"]) {
            StatementKind::SelectForNoKeyUpdate
        } else if begins(here, &["for", "share"]) {
            StatementKind::SelectForShare
        } else if begins(here, &["for", "key", "share"]) {
            StatementKind::SelectForKeyShare
        } else if takes_advisory_lock(here) {
            StatementKind::AdvisoryLock
        } else {
            continue;
        };
        if strength(candidate) > strength(found) {
            found = candidate;
        }
    }
    found
}

fn takes_advisory_lock(items: &[Item]) -> bool {
    let word = items.first().map_or("", Item::word);
    let function = word
        .strip_prefix("pg_try_advisory_")
        .or_else(|| word.strip_prefix("pg_advisory_"));
    let locks = matches!(
        function,
        Some("lock" | "lock_shared" | "xact_lock" | "xact_lock_shared")
    );
    locks && items.get(1) == Some(&Item::Symbol('('))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StatementKind::*;
    use super::*;

    #[test]
    fn the_verb_determines_the_kind() {
        for (sql, expected) in [
            ("", Other),
            (" -- SELECT", Other),
            ("<insufficient privilege>", Other),
            ("SELECT 1", Select),
            ("((select 1))", Select),
            ("TABLE t", Select),
            ("VALUES (1)", Select),
            ("SELECT * FROM t FOR UPDATE", SelectForUpdate),
            (
                "SELECT * FROM t ORDER BY a FOR /* x */ NO KEY\nUPDATE SKIP LOCKED",
                SelectForNoKeyUpdate,
            ),
            ("SELECT * FROM t FOR SHARE OF t NOWAIT", SelectForShare),
            (
                "SELECT 1 FROM ONLY p x WHERE id = $1 FOR KEY SHARE OF x",
                SelectForKeyShare,
            ),
            (
                "SELECT * FROM a, b FOR SHARE OF a FOR UPDATE OF b",
                SelectForUpdate,
            ),
            (
                "SELECT * FROM (SELECT * FROM t FOR UPDATE) x",
                SelectForUpdate,
            ),
            ("SELECT 'FOR UPDATE' -- FOR UPDATE", Select),
            ("SELECT \"for\" update", Select),
            ("INSERT INTO t SELECT 1 FOR UPDATE", Insert),
            ("UPDATE t SET a = 1", Update),
            ("DELETE FROM t", Delete),
            (
                "MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE",
                Merge,
            ),
            ("COPY t FROM STDIN", Copy),
            ("TRUNCATE t", Truncate),
            ("LOCK t IN SHARE MODE", LockTable),
            ("ALTER TABLE t ADD x int", AlterTable),
            ("ALTER INDEX i RENAME TO j", AlterTable),
            ("ALTER MATERIALIZED VIEW m RENAME TO n", AlterTable),
            ("ALTER ROLE r PASSWORD 'x'", Other),
            ("CREATE INDEX ON t (a)", CreateIndex),
            ("CREATE UNIQUE INDEX i ON t (a)", CreateIndex),
            (
                "create unique index concurrently if not exists i on t (a)",
                CreateIndexConcurrently,
            ),
            ("CREATE INDEX \"concurrently\" ON t (a)", CreateIndex),
            ("CREATE TABLE t (a int)", Other),
            ("REINDEX TABLE CONCURRENTLY t", Reindex),
            ("DROP TABLE t", Drop),
            ("VACUUM (FULL) t", Vacuum),
            ("REFRESH MATERIALIZED VIEW m", RefreshMaterializedView),
            ("SELECT pg_advisory_lock(1)", AdvisoryLock),
            (
                "SELECT pg_catalog.pg_advisory_xact_lock_shared (1, 2), now()",
                AdvisoryLock,
            ),
            ("SELECT PG_TRY_ADVISORY_LOCK($1)", AdvisoryLock),
            ("SELECT pg_advisory_unlock(1)", Select),
            ("SELECT 'pg_advisory_lock(1)'", Select),
            ("BEGIN", Begin),
            ("START TRANSACTION READ ONLY", Begin),
            ("COMMIT", Commit),
            ("END", Commit),
            ("ROLLBACK", Rollback),
            ("ABORT", Rollback),
            ("ROLLBACK TO SAVEPOINT a", Other),
            ("SAVEPOINT a", Other),
            ("EXPLAIN (ANALYZE, BUFFERS) UPDATE t SET a = 1", Update),
            (
                "DECLARE c CURSOR WITH HOLD FOR SELECT * FROM t FOR UPDATE",
                SelectForUpdate,
            ),
            (
                "DECLARE c CURSOR FOR WITH x AS (SELECT 1) DELETE FROM t",
                Delete,
            ),
            ("EXPLAIN", Other),
        ] {
            assert_eq!(kind(sql), expected, "{sql}");
        }
    }

    #[test]
    fn behind_a_with_the_main_verb_counts() {
        for (sql, expected) in [
            ("WITH a AS (SELECT 1) SELECT 2", Select),
            (
                "WITH b AS (SELECT id FROM t FOR NO KEY UPDATE) UPDATE t SET a = 1 FROM b",
                Update,
            ),
            (
                "with recursive a(x, y) as not materialized (select (1)), b as (select 2) delete from t",
                Delete,
            ),
            (
                "WITH delete AS (SELECT 1), update AS (SELECT 2) INSERT INTO t SELECT 1",
                Insert,
            ),
            (
                "WITH a AS (SELECT 1) SEARCH DEPTH FIRST BY x, y SET o MERGE INTO t USING s",
                Merge,
            ),
            (
                "WITH moved AS (DELETE FROM t RETURNING *) SELECT * FROM moved",
                Delete,
            ),
            (
                "WITH moved AS (DELETE FROM t RETURNING *) INSERT INTO u SELECT * FROM moved",
                Insert,
            ),
            (
                "WITH a AS (SELECT 1 FROM t FOR UPDATE) SELECT * FROM a",
                SelectForUpdate,
            ),
            (
                "WITH a AS (SELECT 1) SELECT * FROM t FOR SHARE",
                SelectForShare,
            ),
            ("WITH a AS (SELECT 1", Other),
            ("WITH", Other),
        ] {
            assert_eq!(kind(sql), expected, "{sql}");
        }
    }

    #[test]
    fn of_several_statements_the_first_that_locks() {
        assert_eq!(
            kind("BEGIN; SET LOCAL x = 1; UPDATE t SET a = 1; DELETE FROM t"),
            Update
        );
        assert_eq!(kind("; ; COMMIT; SET a = 1"), Commit);
        assert_eq!(kind("SELECT ';'; UPDATE t"), Select);
        assert_eq!(
            kind("CREATE FUNCTION f() RETURNS void BEGIN ATOMIC SELECT 1; DELETE FROM t; END"),
            Other
        );
    }

    proptest! {
        #[test]
        fn every_text_has_one(text in any::<String>()) {
            kind(&text);
        }

        /// Words of the grammar in any order, truncated anywhere.
        #[test]
        fn any_words_have_one(words in prop::collection::vec(
            prop::sample::select(vec![
                "with", "recursive", "a", "as", "materialized", "(", ")", ",", ";", "select", "update", "for", "no",
                "key", "share", "declare", "explain", "hold", "create", "index", "pg_advisory_lock", "'x'",
            ]),
            0..30,
        )) {
            kind(&words.join(" "));
        }
    }
}
