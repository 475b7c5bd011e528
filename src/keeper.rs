//! The handle: wires the rooms below to the application's pool, and holds no logic of its own.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Pool;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Config, Socket};

use crate::advisory::{Advisory, AdvisoryLock, LockDescription, LockedBy, OpenLocked};
use crate::call_site::{ApplicationNames, CallSite};
use crate::connection::{
    Connections, HeartbeatOptions, LONGEST_SILENCE, SideConfig, SideConnection,
};
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::transaction::sql::Begin;
use crate::transaction::{
    self, AsyncFunc, Open, OpenPlain, Policy, RetryIf, Runner, RunsAgain, TransactionOptions, Tx,
};

/// How long a lock is waited for where nothing says otherwise.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// Shorter times would be a load on the server.
const LEAST_HEARTBEAT: Duration = Duration::from_millis(100);
const APPLICATION: &str = "lockkeeper";

/// Advisory locks and deadlock-aware transactions over the application's own pool.
///
/// Cheap to clone. Share one keeper per pool: separate keepers cannot see each other's waiters.
///
/// # Waiting
/// A lock is tried first. A caller that finds it busy waits at the server, on a connection of the pool, or inside the
/// keeper, without one. At most a quarter of the pool waits at the server at a time, so that holders and other work find a
/// connection: at least one request, at most two for a key, and all keys count together. The others wait inside the keeper.
///
/// - A wait at the server is a single one, under a `lock_timeout` of all that is left of it. It keeps its place in the
///   server's queue, which is first come, first served over all processes. `pg_locks.waitstart` and `log_lock_waits` show
///   its full length. If it times out, it writes one entry to the server's log.
/// - The callers for one key (of a set: its first) are served in the order in which they found it busy.
/// - Where more keys are waited for than there are places, their waiters take turns. A waiter gives its place up after ten
///   seconds, and at once if it is not the first for its key. One of a
///   [`conflict_group`](TransactionOptions::conflict_group) keeps its place until its wait is over.
/// - A waiter steps back for an index build. `CREATE INDEX CONCURRENTLY`, `REINDEX CONCURRENTLY` and
///   `DETACH PARTITION CONCURRENTLY` wait until other transactions have ended, those of waiters too. A waiter for a lock that
///   the builder holds would be in a deadlock with it. So, as long as anybody waits, one query of `pg_locks` asks for all
///   waiters of the keeper whether a session waits for their transactions: two to three times in each `deadlock_timeout`. If
///   one does, the waiter is cancelled, which writes an entry to the server's log. It goes to the end of the server's queue
///   when the builder does not wait any more.
/// - That query is sent on the side connection, whose role has to be allowed to signal the pool's sessions: the same role, or
///   a member of it. Without a side connection it is sent on a connection of the pool, which is kept for it as long as anybody
///   waits. A pool of less than four lends one for each query.
/// - Where that cannot be asked, waits are repeated instead, each half as long as `deadlock_timeout` and at most half a
///   second. Then there is no order between processes, and each of them writes an entry to the server's log. That is so
///   with a `deadlock_timeout` shorter than 200 ms, without SELECT on `pg_locks`, and without a side connection while all of
///   the pool's connections are in use. It is also so for ten seconds after two queries in a row were not answered within a
///   third of `deadlock_timeout`, and after a waiter could not be signalled.
/// - Locks are waited for on connections of their own: two guards of one task that wait for each other's locks are no cycle
///   that the server could see, and wait until their time is over.
/// - A waiter inside the keeper tries again as soon as this keeper releases the key it stands in line for. It learns up to
///   half a second later of other releases: by other processes, of locks taken by [`Tx::advisory_lock`], and of the further
///   keys of a set. Every 200 ms one query of `pg_locks` asks for all waiters together.
/// - A waiter whose future is not polled keeps its place at the server.
///
/// [`Tx::advisory_lock`] waits on its transaction's own connection, and does not count.
#[derive(Clone)]
pub struct Keeper {
    inner: Arc<Inner>,
}

struct Inner {
    advisory: Arc<Advisory>,
    names: ApplicationNames,
    call_sites: bool,
    lock_wait: Duration,
    #[cfg(feature = "coordination")]
    lines: Arc<crate::coordination::Lines>,
}

