//! Recognizes statements from their text: their rows in the table of [`StatementLock`](crate::StatementLock), the
//! relations they name, and what has to be checked in the catalogs.
//!
//! This is not a full parser. A statement that is not recognized is marked ([`Statement::actions`] is `None`), never
//! guessed.

mod alter;
mod create;
mod cursor;
mod drop;
mod new_column;
mod other;
mod table_action;

use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::postgres::statement::ambiguous_string;
use crate::schema::statements::{LockedRelation, TableWork};

/// One statement of a batch.
#[derive(Clone, Debug)]
pub(super) struct Statement<'a> {
    pub(super) text: &'a str,
    pub(super) placement: Placement,
    /// The statement's actions; `None` if it is not recognized, empty if it locks no existing relation.
    pub(super) actions: Option<Vec<Action>>,
    /// The part that was not understood; `None` if all of it was.
    pub(super) unknown: Option<String>,
}

/// Where a statement can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    /// In a transaction block.
    InTransaction,
    /// Only outside of a transaction block.
    OutsideTransaction,
    /// Only outside of a transaction block. It can leave partial work behind, and does not block readers or writers
    /// while it waits.
    Concurrently,
    /// `DETACH PARTITION … CONCURRENTLY`, which is like `Concurrently`, except that it finally waits for ACCESS
    /// EXCLUSIVE on the partition.
    Detach,
    /// It begins or ends a transaction.
    TransactionControl,
    /// It changes a setting that outlives the transaction, or the timeout that the library sets.
    SessionSetting,
}

/// A part of a statement that has rows in the table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Action {
    /// Its statement name in the table, unless the catalogs imply another one.
    pub(super) name: &'static str,
    pub(super) target: Target,
    /// Whether the children of the target are left out.
    pub(super) only: bool,
    /// Other relations that it names, by their roles.
    pub(super) others: Vec<(LockedRelation, TableName)>,
    /// What decides in the catalogs on the statement name.
    pub(super) check: CatalogCheck,
    /// The mode on the target, where the statement's text decides it.
    pub(super) mode: Option<LockMode>,
    /// How much of the target is processed, where the statement's text decides it.
    pub(super) work: Option<TableWork>,
    /// What following statements of the batch find changed.
    pub(super) effect: Effect,
}

/// What an action locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Relation(TableName),
    /// What is dropped, with all that depends on it.
    Dropped(Dropped),
    /// Every relation of a schema.
    Schema(String),
    /// Every table of the database; with `true`, those that were clustered before.
    Database(bool),
    /// Every relation of these roles.
    OwnedBy(Vec<String>),
    /// The tables with a column of a domain.
    Domain(TableName),
    /// A composite type, and with `true` the tables of that type.
    Type(TableName, bool),
    /// The tables of a publication, and those that its children are.
    Publication(String),
    /// No existing relation.
    None,
}

/// What a statement drops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    Relation(TableName),
    Column(TableName, String),
    Constraint(TableName, String),
    /// A trigger, rule or policy of a table, with its catalog.
    OfTable(&'static str, TableName, String),
    /// An object of this catalog.
    Object(&'static str, TableName),
    /// What these roles own.
    Owned(Vec<String>),
}

/// What following statements of a batch find changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing that a prediction is made from.
    #[default]
    None,
    /// The target has other columns, constraints or settings.
    Alters,
    /// A column, which did not exist before.
    AddColumn(String),
    RenameColumn(String, String),
    RenameConstraint(String, String),
    /// A constraint that is not validated, and whether it is a foreign key.
    AddConstraint(String, bool),
    Rename(String),
    SetSchema(String),
    /// A relation of this kind (`pg_class.relkind`).
    Create(TableName, char),
}

/// What has to be checked in the catalogs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CatalogCheck {
    Nothing,
    /// Whether a new column's default is volatile, or its type is a domain with constraints.
    NewColumn {
        ty: String,
        calls: Vec<String>,
        /// Whether the default has operators, which can be volatile, too.
        operators: bool,
        has_default: bool,
    },
    /// Whether the stored values stay unchanged under a column's new type, and what is checked or built again.
    NewType {
        column: String,
        ty: String,
        using: bool,
    },
    /// Whether a valid CHECK already implies NOT NULL.
    NotNull {
        column: String,
    },
    /// Whether a column of the index can be NULL.
    UsingIndex {
        index: String,
    },
    /// Whether the constraint is a foreign key, and whether children inherit it.
    Constraint {
        name: String,
    },
    /// The index of the table that is locked with it.
    NamedIndex {
        index: String,
    },
    /// The sequences that this column owns; without a column, those that any column does.
    Sequences {
        column: Option<String>,
    },
    /// The options that are set: of a view, an index or a table.
    Options(Vec<String>),
    /// The functions that a query calls.
    Calls(Vec<String>),
    /// It is a CHECK that children do not inherit.
    NoInherit,
    /// The bounds of a partition: what follows FOR VALUES.
    Bounds(String),
}

