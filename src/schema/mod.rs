//! Schema changes that do not block other sessions for long.
//!
//! `ddl` recognizes statements, `plan` predicts their locks with the help of the catalogs, `lint` refuses statements
//! that block for long or are not understood (`bounds` proves that a partition is not read), `run` makes the attempts while `statement_poll` samples the blockers. The other modules are
//! procedures of several steps.

mod bounds;
mod change;
mod column;
mod constraint;
mod ddl;
mod dry_run;
mod env;
mod index;
mod index_name;
mod likeness;
mod lint;
mod migrate_once;
mod options;
mod plan;
mod preflight;
mod procedure;
mod progress;
mod refusals;
mod replace;
mod report;
mod run;
mod sql;
mod statement_poll;
mod statements;
mod table;

pub use change::Change;
pub use column::AddColumn;
pub use constraint::{AddCheck, AddForeignKey, AddPrimaryKey, ReferentialAction, SetNotNull};
pub use dry_run::DryRun;
pub(crate) use env::Env;
pub use index::{CreateIndex, DropIndex, IndexColumn};
pub use migrate_once::Migration;
pub use preflight::{Intent, Preflight, PreflightLock};
pub use progress::IndexProgress;
pub use replace::ReplaceTable;
pub use report::{ChangeAttempt, ChangeFailed, ChangeReport, ProcedureReport};
pub use statements::{LockedRelation, StatementLock, TableWork};

use options::{ChangeOptions, change_options};

use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::procedure::ForeignKey;
use crate::transaction::AsyncFunc;

/// Schema changes that do not block other sessions for long: [`Keeper::schema`](crate::Keeper::schema).
///
/// A statement that waits for ACCESS EXCLUSIVE blocks all sessions that queue behind it, including readers, for as long
/// as it waits: conflicting requests are granted in the order in which they were made. So everything here waits for its
/// locks at most 100 ms at a time ([`lock_timeout`](Self::lock_timeout)), pauses at least ten times as long before the
/// next attempt, and never waits without limit, even in the last attempt. The report of each attempt, and the error,
/// contain the blockers.
///
/// | to … | call |
/// |---|---|
/// | run a statement or a batch | [`change`](Self::change) |
/// | predict its locks and find its blockers | [`preflight`](Self::preflight), [`dry_run`](Self::dry_run) |
/// | build or drop an index | [`create_index`](Self::create_index), [`drop_index`](Self::drop_index) |
/// | add a constraint | [`add_primary_key`](Self::add_primary_key), [`add_foreign_key`](Self::add_foreign_key), [`add_check`](Self::add_check), [`set_not_null`](Self::set_not_null) |
/// | add a column, replace a table | [`add_column`](Self::add_column), [`replace_table`](Self::replace_table) |
/// | run all of this in one of many processes, once | [`migrate_once`](Self::migrate_once) |
///
/// Each of them can be repeated after it failed or its process died: it determines what is left to do. Names of tables
/// are [`TableName`]s, names of columns and indexes are plain texts; all are quoted wherever they are sent, so `Orders`
/// is not `orders`. The documentation says where a text is the caller's SQL.
///
/// The pool should have at least two connections: one of them samples the blockers, unless there is a
/// [side connection](crate::KeeperBuilder::side_connection).
///
/// # Longest silence
/// Each message of a change may be without an answer for one
/// [`longest_silence`](crate::KeeperBuilder::longest_silence). The statement that is the change itself may take as long as
/// its backend is executing it; where that cannot be shown, it is given up after at most twice that, and up to a second
/// more. A message that was lost before anything was done is sent again, until the deadline.
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let schema = keeper.schema();
/// schema.change("ALTER TABLE orders ADD COLUMN note text").await?;
/// schema.create_index("orders", ["customer"]).await?;
/// schema.add_foreign_key("orders", ["customer"], "customers", ["id"]).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is sent before a change is awaited"]
pub struct Schema {
    env: Env,
    options: ChangeOptions,
    bookkeeping: String,
}

change_options!(Schema);

impl Schema {
    pub(crate) fn new(env: Env) -> Self {
        Self {
            env,
            options: ChangeOptions::default(),
            bookkeeping: "public".to_owned(),
        }
    }

    /// The schema in which [`migrate_once`](Self::migrate_once) keeps its table; `public` by default. The schema has to
    /// exist.
    pub fn bookkeeping(mut self, schema: impl Into<String>) -> Self {
        self.bookkeeping = schema.into();
        self
    }

