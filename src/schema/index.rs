//! Building an index beside others' work, and dropping one.

use std::sync::Arc;
use std::time::Duration;

use super::index_name::{default_name, is_left_of, set_aside};
use super::pace::{Pace, awaited, paced};
use super::progress::IndexProgress;
use super::recipe::{Recipe, Steps};
use super::report::RecipeReport;
use super::run::{Context, How};
use super::table::Table;
use super::watch::OnProgress;
use crate::deadline::{Deadline, timeout_millis};
use crate::error::{Error, ErrorKind, is_already_there};
use crate::postgres::TableName;
use crate::postgres::name_flaw;
use crate::schema::sql::catalog;
use crate::schema::sql::index::{self, Definition, Index, Part};

/// How long the build of an index is repeated, and others' builds are waited for, where nothing says otherwise.
const DEADLINE: Duration = Duration::from_secs(3600);
/// How often it is looked whether others have finished.
const LOOK: Duration = Duration::from_millis(200);

/// A column of an index: a name, or an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexColumn {
    part: Part,
}

impl IndexColumn {
    /// A column by its name, quoted wherever it is sent.
    #[must_use]
    pub fn column(name: &str) -> Self {
        Self {
            part: Part::column(name),
        }
    }

    /// An expression, put between parentheses. It is SQL of the caller's, and sent as it is.
    #[must_use]
    pub fn expression(sql: &str) -> Self {
        Self {
            part: Part::expression(sql),
        }
    }

    /// What stands behind it in the list: an operator class, a collation, `DESC NULLS LAST`. It is SQL of the caller's,
    /// and sent as it is.
    #[must_use]
    pub fn with(mut self, sql: &str) -> Self {
        self.part.sql = format!("{} {sql}", self.part.sql);
        self
    }
}

/// A column by its name.
impl From<&str> for IndexColumn {
    fn from(name: &str) -> Self {
        Self::column(name)
    }
}

/// A column by its name.
impl From<String> for IndexColumn {
    fn from(name: String) -> Self {
        Self::column(&name)
    }
}

/// An index to be built: [`Schema::create_index`](crate::Schema::create_index). Awaiting it builds it.
#[must_use = "an index is not built until it is awaited"]
#[derive(Clone)]
pub struct CreateIndex {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    table: TableName,
    name: Option<String>,
    definition: Definition,
    progress: Option<OnProgress>,
    waits: bool,
}

impl CreateIndex {
    pub(super) fn new(cx: Context, pace: Pace, table: TableName, parts: Vec<IndexColumn>) -> Self {
        Self {
            cx,
            pace: pace.or_deadline(DEADLINE),
            table,
            name: None,
            definition: Definition {
                parts: parts.into_iter().map(|column| column.part).collect(),
                ..Definition::default()
            },
            progress: None,
            waits: true,
        }
    }

    /// What it is to be called; by default after the table and its columns, `orders_customer_idx`, as the server would.
    /// The name is what a build is recognized by when it is begun again.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// A unique index. Rows that are not unique make the build fail; what it leaves is dropped, and it is not repeated.
    pub fn unique(mut self) -> Self {
        self.definition.unique = true;
        self
    }

    /// The access method, `btree` where it is not said.
    pub fn method(mut self, method: impl Into<String>) -> Self {
        self.definition.method = Some(method.into());
        self
    }

    /// `INCLUDE`: columns kept beside the key.
    pub fn include<C: Into<String>>(mut self, columns: impl IntoIterator<Item = C>) -> Self {
        self.definition.include = columns.into_iter().map(Into::into).collect();
        self
    }

    /// `WHERE`: only the rows for which this holds. It is SQL of the caller's, and sent as it is.
    pub fn predicate(mut self, sql: impl Into<String>) -> Self {
        self.definition.predicate = Some(sql.into());
        self
    }

    /// Is told a few times a second how far the build is. It must not block.
    pub fn on_progress(mut self, f: impl Fn(&IndexProgress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(f));
        self
    }

