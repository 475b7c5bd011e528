//! A table built aside and put in another one's place.

use super::pace::{Pace, awaited, paced};
use super::recipe::{Recipe, Steps};
use super::report::RecipeReport;
use super::run::{Context, How};
use super::table::Table;
use super::{ddl, index_name};
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, Kin};
use crate::schema::sql::recipe;

/// A table to be replaced: [`Schema::replace_table`](crate::Schema::replace_table). Awaiting it replaces it.
#[must_use = "a table is not replaced until it is awaited"]
#[derive(Clone, Debug)]
pub struct ReplaceTable {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    pub(super) table: TableName,
    pub(super) new: String,
    pub(super) build: Option<String>,
    pub(super) catch_up: Option<String>,
    pub(super) drop_old: bool,
}

impl ReplaceTable {
    /// SQL of the caller's that creates and fills the new table, run in one transaction where the new table is not there
    /// yet. It takes as long as it takes; nobody waits for it. Without it the new table has to be there.
    pub fn build(mut self, sql: impl Into<String>) -> Self {
        self.build = Some(sql.into());
        self
    }

    /// SQL of the caller's that brings the new table up to date, run in the transaction that swaps the two, while nobody
    /// else can read or write the old one: it should touch what has changed since the build, and no more.
    pub fn catch_up(mut self, sql: impl Into<String>) -> Self {
        self.catch_up = Some(sql.into());
        self
    }

    /// Drops the old table in the end. By default it stays, under the table's name with `_old` behind.
    pub fn drop_old(mut self) -> Self {
        self.drop_old = true;
        self
    }

    /// Builds the new table, unless it is there, and puts it in the other's place.
    ///
    /// What belongs to the table and not to its rows is the caller's to give the new one: indexes, constraints, grants,
    /// triggers, owned sequences. Views go on to read the old one. A table that foreign keys of others refer to is
    /// refused, since they would refer to the old one. Writes between build and swap are lost, but for what
    /// [`catch_up`](Self::catch_up) brings over: have a trigger note them. The swap leaves the old
    /// table with a comment (COMMENT ON TABLE) of its own, by which it is recognized when this is called again: before the
    /// next replacement drop it. An `…_old` table without that comment is somebody's, and refused.
    ///
    /// # SQL
    /// The caller's `build`, in a transaction; then, with short waits and long pauses, one transaction of
    /// `LOCK TABLE … IN ACCESS EXCLUSIVE MODE`, `catch_up`, two `ALTER TABLE … RENAME` and a COMMENT; then `DROP TABLE IF EXISTS`, if asked.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run); [`Config`](crate::ErrorKind::Config) when foreign keys refer to the table,
    /// or the new one is not there and nothing builds it.
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again: a table that was built is not built again, and a swap that was made
    /// is not undone. With [`drop_old`](Self::drop_old) nothing is left in the end that tells of it: called again then, it
    /// replaces the table again. While the `build` of a run that was dropped, or whose connection was lost, goes on at the
    /// server, another one's fails with the server's error about the name.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        Recipe::run(&self.cx, &self.pace, &self).await
    }

    async fn swap(
        &self,
        recipe: &mut Recipe<'_>,
        table: &Table,
        new: &TableName,
        old: &str,
        new_is_there: bool,
    ) -> Result<(), Error> {
        let full = table.full_name();
        let family = catalog::relations(&self.cx.ask(&catalog::family(&full)).await?);
        if let Some(one) = family
            .iter()
            .find(|one| one.kin == Kin::Referencing && one.oid != table.oid)
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
            if (ddl::read(sql).iter()).any(|one| one.block != ddl::Block::May) {
                return Err(Error::config(
                    "what builds or brings up to date runs in a transaction of its own, which it must not end",
                ));
            }
        }
        if !new_is_there && recipe.looks > 1 {
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
            let pace = self.pace.until(&recipe.deadline);
            let done = self.cx.run(&pace, build, How::Transaction).await?;
            recipe.report.push(build, done);
            if Table::find(&self.cx, new).await?.is_none() {
                return Err(Error::config(format!(
                    "what was to build {new} has not created it"
                )));
            }
        }
        let sql = recipe::swap(&full, new, old, self.catch_up.as_deref());
        let swapped = recipe.step(sql).await;
        if swapped.is_err() {
            let old = Table::find(&self.cx, &table.sibling(old)).await;
            let new = Table::find(&self.cx, new).await;
            recipe.is_overtaken = matches!((old, new), (Ok(Some(_)), Ok(None)));
        }
        swapped
    }
}

impl Steps for ReplaceTable {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        let full = table.full_name();
        let new = table.sibling(&self.new);
        let old = index_name::shortened(&table.name, "old");
        let old_name = table.sibling(&old);
        let old_is_there = match Table::find(&self.cx, &old_name).await? {
            Some(there) => {
                // Invariant: only a table that a swap with this new one has put aside is ever taken for done, or dropped.
                let sql = recipe::has_comment(there.oid, &recipe::replaced_by(&new));
                let ours = catalog::yes(&self.cx.ask(&sql).await?);
                // A run of ours whose connection was lost may have dropped it just now.
                let is_there = ours || Table::find(&self.cx, &old_name).await?.is_some();
                if is_there && !ours {
                    return Err(Error::config(format!(
                        "there is {old_name} already, which no replacement by {new} has left; drop or rename it first"
                    )));
                }
                is_there
            }
            None => false,
        };
        let new_is_there = Table::find(&self.cx, &new).await?.is_some();
        if !old_is_there || new_is_there {
            if old_is_there {
                return Err(Error::config(format!(
                    "there is {old_name} already, of an earlier replacement; drop or rename it first"
                )));
            }
            self.swap(recipe, &table, &new, &old, new_is_there).await?;
        }
        if self.drop_old {
            recipe.step(recipe::drop_table(&old_name)).await?;
        }
        tracing::debug!(table = %full, "table replaced");
        Ok(())
    }
}

paced!(ReplaceTable);
awaited!(ReplaceTable => RecipeReport);
