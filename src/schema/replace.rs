//! Replacing a table with a newly built one.

use super::options::{ChangeOptions, change_options, into_future};
use super::procedure::{Procedure, Steps};
use super::report::ProcedureReport;
use super::run::Method;
use super::table::Table;
use super::{Env, ddl, index_name};
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, Relationship};
use crate::schema::sql::procedure;

/// A table to replace: [`Schema::replace_table`](crate::Schema::replace_table). Awaiting it replaces the table.
#[must_use = "a table is not replaced until it is awaited"]
#[derive(Clone, Debug)]
pub struct ReplaceTable {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    pub(super) table: TableName,
    pub(super) new: String,
    pub(super) build: Option<String>,
    pub(super) catch_up: Option<String>,
    pub(super) drop_old: bool,
    pub(super) like_old: bool,
    pub(super) allow_differences: bool,
}

impl ReplaceTable {
    /// The caller's SQL that creates and fills the new table. It runs in one transaction if the new table does not
    /// exist yet, and may take long, because it blocks no other session. Without it, the new table has to exist.
    pub fn build(mut self, sql: impl Into<String>) -> Self {
        self.build = Some(sql.into());
        self
    }

    /// The caller's SQL that brings the new table up to date. It runs in the transaction that swaps the tables, while
    /// no other session can read or write the old one, so it should only process what has changed since the build.
    pub fn catch_up(mut self, sql: impl Into<String>) -> Self {
        self.catch_up = Some(sql.into());
        self
    }

    /// Drops the old table at the end. By default it remains, under the table's name with `_old` appended.
    pub fn drop_old(mut self) -> Self {
        self.drop_old = true;
        self
    }

    /// Gives the new table what the old one has and it lacks, as far as a plain statement does: owner, grants, row-level
    /// security and policies, NOT NULL, defaults, identity columns, constraints, indexes, storage options, statistics
    /// targets and comments before the swap; triggers, owned sequences, the position of identity sequences, publications
    /// and the replica identity in the transaction that swaps the tables, after [`catch_up`](Self::catch_up). Indexes
    /// and their constraints get the names of the old ones, which get `_old` appended, unless such a name is taken. What
    /// is copied to a table that was built before the index builds and checks takes
    /// its time, but blocks no other session.
    pub fn like_old(mut self) -> Self {
        self.like_old = true;
        self
    }

    /// Swaps the tables even if the new one lacks something that the old one has.
    pub fn allow_differences(mut self) -> Self {
        self.allow_differences = true;
        self
    }

