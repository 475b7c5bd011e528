//! Schema changes that keep nobody waiting for long.
//!
//! `ddl` reads statements, `plan` puts them together with the catalogs, `refusal` says what is better not done, `run`
//! makes attempts, with `watch` looking on; the rest are the recipes.

mod change;
mod column;
mod constraint;
mod ddl;
mod dry_run;
mod index;
mod index_name;
mod once;
mod pace;
mod plan;
mod preflight;
mod progress;
mod recipe;
mod refusal;
mod replace;
mod report;
mod run;
mod sql;
mod statements;
mod table;
mod watch;

pub use change::Change;
pub use column::AddColumn;
pub use constraint::{AddCheck, AddForeignKey, AddPrimaryKey, ReferentialAction, SetNotNull};
pub use dry_run::DryRun;
pub use index::{CreateIndex, DropIndex, IndexColumn};
pub use once::Migration;
pub use preflight::{Intent, Preflight, PreflightLock};
pub use progress::IndexProgress;
pub use replace::ReplaceTable;
pub use report::{ChangeAttempt, ChangeFailed, ChangeReport, RecipeReport};
pub(crate) use run::Context;
pub use statements::{LockedRelation, StatementLock, TableWork};

use pace::{Pace, paced};

use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::recipe::ForeignKey;
use crate::transaction::AsyncFunc;

/// Schema changes that keep nobody waiting for long: [`Keeper::schema`](crate::Keeper::schema).
///
/// A statement that waits for ACCESS EXCLUSIVE keeps all waiting who come behind it, readers too, for as long as it waits:
/// the lock queue is first come, first served among what conflicts. So everything here waits for its locks 100 ms at most
/// at a time ([`lock_timeout`](Self::lock_timeout)), pauses at least ten times as long before it tries again, and never
/// ends with an attempt that waits without limit. Who was in the way is in the report of each attempt, and in the error.
///
/// | to … | call |
/// |---|---|
/// | run a statement or a batch so | [`change`](Self::change) |
/// | know beforehand what it locks and who is in the way | [`preflight`](Self::preflight), [`dry_run`](Self::dry_run) |
/// | build or drop an index | [`create_index`](Self::create_index), [`drop_index`](Self::drop_index) |
/// | add a constraint | [`add_primary_key`](Self::add_primary_key), [`add_foreign_key`](Self::add_foreign_key), [`add_check`](Self::add_check), [`set_not_null`](Self::set_not_null) |
/// | add a column, replace a table | [`add_column`](Self::add_column), [`replace_table`](Self::replace_table) |
/// | run all of it from one process of many, once | [`migrate_once`](Self::migrate_once) |
///
/// What each of them does can be run again after it failed, or its process died, half-way: it finds out what is left to
/// do. Names of tables are [`TableName`]s, names of columns and indexes plain texts; all are quoted wherever they are sent,
/// so that `Orders` is not `orders`. What is SQL of the caller's says so.
///
/// The pool should have two connections or more: one is used to look at who is in the way, where there is no
/// [side connection](crate::KeeperBuilder::side_connection).
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
    cx: Context,
    pace: Pace,
    bookkeeping: String,
}

paced!(Schema);

impl Schema {
    pub(crate) fn new(cx: Context) -> Self {
        Self {
            cx,
            pace: Pace::default(),
            bookkeeping: "public".to_owned(),
        }
    }

    /// The schema in which [`migrate_once`](Self::migrate_once) keeps its table; `public` by default. It has to be there.
    pub fn bookkeeping(mut self, schema: impl Into<String>) -> Self {
        self.bookkeeping = schema.into();
        self
    }

