//! The table of which statement takes which lock on what.
//!
//! There is one file for each kind of statement. The tests in `tests/it/lock_modes` execute every row on a live server
//! and read the locks there: a row without a test fails the suite, and so does a locked relation without a row.

use std::fmt;

use crate::mode::{LockMode, RowLock};

/// `"statement" => { on: mode work; … }`, one lock per line, with optional parts: `rows` and the row lock that the
/// statement takes as well, `since` and `until` a major version, a note. Statements that take the same locks are joined
/// by `|`.
macro_rules! statements {
    (in_transaction_block: $in_block:literal; $($($statement:literal)|+ => $locks:tt)+) => {
        pub(super) const ALL: &[&[StatementLock]] = &[$($(
            statements!(@locks $in_block, $statement, $locks),
        )+)+];
    };
    (@locks $in_block:literal, $statement:literal, {$(
        $on:ident: $mode:ident $work:ident
            $(rows $row:ident)? $(since $since:literal)? $(until $until:literal)? $($note:literal)?;
    )+}) => {
        &[$(
            StatementLock {
                statement: $statement,
                on: LockedRelation::$on,
                mode: LockMode::$mode,
                work: TableWork::$work,
                row_lock: optional(&[$(RowLock::$row)?]),
                since: optional(&[$($since)?]),
                until: optional(&[$($until)?]),
                in_transaction_block: $in_block,
                note: optional(&[$($note)?]),
            },
        )+]
    };
}

mod alter_table;
mod definitions;
mod indexes;
mod non_transactional;
mod queries;
mod relation;

pub use relation::{LockedRelation, TableWork};

/// One lock that a statement takes: on which relation, in which mode, and what the statement does while it holds the
/// lock.
///
/// A statement that locks several relations has several entries. The locks are held until the transaction ends, except
/// those of statements that run their own transactions ([`in_transaction_block`](Self::in_transaction_block) is
/// `false`).
///
/// The entries describe ordinary tables. A statement that recurses to partitions or inheritance children locks them in
/// the mode of the table it names, unless a row says otherwise. Several forms of ALTER TABLE in one statement take the
/// strongest of their locks. ALTER VIEW, ALTER MATERIALIZED VIEW and ALTER FOREIGN TABLE take the same locks as ALTER
/// TABLE. EXPLAIN and PREPARE take the locks of the statement they contain on the tables that it names.
///
/// The table follows the servers where PostgreSQL's documentation differs: it documents SHARE on the tables that refer
/// to a detached partition.
///
/// # The table
///
/// It describes PostgreSQL 14 to 18. Every row is executed on the server versions that the test suite runs on.
///
#[doc = include_str!("table.md")]
///
/// # Examples
///
/// ```
/// use lockkeeper::{LockMode, StatementLock};
///
/// // What would ADD FOREIGN KEY block?
/// for lock in StatementLock::of("alter table add foreign key") {
///     println!("{lock} blocks {}", lock.mode().blocks());
/// }
///
/// // What cannot run concurrently with a write?
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
    /// All entries; those of one statement are adjacent.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        [
            queries::ALL,
            definitions::ALL,
            indexes::ALL,
            alter_table::ALL,
            non_transactional::ALL,
        ]
        .into_iter()
        .flatten()
        .copied()
        .flatten()
    }

    /// The locks of the statements whose names begin with these words, ignoring case and the `…` that stands for names:
    /// `alter table add` finds `ALTER TABLE … ADD COLUMN` and more.
    ///
    /// This searches statement names and does not parse SQL: `ALTER TABLE orders` finds nothing.
    pub fn of(statement: &str) -> impl Iterator<Item = &'static Self> + use<> {
        let wanted: Vec<String> = words(statement).map(str::to_uppercase).collect();
        Self::all().filter(move |lock| {
            let mut name = words(lock.statement).map(str::to_uppercase);
            wanted.iter().all(|word| name.next().as_ref() == Some(word))
        })
    }

    /// The locks that have this mode.
    pub fn with_mode(mode: LockMode) -> impl Iterator<Item = &'static Self> {
        Self::all().filter(move |lock| lock.mode == mode)
    }

    /// The statement's name, with `…` for names and values, and in parentheses the condition under which the entry
    /// applies: `ALTER TABLE … ADD COLUMN (volatile default)`.
    #[must_use]
    pub fn statement(&self) -> &'static str {
        self.statement
    }

    getters! {
        /// The locked relation, by its role in the statement.
        on: LockedRelation;

        /// The strongest mode in which the statement locks that relation.
        mode: LockMode;

        /// How much of the relation the statement processes while it holds the lock.
        work: TableWork;

        /// The lock that the statement also takes on rows; `None` if it locks no rows that are visible to other
        /// transactions.
        row_lock: Option<RowLock>;

        /// The first major version that takes this lock; `None` if all of 14 to 18 do.
        since: Option<u32>;

        /// The last major version that takes this lock; `None` if 18 still does.
        until: Option<u32>;
    }

    /// Whether a server of this major version takes this lock.
    #[must_use]
    pub fn applies_to(&self, major: u32) -> bool {
        self.since.is_none_or(|since| since <= major)
            && self.until.is_none_or(|until| major <= until)
    }

    /// Whether the statement can run in a transaction block. A statement that cannot commits and begins transactions
    /// itself, and can leave partial work behind when it fails.
    #[must_use]
    pub fn in_transaction_block(&self) -> bool {
        self.in_transaction_block
    }

    /// A remark on the lock.
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

/// The value of an optional part of a row.
const fn optional<T: Copy>(given: &[T]) -> Option<T> {
    match given {
        [value] => Some(*value),
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
    fn rows_are_unique_and_statements_contiguous() {
        let mut seen = HashSet::new();
        let all: Vec<_> = StatementLock::all().collect();
        for locks in all.chunk_by(|a, b| a.statement == b.statement) {
            assert!(
                seen.insert((locks[0].statement, None)),
                "{}: not contiguous",
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
    fn major_versions_are_distinguished() {
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
    fn statements_are_found_by_their_leading_words() {
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
    fn every_mode_has_statements() {
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
    fn display_is_one_line() {
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

    /// With `LOCKKEEPER_WRITE_DOCS=1` the test writes the file instead.
    #[test]
    fn the_table_in_the_docs_is_the_data() {
        if std::env::var("LOCKKEEPER_WRITE_DOCS").is_ok_and(|value| value == "1") {
            let file = concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/src/schema/statements/table.md"
            );
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
