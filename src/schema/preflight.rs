//! Predicts what a change would lock, and finds its blockers, without locking anything.

use std::fmt;

use super::plan::{LockPlan, NotUnderstood, PlannedLock, printable};
use super::{Env, ddl, lint};
use crate::blocker::Blocker;
use crate::error::Error;
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::postgres::text::Joined;
use crate::schema::sql::catalog::{self, Relationship};
use crate::schema::statements::TableWork;

/// What a [preflight](crate::Schema::preflight) checks: SQL, or a lock on a table.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Intent {
    /// One or several statements. They are parsed, not run.
    Sql(String),
    /// A lock of this mode on a table.
    Lock(TableName, LockMode),
}

impl From<&str> for Intent {
    fn from(sql: &str) -> Self {
        Self::Sql(sql.to_owned())
    }
}

impl From<String> for Intent {
    fn from(sql: String) -> Self {
        Self::Sql(sql)
    }
}

impl<T: Into<TableName>> From<(T, LockMode)> for Intent {
    fn from((table, mode): (T, LockMode)) -> Self {
        Self::Lock(table.into(), mode)
    }
}

/// The locks that a change would take, and its current blockers.
///
#[doc = include_str!("preflight.md")]
#[derive(Clone, Debug)]
pub struct Preflight {
    locks: Vec<PreflightLock>,
    unrecognized: Vec<String>,
    parts: Vec<String>,
}

impl Preflight {
    /// See [`Schema::preflight`](crate::Schema::preflight).
    pub(super) async fn of(env: &Env, intent: Intent) -> Result<Self, Error> {
        let (planned, unrecognized) = match intent {
            Intent::Sql(sql) => {
                let plan = LockPlan::of(env, &ddl::read(&sql)).await?;
                (plan.merged(), plan.unrecognized)
            }
            Intent::Lock(name, mode) => (locks_for_mode(env, &name, mode).await?, Vec::new()),
        };
        let oids: Vec<u32> = planned.iter().map(|lock| lock.relation.oid).collect();
        let label = |oid| {
            let mut all = planned.iter();
            let found = all.find(|lock| lock.relation.oid == oid);
            found.map_or_else(String::new, |lock| {
                format!("{}.{}", lock.relation.schema, lock.relation.name)
            })
        };
        let who = if oids.is_empty() {
            Vec::new()
        } else {
            catalog::read_holders_and_waiters(
                &env.ask(&catalog::holders_and_waiters(&oids)).await?,
                label,
            )
        };
        let lock = |planned: &PlannedLock| {
            let here = who.iter().filter(|(oid, _)| *oid == planned.relation.oid);
            let here: Vec<&Blocker> = here.map(|(_, blocker)| blocker).collect();
            PreflightLock {
                planned: planned.clone(),
                blockers: (here.iter())
                    .filter(|one| planned.mode.conflicts_with(one.lock_mode()))
                    .map(|one| (*one).clone())
                    .collect(),
                waiting: (here.iter())
                    .filter(|one| !one.is_holder())
                    .map(|one| (*one).clone())
                    .collect(),
            }
        };
        let (unrecognized, parts) = (unrecognized.into_iter())
            .map(|NotUnderstood { statement, part }| (statement, part))
            .unzip();
        Ok(Self {
            locks: planned.iter().map(lock).collect(),
            unrecognized,
            parts,
        })
    }

    /// The relations that would be locked, each once, with the strongest mode. They include partitions, parents and
    /// tables at the other end of foreign keys, but no relations that do not exist yet.
    #[must_use]
    pub fn locks(&self) -> &[PreflightLock] {
        &self.locks
    }

    /// The lock on one relation.
    #[must_use]
    pub fn lock_on(&self, relation: impl Into<TableName>) -> Option<&PreflightLock> {
        let wanted = relation.into();
        self.locks.iter().find(|lock| {
            let schema = wanted.schema();
            lock.planned.relation.name == wanted.name()
                && schema.is_none_or(|schema| schema == lock.planned.relation.schema)
        })
    }

    /// The text of statements that were not understood, or understood in part. They can lock more than
    /// [`locks`](Self::locks) contains.
    #[must_use]
    pub fn unrecognized(&self) -> &[String] {
        &self.unrecognized
    }

