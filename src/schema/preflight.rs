//! What a change would lock and who is in its way, without locking anything.

use std::fmt;

use super::ddl;
use super::plan::{Plan, Planned};
use super::refusal;
use super::run::Context;
use crate::blocker::Blocker;
use crate::error::Error;
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, Kin};
use crate::schema::statements::TableWork;

/// What a [preflight](crate::Schema::preflight) is about: SQL, or a table and a lock on it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Intent {
    /// One or several statements. They are read, not run.
    Sql(String),
    /// A lock of this mode on a table, whatever takes it.
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

/// What a change would lock, and who is in its way.
#[derive(Clone, Debug)]
pub struct Preflight {
    locks: Vec<PreflightLock>,
    unread: Vec<String>,
}

impl Preflight {
    /// Asks the server; see [`Schema::preflight`](crate::Schema::preflight).
    pub(super) async fn of(cx: &Context, intent: Intent) -> Result<Self, Error> {
        let (planned, unread) = match intent {
            Intent::Sql(sql) => {
                let plan = Plan::of(cx, &ddl::read(&sql)).await?;
                (plan.merged(), plan.unread)
            }
            Intent::Lock(name, mode) => (named(cx, &name, mode).await?, Vec::new()),
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
            catalog::who(&cx.ask(&catalog::holders(&oids)).await?, label)
        };
        let lock = |planned: &Planned| {
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
        Ok(Self {
            locks: planned.iter().map(lock).collect(),
            unread,
        })
    }

    /// The relations that would be locked, each once, in the strongest mode. Partitions, parents and tables at the other
    /// end of foreign keys are among them; relations that do not exist yet are not.
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

    /// Statements that were not understood, as they were given: nothing is known of their locks.
    #[must_use]
    pub fn unread(&self) -> &[String] {
        &self.unread
    }

    /// Everybody who is in the way now: who holds, or waits for, what conflicts.
    pub fn blockers(&self) -> impl Iterator<Item = &Blocker> {
        self.locks.iter().flat_map(|lock| lock.blockers.iter())
    }

    /// Whether all of it was understood and nobody is in the way at this moment.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.unread.is_empty() && self.blockers().next().is_none()
    }
}

/// One relation of a [`Preflight`].
#[derive(Clone, Debug)]
pub struct PreflightLock {
    planned: Planned,
    blockers: Vec<Blocker>,
    waiting: Vec<Blocker>,
}

impl PreflightLock {
    /// The relation, with its schema.
    #[must_use]
    pub fn relation(&self) -> TableName {
        self.planned.relation.table_name()
    }

    /// How it would be locked.
    #[must_use]
    pub fn mode(&self) -> LockMode {
        self.planned.mode
    }

    /// The statement that takes it, by its name in the table of [`StatementLock`](crate::StatementLock); empty where
    /// only a mode was asked about.
    #[must_use]
    pub fn statement(&self) -> &'static str {
        self.planned.statement
    }

    /// Whether it is read or rewritten meanwhile.
    #[must_use]
    pub fn work(&self) -> TableWork {
        self.planned.work
    }

    /// The number of its rows as the server estimates it; `None` where it does not.
    #[must_use]
    pub fn rows(&self) -> Option<u64> {
        self.planned.relation.rows
    }

    /// Who would queue behind it, for as long as it is held or waited for; in words that follow “blocks”.
    #[must_use]
    pub fn blocks(&self) -> &'static str {
        self.planned.mode.blocks()
    }

    /// Who is in the way: sessions that hold what conflicts, and those queued for it ahead; with how long their
    /// transactions have been open.
    #[must_use]
    pub fn blockers(&self) -> &[Blocker] {
        &self.blockers
    }

    /// Who waits for a lock on it already, whatever the mode.
    #[must_use]
    pub fn waiting(&self) -> &[Blocker] {
        &self.waiting
    }

    /// Why [`Schema::change`](crate::Schema::change) refuses it where there are rows, and the better way.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        refusal::is_heavy(&self.planned).then(|| refusal::better(self.planned.statement))
    }
}

/// Several lines.
impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.locks.is_empty() && self.unread.is_empty() {
            return f.write_str("locks nothing that is there");
        }
        for (n, lock) in self.locks.iter().enumerate() {
            write!(f, "{}{lock}", if n == 0 { "" } else { "\n" })?;
        }
        for (n, sql) in self.unread.iter().enumerate() {
            let line = if n == 0 && self.locks.is_empty() {
                ""
            } else {
                "\n"
            };
            write!(f, "{line}not understood: {sql}")?;
        }
        Ok(())
    }
}

/// `ACCESS EXCLUSIVE on "public"."t" (about 1000 rows), rewrites it, blocks …; in the way: pid 4711 (…) holds …`
impl fmt::Display for PreflightLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.mode().as_sql(), self.relation())?;
        if let Some(rows) = self.rows() {
            write!(f, " (about {rows} rows)")?;
        }
        write!(f, ", {}, blocks {}", self.work(), self.blocks())?;
        for (n, blocker) in self.blockers.iter().enumerate() {
            let before = if n == 0 { "; in the way: " } else { ", " };
            write!(f, "{before}{blocker}")?;
        }
        if let Some(advice) = self.advice() {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

/// A lock that somebody wants on a table, and so on what is below it.
async fn named(cx: &Context, name: &TableName, mode: LockMode) -> Result<Vec<Planned>, Error> {
    if let Some(flaw) = name.flaw() {
        return Err(Error::config(flaw));
    }
    let family = catalog::relations(&cx.ask(&catalog::family(name)).await?);
    let mut locks: Vec<Planned> = Vec::new();
    for relation in family {
        if matches!(relation.kin, Kin::Itself | Kin::Below) {
            locks.push(Planned {
                on: crate::schema::statements::LockedRelation::Table,
                statement: "",
                mode,
                work: TableWork::Brief,
                relation,
            });
        }
    }
    if locks.is_empty() {
        return Err(Error::config(format!(
            "there is no table {name}; its schema may be missing from the search_path"
        )));
    }
    Ok(locks)
}