impl Keeper {
    /// A keeper over a pool, with the defaults of its [`builder`](Self::builder).
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self::builder(pool).build()
    }

    /// A keeper over a pool, to be configured.
    pub fn builder(pool: Pool) -> KeeperBuilder {
        KeeperBuilder {
            pool,
            side: None,
            application: APPLICATION.to_owned(),
            call_sites: true,
            lock_wait: LOCK_WAIT,
            longest_silence: LONGEST_SILENCE,
            heartbeat: HeartbeatOptions::DEFAULT,
            #[cfg(feature = "incidents")]
            sampling: crate::sampler::SamplerOptions::default(),
            #[cfg(feature = "coordination")]
            coordination_schema: "public".to_owned(),
        }
    }

    /// An advisory lock, to be described further and then acquired.
    #[track_caller]
    pub fn advisory_lock(&self, key: impl Into<LockKey>) -> AdvisoryLock {
        let options = TransactionOptions::new();
        AdvisoryLock::new(self.describe(vec![key.into()], &options, CallSite::caller()))
    }

    /// Several advisory locks, to be acquired together: sorted, without repeats, all or none, under one total wait.
    ///
    /// Two callers that want overlapping sets never wait for each other in a cycle, whatever order they name them in.
    #[track_caller]
    pub fn advisory_locks<K: Into<LockKey>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> AdvisoryLock {
        let keys = keys.into_iter().map(Into::into).collect();
        let options = TransactionOptions::new();
        AdvisoryLock::new(self.describe(keys, &options, CallSite::caller()))
    }

    /// Runs a critical section: one transaction that holds one transaction-level advisory lock. **It may run more than
    /// once**: after a deadlock, a serialization failure or a lock timeout inside, all of it runs again, from a clone of the
    /// closure.
    ///
    /// This is [`advisory_lock(key).run(f)`](AdvisoryLock::run): see there for the options. `Ok` commits, `Err` rolls back and
    /// comes back as it was. The lock is released by the end of the transaction, so the next holder sees what this one
    /// committed.
    ///
    /// # SQL
    /// Two round trips besides the section's own: `BEGIN`, settings and lock in one message, and COMMIT. See
    /// [`AdvisoryLock::acquire`].
    ///
    /// # Errors
    /// The closure's own; an [`Error`] as of [`AdvisoryLock::acquire`] and
    /// [`XactGuard::commit`](crate::XactGuard::commit), turned into the closure's error type.
    ///
    /// # Cancel safety
    /// May be dropped at any point: a waiting lock request is cancelled on the server, an open transaction rolled back.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// keeper
    ///     .with_advisory_lock("invoice:42", async |tx| {
    ///         tx.execute("UPDATE invoice SET paid = true WHERE id = $1", &[&42_i64]).await?;
    ///         Ok::<_, lockkeeper::Error>(())
    ///     })
    ///     .await
    /// # }
    /// ```
    ///
    /// # Longest silence
    /// As [`acquire`](AdvisoryLock::acquire), and then as [`transaction_with`](Self::transaction_with).
    #[track_caller]
    pub fn with_advisory_lock<R, E, F>(
        &self,
        key: impl Into<LockKey>,
        f: F,
    ) -> impl Future<Output = Result<R, E>> + Send
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        self.advisory_lock(key).run(f)
    }

    /// The same if the lock is free; `None`, without running the section, if it is not. Never waits for the lock. The section
    /// may run more than once here too.
    ///
    /// # Errors
    /// As [`with_advisory_lock`](Self::with_advisory_lock), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`with_advisory_lock`](Self::with_advisory_lock).
    ///
    /// # Longest silence
    /// As [`with_advisory_lock`](Self::with_advisory_lock).
    #[track_caller]
    pub fn try_with_advisory_lock<R, E, F>(
        &self,
        key: impl Into<LockKey>,
        f: F,
    ) -> impl Future<Output = Result<Option<R>, E>> + Send
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        self.advisory_lock(key).try_run(f)
    }

    /// Runs a transaction, and the whole of it again when PostgreSQL says that this can help: **it may run more than once**.
    ///
    /// As [`transaction_with`](Self::transaction_with) and the defaults of [`TransactionOptions`].
    ///
    /// # Errors
    /// As [`transaction_with`](Self::transaction_with).
    ///
    /// # Cancel safety
    /// As [`transaction_with`](Self::transaction_with).
    ///
    /// # Longest silence
    /// As [`transaction_with`](Self::transaction_with).
    #[track_caller]
    pub fn transaction<R, E, F>(&self, f: F) -> impl Future<Output = Result<R, E>> + Send
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        self.transaction_with(TransactionOptions::new(), f)
    }

    /// Runs a transaction as the options say: `Ok` commits, `Err` rolls back. **It may run more than once**, unless the options
    /// say [`once`](TransactionOptions::once); [`Tx::attempt`] tells which run it is.
    ///
    /// A deadlock, a serialization failure (COMMIT's too) and a lock timeout of a statement (not NOWAIT's refusal) are
    /// followed by a rollback of the whole transaction, a random pause, and another run from a clone of the closure, as often as
    /// [`attempts`](TransactionOptions::attempts) says. They are recognized by what the server said to the transaction
    /// itself, whatever the closure's error type is. So is a prepared statement whose result has another type since a schema
    /// change (0A000, "cached plan must not change result type"): the pool's cached statements are forgotten, and the
    /// transaction runs again, once.
    ///
    /// # SQL
    /// Two round trips besides the closure's own: `BEGIN` with all settings in one message, and COMMIT.
    ///
    /// # Errors
    /// The closure's own error, as it was, when it is not one to be retried, or was not retried;
    /// [`RetriesExhausted`](ErrorKind::RetriesExhausted) when every attempt failed;
    /// [`CommitUnknown`](ErrorKind::CommitUnknown) when the connection was lost during COMMIT; the kind of the first
    /// failed statement when the closure swallowed its error and returned `Ok`.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the transaction is rolled back. Dropped during COMMIT, it may have committed.
    ///
    /// # Longest silence
    /// The wait for a connection is bounded by [`lock_wait`](KeeperBuilder::lock_wait). Each of BEGIN, COMMIT and ROLLBACK has
    /// one [`longest_silence`](KeeperBuilder::longest_silence), and a silent connection is replaced at BEGIN. A statement of the
    /// closure has twice that, and up to a second more; looking COMMIT up has
    /// [`resolve_commit_within`](TransactionOptions::resolve_commit_within).
    #[track_caller]
    pub fn transaction_with<R, E, F, P>(
        &self,
        options: TransactionOptions<P>,
        f: F,
    ) -> impl Future<Output = Result<R, E>> + Send
    where
        P: RetryIf<E>,
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        let policy = self.policy(&options);
        let open = self.open(&options, CallSite::caller());
        async move {
            options.check()?;
            let value = transaction::run(&policy, options.retries(), &*open, f).await?;
            // Only a lock can be busy, and a group's is waited for.
            value.ok_or_else(|| Error::new(ErrorKind::Pool).into())
        }
    }

    fn open<P>(&self, options: &TransactionOptions<P>, caller: CallSite) -> Box<dyn Open> {
        if let Some(key) = options.group() {
            return Box::new(OpenLocked {
                lock: self.describe(vec![key.clone()], options, caller),
                how: LockedBy::ConflictGroup,
                group: None,
            });
        }
        let call_site = self.call_site(caller);
        Box::new(OpenPlain {
            connections: Arc::clone(&self.inner.advisory.connections),
            begin: self.begin(options, call_site.as_ref()),
            call_site,
            lock_wait: self.inner.lock_wait,
        })
    }

    fn describe<P>(
        &self,
        keys: Vec<LockKey>,
        options: &TransactionOptions<P>,
        caller: CallSite,
    ) -> LockDescription {
        let call_site = self.call_site(caller);
        let begin = self.begin(options, call_site.as_ref());
        LockDescription::new(
            Arc::clone(&self.inner.advisory),
            keys,
            self.inner.lock_wait,
            begin,
            call_site,
        )
    }

    fn call_site(&self, caller: CallSite) -> Option<CallSite> {
        self.inner.call_sites.then_some(caller)
    }

    fn begin<P>(&self, options: &TransactionOptions<P>, call_site: Option<&CallSite>) -> Begin {
        options.begin(Some(self.inner.names.of(call_site)))
    }

    fn policy<P>(&self, options: &TransactionOptions<P>) -> Policy {
        self.inner.advisory.runner.policy(options)
    }
}