    /// Describes a change: one statement, or several separated by `;`, which then run in one transaction. It is the
    /// caller's SQL and sent unchanged. Settings that it changes for the session by `set_config(…, false)`, or in a
    /// function, remain on that connection of the pool.
    ///
    /// Statements that block other sessions while they process a whole table are refused if the table has rows. The
    /// error contains the reason and a better way. These are CREATE INDEX without CONCURRENTLY, a column type that
    /// requires a rewrite, a volatile default, constraints that are checked at once, VACUUM FULL, CLUSTER;
    /// [`allow_scan`](Change::allow_scan) and [`allow_rewrite`](Change::allow_rewrite) allow them. So are statements that
    /// process rows while an earlier statement of the batch keeps other sessions waiting, and statements that are not
    /// understood, which [`allow_unknown`](Change::allow_unknown) allows.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// use std::time::Duration;
    ///
    /// let report = keeper
    ///     .schema()
    ///     .change("ALTER TABLE orders DROP COLUMN note; DROP TABLE drafts")
    ///     .lock_timeout(Duration::from_millis(50))
    ///     .deadline(Duration::from_secs(60))
    ///     .on_attempt(|attempt| println!("{attempt}"))
    ///     .await?;
    /// println!("{} attempts", report.attempts().len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn change(&self, sql: impl Into<String>) -> Change {
        Change::new(self.env.clone(), self.options.clone(), sql.into())
    }

    /// Predicts which relations SQL would lock, in which modes and for which work, and finds their current blockers and
    /// waiters; or does the same for a table and a [`LockMode`](crate::LockMode). It takes none of these locks, and
    /// does not wait.
    ///
    /// The SQL is parsed, not run, and combined with the table of [`StatementLock`](crate::StatementLock) and the
    /// catalogs. A batch is judged as one transaction: each statement runs under the locks of those before it, and finds
    /// what they renamed. [`Preflight`](crate::Preflight#how-far-preflight-can-be-believed) contains measurements.
    ///
    /// # SQL
    /// A few queries of the catalogs, which find names by joins; and one of `pg_locks` and `pg_stat_activity`.
    ///
    /// # Errors
    /// Connection errors; [`Config`](crate::ErrorKind::Config) for a lock on a table that does not exist.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: nothing is changed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// use lockkeeper::LockMode;
    ///
    /// let preflight = keeper.schema().preflight("ALTER TABLE orders ADD COLUMN note text").await?;
    /// println!("{preflight}");
    /// let preflight = keeper.schema().preflight(("orders", LockMode::AccessExclusive)).await?;
    /// for blocker in preflight.blockers() {
    ///     println!("{blocker}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn preflight(&self, what: impl Into<Intent> + Send) -> Result<Preflight, Error> {
        let intent = what.into();
        Preflight::of(&self.env, intent).await
    }

    /// Runs SQL in a transaction, records what it has locked, and rolls it back.
    ///
    /// **It takes all of these locks, and does all of the work, as the change itself would**, and holds the locks to
    /// the end: use it on a copy of the database or an empty one. Statements that cannot be rolled back are refused
    /// (CONCURRENTLY, VACUUM); sequences stay advanced. The text is the caller's SQL and sent unchanged.
    ///
    /// # SQL
    /// `BEGIN` with the `lock_timeout`, the caller's SQL, `pg_locks` of this backend, ROLLBACK.
    ///
    /// # Errors
    /// The server's errors. The dry run is not repeated.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the statement is cancelled, and the transaction rolled back.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn dry_run(&self, sql: impl AsRef<str> + Send) -> Result<DryRun, Error> {
        let sql = sql.as_ref().to_owned();
        dry_run::run(&self.env, &self.options, &sql).await
    }

    /// Describes an index on columns, or [expressions](IndexColumn::expression), of a table.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// use lockkeeper::IndexColumn;
    ///
    /// keeper
    ///     .schema()
    ///     .create_index("users", [IndexColumn::expression("lower(email)")])
    ///     .name("users_email")
    ///     .unique()
    ///     .predicate("deleted_at IS NULL")
    ///     .on_progress(|progress| println!("{progress}"))
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn create_index<C: Into<IndexColumn>>(
        &self,
        table: impl Into<TableName>,
        columns: impl IntoIterator<Item = C>,
    ) -> CreateIndex {
        let columns = columns.into_iter().map(Into::into).collect();
        CreateIndex::new(
            self.env.clone(),
            self.options.clone(),
            table.into(),
            columns,
        )
    }

    /// Describes the drop of an index, by its name.
    pub fn drop_index(&self, index: impl Into<TableName>) -> DropIndex {
        DropIndex::new(self.env.clone(), self.options.clone(), index.into())
    }

    /// Describes a primary key on columns of a table.
    pub fn add_primary_key<C: Into<String>>(
        &self,
        table: impl Into<TableName>,
        columns: impl IntoIterator<Item = C>,
    ) -> AddPrimaryKey {
        let columns = columns.into_iter().map(Into::into).collect();
        AddPrimaryKey::new(
            self.env.clone(),
            self.options.clone(),
            table.into(),
            columns,
        )
    }

    /// Describes a foreign key from columns of a table to columns of another; without referenced columns, to its
    /// primary key.
    pub fn add_foreign_key<C: Into<String>, D: Into<String>>(
        &self,
        table: impl Into<TableName>,
        columns: impl IntoIterator<Item = C>,
        referenced: impl Into<TableName>,
        referenced_columns: impl IntoIterator<Item = D>,
    ) -> AddForeignKey {
        AddForeignKey {
            env: self.env.clone(),
            options: self.options.clone(),
            table: table.into(),
            name: None,
            key: ForeignKey {
                columns: columns.into_iter().map(Into::into).collect(),
                referenced: referenced.into(),
                referenced_columns: referenced_columns.into_iter().map(Into::into).collect(),
                on_delete: None,
                on_update: None,
            },
        }
    }

    /// Describes a CHECK constraint. The expression is the caller's SQL and sent unchanged.
    pub fn add_check(
        &self,
        table: impl Into<TableName>,
        name: impl Into<String>,
        expression: impl Into<String>,
    ) -> AddCheck {
        AddCheck {
            env: self.env.clone(),
            options: self.options.clone(),
            table: table.into(),
            name: name.into(),
            expression: expression.into(),
        }
    }

    /// Describes the change of a column to NOT NULL.
    pub fn set_not_null(
        &self,
        table: impl Into<TableName>,
        column: impl Into<String>,
    ) -> SetNotNull {
        SetNotNull {
            env: self.env.clone(),
            options: self.options.clone(),
            table: table.into(),
            column: column.into(),
        }
    }

    /// Describes a new column. Its type is the caller's SQL and sent unchanged.
    pub fn add_column(
        &self,
        table: impl Into<TableName>,
        column: impl Into<String>,
        ty: impl Into<String>,
    ) -> AddColumn {
        AddColumn {
            env: self.env.clone(),
            options: self.options.clone(),
            table: table.into(),
            column: column.into(),
            ty: ty.into(),
            default: None,
            not_null: false,
        }
    }

    /// Describes the replacement of a table by the table `new` of the same schema. It is an alternative to VACUUM FULL,
    /// CLUSTER, and changes that rewrite the table.
    pub fn replace_table(
        &self,
        table: impl Into<TableName>,
        new: impl Into<String>,
    ) -> ReplaceTable {
        ReplaceTable {
            env: self.env.clone(),
            options: self.options.clone(),
            table: table.into(),
            new: new.into(),
            build: None,
            catch_up: None,
            drop_old: false,
            like_old: false,
            allow_differences: false,
        }
    }

    /// Runs `f` once, in one of the processes that call this with the same key. Returns `Some` with the result of `f`
    /// if it ran here, and `None` if the migration is done. While one process runs it, the others wait until it has
    /// ended and find it done; if it failed or its process died, the next process runs it.
    ///
    /// A waiting process polls and holds neither a snapshot nor a connection: the index builds of the running
    /// migration would wait for a session that waits in a query, and deadlock with it. It waits for at most the
    /// [`deadline`](Self::deadline), an hour by default.
    ///
    /// After `f` has succeeded, the migration is recorded as done in a separate statement, so `f` may run again if the
    /// process dies in between, or during `f`. All operations of [`Schema`] can be repeated; make your own statements
    /// repeatable, too.
    ///
    /// # SQL
    /// A session lock of the key `("lockkeeper migration", key)`, on its own connection, which the pool has to have in
    /// addition to those of `f`; and the table `lockkeeper_migration (key text PRIMARY KEY, done_at timestamptz,
    /// done_by text)` in the schema of [`bookkeeping`](Self::bookkeeping), which is created if it does not exist. The
    /// role needs the privilege to create it, unless it exists, and SELECT and INSERT on it.
    ///
    /// # Errors
    /// The closure's own; [`LockTimeout`](crate::ErrorKind::LockTimeout) if another process still runs it at the
    /// deadline; [`LockLost`](crate::ErrorKind::LockLost) if the connection with the lock was lost: `f` is dropped if
    /// the loss is noticed while it runs (the lock is polled a few times a second, so another process may have begun by
    /// then), and nothing is recorded; [`Config`](crate::ErrorKind::Config) if `f` left a transaction open on the
    /// guard; [`TransactionPooler`](crate::ErrorKind::TransactionPooler) as for all session locks.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the lock is released, and the migration is not done.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let schema = keeper.schema();
    /// schema
    ///     .migrate_once("2024-05 orders by customer", async |migration| {
    ///         migration.schema().create_index("orders", ["customer"]).await?;
    ///         Ok::<_, lockkeeper::Error>(())
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn migrate_once<R, E, F>(
        &self,
        key: impl Into<String> + Send,
        f: F,
    ) -> Result<Option<R>, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Migration) -> Result<R, E>
            + AsyncFunc<&'r mut Migration, Result<R, E>, Fut: Send>
            + Send,
        E: From<Error> + Send,
        R: Send,
    {
        migrate_once::run(self, key.into(), f).await
    }
}
