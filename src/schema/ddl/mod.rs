//! What statements would lock, read from their text: which rows of [`StatementLock`](crate::StatementLock) they are, of
//! which relations, and what only the catalogs can tell.
//!
//! No parser. What is not recognized is said to be so ([`Statement::actions`] is `None`), and never guessed.

mod alter;
mod cursor;
mod other;

use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::postgres::statement::ambiguous_string;
use crate::schema::statements::LockedRelation;

/// One statement of a batch.
#[derive(Clone, Debug)]
pub(super) struct Statement<'a> {
    pub(super) text: &'a str,
    pub(super) block: Block,
    /// What it does; `None` where it could not be read, empty where it locks no relation that is there before it.
    pub(super) actions: Option<Vec<Action>>,
}

/// Where a statement may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// In a transaction.
    May,
    /// Not in a transaction block.
    MustNot,
    /// The same, and it can leave something half done; it waits for others without keeping readers or writers waiting.
    Concurrently,
    /// The same of `DETACH PARTITION … CONCURRENTLY`, which at its end stands in the partition's queue for ACCESS EXCLUSIVE.
    Detach,
    /// It begins or ends one.
    Control,
    /// It sets something that stays on the connection behind the transaction, or the timeout that is ours to set.
    Setting,
}

/// A part of a statement that is a statement of the table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Action {
    /// Its name in the table, where nothing in the catalogs makes it another one.
    pub(super) name: &'static str,
    pub(super) target: Target,
    /// Other relations that it names.
    pub(super) others: Vec<(LockedRelation, TableName)>,
    /// What makes the difference.
    pub(super) ask: Ask,
    /// The mode that it names itself: LOCK TABLE.
    pub(super) mode: Option<LockMode>,
}

/// What an action is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Relation(TableName),
    /// Every relation of a schema.
    Schema(String),
    /// No relation that is there before.
    None,
}

/// What the text does not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Nothing,
    /// Whether a new column's default differs from row to row, or its type is a domain that has to be checked.
    NewColumn {
        ty: String,
        calls: Vec<String>,
    },
    /// Whether a column's new type has the same bytes as its old one.
    NewType {
        column: String,
        ty: String,
        using: bool,
    },
    /// Whether a CHECK says so already.
    NotNull {
        column: String,
    },
    /// Whether a column of the index can be NULL.
    UsingIndex {
        index: String,
    },
    /// Whether it is a foreign key, or a key that others refer to.
    Constraint {
        name: String,
        cascade: bool,
    },
    /// The same of the constraints of a column.
    DropColumn {
        column: String,
        cascade: bool,
    },
}

impl Action {
    fn new(name: &'static str, target: impl Into<Option<TableName>>) -> Self {
        Self {
            name,
            target: target.into().map_or(Target::None, Target::Relation),
            others: Vec::new(),
            ask: Ask::Nothing,
            mode: None,
        }
    }

    fn with(mut self, role: LockedRelation, name: impl Into<Option<TableName>>) -> Self {
        self.others.extend(name.into().map(|name| (role, name)));
        self
    }

    fn asking(mut self, ask: Ask) -> Self {
        self.ask = ask;
        self
    }
}

/// The statements of a batch.
pub(super) fn read(sql: &str) -> Vec<Statement<'_>> {
    cursor::split(sql).into_iter().map(read_one).collect()
}

/// Why a batch cannot be read to its end, if so: behind a string whose end a setting decides could stand anything, a
/// COMMIT too.
pub(super) fn flaw(sql: &str) -> Option<String> {
    let unread = ambiguous_string(sql)?;
    let (_, behind) = unread.split_once(';')?;
    (!behind.trim().is_empty()).then(|| {
        let end = unread.char_indices().nth(40).map_or(unread.len(), |(at, _)| at);
        format!(
            "the text cannot be told apart into statements from {:?} on; write a string that ends in a backslash as \
             E'…\\\\', or the statements as changes of their own",
            &unread[..end]
        )
    })
}

/// The functions that a default calls.
pub(super) fn read_default(expression: &str) -> Vec<String> {
    cursor::Cursor::of(expression).calls()
}