/// Reading the state of the server.
#[cfg(feature = "monitor")]
impl Keeper {
    /// Looks at the server's sessions and locks, over the [side connection](KeeperBuilder::side_connection) where
    /// there is one. Nothing is sent before it is asked something.
    #[must_use]
    pub fn monitor(&self) -> crate::monitor::Monitor {
        crate::monitor::Monitor::new(Arc::clone(&self.inner.advisory.connections))
    }
}

/// Acting on sessions.
#[cfg(feature = "resolver")]
impl Keeper {
    /// Clears a pile-up of lock waits as a policy says: as [`Monitor::resolver`](crate::Monitor::resolver) of its [`monitor`](Self::monitor).
    #[must_use = "does nothing until it is run"]
    pub fn resolver(&self, policy: crate::resolver::ResolverPolicy) -> crate::resolver::Resolver {
        self.monitor().resolver(policy)
    }

    /// Starts a task that reports leaked advisory locks, idle sessions that block others, and lock waits that will never
    /// end. It only reports them unless the policy allows it to act. As [`Monitor::watchdog`](crate::Monitor::watchdog)
    /// of its [`monitor`](Self::monitor), with the waits searched among sessions of this keeper's
    /// [application](KeeperBuilder::application).
    ///
    /// # Errors
    /// As [`Monitor::watchdog`](crate::Monitor::watchdog).
    pub fn watchdog(
        &self,
        policy: crate::resolver::watchdog::WatchdogPolicy,
    ) -> Result<crate::resolver::watchdog::Watchdog, Error> {
        let policy = policy.default_zombie_application(&self.inner.names.of(None));
        self.monitor().watchdog(policy)
    }
}