impl Action {
    fn new(name: &'static str, target: impl Into<Option<TableName>>) -> Self {
        Self {
            name,
            target: target.into().map_or(Target::None, Target::Relation),
            only: false,
            others: Vec::new(),
            check: CatalogCheck::Nothing,
            mode: None,
            work: None,
            effect: Effect::None,
        }
    }

    fn on(name: &'static str, target: Target) -> Self {
        Self {
            target,
            ..Self::new(name, None)
        }
    }

    fn with(mut self, role: LockedRelation, name: impl Into<Option<TableName>>) -> Self {
        self.others.extend(name.into().map(|name| (role, name)));
        self
    }

    fn checking(mut self, check: CatalogCheck) -> Self {
        self.check = check;
        self
    }

    fn only(mut self, only: bool) -> Self {
        self.only = only;
        self
    }

    fn working(mut self, work: TableWork) -> Self {
        self.work = Some(work);
        self
    }

    fn then(mut self, effect: Effect) -> Self {
        self.effect = effect;
        self
    }
}

/// The statements of a batch.
pub(super) fn read(sql: &str) -> Vec<Statement<'_>> {
    cursor::split(sql).into_iter().map(read_one).collect()
}

/// Why a batch cannot be sent, or cannot be split into statements, if so: the end of a string can depend on a setting,
/// and the text after it can contain any statement, even COMMIT.
pub(super) fn flaw(sql: &str) -> Option<String> {
    if sql.starts_with('\u{feff}') {
        let flaw = "the text begins with a byte-order mark, which the server reads as part of the first word; leave it out";
        return Some(flaw.to_owned());
    }
    let copies = |text: &&str| {
        let mut cursor = cursor::Cursor::of(text);
        cursor.eat(&["copy"]) && cursor.has(&["from", "stdin"])
    };
    if let Some(copy) = cursor::split(sql).into_iter().find(copies) {
        return Some(format!(
            "{:?} reads rows that are sent after it, which a text of statements cannot contain; send them by copy_in, or \
             write INSERT",
            copy.lines().next().unwrap_or_default()
        ));
    }
    let rest = ambiguous_string(sql)?;
    let (_, following) = rest.split_once(';')?;
    (!following.trim().is_empty()).then(|| {
        let end = rest.char_indices().nth(40).map_or(rest.len(), |(at, _)| at);
        format!(
            "the text cannot be told apart into statements from {:?} on; write a string that ends in a backslash as \
             E'…\\\\', or the statements as changes of their own",
            &rest[..end]
        )
    })
}

/// The functions that an expression calls.
pub(super) fn called_functions(expression: &str) -> Vec<String> {
    cursor::Cursor::of(expression).calls()
}

/// The words of a statement that were not understood.
fn excerpt(text: &str) -> String {
    let mut words = text.split_whitespace();
    let mut excerpt: Vec<&str> = words.by_ref().take(6).collect();
    excerpt.extend(words.next().map(|_| "…"));
    excerpt.join(" ")
}