fn read_one(text: &str) -> Statement<'_> {
    let mut cursor = cursor::Cursor::of(text);
    let (block, actions) = if cursor.eat(&["alter"]) {
        alter::read(cursor)
    } else {
        other::read(cursor)
    };
    Statement {
        text,
        block,
        actions,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::StatementLock;

    pub(super) fn names(sql: &str) -> Vec<&'static str> {
        let statements = read(sql);
        let actions = statements.into_iter().filter_map(|one| one.actions);
        actions.flatten().map(|action| action.name).collect()
    }

    /// Each statement here, and the rows it is read as; every name has to be in the table.
    #[test]
    fn statements_are_found_in_the_table() {
        for (sql, expected) in [
            (
                "ALTER TABLE t ADD COLUMN a int DEFAULT 1, DROP b",
                vec!["ALTER TABLE … ADD COLUMN", "ALTER TABLE … DROP COLUMN"],
            ),
            (
                "alter table only s.t add a serial",
                vec!["ALTER TABLE … ADD COLUMN (volatile default)"],
            ),
            (
                "ALTER TABLE t ADD a int GENERATED ALWAYS AS (b + 1) STORED",
                vec!["ALTER TABLE … ADD COLUMN … GENERATED … STORED"],
            ),
            (
                "ALTER TABLE t ADD a int GENERATED BY DEFAULT AS IDENTITY",
                vec!["ALTER TABLE … ADD COLUMN … GENERATED … AS IDENTITY"],
            ),
            (
                "ALTER TABLE t ADD a int REFERENCES p (id) NOT NULL",
                vec![
                    "ALTER TABLE … ADD COLUMN",
                    "ALTER TABLE … ADD COLUMN … REFERENCES",
                ],
            ),
            (
                "ALTER TABLE t ADD a int CHECK (a > 0)",
                vec![
                    "ALTER TABLE … ADD COLUMN",
                    "ALTER TABLE … ADD COLUMN … CHECK",
                ],
            ),
            (
                "ALTER TABLE t ADD a int PRIMARY KEY",
                vec![
                    "ALTER TABLE … ADD COLUMN",
                    "ALTER TABLE … ADD COLUMN … UNIQUE",
                ],
            ),
            (
                "ALTER TABLE t ALTER a TYPE bigint",
                vec!["ALTER TABLE … ALTER COLUMN … TYPE"],
            ),
            (
                "ALTER TABLE t ALTER COLUMN a SET DATA TYPE bigint USING a::bigint",
                vec!["ALTER TABLE … ALTER COLUMN … TYPE"],
            ),
            (
                "ALTER TABLE t ALTER a SET NOT NULL, ALTER b DROP NOT NULL",
                vec![
                    "ALTER TABLE … ALTER COLUMN … SET NOT NULL",
                    "ALTER TABLE … ALTER COLUMN … DROP NOT NULL",
                ],
            ),
            (
                "ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0)",
                vec!["ALTER TABLE … ADD CHECK"],
            ),
            (
                "ALTER TABLE t ADD CHECK (a > 0) NOT VALID",
                vec!["ALTER TABLE … ADD CHECK … NOT VALID"],
            ),
            (
                "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES p",
                vec!["ALTER TABLE … ADD FOREIGN KEY"],
            ),
            (
                "ALTER TABLE t ADD CONSTRAINT c FOREIGN KEY (a) REFERENCES p ON DELETE CASCADE NOT VALID",
                vec!["ALTER TABLE … ADD FOREIGN KEY … NOT VALID"],
            ),
            (
                "ALTER TABLE t ADD PRIMARY KEY (a)",
                vec!["ALTER TABLE … ADD PRIMARY KEY"],
            ),
            (
                "ALTER TABLE t ADD CONSTRAINT c PRIMARY KEY USING INDEX i",
                vec!["ALTER TABLE … ADD PRIMARY KEY USING INDEX"],
            ),
            (
                "ALTER TABLE t ADD UNIQUE (a)",
                vec!["ALTER TABLE … ADD UNIQUE"],
            ),
            (
                "ALTER TABLE t VALIDATE CONSTRAINT c",
                vec!["ALTER TABLE … VALIDATE CONSTRAINT"],
            ),
            ("ALTER TABLE t RENAME TO u", vec!["ALTER TABLE … RENAME"]),
            (
                "ALTER TABLE t SET (fillfactor = 70)",
                vec!["ALTER TABLE … SET (…)"],
            ),
            (
                "ALTER TABLE t SET UNLOGGED",
                vec!["ALTER TABLE … SET UNLOGGED"],
            ),
            (
                "ALTER TABLE p ATTACH PARTITION q DEFAULT",
                vec!["ALTER TABLE … ATTACH PARTITION"],
            ),
            (
                "ALTER TABLE p DETACH PARTITION q CONCURRENTLY",
                vec!["ALTER TABLE … DETACH PARTITION CONCURRENTLY"],
            ),
            ("CREATE UNIQUE INDEX i ON t (a)", vec!["CREATE INDEX"]),
            (
                "CREATE INDEX CONCURRENTLY ON t (a)",
                vec!["CREATE INDEX CONCURRENTLY"],
            ),
            ("DROP INDEX i, j", vec!["DROP INDEX", "DROP INDEX"]),
            (
                "DROP INDEX CONCURRENTLY IF EXISTS i",
                vec!["DROP INDEX CONCURRENTLY"],
            ),
            (
                "DROP TABLE IF EXISTS t CASCADE",
                vec!["DROP TABLE … CASCADE"],
            ),
            ("TRUNCATE a, b", vec!["TRUNCATE", "TRUNCATE"]),
            ("VACUUM FULL t", vec!["VACUUM FULL"]),
            ("VACUUM (FULL, ANALYZE) t", vec!["VACUUM FULL"]),
            ("VACUUM (FULL off) t", vec!["VACUUM"]),
            ("CLUSTER t USING i", vec!["CLUSTER"]),
            (
                "REINDEX (VERBOSE) TABLE CONCURRENTLY t",
                vec!["REINDEX TABLE CONCURRENTLY"],
            ),
            ("REINDEX INDEX i", vec!["REINDEX INDEX"]),
            (
                "REFRESH MATERIALIZED VIEW m",
                vec!["REFRESH MATERIALIZED VIEW"],
            ),
            ("LOCK t IN SHARE MODE", vec!["LOCK TABLE"]),
            (
                "CREATE TABLE c (p int REFERENCES p, FOREIGN KEY (q) REFERENCES q)",
                vec!["CREATE TABLE … REFERENCES", "CREATE TABLE … REFERENCES"],
            ),
            (
                "CREATE TRIGGER g BEFORE INSERT ON t EXECUTE FUNCTION f()",
                vec!["CREATE TRIGGER"],
            ),
            ("COMMENT ON COLUMN s.t.a IS 'x'", vec!["COMMENT ON COLUMN"]),
            ("UPDATE t SET a = 1", vec!["UPDATE"]),
            ("INSERT INTO t VALUES (1)", vec!["INSERT"]),
            ("CREATE SCHEMA s", vec![]),
        ] {
            let found = names(sql);
            assert_eq!(found, expected, "{sql}");
            for name in found {
                assert!(
                    StatementLock::all().any(|lock| lock.statement() == name),
                    "{name}"
                );
            }
            assert!(read(sql)[0].actions.is_some(), "{sql}");
        }
        for sql in ["ALTER TABLE t FROBNICATE", "MAKE ME A TABLE"] {
            assert!(read(sql)[0].actions.is_none(), "{sql}");
        }
    }

    #[test]
    fn a_string_that_a_setting_ends_is_not_the_last_of_a_batch() {
        for sql in [
            r"COMMENT ON TABLE t IS 'C:\'; COMMIT; DROP TABLE t",
            r"COMMENT ON TABLE t IS U&'\'; COMMIT; --'",
        ] {
            assert!(flaw(sql).is_some(), "{sql}");
        }
        for sql in [
            r"COMMENT ON TABLE t IS 'C:\'",
            r"COMMENT ON TABLE t IS 'C:\';",
            r"COMMENT ON TABLE t IS E'C:\\'; DROP TABLE u",
            r"COMMENT ON TABLE t IS $$C:\'; $$; DROP TABLE u -- it's; open",
            "DROP TABLE t; DROP TABLE u",
        ] {
            assert_eq!(flaw(sql), None, "{sql}");
        }
    }

    #[test]
    fn where_statements_may_stand() {
        for (sql, block) in [
            ("CREATE INDEX concurrently_not ON t (a)", Block::May),
            (
                "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)",
                Block::Concurrently,
            ),
            ("DROP INDEX CONCURRENTLY i", Block::Concurrently),
            ("REINDEX (CONCURRENTLY) TABLE t", Block::Concurrently),
            ("REINDEX SCHEMA s", Block::MustNot),
            ("VACUUM t", Block::MustNot),
            ("CLUSTER", Block::MustNot),
            ("CLUSTER t", Block::May),
            ("CREATE DATABASE d", Block::MustNot),
            ("ALTER SYSTEM SET work_mem = '1MB'", Block::MustNot),
            ("REFRESH MATERIALIZED VIEW CONCURRENTLY m", Block::May),
            (
                "ALTER TABLE p DETACH PARTITION q CONCURRENTLY",
                Block::Detach,
            ),
            ("SET LOCAL work_mem = '1MB'", Block::May),
            ("SET CONSTRAINTS ALL DEFERRED", Block::May),
            ("SET LOCAL \"LOCK_timeout\" = 0", Block::Setting),
            ("SET LOCAL U&\"lock\\005ftimeout\" = 0", Block::Setting),
            ("LISTEN c", Block::Setting),
            ("BEGIN", Block::Control),
            ("start transaction", Block::Control),
            ("COMMIT", Block::Control),
            ("ROLLBACK TO SAVEPOINT a", Block::Control),
            ("END", Block::Control),
            ("SET search_path = a", Block::Setting),
            ("SET SESSION work_mem = '1MB'", Block::Setting),
            ("SET LOCAL lock_timeout = 0", Block::Setting),
            ("RESET ALL", Block::Setting),
            ("SET LOCAL search_path = a", Block::May),
            ("SET CONSTRAINTS ALL DEFERRED", Block::May),
        ] {
            assert_eq!(read(sql)[0].block, block, "{sql}");
        }
    }

    #[test]
    fn relations_are_found_with_their_parts() {
        let action = |sql: &str| read(sql)[0].actions.clone().into_iter().flatten().next();
        let relation = |name: &str| Target::Relation(TableName::from(name));
        let added = action(
            "ALTER TABLE IF EXISTS ONLY Shop.\"T\" ADD CONSTRAINT c FOREIGN KEY (a) REFERENCES shop.p (id)",
        );
        let added = added.expect("it is read");
        assert_eq!(added.target, relation("shop.T"));
        assert_eq!(
            added.others,
            [(LockedRelation::Referenced, TableName::from("shop.p"))]
        );
        let index = action("CREATE INDEX ON ONLY t USING gin (a)").expect("it is read");
        assert_eq!(index.target, relation("t"));
        let column = action("ALTER TABLE t ADD a text DEFAULT md5(random()::text) NOT NULL");
        let ask = Ask::NewColumn {
            ty: "text".into(),
            calls: vec!["md5".into(), "random".into()],
        };
        assert_eq!(column.expect("it is read").ask, ask);
        let lock = action("LOCK TABLE ONLY a IN ROW SHARE MODE NOWAIT").expect("it is read");
        assert_eq!(
            (lock.target, lock.mode),
            (relation("a"), Some(LockMode::RowShare))
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>()) {
            read(&text);
        }

        #[test]
        fn any_words_are_read(words in prop::collection::vec(prop::sample::select(vec![
            "alter", "table", "add", "column", "constraint", "drop", "index", "create", "unique", "on", "only", "t",
            "\"q\"", "(", ")", ",", ".", ";", "foreign", "key", "references", "not", "valid", "default", "1", "'x'",
            "set", "type", "using", "vacuum", "full", "concurrently", "reindex", "lock", "in", "mode", "partition",
        ]), 0..14)) {
            read(&words.join(" "));
        }
    }
}