/// Changing schemas and rows while other sessions use them.
#[cfg(feature = "schema")]
impl Keeper {
    /// Schema changes that do not block other sessions for long. Nothing is sent before one is awaited.
    #[track_caller]
    pub fn schema(&self) -> crate::schema::Schema {
        crate::schema::Schema::new(self.env(CallSite::caller()))
    }

    /// Describes a change of all rows of a table, in the order of its key and in batches that block other sessions only briefly.
    /// The key is the name of a column, or an array of names.
    #[track_caller]
    pub fn backfill(
        &self,
        table: impl Into<crate::postgres::TableName>,
        key: impl Into<crate::backfill::BackfillKey>,
    ) -> crate::backfill::Backfill {
        let env = self.env(CallSite::caller());
        let policy = self.policy(&TransactionOptions::new());
        crate::backfill::Backfill::new(env, policy, table.into(), key.into())
    }

    fn env(&self, caller: CallSite) -> crate::schema::Env {
        let call_site = self.call_site(caller);
        crate::schema::Env {
            advisory: Arc::clone(&self.inner.advisory),
            application_name: self.inner.names.of(call_site.as_ref()),
            call_site,
            lock_wait: self.inner.lock_wait,
            jitter: Arc::clone(&self.inner.advisory.runner.jitter),
        }
    }
}

/// What several processes agree on.
#[cfg(feature = "coordination")]
impl Keeper {
    /// Fencing tokens: numbers that increase with each tenure of a lock. Nothing is sent before it is set up.
    #[track_caller]
    pub fn fencing(&self) -> crate::coordination::Fencing {
        crate::coordination::Fencing::new(self.coordination(CallSite::caller()))
    }

    /// One leader among all processes: `keeper.leader("scheduler").run(async |term| …)`. Its term's number is a fencing token, so
    /// [`fencing`](Self::fencing) has to be set up.
    #[track_caller]
    pub fn leader(&self, name: impl Into<String>) -> crate::coordination::Leader {
        let coordination = self.coordination(CallSite::caller());
        crate::coordination::Leader::new(coordination, name.into())
    }

    /// A number of permits that all processes share: `keeper.semaphore("thumbnails", 4).acquire()`. All have to name the same
    /// number.
    #[track_caller]
    pub fn semaphore(
        &self,
        name: impl Into<String>,
        permits: u32,
    ) -> crate::coordination::Semaphore {
        let coordination = self.coordination(CallSite::caller());
        crate::coordination::Semaphore::new(coordination, name.into(), permits)
    }

    /// Work that runs once in each period, over all processes: `keeper.once("nightly", a_day).run(async |tx| …)`.
    #[track_caller]
    pub fn once(&self, name: impl Into<String>, period: Duration) -> crate::coordination::Once {
        let coordination = self.coordination(CallSite::caller());
        crate::coordination::Once::new(coordination, name.into(), period)
    }

    fn coordination(&self, caller: CallSite) -> crate::coordination::Coordination {
        let call_site = self.call_site(caller);
        crate::coordination::Coordination {
            advisory: Arc::clone(&self.inner.advisory),
            application_name: self.inner.names.of(call_site.as_ref()),
            call_site,
            lock_wait: self.inner.lock_wait,
            lines: Arc::clone(&self.inner.lines),
        }
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper")
            .field("application", &self.inner.names.of(None))
            .field("lock_wait", &self.inner.lock_wait)
            .finish_non_exhaustive()
    }
}

