//! Building and dropping indexes while other sessions use the table.

use std::sync::Arc;
use std::time::Duration;

use super::Env;
use super::index_name::{aside_name, default_name, is_remnant_of};
use super::options::{ChangeOptions, change_options, into_future};
use super::procedure::{Procedure, Steps};
use super::progress::IndexProgress;
use super::report::ProcedureReport;
use super::run::Method;
use super::statement_poll::OnProgress;
use super::table::Table;
use crate::deadline::{Deadline, timeout_millis};
use crate::error::{Error, ErrorKind, is_already_there};
use crate::postgres::{TableName, name_flaw};
use crate::schema::sql::index::{self, Index, IndexDefinition, Part};

/// The default time in which a build is repeated and other sessions' builds are waited for.
const DEADLINE: Duration = Duration::from_secs(3600);
/// How often other sessions' builds are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// A column of an index: a column name or an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexColumn {
    part: Part,
}

impl IndexColumn {
    /// A column. Its name is quoted wherever it is sent.
    #[must_use]
    pub fn column(name: &str) -> Self {
        Self {
            part: Part::column(name),
        }
    }

    /// An expression, which is put in parentheses. It is the caller's SQL and sent unchanged.
    #[must_use]
    pub fn expression(sql: &str) -> Self {
        Self {
            part: Part::expression(sql),
        }
    }

    /// Appends an operator class, a collation, `DESC NULLS LAST` and the like. It is the caller's SQL and sent
    /// unchanged.
    #[must_use]
    pub fn with(mut self, sql: &str) -> Self {
        self.part.sql = format!("{} {sql}", self.part.sql);
        self
    }
}

/// A column name.
impl From<&str> for IndexColumn {
    fn from(name: &str) -> Self {
        Self::column(name)
    }
}

/// A column name.
impl From<String> for IndexColumn {
    fn from(name: String) -> Self {
        Self::column(&name)
    }
}

/// An index to build: [`Schema::create_index`](crate::Schema::create_index). Awaiting it builds the index.
#[must_use = "an index is not built until it is awaited"]
#[derive(Clone)]
pub struct CreateIndex {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    table: TableName,
    name: Option<String>,
    definition: IndexDefinition,
    on_progress: Option<OnProgress>,
    waits_for_builds: bool,
}

impl CreateIndex {
    pub(super) fn new(
        env: Env,
        options: ChangeOptions,
        table: TableName,
        parts: Vec<IndexColumn>,
    ) -> Self {
        Self {
            env,
            options: options.or_deadline(DEADLINE),
            table,
            name: None,
            definition: IndexDefinition {
                parts: parts.into_iter().map(|column| column.part).collect(),
                ..IndexDefinition::default()
            },
            on_progress: None,
            waits_for_builds: true,
        }
    }

    /// The index's name. The default is the name the server would choose, such as `orders_customer_idx`. A repeated
    /// call recognizes the index by its name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Makes the index unique. Duplicate rows make the build fail; its remains are dropped, and it is not repeated.
    pub fn unique(mut self) -> Self {
        self.definition.unique = true;
        self
    }

    /// The access method; `btree` by default.
    pub fn method(mut self, method: impl Into<String>) -> Self {
        self.definition.method = Some(method.into());
        self
    }

    /// `INCLUDE`: columns stored in addition to the key.
    pub fn include<C: Into<String>>(mut self, columns: impl IntoIterator<Item = C>) -> Self {
        self.definition.include = columns.into_iter().map(Into::into).collect();
        self
    }

    /// `WHERE`: indexes only the rows that satisfy this. It is the caller's SQL and sent unchanged.
    pub fn predicate(mut self, sql: impl Into<String>) -> Self {
        self.definition.predicate = Some(sql.into());
        self
    }

    /// Calls `f` a few times a second with the progress of the build. `f` must not block.
    pub fn on_progress(mut self, f: impl Fn(&IndexProgress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(f));
        self
    }

    /// Fails at once with [`LockTimeout`](crate::ErrorKind::LockTimeout) if another session builds an index of the
    /// table, instead of waiting for that build.
    pub fn no_wait(mut self) -> Self {
        self.waits_for_builds = false;
        self
    }

