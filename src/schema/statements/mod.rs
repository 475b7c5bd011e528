//! Which statement takes which lock on what, as data.
//!
//! A file for each kind of statement. Every row is executed against a live server, and what it takes is read there
//! (`tests/it/lock_modes`): a row without its check fails the suite, and so does a table locked without a row.

use std::fmt;

use crate::mode::{LockMode, RowLock};

/// `"statement" { on: mode work; … }`, a lock a line, each with what differs from most: `rows` and the row lock it takes
/// too, `since` and `until` a major version, a note.
macro_rules! statements {
    (
        in_transaction_block: $in_block:literal;
        $($statement:literal {$(
            $on:ident: $mode:ident $work:ident
                $(rows $row:ident)? $(since $since:literal)? $(until $until:literal)? $($note:literal)?;
        )+})+
    ) => {
        pub(super) const ALL: &[StatementLock] = &[$($(
            StatementLock {
                statement: $statement,
                on: LockedRelation::$on,
                mode: LockMode::$mode,
                work: TableWork::$work,
                row_lock: one(&[$(RowLock::$row)?]),
                since: one(&[$($since)?]),
                until: one(&[$($until)?]),
                in_transaction_block: $in_block,
                note: one(&[$($note)?]),
            },
        )+)+];
    };
}

mod alter_table;
mod definitions;
mod indexes;
mod outside;
mod queries;
mod relation;

pub use relation::{LockedRelation, TableWork};

/// One lock that a statement takes: on what, in which mode, and what it does meanwhile.
///
/// A statement that locks several relations has several. They are held until the transaction ends, but for those of
/// statements that run in transactions of their own ([`in_transaction_block`](Self::in_transaction_block) is `false`).
///
/// It is said of ordinary tables. A statement that goes down to partitions or inheritance children locks them in the mode
/// of the table it names, where no row says otherwise. Several forms of ALTER TABLE in one statement take the strongest
/// of their locks, and ALTER VIEW, ALTER MATERIALIZED VIEW and ALTER FOREIGN TABLE take what ALTER TABLE does. EXPLAIN
/// and PREPARE take the locks of the statement behind them on the tables that it names.
///
/// Where PostgreSQL's documentation says otherwise (of tables that refer to a partition which is detached, it says SHARE)
/// it is what the servers do.
///
/// # The table
///
/// As of PostgreSQL 14 to 18, every row executed on a server of the versions that the suite runs on.
///
#[doc = include_str!("table.md")]
///
/// # Examples
///
/// ```
/// use lockkeeper::{LockMode, StatementLock};
///
/// // What would ADD FOREIGN KEY keep waiting?
/// for lock in StatementLock::of("alter table add foreign key") {
///     println!("{lock} blocks {}", lock.mode().blocks());
/// }
///
/// // What cannot run beside a write?
/// let builds = StatementLock::all().filter(|lock| lock.mode().conflicts_with(LockMode::RowExclusive));
/// assert!(builds.map(StatementLock::statement).any(|statement| statement == "CREATE INDEX"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StatementLock {
    statement: &'static str,
    on: LockedRelation,
    mode: LockMode,
    work: TableWork,
    row_lock: Option<RowLock>,
    since: Option<u32>,
    until: Option<u32>,
    in_transaction_block: bool,
    note: Option<&'static str>,
}