/// Configures a [`Keeper`].
#[must_use = "call `.build()` to create the keeper"]
pub struct KeeperBuilder {
    pool: Pool,
    side: Option<SideConnection>,
    application: String,
    call_sites: bool,
    lock_wait: Duration,
    longest_silence: Duration,
    heartbeat: HeartbeatOptions,
    #[cfg(feature = "incidents")]
    sampling: crate::sampler::SamplerOptions,
    #[cfg(feature = "coordination")]
    coordination_schema: String,
}

impl KeeperBuilder {
    /// What stands before the call site in `application_name`, so that operators know whose backend it is;
    /// `lockkeeper` by default. Anything but printable ASCII becomes `?`; where a long path needs the room, it is
    /// shortened to 24 bytes.
    pub fn application(mut self, name: impl Into<String>) -> Self {
        self.application = name.into();
        self
    }

    /// Whether `application_name` carries the caller's file and line while a lock or a transaction is held; it does by
    /// default. Turn it off where metrics are labelled by `application_name` and each value costs.
    pub fn call_sites(mut self, on: bool) -> Self {
        self.call_sites = on;
        self
    }

    /// A connection beside the pool, for cancelling and looking while the pool's own connections are stuck. It is
    /// opened when it is first needed, and there is one for the keeper, and up to three while it is busy: cancel requests,
    /// samples of the watcher and questions of the monitor do not wait for one another. Those beyond the first are closed
    /// when none is busy any more.
    ///
    /// Without it cancel requests go unencrypted, as libpq's did before version 17; with `sslmode=require`, which refuses
    /// that, and for whatever else needs a query, a connection of the pool is borrowed, if there is a free one. Give it where the server is reached through TLS only, or through a pooler, in whose stead
    /// it should name the server itself. Over TCP, call [`tcp_timeouts`](crate::tcp_timeouts) on its `Config`.
    pub fn side_connection<T>(mut self, config: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send + Sync,
        T::TlsConnect: Send + Sync,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.side = Some(SideConnection::new(SideConfig { config, tls }));
        self
    }

    /// How long a lock is waited for, in all, where the call does not say; 10 seconds by default.
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.lock_wait = wait;
        self
    }

    /// How long the server may be silent before its connection counts as lost; 15 seconds by default, at least 100 ms.
    ///
    /// - A message of this crate (BEGIN, COMMIT, an unlock, a question) that has no answer for so long ends with an error.
    ///   A lock that is waited for has its own bound, [`lock_wait`](Self::lock_wait).
    /// - A statement of the caller may take as long as it likes. When it has been silent for so long, another connection
    ///   asks whether its backend is still executing it. If the backend is not, or if nothing answers for the same time
    ///   again, the statement ends with the driver's error for a closed connection.
    ///
    /// The connection is closed then, and the pool may open another. The other connection is the
    /// [`side_connection`](Self::side_connection), or else one of the pool; where all of those are in use, the pool opens one
    /// more for the question.
    pub fn longest_silence(mut self, silence: Duration) -> Self {
        self.longest_silence = silence.max(Duration::from_millis(100));
        self
    }

    /// How often the connection of an idle [`SessionGuard`](crate::SessionGuard) is asked whether it lives and still holds its
    /// locks; 5 seconds by default, at least 100 ms. `None` for never: then a server that vanishes without a word is noticed
    /// only when the connection is used.
    ///
    /// The heartbeat is one small query. It is not sent in a transaction, and not while a statement of the caller runs. It
    /// also keeps the session from `idle_session_timeout`: it is sent at least twice in that time, unless that is shorter than
    /// half a second. Where the caller may have begun a transaction by hand, another connection is asked first whether the
    /// session idles outside of one; if none can be had, the heartbeat is left out.
    ///
    /// # SQL
    /// A SELECT of `pg_backend_pid()`, of `idle_session_timeout`, and of the guard's rows in `pg_locks` (of its first hundred
    /// keys; of none where the role may not read that).
    pub fn heartbeat(mut self, interval: impl Into<Option<Duration>>) -> Self {
        let interval = interval.into();
        self.heartbeat.interval = interval.map(|interval| interval.max(LEAST_HEARTBEAT));
        self
    }

    /// How long the answer to a [`heartbeat`](Self::heartbeat) may take before the locks count as lost; 8 seconds by default,
    /// at least 100 ms. A lock on a server that falls silent is reported as lost after at most the interval and this, so
    /// after 13 seconds by default.
    pub fn heartbeat_patience(mut self, patience: Duration) -> Self {
        self.heartbeat.patience = patience.max(LEAST_HEARTBEAT);
        self
    }

    /// The keeper. Nothing is opened or sent before it is used.
    #[must_use]
    pub fn build(self) -> Keeper {
        crate::meter::describe();
        #[cfg(feature = "incidents")]
        let transactions = Arc::new(crate::sampler::ActiveTransactions::default());
        #[cfg(feature = "incidents")]
        let observer = Some(Arc::clone(&transactions) as _);
        #[cfg(not(feature = "incidents"))]
        let observer = None;
        let connections = Connections::new(
            self.pool,
            self.side,
            observer,
            self.longest_silence,
            self.heartbeat,
        );
        #[cfg(feature = "coordination")]
        connections.set_tables_schema(self.coordination_schema);
        #[cfg(feature = "incidents")]
        let reporter = Some(crate::sampler::Sampler::new(
            Arc::clone(&connections),
            transactions,
            self.sampling,
        ) as _);
        #[cfg(not(feature = "incidents"))]
        let reporter = None;
        Keeper {
            inner: Arc::new(Inner {
                advisory: Advisory::new(connections, Runner::new(reporter)),
                names: ApplicationNames::new(self.application),
                call_sites: self.call_sites,
                lock_wait: self.lock_wait,
                #[cfg(feature = "coordination")]
                lines: Arc::default(),
            }),
        }
    }
}

