//! PostgreSQL advisory locks that cannot leak, and transactions that retry when that is right and explain their
//! deadlocks, beside the [`tokio-postgres`](tokio_postgres) and [`deadpool-postgres`](deadpool_postgres) an application already has.
//!
//! ```no_run
//! use lockkeeper::Keeper;
//! # use deadpool_postgres::Pool;
//! # async fn pay(pool: Pool) -> Result<(), lockkeeper::Error> {
//! let keeper = Keeper::new(pool);
//! keeper
//!     .with_advisory_lock("invoice:42", async |tx| {
//!         // One transaction, alone in the whole database with this key until it commits.
//!         tx.execute("UPDATE invoice SET paid = true WHERE id = $1", &[&42_i64]).await?;
//!         Ok::<_, lockkeeper::Error>(())
//!     })
//!     .await
//! # }
//! ```
//!
//! The lock is taken in the message that begins the transaction, and released by its end, whatever that is: COMMIT, an
//! error, a panic, a dropped future, a lost connection. A connection whose state is in doubt is closed, never returned
//! to the pool.
//!
//! # Contents
//!
//! | to … | see |
//! |---|---|
//! | run a critical section under a lock | [`Keeper::with_advisory_lock`], [`Keeper::try_with_advisory_lock`] |
//! | run one under several locks, a shared one, or with options | [`AdvisoryLock::run`], [`AdvisoryLock::try_run`] |
//! | hold a lock as a guard | [`Keeper::advisory_lock`], [`XactGuard`] |
//! | hold a lock over several transactions | [`AdvisoryLock::session`], [`SessionGuard`] |
//! | lock several keys without deadlocks | [`Keeper::advisory_locks`] |
//! | run a transaction that retries deadlocks and serialization failures | [`Keeper::transaction`], [`Keeper::transaction_with`], [`TransactionOptions`] |
//! | know which two statements at which two places deadlocked | [`KeeperBuilder::on_incident`], [`Incident`], [`incident`] |
//! | take one more lock, or a savepoint, inside a transaction | [`Tx::advisory_lock`], [`Tx::savepoint`] |
//! | lock rows in one order, so that those who do never deadlock over them | [`Tx::lock_rows`] |
//! | change all rows of a large table while others use it | [`Keeper::backfill`], [`Backfill`] |
//! | refuse what a former holder of a lock writes | [`SessionGuard::fencing_token`], [`Tx::check_fencing`], [`Fencing`] |
//! | have one leader among many processes | [`Keeper::leader`], [`Leader`] |
//! | let a number of tasks do something at a time, over all processes | [`Keeper::semaphore`], [`Semaphore`] |
//! | run work once a day, whichever process asks first | [`Keeper::once`], [`Once`] |
//! | know what a key is, and compute it in SQL | [`LockKey`] |
//! | share a lock with a Rails, Django, Go or .NET program | `compat`, with the feature of that name |
//! | know what a lock on a table or a row keeps waiting, and which statement takes which | [`LockMode`], [`RowLock`], [`StatementLock`] |
//! | tell errors apart, and see who is in the way | [`Error`], [`ErrorKind`], [`Blocker`] |
//! | see who waits for whom, and which advisory locks are held | [`Keeper::monitor`], [`Monitor`], [`graph`] |
//! | draw that, or an incident: a page of HTML, Mermaid, DOT | [`graph::LockTree::to_html`], [`Incident::to_html`] |
//! | watch this process's locks and transactions in numbers | [`guide::numbers`] |
//! | watch the server's locks in numbers, and export them | [`Monitor::health`], [`Health`] |
//! | know whether the server is set up well for this | [`Monitor::settings`], [`SettingsFinding`] |
//! | read what the server's own log says about locks | [`server_log`] |
//! | know why a transaction deadlocked or waited too long, and what to do about it | [`Incident`], [`Error::incident`], [`KeeperBuilder::on_incident`], [`incident`] |
//! | watch waits come and go, and know when an incident is over | [`Monitor::watch`], [`Monitor::recovery`] |
//! | cancel or terminate the session that was seen, and nobody else | [`Monitor::cancel`], [`Monitor::terminate`] |
//! | clear a pile-up of lock waits in the safest order | [`Keeper::resolver`], [`resolver`] |
//! | be told of leaked locks and of sessions idle in the way of others | [`Keeper::watchdog`], [`watchdog`] |
//! | change a schema without keeping others waiting, and know beforehand who is in the way | [`Keeper::schema`], [`Schema`] |
//! | understand what the compiler says of a closure, or copy the bounds of one | [`guide::compiler`] |
//! | send a mail, return a result, name a row's lock | [`guide::recipes`] |
//! | end work when its lock is lost | [`SessionGuard::run`], [`SessionGuard::loss`], [`KeeperBuilder::heartbeat`] |
//! | configure | [`Keeper::builder`], [`KeeperBuilder`] |
//! | have a dead network noticed | [`tcp_timeouts`], [`KeeperBuilder::longest_silence`] |
//!
//! # Features
//!
//! | feature | adds |
//! |---|---|
//! | `incidents` (default) | deadlocks, lock timeouts and long waits, explained: `Error::incident`, `KeeperBuilder::on_incident`, `graph` |
//! | `monitor` | reading the state of the server: `Keeper::monitor`, lock tree, held and leaked locks, health, settings |
//! | `resolver` | acting on sessions: `Keeper::resolver`, `Keeper::watchdog`, `Monitor::cancel`; brings `monitor` |
//! | `schema` | schema changes and backfills: `Keeper::schema`, `Keeper::backfill`, `StatementLock` |
//! | `server-log` | reading the server's own log: `server_log` |
//! | `pictures` | lock trees and incidents as HTML, Mermaid and DOT |
//! | `compat` | keys as other programs derive them |
//! | `coordination` | what many processes agree on: fencing tokens, `Keeper::leader`, `Keeper::semaphore`, `Keeper::once` |
//! | `metrics` | waits, holds, timeouts, retries and deadlocks of this process for the `metrics` facade ([`guide::numbers`]); `Health::record`, together with `monitor`: the server's locks |
//! | `serde` | incidents, trees, locks, health and settings as JSON |
//! | `full` | all of them |
//!
//! Without default features the crate is the core: locks, guards and transactions.
//!
//! # What it holds to
//!
//! - **Transaction-scoped by default.** Such a lock cannot outlive its transaction, in any pooling mode. Session locks
//!   are for what needs several transactions; their guard owns the connection and unlocks on drop.
//! - **Every future may be dropped at every point.** A wait that nobody awaits any more is cancelled on the server, so
//!   that it does not stand in the queue. What was sent and not answered is undone in the background, and its connection
//!   goes back only after the server has confirmed it.
//! - **Waits are bounded, and stand in the server's own queue**, each as a single wait that operators see at its full length.
//!   A waiter [steps back](Keeper#waiting) for the `CREATE INDEX CONCURRENTLY` of a holder, which it would deadlock. One whose
//!   process was killed leaves the queue within a second, where the server runs on Linux (`client_connection_check_interval`).
//!   Inside one [`Keeper`] waiters for a key form a line of their own, and all waiters together [occupy](Keeper#waiting) at
//!   most a quarter of the pool.
//! - **Settings are left as they were**: all are `SET LOCAL`, but for the session guard's `application_name`, which is
//!   put back.
//! - **`application_name` carries the call site** (`billing src/pay.rs:42`) while a lock or a transaction is held, since
//!   it is what every role sees of every backend. It is in the error of those who wait.
//!
//! # Limits
//!
//! - Advisory locks exclude only sessions that request them. Nothing stops a statement that does not.
//! - A lock is per database, and per server: on a standby it would exclude nobody on the primary, so it is refused there
//!   ([`ErrorKind::ReadOnlyServer`]).
//! - A session lock lives no longer than its connection. [`SessionGuard::loss`] tells when that ends, and within 13 seconds
//!   by default when the server falls silent. Work on the guard's own connection fails with it; other work may go on for
//!   that long while another session has the lock.
//! - A process that is killed while a long statement of it runs keeps its locks until the server notices, which is at that
//!   statement's end, or earlier where `client_connection_check_interval` is set.
//! - Behind a pooler in transaction mode session locks are refused ([`ErrorKind::TransactionPooler`]).
//! - First come, first served over all processes holds among those who stand in the server's queue. Where more of one process
//!   wait than have a [place](Keeper#waiting) there, the others stand in a line of the process.
//! - What is found out about a server or a pooler counts for a minute. A pooler that is switched from session to
//!   transaction mode is gone through with session locks for as long, and for longer while no second connection is to be
//!   had to examine it with.
//! - A role without SELECT on `pg_locks`, which every role has by default, can use all locks. Three things are missing
//!   then: errors name no blockers, and there are no incidents of waits; locks in great numbers are compared with the whole
//!   lock table, not with what is free in it; and of an engine that is not PostgreSQL it is checked whether it counts
//!   session locks, not whether its transaction locks do anything. What else cannot be done says which right is missing.
//! - Needs PostgreSQL 14 or later, and a Tokio runtime with timers and I/O.
//!
//! # Logging
//!
//! Through `tracing`, with the lock's readable key: `debug` [spans](guide::numbers#spans) around each transaction, each of its
//! attempts and each request for a lock, and
//! `debug` events for locks acquired, waited for, released, busy and timed out (with `waited_ms` and `held_ms`), and for
//! attempts repeated; one `warn` event of target `lockkeeper::incident` for each [`Incident`]; `warn` for a pool that gives connections with transactions
//! left open. Of target `lockkeeper::resolver` an `info` event for each step of a [`Resolver`], of target
//! `lockkeeper::watchdog` a `warn` event for each [`Finding`]. Nothing at `info` and above where all is well.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[macro_use]
mod getters;