    /// Builds the index, unless a valid index of that name exists.
    ///
    /// Invalid indexes of that name, and the remains of a failed REINDEX CONCURRENTLY (`…_ccnew`, `…_ccold`), are
    /// dropped first. While another session builds an index of the table, nothing is changed: the end of that build is
    /// polled, because a session that waits in the lock's queue has a snapshot for which that build in turn waits. If
    /// the build fails because of other sessions (a deadlock, a lock timeout, a cancel, a lost connection), it is
    /// cleaned up and repeated until the deadline. If it fails because of the data, it is cleaned up and the error
    /// returned.
    ///
    /// For a partitioned table, its own index is first created without those of its partitions; then an index is built
    /// on each partition and attached.
    ///
    /// # SQL
    /// `CREATE INDEX CONCURRENTLY`, outside of a transaction, with the remaining time until the deadline as its
    /// `lock_timeout`: it waits for transactions that use the table and for older snapshots in the whole database, and
    /// only other schema changes queue behind it. `DROP INDEX CONCURRENTLY` for remains of failed builds. Meanwhile
    /// another connection reads `pg_stat_progress_create_index` and the blockers. If a valid index of that name exists,
    /// and the definition has more than column names, the same index is built on an empty temporary table, to compare
    /// the two.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) if a valid index of that name exists and differs;
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) with the blockers if other sessions blocked the build until the
    /// deadline; the server's own errors, such as a unique violation, at once.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the statement is cancelled on the server. It can leave an INVALID index, which the
    /// next call with that name drops.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for CreateIndex {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        let mut definition = self.definition.clone();
        definition.name = match &self.name {
            Some(name) => name.clone(),
            None => default_name(&table.name, &definition),
        };
        check(&definition)?;
        let build = IndexBuild {
            on_progress: self.on_progress.as_ref(),
            waits_for_builds: self.waits_for_builds,
            ..IndexBuild::new(&self.env, &self.options, &procedure.deadline)
        };
        build.run(&table, &definition, &mut procedure.report).await
    }
}

change_options!(CreateIndex);
into_future!(CreateIndex => ProcedureReport);

impl std::fmt::Debug for CreateIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateIndex")
            .field("table", &self.table)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// An index to drop: [`Schema::drop_index`](crate::Schema::drop_index). Awaiting it drops the index.
#[must_use = "an index is not dropped until it is awaited"]
#[derive(Clone, Debug)]
pub struct DropIndex {
    env: Env,
    options: ChangeOptions,
    index: TableName,
}

impl DropIndex {
    pub(super) fn new(env: Env, options: ChangeOptions, index: TableName) -> Self {
        Self {
            env,
            options: options.or_deadline(DEADLINE),
            index,
        }
    }

    /// Drops the index, if it exists, and the remains of a failed REINDEX CONCURRENTLY of it.
    ///
    /// The index of a partitioned table cannot be dropped concurrently. It is dropped together with those of its
    /// partitions under ACCESS EXCLUSIVE, with the short waits and long pauses of [`change`](crate::Schema::change).
    ///
    /// # SQL
    /// `DROP INDEX CONCURRENTLY`, outside of a transaction, with the remaining time until the deadline as its
    /// `lock_timeout`.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) with the blockers if other sessions blocked the drop until the
    /// deadline; the server's own errors at once, for example because the index belongs to a constraint.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the statement is cancelled on the server. It can leave the index INVALID, which the
    /// next call drops.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for DropIndex {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let Some((index, table)) = Table::of_index(&self.env, &self.index).await? else {
            return Ok(());
        };
        let build = IndexBuild::new(&self.env, &self.options, &procedure.deadline);
        let all = build.indexes(&table).await?;
        let names = all
            .iter()
            .filter(|one| one.name == index || !one.is_valid && is_remnant_of(&one.name, &index));
        for one in names {
            build.drop_index(&table, one, &mut procedure.report).await?;
        }
        Ok(())
    }
}

change_options!(DropIndex);
into_future!(DropIndex => ProcedureReport);

/// Builds and drops indexes, waits for other sessions' builds, and cleans up.
pub(super) struct IndexBuild<'a> {
    env: &'a Env,
    options: &'a ChangeOptions,
    deadline: &'a Deadline,
    on_progress: Option<&'a OnProgress>,
    /// Whether to wait for other sessions' builds, rather than fail.
    waits_for_builds: bool,
}

impl<'a> IndexBuild<'a> {
    pub(super) fn new(env: &'a Env, options: &'a ChangeOptions, deadline: &'a Deadline) -> Self {
        Self {
            env,
            options,
            deadline,
            on_progress: None,
            waits_for_builds: true,
        }
    }

    /// Builds the index on a table, or on a partitioned table and its partitions.
    pub(super) async fn run(
        &self,
        table: &Table,
        definition: &IndexDefinition,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        if table.kind == 'p' {
            Box::pin(self.on_partitioned_table(table, definition, report)).await
        } else {
            self.on_table(table, definition, report).await
        }
    }