/// Where coordination keeps what outlives a session.
#[cfg(feature = "coordination")]
impl KeeperBuilder {
    /// The schema of the tables `lockkeeper_fencing`, `lockkeeper_fencing_server` and `lockkeeper_once`; `public` by
    /// default. All processes have to name the same one. It has to exist before the tables are set up.
    pub fn coordination_schema(mut self, schema: impl Into<String>) -> Self {
        self.coordination_schema = schema.into();
        self
    }
}

/// Reports of deadlocks, lock timeouts and long waits.
#[cfg(feature = "incidents")]
impl KeeperBuilder {
    /// Is given every [`Incident`](crate::Incident): deadlocks, lock timeouts and long waits of transactions run by
    /// [`transaction`](Keeper::transaction), [`transaction_with`](Keeper::transaction_with) and
    /// [`with_advisory_lock`](Keeper::with_advisory_lock), those that were retried too.
    ///
    /// It is called on a thread where blocking does no harm, one report after another, and never holds up or fails a
    /// transaction: while it is slow, up to 64 reports wait and later ones are dropped; a panic is contained. Each report
    /// is also one `tracing` event of level `WARN` and target `lockkeeper::incident`.
    ///
    /// # Examples
    /// ```no_run
    /// # fn example(pool: lockkeeper::deadpool_postgres::Pool) {
    /// let keeper = lockkeeper::Keeper::builder(pool)
    ///     .on_incident(|incident| eprintln!("{incident}"))
    ///     .build();
    /// # }
    /// ```
    pub fn on_incident(
        mut self,
        f: impl Fn(&crate::incident::Incident) + Send + Sync + 'static,
    ) -> Self {
        self.sampling.sink = Some(Arc::new(f));
        self
    }

    /// After how long a transaction's wait for a lock is reported although it goes on; 10 seconds by default, `None` for
    /// never.
    pub fn long_wait(mut self, wait: impl Into<Option<Duration>>) -> Self {
        self.sampling.long_wait = wait.into();
        self
    }

    /// Whether reports show the literals in statements. They do not by default: literals are data, and reports end up in
    /// logs and trackers.
    pub fn show_literals(mut self, show: bool) -> Self {
        self.sampling.literals = show;
        self
    }

    /// Whether to look at the server while transactions wait, which is what gives a report its evidence; on by default.
    ///
    /// A task looks at statements that have run for 100 ms, ten times a second, in one query for all of them, on the
    /// [`side_connection`](Self::side_connection); where there is none, on a connection of the pool if one is to
    /// be had within 20 ms. While no transaction is running it sleeps.
    pub fn watch(mut self, watch: bool) -> Self {
        self.sampling.enabled = watch;
        self
    }
}

impl fmt::Debug for KeeperBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperBuilder")
            .field("application", &self.application)
            .field("lock_wait", &self.lock_wait)
            .finish_non_exhaustive()
    }
}