mod advisory;
#[cfg(feature = "schema")]
mod backfill;
mod backoff;
mod blocker;
mod call_site;
mod connection;
#[cfg(feature = "coordination")]
mod coordination;
mod deadline;
mod error;
#[cfg(feature = "incidents")]
pub mod graph;
pub mod guide;
#[cfg(feature = "incidents")]
pub mod incident;
mod keeper;
mod key;
mod meter;
mod mode;
#[cfg(feature = "monitor")]
mod monitor;
#[cfg(feature = "pictures")]
mod picture;
mod postgres;
#[cfg(feature = "resolver")]
pub mod resolver;
#[cfg(feature = "incidents")]
mod sampler;
#[cfg(feature = "schema")]
mod schema;
#[cfg(feature = "server-log")]
pub mod server_log;
mod transaction;

pub use advisory::{AdvisoryLock, SessionAdvisoryLock, SessionGuard, TxAdvisoryLock, XactGuard};
#[cfg(feature = "schema")]
pub use backfill::{
    Backfill, BackfillKey, BackfillPause, BackfillProgress, BackfillStream, ReplicationLag,
};
pub use blocker::Blocker;
pub use call_site::CallSite;
pub use connection::{Connector, Loss, ToStatement, tcp_timeouts};
#[cfg(feature = "coordination")]
pub use coordination::{
    Fencing, FencingToken, Leader, Leadership, Once, Semaphore, SemaphorePermit, Term,
};
pub use deadpool_postgres;
pub use error::{Error, ErrorKind, is_retryable};
#[cfg(feature = "incidents")]
pub use incident::{Incident, IncidentKind};
pub use keeper::{Keeper, KeeperBuilder};
pub use key::LockKey;
#[cfg(feature = "compat")]
pub use key::compat;
pub use mode::{AdvisoryMode, LockMode, ParseModeError, RowLock};
#[cfg(feature = "monitor")]
pub use monitor::{
    AdvisoryLockEntry, Deadlocks, Effect, Health, InvalidIndexes, LockTableUsage, Monitor,
    ObservedValue, PreparedTransactions, Recovery, RecoveryCheck, RecoveryCriterion,
    SettingsFinding, SettingsFindingKind, SettingsReport, Severity, SnapshotDiff, Trend,
    WaitSummary, Watch, WatchUpdate,
};
pub use postgres::TableName;
#[cfg(feature = "resolver")]
pub use resolver::{
    LoadChange, Protection, Resolver, ResolverPolicy, RunLog, SignalOutcome, watchdog,
};
#[cfg(feature = "schema")]
pub use schema::{
    AddCheck, AddColumn, AddForeignKey, AddPrimaryKey, Change, ChangeAttempt, ChangeFailed,
    ChangeReport, CreateIndex, DropIndex, DryRun, IndexColumn, IndexProgress, Intent,
    LockedRelation, Migration, Preflight, PreflightLock, ProcedureReport, ReferentialAction,
    ReplaceTable, Schema, SetNotNull, StatementLock, TableWork,
};
pub use tokio_postgres;
pub use transaction::{AsyncFunc, LockRows, NoRetry, RetryIf, RunsAgain, TransactionOptions, Tx};
#[cfg(feature = "resolver")]
pub use watchdog::{Finding, FindingKind, Watchdog, WatchdogPolicy};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