    async fn on_partitioned_table(
        &self,
        table: &Table,
        definition: &IndexDefinition,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        let parent = match self.find(table, &definition.name).await? {
            Some(parent) => parent,
            None => {
                let sql = definition.on_only(&table.full_name());
                let mut refused = None;
                match self.change(&sql).await {
                    Ok(done) => report.push(sql, done),
                    // Another session has created it meanwhile, or a table has the name.
                    Err(error) if is_already_there(&error) => refused = Some(error),
                    Err(error) => return Err(error),
                }
                self.find(table, &definition.name)
                    .await?
                    .ok_or_else(|| refused.unwrap_or_else(|| gone(&definition.name)))?
            }
        };
        self.ensure_same(table, &parent, definition).await?;
        if parent.is_valid {
            return Ok(());
        }
        for partition in table.partitions(self.env).await? {
            let all = self.indexes(&partition).await?;
            if all.iter().any(|one| one.attached_to == Some(parent.oid)) {
                continue;
            }
            let own = IndexDefinition {
                name: default_name(&partition.name, definition),
                ..definition.clone()
            };
            self.run(&partition, &own, report).await?;
            let parent_name = table.sibling(&definition.name);
            let sql = index::attach(&parent_name, &partition.sibling(&own.name));
            let done = self.change(&sql).await?;
            report.push(sql, done);
        }
        Ok(())
    }

    async fn on_table(
        &self,
        table: &Table,
        definition: &IndexDefinition,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        let mut retry = self.options.retry(*self.deadline, u32::MAX);
        let mut refused = false;
        loop {
            let attempt = retry.begin();
            for remnant in self.remains(table, &definition.name).await? {
                self.drop_remnant(table, &remnant, &definition.name, report)
                    .await?;
            }
            if let Some(there) = self.find(table, &definition.name).await?
                && there.is_valid
            {
                return self.ensure_same(table, &there, definition).await;
            }
            let sql = definition.concurrently(&table.full_name());
            let options = self.options.until(self.deadline);
            let building = (self.env).run_with_progress(
                &options,
                &sql,
                Method::Concurrently,
                self.on_progress,
            );
            let error = match building.await {
                Ok(done) => {
                    report.push(sql, done);
                    return Ok(());
                }
                Err(error) => error,
            };
            // Another session has built an index of that name meanwhile, or has failed to; or a table has the name.
            if is_already_there(&error) {
                let is_first = !std::mem::replace(&mut refused, true);
                let repeats_now = is_first
                    || !self.deadline.has_passed()
                        && matches!(self.find(table, &definition.name).await, Ok(Some(_)));
                if repeats_now {
                    continue;
                }
            }
            let cleaned = self.clean_up(table, definition, report).await;
            let is_by_others = matches!(
                error.kind(),
                ErrorKind::Deadlock
                    | ErrorKind::LockTimeout
                    | ErrorKind::Serialization
                    | ErrorKind::Cancelled
                    | ErrorKind::ConnectionLost
            );
            let pause = self.env.pause_before_retry(&retry);
            let Some(pause) = pause.filter(|_| is_by_others) else {
                if let Err(error) = cleaned {
                    tracing::warn!(index = %definition.name, %error, "a failed index build could not be cleaned up");
                }
                return Err(error);
            };
            tracing::debug!(attempt, %error, index = %definition.name, ?pause, "index build failed, to be repeated");
            // Cancel safety: no connection is held between two attempts.
            tokio::time::sleep(pause).await;
        }
    }

    /// The remains of failed builds of an index. Waits until no other session builds an index of the table.
    ///
    /// Invariant: none of them is the result of a build that has just succeeded. An invalid index may still be under
    /// construction. If no session builds an index after it was seen, its build has ended, and only if it is still
    /// invalid then has the build failed.
    async fn remains(&self, table: &Table, name: &str) -> Result<Vec<Index>, Error> {
        let before = self.indexes(table).await?;
        self.wait_for_builders(table).await?;
        let mut after = self.indexes(table).await?;
        after.retain(|one| {
            let was = before.iter().any(|was| was.oid == one.oid && !was.is_valid);
            was && !one.is_valid && (one.name == name || is_remnant_of(&one.name, name))
        });
        Ok(after)
    }

    /// Drops the remains of a failed build, unless another session builds an index of the table.
    async fn clean_up(
        &self,
        table: &Table,
        definition: &IndexDefinition,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        if !self.builders(table).await?.is_empty() {
            return Ok(());
        }
        for remnant in self.remains(table, &definition.name).await? {
            self.drop_remnant(table, &remnant, &definition.name, report)
                .await?;
        }
        Ok(())
    }