impl StatementLock {
    /// The whole table, the locks of a statement together.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        [
            queries::ALL,
            definitions::ALL,
            indexes::ALL,
            alter_table::ALL,
            outside::ALL,
        ]
        .into_iter()
        .flatten()
    }

    /// The locks of the statements whose names begin with these words, whatever their case and with or without the `…`
    /// that stands for names: `alter table add` finds `ALTER TABLE … ADD COLUMN` and more.
    ///
    /// It looks for names, it does not read SQL: `ALTER TABLE orders` finds nothing.
    pub fn of(statement: &str) -> impl Iterator<Item = &'static Self> + use<> {
        let wanted: Vec<String> = words(statement).map(str::to_uppercase).collect();
        Self::all().filter(move |lock| {
            let mut name = words(lock.statement).map(str::to_uppercase);
            wanted.iter().all(|word| name.next().as_ref() == Some(word))
        })
    }

    /// The locks of this mode.
    pub fn with_mode(mode: LockMode) -> impl Iterator<Item = &'static Self> {
        Self::all().filter(move |lock| lock.mode == mode)
    }

    /// The statement's name, with `…` for what the user chooses and the condition that makes the difference in brackets:
    /// `ALTER TABLE … ADD COLUMN (volatile default)`.
    #[must_use]
    pub fn statement(&self) -> &'static str {
        self.statement
    }

    /// What is locked.
    #[must_use]
    pub fn on(&self) -> LockedRelation {
        self.on
    }

    /// How strongly: the strongest mode the statement takes there.
    #[must_use]
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// How much of the relation the statement goes through while it has the lock.
    #[must_use]
    pub fn work(&self) -> TableWork {
        self.work
    }

    /// The lock it takes on the rows it touches as well; `None` where it locks no rows that others could see.
    #[must_use]
    pub fn row_lock(&self) -> Option<RowLock> {
        self.row_lock
    }

    /// The first major version that takes this lock; `None` where all of 14 to 18 do.
    #[must_use]
    pub fn since(&self) -> Option<u32> {
        self.since
    }

    /// The last major version that takes this lock; `None` where 18 still does.
    #[must_use]
    pub fn until(&self) -> Option<u32> {
        self.until
    }

    /// Whether a server of this major version takes this lock.
    #[must_use]
    pub fn applies_to(&self, major: u32) -> bool {
        self.since.is_none_or(|since| since <= major)
            && self.until.is_none_or(|until| major <= until)
    }

    /// Whether the statement may stand between BEGIN and COMMIT. What may not ends and begins transactions itself, and
    /// can leave something half done behind when it fails.
    #[must_use]
    pub fn in_transaction_block(&self) -> bool {
        self.in_transaction_block
    }

    /// What else there is to know about it.
    #[must_use]
    pub fn note(&self) -> Option<&'static str> {
        self.note
    }
}

/// `CREATE INDEX: SHARE on the table`
impl fmt::Display for StatementLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} on {}",
            self.statement,
            self.mode.as_sql(),
            self.on
        )
    }
}

/// What an optional part of a row was given.
const fn one<T: Copy>(given: &[T]) -> Option<T> {
    match given {
        [one] => Some(*one),
        _ => None,
    }
}