    /// Builds the new table, unless it exists, and swaps it with the old one.
    ///
    /// Before the swap the two tables are compared. If the new one lacks something that belongs to the old one, the
    /// replacement is refused, and the error lists it: owner, grants (without them the application loses its rights),
    /// row-level security and policies (without them hidden rows become visible), NOT NULL, defaults, identity and
    /// generated columns, owned sequences, indexes, constraints, triggers, rules, extended statistics, publications,
    /// replica identity, storage options, comments, and the place among partitions. So are views, materialized views and
    /// functions that continue to read the old table. [`like_old`](Self::like_old) copies what it can;
    /// [`allow_differences`](Self::allow_differences) accepts the rest. Types of columns, and columns that the new table
    /// does not have, are not compared: they are why tables are replaced. Functions whose body is a text find the new
    /// table by its name.
    ///
    /// A table that is referenced by foreign keys is refused, because they would reference the old table. Writes between the build and the swap
    /// are lost, except those that [`catch_up`](Self::catch_up) copies: record them with a trigger. The swap sets a
    /// comment on the old table (COMMENT ON TABLE), by which a repeated call recognizes it. Drop the old table before
    /// the next replacement. An `…_old` table without that comment is not a result of a swap, and is refused.
    ///
    /// # SQL
    /// The caller's `build`, in a transaction; two catalog queries; with [`like_old`](Self::like_old) the statements that
    /// copy; then, with short waits and long pauses, one transaction of
    /// `LOCK TABLE … IN ACCESS EXCLUSIVE MODE`, `catch_up`, two `ALTER TABLE … RENAME` and a COMMENT; then, with
    /// [`drop_old`](Self::drop_old), `DROP TABLE IF EXISTS`.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run); [`Config`](crate::ErrorKind::Config) if foreign keys reference the
    /// table, if the new table lacks something that the old one has, or if the new table does not exist and nothing builds it.
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again: a table that was built is not built again, and a swap that was
    /// made is not undone. With [`drop_old`](Self::drop_old), a completed replacement leaves no trace: another call
    /// replaces the table again. If a run is dropped or loses its connection while its `build` still runs on the
    /// server, the `build` of another run fails with the server's error about the name.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        Procedure::run(&self.env, &self.options, &self).await
    }

    async fn swap(
        &self,
        procedure: &mut Procedure<'_>,
        table: &Table,
        new: &TableName,
        old: &str,
        new_is_there: bool,
    ) -> Result<(), Error> {
        let full = table.full_name();
        let related = (self.env.relations(&catalog::related_relations(&full))).await?;
        if let Some(one) = related
            .iter()
            .find(|one| one.relationship == Relationship::Referencing && one.oid != table.oid)
        {
            return Err(Error::config(format!(
                "a foreign key of {} refers to {full}, and would go on to refer to the old table; drop it first, and \
                 add it again by add_foreign_key",
                one.label()
            )));
        }
        let catches = self.catch_up.iter();
        for sql in catches.chain(&self.build) {
            if let Some(flaw) = ddl::flaw(sql) {
                return Err(Error::config(flaw));
            }
            if (ddl::read(sql).iter()).any(|one| one.placement != ddl::Placement::InTransaction) {
                return Err(Error::config(
                    "what builds or brings up to date runs in a transaction of its own, which it must not end",
                ));
            }
        }
        if !new_is_there && procedure.retry.attempts() > 1 {
            return Err(Error::config(format!(
                "{full} has been replaced by another session meanwhile"
            )));
        }
        if !new_is_there {
            let Some(build) = &self.build else {
                return Err(Error::config(format!(
                    "there is no table {new} to put in the place of {full}; build it, or give the SQL that does"
                )));
            };
            let options = self.options.until(&procedure.deadline).unhurried();
            let done = self.env.run(&options, build, Method::InTransaction).await?;
            procedure.report.push(build, done);
            if Table::find(&self.env, new).await?.is_none() {
                return Err(Error::config(format!(
                    "what was to build {new} has not created it"
                )));
            }
        }
        let Some(new_table) = Table::find(&self.env, new).await? else {
            // Another session has swapped it.
            procedure.is_overtaken = true;
            return Err(Error::config(format!("there is no table {new} any more")));
        };
        let likeness = self.likeness(procedure, table, &new_table).await?;
        let sql = procedure::swap(&full, new, old, self.catch_up.as_deref(), &likeness);
        let swapped = procedure.step(sql).await;
        if swapped.is_err() {
            let old = Table::find(&self.env, &table.sibling(old)).await;
            let new = Table::find(&self.env, new).await;
            procedure.is_overtaken = matches!((old, new), (Ok(Some(_)), Ok(None)));
        }
        swapped
    }
}

impl Steps for ReplaceTable {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        let full = table.full_name();
        let new = table.sibling(&self.new);
        let old = index_name::shortened(&table.name, "old");
        let old_name = table.sibling(&old);
        let old_is_there = match Table::find(&self.env, &old_name).await? {
            Some(there) => {
                // Invariant: only a table that a swap with this new table has renamed counts as done, or is dropped.
                let sql = procedure::has_comment(there.oid, &procedure::replaced_by(&new));
                let is_replaced = self.env.is_yes(&sql).await?;
                // An earlier run whose connection was lost may have dropped it just now.
                let is_there = is_replaced || Table::find(&self.env, &old_name).await?.is_some();
                if is_there && !is_replaced {
                    return Err(Error::config(format!(
                        "there is {old_name} already, which no replacement by {new} has left; drop or rename it first"
                    )));
                }
                is_there
            }
            None => false,
        };
        let new_is_there = Table::find(&self.env, &new).await?.is_some();
        if !old_is_there || new_is_there {
            if old_is_there {
                return Err(Error::config(format!(
                    "there is {old_name} already, of an earlier replacement; drop or rename it first"
                )));
            }
            self.swap(procedure, &table, &new, &old, new_is_there)
                .await?;
        }
        if self.drop_old {
            procedure.step(procedure::drop_table(&old_name)).await?;
        }
        tracing::debug!(table = %full, "table replaced");
        Ok(())
    }
}

change_options!(ReplaceTable);
into_future!(ReplaceTable => ProcedureReport);