    /// A statement, or several with `;` between them, which then run in one transaction. It is SQL of the caller's, and
    /// sent as it is. What it sets for the session by `set_config(…, false)`, or in a function, stays on that connection of
    /// the pool.
    ///
    /// Statements that keep others waiting for as long as it takes to go through a table are refused where it has rows,
    /// with the reason and what does the same better: CREATE INDEX without CONCURRENTLY, a type that needs a rewrite, a
    /// volatile default, constraints that are checked at once, VACUUM FULL, CLUSTER;
    /// [`allow_scan`](Change::allow_scan) and [`allow_rewrite`](Change::allow_rewrite) let them pass.
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
        Change::new(self.cx.clone(), self.pace.clone(), sql.into())
    }

    /// Which relations SQL would lock, how, what it would do with them, and who is in the way now, or waits already; or
    /// the same of a table and a [`LockMode`](crate::LockMode). It takes none of these locks, and waits for nobody.
    ///
    /// The SQL is read, not run, and put together with the table of [`StatementLock`](crate::StatementLock) and the
    /// catalogs. It is a prediction: triggers and functions that the statements call are not looked into.
    ///
    /// # SQL
    /// A few questions to the catalogs, names found by joins; and one to `pg_locks` and `pg_stat_activity`.
    ///
    /// # Errors
    /// The connection's; [`Config`](crate::ErrorKind::Config) for a lock on a table that is not there.
    ///
    /// # Cancel safety
    /// May be dropped at any point: nothing is changed.
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
    pub async fn preflight(&self, what: impl Into<Intent> + Send) -> Result<Preflight, Error> {
        let intent = what.into();
        Preflight::of(&self.cx, intent).await
    }

    /// Runs SQL in a transaction, notes what it has locked, and rolls it back.
    ///
    /// **It takes all of these locks, and does all of the work, as the change itself would**, and holds them to the end:
    /// it is for a database that is meant for that, a copy or an empty one. What cannot be rolled back is refused
    /// (CONCURRENTLY, VACUUM); sequences stay advanced. The SQL is the caller's, and sent as it is.
    ///
    /// # SQL
    /// `BEGIN` with the `lock_timeout`, the caller's text, `pg_locks` of this backend, ROLLBACK.
    ///
    /// # Errors
    /// The server's; it is not repeated.
    ///
    /// # Cancel safety
    /// May be dropped at any point: what runs is cancelled, and the transaction rolled back.
    pub async fn dry_run(&self, sql: impl AsRef<str> + Send) -> Result<DryRun, Error> {
        let sql = sql.as_ref().to_owned();
        dry_run::run(&self.cx, &self.pace, &sql).await
    }

    /// An index on columns, or [expressions](IndexColumn::expression), of a table.
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
        CreateIndex::new(self.cx.clone(), self.pace.clone(), table.into(), columns)
    }

    /// An index to be dropped, by its name.
    pub fn drop_index(&self, index: impl Into<TableName>) -> DropIndex {
        DropIndex::new(self.cx.clone(), self.pace.clone(), index.into())
    }

    /// A primary key on columns of a table.
    pub fn add_primary_key<C: Into<String>>(
        &self,
        table: impl Into<TableName>,
        columns: impl IntoIterator<Item = C>,
    ) -> AddPrimaryKey {
        let columns = columns.into_iter().map(Into::into).collect();
        AddPrimaryKey::new(self.cx.clone(), self.pace.clone(), table.into(), columns)
    }

    /// A foreign key from columns of a table to those of another; with no columns there, to its primary key.
    pub fn add_foreign_key<C: Into<String>, D: Into<String>>(
        &self,
        table: impl Into<TableName>,
        columns: impl IntoIterator<Item = C>,
        referenced: impl Into<TableName>,
        referenced_columns: impl IntoIterator<Item = D>,
    ) -> AddForeignKey {
        AddForeignKey {
            cx: self.cx.clone(),
            pace: self.pace.clone(),
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

    /// A CHECK of that name. The expression is SQL of the caller's, and sent as it is.
    pub fn add_check(
        &self,
        table: impl Into<TableName>,
        name: impl Into<String>,
        expression: impl Into<String>,
    ) -> AddCheck {
        AddCheck {
            cx: self.cx.clone(),
            pace: self.pace.clone(),
            table: table.into(),
            name: name.into(),
            expression: expression.into(),
        }
    }

    /// A column that is to be NOT NULL.
    pub fn set_not_null(
        &self,
        table: impl Into<TableName>,
        column: impl Into<String>,
    ) -> SetNotNull {
        SetNotNull {
            cx: self.cx.clone(),
            pace: self.pace.clone(),
            table: table.into(),
            column: column.into(),
        }
    }

    /// A new column of a type. The type is SQL of the caller's, and sent as it is.
    pub fn add_column(
        &self,
        table: impl Into<TableName>,
        column: impl Into<String>,
        ty: impl Into<String>,
    ) -> AddColumn {
        AddColumn {
            cx: self.cx.clone(),
            pace: self.pace.clone(),
            table: table.into(),
            column: column.into(),
            ty: ty.into(),
            default: None,
            not_null: false,
        }
    }

    /// Puts the table `new`, of the same schema, in a table's place: instead of VACUUM FULL, CLUSTER, and changes that
    /// rewrite.
    pub fn replace_table(
        &self,
        table: impl Into<TableName>,
        new: impl Into<String>,
    ) -> ReplaceTable {
        ReplaceTable {
            cx: self.cx.clone(),
            pace: self.pace.clone(),
            table: table.into(),
            new: new.into(),
            build: None,
            catch_up: None,
            drop_old: false,
        }
    }

    /// Runs `f` in one process of all that call this with the same key, once: `Some` with what it gave where it was run
    /// here, `None` where it is done. Those that come while another one runs it wait until that has ended, and see that it
    /// is done; where it failed or died, the next one runs it.
    ///
    /// Who waits does so without a snapshot and without a connection, by looking now and then: a session that waits in a
    /// query would be waited for by the index builds of the one that runs it, and deadlock with them. It waits as long as
    /// [`deadline`](Self::deadline) says, an hour by default.
    ///
    /// It is noted as done after `f` has succeeded, in a statement of its own: where the process dies in between it is run
    /// again, as it is where it died half-way. Everything of [`Schema`] can be; see to the rest yourself.
    ///
    /// # SQL
    /// A session lock of the key `("lockkeeper migration", key)`, on a connection of its own, which the pool has to have
    /// besides those of `f`; and the table `lockkeeper_migration (key text PRIMARY KEY, done_at timestamptz, done_by text)`
    /// in the schema of [`bookkeeping`](Self::bookkeeping), which is created if it is not there: the role needs the right
    /// to, or to have it created beforehand, and SELECT and INSERT on it.
    ///
    /// # Errors
    /// The closure's own; [`LockTimeout`](crate::ErrorKind::LockTimeout) when another process runs it beyond the deadline;
    /// [`LockLost`](crate::ErrorKind::LockLost) when the connection with the lock was lost, and with it the lock: `f` is
    /// dropped where that is seen while it runs (by looking a few times a second, so that another process may have begun
    /// by then), and nothing noted; [`Config`](crate::ErrorKind::Config) when `f` left a transaction open on the guard;
    /// [`TransactionPooler`](crate::ErrorKind::TransactionPooler) as for all session locks.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the lock is released, and the migration is not done.
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
        once::run(self, key.into(), f).await
    }
}