    /// Does not wait for another session's build on the same table, but fails at once with
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout).
    pub fn no_wait(mut self) -> Self {
        self.waits = false;
        self
    }

    /// Builds it, unless a valid index of that name is there.
    ///
    /// Invalid indexes of that name, and what a failed REINDEX CONCURRENTLY has left of it (`…_ccnew`, `…_ccold`), are
    /// dropped first; but while another session builds an index of the table nothing is touched, and its end is waited
    /// for, by looking now and then, since a session that waits in the lock's queue has a snapshot for which that build
    /// waits in turn. What fails because of others (a deadlock, a lock, a cancel, a lost connection) is cleaned up and
    /// repeated until the deadline; what fails because of the data is cleaned up and reported.
    ///
    /// Of a partitioned table, its own index is created first without those of its partitions, then one for each
    /// partition in turn, which is then attached.
    ///
    /// # SQL
    /// `CREATE INDEX CONCURRENTLY`, outside of a transaction, with a `lock_timeout` of what is left of the deadline: it
    /// waits for transactions that use the table and for older snapshots in the whole database, and nobody has to wait
    /// behind it but other schema changes. `DROP INDEX CONCURRENTLY` for what is left over. Meanwhile, on another
    /// connection, `pg_stat_progress_create_index` and who is in the way. Where a valid index of that name is there, and more
    /// is said than columns, the same index is built of an empty temporary table, to see whether they are the same.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) when a valid index of that name is there that differs;
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) with the blockers when others did not get out of the way until the
    /// deadline; the server's own, such as a unique violation, at once.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the statement is cancelled on the server. It can leave an INVALID index, which the
    /// next call with that name drops.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for CreateIndex {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        let mut definition = self.definition.clone();
        definition.name = match &self.name {
            Some(name) => name.clone(),
            None => default_name(&table.name, &definition),
        };
        check(&definition)?;
        let build = Build {
            cx: &self.cx,
            pace: &self.pace,
            deadline: &recipe.deadline,
            progress: self.progress.as_ref(),
            waits: self.waits,
        };
        build.on(&table, &definition, &mut recipe.report).await
    }
}

paced!(CreateIndex);
awaited!(CreateIndex => RecipeReport);

impl std::fmt::Debug for CreateIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateIndex")
            .field("table", &self.table)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// An index to be dropped: [`Schema::drop_index`](crate::Schema::drop_index). Awaiting it drops it.
#[must_use = "an index is not dropped until it is awaited"]
#[derive(Clone, Debug)]
pub struct DropIndex {
    cx: Context,
    pace: Pace,
    index: TableName,
}

impl DropIndex {
    pub(super) fn new(cx: Context, pace: Pace, index: TableName) -> Self {
        Self {
            cx,
            pace: pace.or_deadline(DEADLINE),
            index,
        }
    }

    /// Drops it, if it is there, with what a failed REINDEX CONCURRENTLY has left of it.
    ///
    /// The index of a partitioned table cannot be dropped concurrently: it is, with those of its partitions, under ACCESS
    /// EXCLUSIVE, with the short waits and long pauses of [`change`](crate::Schema::change).
    ///
    /// # SQL
    /// `DROP INDEX CONCURRENTLY`, outside of a transaction, with a `lock_timeout` of what is left of the deadline.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) with the blockers when others did not get out of the way until the
    /// deadline; the server's own at once: the index of a constraint goes with its constraint only.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the statement is cancelled on the server. It can leave the index INVALID, which the
    /// next call drops.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for DropIndex {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let Some((index, table)) = Table::of_index(&self.cx, &self.index).await? else {
            return Ok(());
        };
        let build = Build {
            cx: &self.cx,
            pace: &self.pace,
            deadline: &recipe.deadline,
            progress: None,
            waits: true,
        };
        let all = build.indexes(&table).await?;
        let names = all
            .iter()
            .filter(|one| one.name == index || !one.is_valid && is_left_of(&one.name, &index));
        for one in names {
            build.drop_one(&table, one, &mut recipe.report).await?;
        }
        Ok(())
    }
}

paced!(DropIndex);
awaited!(DropIndex => RecipeReport);

/// Builds, waits and cleans up.
pub(super) struct Build<'a> {
    pub(super) cx: &'a Context,
    pub(super) pace: &'a Pace,
    pub(super) deadline: &'a Deadline,
    pub(super) progress: Option<&'a OnProgress>,
    pub(super) waits: bool,
}