fn words(statement: &str) -> impl Iterator<Item = &str> {
    statement
        .split_whitespace()
        .map(|word| word.trim_matches('…'))
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn names(locks: impl Iterator<Item = &'static StatementLock>) -> HashSet<&'static str> {
        locks.map(StatementLock::statement).collect()
    }

    #[test]
    fn a_row_is_there_once_and_a_statement_in_one_place() {
        let mut seen = HashSet::new();
        let all: Vec<_> = StatementLock::all().collect();
        for locks in all.chunk_by(|a, b| a.statement == b.statement) {
            assert!(
                seen.insert((locks[0].statement, None)),
                "{}: not in one place",
                locks[0]
            );
        }
        for lock in all {
            for major in 14..=18 {
                let row = (lock.statement, Some((lock.on, major)));
                assert!(!lock.applies_to(major) || seen.insert(row), "{lock}");
            }
            assert!((14..=18).any(|major| lock.applies_to(major)), "{lock}");
            assert!(
                lock.since.is_none_or(|since| (15..=18).contains(&since)),
                "{lock}"
            );
            assert!(
                lock.until.is_none_or(|until| (14..=17).contains(&until)),
                "{lock}"
            );
            assert!(!lock.statement.contains('|'), "{lock}");
        }
    }

    #[test]
    fn majors_are_told_apart() {
        let grant: Vec<_> = StatementLock::of("grant").collect();
        assert!(!grant.is_empty());
        assert!(
            grant
                .iter()
                .all(|lock| lock.applies_to(18) && !lock.applies_to(17))
        );
        let attach: Vec<_> = StatementLock::of("alter table attach partition")
            .filter(|lock| lock.on == LockedRelation::Referencing)
            .map(|lock| (lock.mode, lock.applies_to(14), lock.applies_to(15)))
            .collect();
        assert_eq!(
            attach,
            [
                (LockMode::AccessShare, true, false),
                (LockMode::ShareRowExclusive, false, true)
            ]
        );
    }

    #[test]
    fn statements_are_found_by_their_first_words() {
        assert_eq!(names(StatementLock::of("  truncate\n")).len(), 3);
        assert_eq!(
            names(StatementLock::of("Alter Table … add  foreign KEY")),
            names(StatementLock::of("alter table add foreign key"))
        );
        assert!(names(StatementLock::of("alter table")).len() > 60);
        let any: Vec<_> = StatementLock::of("CREATE INDEX").collect();
        assert!(
            any.iter()
                .all(|lock| lock.statement.starts_with("CREATE INDEX"))
        );
        assert!(
            any.iter()
                .any(|lock| lock.statement == "CREATE INDEX CONCURRENTLY")
        );
        for nothing in ["ALTER TABLE orders", "CREATE IND", "SELECT 1"] {
            assert_eq!(StatementLock::of(nothing).count(), 0, "{nothing}");
        }
        assert_eq!(StatementLock::of("").count(), StatementLock::all().count());
    }

    #[test]
    fn every_mode_has_its_statements() {
        let mut found = 0;
        for mode in LockMode::ALL {
            let locks: Vec<_> = StatementLock::with_mode(mode).collect();
            assert!(!locks.is_empty(), "{mode}");
            assert!(locks.iter().all(|lock| lock.mode == mode));
            found += locks.len();
        }
        assert_eq!(found, StatementLock::all().count());
    }

    #[test]
    fn one_line_for_people() {
        let line = StatementLock::of("DROP INDEX")
            .next()
            .map(ToString::to_string);
        assert_eq!(
            line.as_deref(),
            Some("DROP INDEX: ACCESS EXCLUSIVE on the table")
        );
    }

    fn table() -> String {
        let mut table = String::from("| statement | takes | on | and | |\n|---|---|---|---|---|");
        let mut last = "";
        for lock in StatementLock::all() {
            let name = if lock.statement == last {
                ""
            } else {
                lock.statement
            };
            last = lock.statement;
            let mut also = vec![lock.work.to_string()];
            also.extend(lock.row_lock.map(|row| format!("locks rows {row}")));
            let mut notes = Vec::new();
            match (lock.since, lock.until) {
                (None, None) => {}
                (Some(since), None) => notes.push(format!("since {since}")),
                (None, Some(until)) => notes.push(format!("until {until}")),
                (Some(since), Some(until)) => notes.push(format!("{since} to {until}")),
            }
            if !lock.in_transaction_block && !name.is_empty() {
                notes.push("not in a transaction block".into());
            }
            notes.extend(lock.note.map(str::to_owned));
            table += &format!(
                "\n| {name} | {} | {} | {} | {} |",
                lock.mode.as_sql(),
                lock.on,
                also.join(", "),
                notes.join("; ")
            );
        }
        table
    }

    /// With `LOCKKEEPER_WRITE_DOCS=1` the file is written instead.
    #[test]
    fn the_table_in_the_docs_is_the_data() {
        if std::env::var("LOCKKEEPER_WRITE_DOCS").is_ok_and(|value| value == "1") {
            let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/mode/statements/table.md");
            std::fs::write(file, table() + "\n").expect("the sources can be written");
            return;
        }
        let written = include_str!("table.md").lines();
        for (at, (written, data)) in written.zip(table().lines()).enumerate() {
            assert_eq!(
                written,
                data,
                "table.md:{}; LOCKKEEPER_WRITE_DOCS=1 writes it",
                at + 1
            );
        }
        assert_eq!(
            include_str!("table.md").lines().count(),
            table().lines().count()
        );
    }
}