    /// The parts that were not understood, one of each statement in [`unrecognized`](Self::unrecognized): words of the
    /// statement, or what it depends on.
    #[must_use]
    pub fn unrecognized_parts(&self) -> &[String] {
        &self.parts
    }

    /// The sessions that block the change now: they hold a conflicting lock or wait for one.
    pub fn blockers(&self) -> impl Iterator<Item = &Blocker> {
        self.locks.iter().flat_map(|lock| lock.blockers.iter())
    }

    /// Whether every statement was understood and no session blocks the change at this moment.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.unrecognized.is_empty() && self.blockers().next().is_none()
    }
}

/// One relation of a [`Preflight`].
#[derive(Clone, Debug)]
pub struct PreflightLock {
    planned: PlannedLock,
    blockers: Vec<Blocker>,
    waiting: Vec<Blocker>,
}

impl PreflightLock {
    /// The relation, with its schema.
    #[must_use]
    pub fn relation(&self) -> TableName {
        self.planned.relation.table_name()
    }

    /// The mode in which the relation would be locked.
    #[must_use]
    pub fn mode(&self) -> LockMode {
        self.planned.mode
    }

    /// The statement that takes the lock, by its name in the table of [`StatementLock`](crate::StatementLock); empty
    /// for [`Intent::Lock`].
    #[must_use]
    pub fn statement(&self) -> &'static str {
        self.planned.statement
    }

    getters! {
        /// How much of the relation the statement processes while it holds the lock.
        work: TableWork = planned.work;

        /// The server's estimate of the number of rows; `None` without an estimate.
        rows: Option<u64> = planned.relation.rows;
    }

    /// The operations that would queue behind the lock while it is held or waited for, as a phrase that follows
    /// “blocks”.
    #[must_use]
    pub fn blocks(&self) -> &'static str {
        self.planned.mode.blocks()
    }

    getters! {
        /// The sessions that block the lock: holders of a conflicting lock, and waiters for one, with the age of their
        /// transactions.
        blockers: &[Blocker];

        /// The sessions that already wait for a lock on the relation, in any mode.
        waiting: &[Blocker];
    }

    /// A better way, if [`Schema::change`](crate::Schema::change) refuses the statement on a table with rows.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        lint::is_heavy(&self.planned).then(|| lint::advice(self.planned.statement))
    }
}

/// One lock or statement that was not understood per line. Control characters in names are escaped.
impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.locks.is_empty() && self.unrecognized.is_empty() {
            return f.write_str("locks nothing that is there");
        }
        let locks = self.locks.iter().map(ToString::to_string);
        let others = self.unrecognized.iter().zip(&self.parts);
        let others = others.map(|(sql, part)| {
            let (sql, part) = (printable(sql), printable(part));
            format!("not understood, may lock anything: {sql} ({part})")
        });
        Joined(&locks.chain(others).collect::<Vec<_>>(), "\n").fmt(f)
    }
}

/// `ACCESS EXCLUSIVE on "public"."t" (about 1000 rows), rewrites it, blocks …; in the way: pid 4711 (…) holds …`
impl fmt::Display for PreflightLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} on {}",
            self.mode().as_sql(),
            self.planned.relation.label()
        )?;
        if let Some(rows) = self.rows() {
            write!(f, " (about {rows} rows)")?;
        }
        write!(f, ", {}, blocks {}", self.work(), self.blocks())?;
        if !self.blockers.is_empty() {
            write!(f, "; in the way: {}", Joined(&self.blockers, ", "))?;
        }
        if let Some(advice) = self.advice() {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

/// The locks for [`Intent::Lock`]: on the table, its partitions and inheritance children.
async fn locks_for_mode(
    env: &Env,
    name: &TableName,
    mode: LockMode,
) -> Result<Vec<PlannedLock>, Error> {
    if let Some(flaw) = name.flaw() {
        return Err(Error::config(flaw));
    }
    let relations = env.relations(&catalog::related_relations(name)).await?;
    let mut locks: Vec<PlannedLock> = Vec::new();
    for relation in relations {
        if matches!(
            relation.relationship,
            Relationship::Itself | Relationship::Below
        ) {
            locks.push(PlannedLock::alone(relation, mode));
        }
    }
    if locks.is_empty() {
        return Err(Error::config(format!(
            "there is no table {name}; its schema may be missing from the search_path"
        )));
    }
    Ok(locks)
}