fn read_one(text: &str) -> Statement<'_> {
    let mut cursor = cursor::Cursor::of(text);
    let (placement, actions, unknown) = if cursor.eat(&["alter"]) {
        alter::read(cursor)
    } else {
        let (placement, actions) = other::read(cursor);
        (placement, actions, None)
    };
    let unknown = match &actions {
        Some(_) => unknown,
        None => Some(unknown.unwrap_or_else(|| excerpt(text))),
    };
    Statement {
        text,
        placement,
        actions,
        unknown,
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

    /// Statements and the rows they are recognized as. Every name has to be in the table.
    #[test]
    fn statements_are_found_in_the_table() {
        for (sql, expected) in [
            (
                "ALTER TABLE t ADD COLUMN a int DEFAULT 1, DROP b",
                vec![
                    "ALTER TABLE … ADD COLUMN",
                    "ALTER TABLE … DROP COLUMN",
                    "ALTER TABLE … DROP COLUMN",
                ],
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
                vec![
                    "CREATE TABLE AS",
                    "CREATE TABLE … REFERENCES",
                    "CREATE TABLE … REFERENCES",
                ],
            ),
            (
                "CREATE TRIGGER g BEFORE INSERT ON t EXECUTE FUNCTION f()",
                vec!["CREATE TRIGGER"],
            ),
            ("COMMENT ON COLUMN s.t.a IS 'x'", vec!["COMMENT ON COLUMN"]),
            ("UPDATE t SET a = 1", vec!["UPDATE", "SELECT"]),
            ("INSERT INTO t VALUES (1)", vec!["INSERT", "SELECT"]),
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
            assert!(read(sql)[0].unknown.is_some(), "{sql}");
        }
    }

    #[test]
    fn a_batch_with_an_ambiguous_string_end_is_refused() {
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
    fn placements_are_recognized() {
        for (sql, placement) in [
            (
                "CREATE INDEX concurrently_not ON t (a)",
                Placement::InTransaction,
            ),
            (
                "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)",
                Placement::Concurrently,
            ),
            ("DROP INDEX CONCURRENTLY i", Placement::Concurrently),
            ("REINDEX (CONCURRENTLY) TABLE t", Placement::Concurrently),
            ("REINDEX SCHEMA s", Placement::OutsideTransaction),
            ("VACUUM t", Placement::OutsideTransaction),
            ("CLUSTER", Placement::OutsideTransaction),
            ("CLUSTER t", Placement::InTransaction),
            ("CREATE DATABASE d", Placement::OutsideTransaction),
            (
                "ALTER SYSTEM SET work_mem = '1MB'",
                Placement::OutsideTransaction,
            ),
            (
                "REFRESH MATERIALIZED VIEW CONCURRENTLY m",
                Placement::InTransaction,
            ),
            (
                "ALTER TABLE p DETACH PARTITION q CONCURRENTLY",
                Placement::Detach,
            ),
            ("SET LOCAL work_mem = '1MB'", Placement::InTransaction),
            ("SET CONSTRAINTS ALL DEFERRED", Placement::InTransaction),
            ("SET LOCAL \"LOCK_timeout\" = 0", Placement::SessionSetting),
            (
                "SET LOCAL U&\"lock\\005ftimeout\" = 0",
                Placement::SessionSetting,
            ),
            ("LISTEN c", Placement::SessionSetting),
            ("BEGIN", Placement::TransactionControl),
            ("start transaction", Placement::TransactionControl),
            ("COMMIT", Placement::TransactionControl),
            ("ROLLBACK TO SAVEPOINT a", Placement::TransactionControl),
            ("END", Placement::TransactionControl),
            ("SET search_path = a", Placement::SessionSetting),
            ("SET SESSION work_mem = '1MB'", Placement::SessionSetting),
            ("SET LOCAL lock_timeout = 0", Placement::SessionSetting),
            ("RESET ALL", Placement::SessionSetting),
            ("SET LOCAL search_path = a", Placement::InTransaction),
            ("SET CONSTRAINTS ALL DEFERRED", Placement::InTransaction),
        ] {
            assert_eq!(read(sql)[0].placement, placement, "{sql}");
        }
    }

    #[test]
    fn relations_are_found_with_their_roles() {
        let action = |sql: &str| read(sql)[0].actions.clone().into_iter().flatten().next();
        let relation = |name: &str| Target::Relation(TableName::from(name));
        let added = action(
            "ALTER TABLE IF EXISTS ONLY Shop.\"T\" ADD CONSTRAINT c FOREIGN KEY (a) REFERENCES shop.p (id)",
        );
        let added = added.expect("it is recognized");
        assert_eq!(added.target, relation("shop.T"));
        assert_eq!(
            added.others,
            [(LockedRelation::Referenced, TableName::from("shop.p"))]
        );
        let index = action("CREATE INDEX ON ONLY t USING gin (a)").expect("it is recognized");
        assert_eq!(index.target, relation("t"));
        let column = action("ALTER TABLE t ADD a text DEFAULT md5(random()::text) NOT NULL");
        let check = CatalogCheck::NewColumn {
            ty: "text".into(),
            calls: vec!["md5".into(), "random".into()],
            operators: false,
            has_default: true,
        };
        assert_eq!(column.expect("it is recognized").check, check);
        let lock = action("LOCK TABLE ONLY a IN ROW SHARE MODE NOWAIT").expect("it is recognized");
        assert_eq!(
            (lock.target, lock.mode),
            (relation("a"), Some(LockMode::RowShare))
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            read(&text);
        }

        #[test]
        fn any_words_are_read_without_panic(words in prop::collection::vec(prop::sample::select(vec![
            "alter", "table", "add", "column", "constraint", "drop", "index", "create", "unique", "on", "only", "t",
            "\"q\"", "(", ")", ",", ".", ";", "foreign", "key", "references", "not", "valid", "default", "1", "'x'",
            "set", "type", "using", "vacuum", "full", "concurrently", "reindex", "lock", "in", "mode", "partition",
        ]), 0..14)) {
            read(&words.join(" "));
        }
    }
}