impl Build<'_> {
    /// Builds the index on a table, or on a partitioned one and its partitions.
    pub(super) async fn on(
        &self,
        table: &Table,
        definition: &Definition,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        if table.kind == 'p' {
            Box::pin(self.on_partitioned(table, definition, report)).await
        } else {
            self.on_one(table, definition, report).await.map(drop)
        }
    }

    async fn on_partitioned(
        &self,
        table: &Table,
        definition: &Definition,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        let parent = match self.find(table, &definition.name).await? {
            Some(parent) => parent,
            None => {
                let sql = definition.on_only(&table.full_name());
                let mut refused = None;
                match self.change(&sql).await {
                    Ok(done) => report.push(sql, done),
                    // Somebody else was faster, or a table has the name.
                    Err(error) if is_already_there(&error) => refused = Some(error),
                    Err(error) => return Err(error),
                }
                self.find(table, &definition.name)
                    .await?
                    .ok_or_else(|| refused.unwrap_or_else(|| gone(&definition.name)))?
            }
        };
        self.same(table, &parent, definition).await?;
        if parent.is_valid {
            return Ok(());
        }
        for partition in table.partitions(self.cx).await? {
            let all = self.indexes(&partition).await?;
            if all.iter().any(|one| one.attached_to == Some(parent.oid)) {
                continue;
            }
            let own = Definition {
                name: default_name(&partition.name, definition),
                ..definition.clone()
            };
            self.on(&partition, &own, report).await?;
            let parent_name = table.sibling(&definition.name);
            let sql = index::attach(&parent_name, &partition.sibling(&own.name));
            let done = self.change(&sql).await?;
            report.push(sql, done);
        }
        Ok(())
    }

    async fn on_one(
        &self,
        table: &Table,
        definition: &Definition,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        let mut attempt = 1;
        let mut refused = false;
        loop {
            for left in self.left_over(table, &definition.name).await? {
                self.drop_left(table, &left, &definition.name, report)
                    .await?;
            }
            if let Some(there) = self.find(table, &definition.name).await?
                && there.is_valid
            {
                return self.same(table, &there, definition).await;
            }
            let sql = definition.concurrently(&table.full_name());
            let pace = self.pace.until(self.deadline);
            let building = (self.cx).run_with(&pace, &sql, How::Concurrently, self.progress);
            let error = match building.await {
                Ok(done) => {
                    report.push(sql, done);
                    return Ok(());
                }
                Err(error) => error,
            };
            // Somebody has built one of that name meanwhile, or has begun to and failed; or a table has it.
            if is_already_there(&error) {
                let is_first = !std::mem::replace(&mut refused, true);
                let goes_on = is_first
                    || !self.deadline.has_passed()
                        && matches!(self.find(table, &definition.name).await, Ok(Some(_)));
                if goes_on {
                    continue;
                }
            }
            let cleaned = self.clean_up(table, definition, report).await;
            let pause = self.pace.pause(attempt, self.cx.jitter.next());
            let others = matches!(
                error.kind(),
                ErrorKind::Deadlock
                    | ErrorKind::LockTimeout
                    | ErrorKind::Serialization
                    | ErrorKind::Cancelled
                    | ErrorKind::ConnectionLost
            );
            if !others || self.deadline.remaining() <= pause {
                if let Err(left) = cleaned {
                    tracing::warn!(index = %definition.name, error = %left, "a failed index build could not be cleaned up");
                }
                return Err(error);
            }
            tracing::debug!(attempt, %error, index = %definition.name, ?pause, "index build failed, to be repeated");
            // Cancel safety: nothing is held between two attempts.
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    /// What failed builds have left of an index, once nobody builds one of the table.
    ///
    /// Invariant: none of them is somebody's who has just finished. One that is not valid may be under way; who is seen to
    /// build nothing after it was has finished or failed, and only if it is not valid afterwards either has it failed.
    async fn left_over(&self, table: &Table, name: &str) -> Result<Vec<Index>, Error> {
        let before = self.indexes(table).await?;
        self.wait_for_builders(table).await?;
        let mut after = self.indexes(table).await?;
        after.retain(|one| {
            let was = before.iter().any(|was| was.oid == one.oid && !was.is_valid);
            was && !one.is_valid && (one.name == name || is_left_of(&one.name, name))
        });
        Ok(after)
    }

    /// Drops what a failed build of ours has left, if nobody else has begun to build it.
    async fn clean_up(
        &self,
        table: &Table,
        definition: &Definition,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        if !self.builders(table).await?.is_empty() {
            return Ok(());
        }
        for left in self.left_over(table, &definition.name).await? {
            self.drop_left(table, &left, &definition.name, report)
                .await?;
        }
        Ok(())
    }

    /// Drops what is left of an index, and nothing that has its name by then.
    ///
    /// DROP INDEX takes a name, and looks it up again once it has waited for the table: another session may have built a
    /// valid one under that name meanwhile. So the one meant is first given a name that only it can have, in a transaction
    /// that is rolled back where the name was not that index's any more. What a REINDEX leaves has such a name already.
    async fn drop_left(
        &self,
        table: &Table,
        left: &Index,
        name: &str,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        if left.name != name || left.is_partitioned {
            return self.drop_one(table, left, report).await;
        }
        let aside = set_aside(name, left.oid);
        let sql = index::rename_if(&table.sibling(name), &aside, left.oid);
        match self.change(&sql).await {
            Ok(done) => report.push(sql, done),
            Err(error) => {
                let all = self.indexes(table).await?;
                if all
                    .iter()
                    .any(|one| one.oid == left.oid && one.name == name)
                {
                    return Err(error);
                }
                tracing::debug!(%error, index = %name, "somebody else has dropped what was left");
                return Ok(());
            }
        }
        let aside = Index {
            name: aside,
            ..left.clone()
        };
        self.drop_one(table, &aside, report).await
    }

    async fn drop_one(
        &self,
        table: &Table,
        one: &Index,
        report: &mut RecipeReport,
    ) -> Result<(), Error> {
        let name = table.sibling(&one.name);
        if one.is_partitioned {
            let sql = index::drop_plainly(&name);
            let done = self.change(&sql).await?;
            report.push(sql, done);
            return Ok(());
        }
        let sql = index::drop_concurrently(&name);
        let mut attempt = 1;
        loop {
            self.wait_for_builders(table).await?;
            let pace = self.pace.until(self.deadline);
            let error = match self.cx.run(&pace, &sql, How::Concurrently).await {
                Ok(done) => {
                    report.push(sql, done);
                    return Ok(());
                }
                Err(error) => error,
            };
            // It waits for older snapshots as a build does, and can be a deadlock's victim as well.
            let others = matches!(
                error.kind(),
                ErrorKind::Deadlock | ErrorKind::LockTimeout | ErrorKind::Cancelled
            );
            let pause = self.pace.pause(attempt, self.cx.jitter.next());
            if !others || self.deadline.remaining() <= pause {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    /// Waits until nobody else builds an index of the table, without a snapshot of one's own.
    async fn wait_for_builders(&self, table: &Table) -> Result<(), Error> {
        loop {
            let builders = self.builders(table).await?;
            if builders.is_empty() {
                return Ok(());
            }
            if !self.waits || self.deadline.has_passed() {
                let mut blockers = table.holders(self.cx).await?;
                blockers.retain(|one| one.pid().is_some_and(|pid| builders.contains(&pid)));
                return Err(Error::new(ErrorKind::LockTimeout)
                    .with_detail(format!(
                        "another session builds an index of {}",
                        table.full_name()
                    ))
                    .with_waited(self.deadline.waited())
                    .with_blockers(blockers));
            }
            // Cancel safety: nothing is held between two looks.
            tokio::time::sleep(LOOK.min(self.deadline.remaining())).await;
        }
    }

    async fn builders(&self, table: &Table) -> Result<Vec<i32>, Error> {
        Ok(index::pids(
            &self.cx.ask(&index::builders(table.oid)).await?,
        ))
    }

    pub(super) async fn indexes(&self, table: &Table) -> Result<Vec<Index>, Error> {
        Ok(index::indexes(
            &self.cx.ask(&index::of_table(table.oid)).await?,
        ))
    }

    pub(super) async fn find(&self, table: &Table, name: &str) -> Result<Option<Index>, Error> {
        let mut all = self.indexes(table).await?.into_iter();
        Ok(all.find(|one| one.name == name))
    }

    /// Refuses an index that is there under the name and is another one.
    async fn same(&self, table: &Table, there: &Index, wanted: &Definition) -> Result<(), Error> {
        differs(there, wanted)?;
        if !wanted.has_sql() {
            return Ok(());
        }
        let timeout = timeout_millis(self.pace.lock_timeout);
        let sql = index::is_same(there.oid, wanted, &table.full_name(), timeout);
        if catalog::yes(&self.cx.ask(&sql).await?) {
            return Ok(());
        }
        Err(another(there))
    }

    async fn change(&self, sql: &str) -> Result<super::ChangeReport, Error> {
        let pace = self.pace.until(self.deadline);
        self.cx.run(&pace, sql, How::Transaction).await
    }
}

fn gone(name: &str) -> Error {
    Error::new(ErrorKind::Database).with_detail(format!("the index {name:?} is gone again"))
}

/// Refuses an index that is there under the name and is another one, as far as the catalogs tell without the table's
/// being locked.
fn differs(there: &Index, wanted: &Definition) -> Result<(), Error> {
    let key = (wanted.parts.iter())
        .map(|part| part.column.clone())
        .collect::<Vec<_>>();
    let same = there.is_unique == wanted.unique
        && there.has_predicate == wanted.predicate.is_some()
        && there.included == wanted.include.len()
        && there.key == key
        && there.method == wanted.method.as_deref().unwrap_or("btree");
    if same {
        return Ok(());
    }
    Err(another(there))
}

fn another(there: &Index) -> Error {
    Error::config(format!(
        "there is an index {:?} already, and it differs from the one wanted; drop it, or choose another name",
        there.name
    ))
}

fn check(definition: &Definition) -> Result<(), Error> {
    if definition.parts.is_empty() {
        return Err(Error::config("an index needs at least one column"));
    }
    let columns = definition
        .parts
        .iter()
        .filter_map(|part| part.column.as_ref());
    let mut flaws = columns
        .chain(&definition.include)
        .map(|column| name_flaw("column", column))
        .chain([name_flaw("index", &definition.name)])
        .flatten();
    flaws.next().map_or(Ok(()), |flaw| Err(Error::config(flaw)))
}