    /// Drops the remains of an index, but never another index that has got its name meanwhile.
    ///
    /// DROP INDEX resolves the name again after it has waited for the table, and another session may have built a valid
    /// index of that name meanwhile. So the remains are first renamed to a name that no other index can have, in a
    /// transaction that is rolled back if the name no longer belongs to them. The remains of a REINDEX already have
    /// such a name.
    async fn drop_remnant(
        &self,
        table: &Table,
        remnant: &Index,
        name: &str,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        if remnant.name != name || remnant.is_partitioned {
            return self.drop_index(table, remnant, report).await;
        }
        let aside = aside_name(name, remnant.oid);
        let sql = index::rename_if(&table.sibling(name), &aside, remnant.oid);
        match self.change(&sql).await {
            Ok(done) => report.push(sql, done),
            Err(error) => {
                let all = self.indexes(table).await?;
                if all
                    .iter()
                    .any(|one| one.oid == remnant.oid && one.name == name)
                {
                    return Err(error);
                }
                tracing::debug!(%error, index = %name, "somebody else has dropped what was left");
                return Ok(());
            }
        }
        let aside = Index {
            name: aside,
            ..remnant.clone()
        };
        self.drop_index(table, &aside, report).await
    }

    async fn drop_index(
        &self,
        table: &Table,
        one: &Index,
        report: &mut ProcedureReport,
    ) -> Result<(), Error> {
        let name = table.sibling(&one.name);
        if one.is_partitioned {
            let sql = index::drop_plainly(&name);
            let done = self.change(&sql).await?;
            report.push(sql, done);
            return Ok(());
        }
        let sql = index::drop_concurrently(&name);
        let mut retry = self.options.retry(*self.deadline, u32::MAX);
        loop {
            retry.begin();
            self.wait_for_builders(table).await?;
            let options = self.options.until(self.deadline);
            let error = match self.env.run(&options, &sql, Method::Concurrently).await {
                Ok(done) => {
                    report.push(sql, done);
                    return Ok(());
                }
                Err(error) => error,
            };
            // Like a build, it waits for older snapshots and can be a deadlock's victim.
            let is_by_others = matches!(
                error.kind(),
                ErrorKind::Deadlock | ErrorKind::LockTimeout | ErrorKind::Cancelled
            );
            let pause = self.env.pause_before_retry(&retry);
            let Some(pause) = pause.filter(|_| is_by_others) else {
                return Err(error);
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Waits until no other session builds an index of the table. Holds no snapshot while it waits.
    async fn wait_for_builders(&self, table: &Table) -> Result<(), Error> {
        loop {
            let builders = self.builders(table).await?;
            if builders.is_empty() {
                return Ok(());
            }
            if !self.waits_for_builds || self.deadline.has_passed() {
                let mut blockers = table.holders_and_waiters(self.env).await?;
                blockers.retain(|one| one.pid().is_some_and(|pid| builders.contains(&pid)));
                return Err(Error::new(ErrorKind::LockTimeout)
                    .with_detail(format!(
                        "another session builds an index of {}",
                        table.full_name()
                    ))
                    .with_waited(self.deadline.waited())
                    .with_blockers(blockers));
            }
            // Cancel safety: no connection is held between two polls.
            tokio::time::sleep(POLL_INTERVAL.min(self.deadline.remaining())).await;
        }
    }

    async fn builders(&self, table: &Table) -> Result<Vec<i32>, Error> {
        Ok(index::read_pids(
            &self.env.ask(&index::builders(table.oid)).await?,
        ))
    }

    pub(super) async fn indexes(&self, table: &Table) -> Result<Vec<Index>, Error> {
        Ok(index::read_indexes(
            &self.env.ask(&index::indexes_of(table.oid)).await?,
        ))
    }

    pub(super) async fn find(&self, table: &Table, name: &str) -> Result<Option<Index>, Error> {
        let mut all = self.indexes(table).await?.into_iter();
        Ok(all.find(|one| one.name == name))
    }

    /// Refuses an existing index of the name if it differs from the wanted one.
    async fn ensure_same(
        &self,
        table: &Table,
        there: &Index,
        wanted: &IndexDefinition,
    ) -> Result<(), Error> {
        ensure_same_columns(there, wanted)?;
        if !wanted.has_sql() {
            return Ok(());
        }
        let timeout = timeout_millis(self.options.lock_timeout);
        let sql = index::is_same(there.oid, wanted, &table.full_name(), timeout);
        if self.env.is_yes(&sql).await? {
            return Ok(());
        }
        Err(differs(there))
    }

    async fn change(&self, sql: &str) -> Result<super::ChangeReport, Error> {
        let options = self.options.until(self.deadline);
        self.env.run(&options, sql, Method::InTransaction).await
    }
}

fn gone(name: &str) -> Error {
    Error::new(ErrorKind::Database).with_detail(format!("the index {name:?} is gone again"))
}

/// Refuses an existing index of the name if it differs from the wanted one, as far as the catalogs show without a lock
/// on the table.
fn ensure_same_columns(there: &Index, wanted: &IndexDefinition) -> Result<(), Error> {
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
    Err(differs(there))
}

fn differs(there: &Index) -> Error {
    Error::config(format!(
        "there is an index {:?} already, and it differs from the one wanted; drop it, or choose another name",
        there.name
    ))
}

fn check(definition: &IndexDefinition) -> Result<(), Error> {
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
