//! The calls that are compared, as each of the peers would have them written.

use std::fmt;
use std::time::{Duration, Instant};

use lockkeeper::TransactionOptions;
use tokio_postgres::Client;

use crate::{Failure, Peer, Pools};

const SELECT: &str = "SELECT balance FROM account WHERE id = $1";
const UPDATE: &str = "UPDATE account SET balance = balance + 1 WHERE id = $1";
const LOCK: &str = "SELECT pg_advisory_xact_lock($1)";
const SESSION_LOCK: &str = "SELECT pg_advisory_lock($1)";
const SESSION_UNLOCK: &str = "SELECT pg_advisory_unlock($1)";
/// The timeouts of [`Case::OptionsAlike`], as whoever writes it by hand would set them: a round trip of its own, since the
/// driver's BEGIN takes nothing with it.
const SET: &str = "SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '5s'; \
                   SET LOCAL idle_in_transaction_session_timeout = '10s'; \
                   SET LOCAL application_name = 'benches case.rs:42'";
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// What is said of a call that [`Case::is_for`] excludes.
const NOT_MADE: &str = "this call is not made by this peer";
/// The key where a peer takes a number and not a name.
const KEY: i64 = 42;

/// A call, nobody else wanting its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Case {
    /// The least that can be asked: what one round trip costs here.
    Nothing,
    /// `with_advisory_lock` around the SELECT of one row.
    LockedSelect,
    /// `with_advisory_lock` around the UPDATE of one row.
    LockedUpdate,
    /// `acquire` and `commit`, nothing in between.
    AcquireCommit,
    /// A session lock acquired and released.
    Session,
    /// A session lock acquired, and the guard dropped.
    SessionDropped,
    /// A transaction with the SELECT of one row.
    TransactionSelect,
    /// A transaction with the UPDATE of one row.
    TransactionUpdate,
    /// `transaction_with` three timeouts and the call site around the SELECT of one row; the others' plain transaction.
    OptionsSelect,
    /// The same with the UPDATE of one row.
    OptionsUpdate,
    /// `transaction_with` three timeouts and the call site around the SELECT of one row; the others set the same.
    OptionsAlike,
}

impl Case {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Nothing,
        Self::LockedSelect,
        Self::LockedUpdate,
        Self::AcquireCommit,
        Self::Session,
        Self::SessionDropped,
        Self::TransactionSelect,
        Self::TransactionUpdate,
        Self::OptionsSelect,
        Self::OptionsUpdate,
        Self::OptionsAlike,
    ];

    /// Those of [`ALL`](Self::ALL) that are transactions without a lock, and what one round trip costs.
    pub const TRANSACTIONS: [Self; 6] = [
        Self::Nothing,
        Self::TransactionSelect,
        Self::TransactionUpdate,
        Self::OptionsSelect,
        Self::OptionsUpdate,
        Self::OptionsAlike,
    ];

    /// Its row's head.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "an empty statement: one round trip",
            Self::LockedSelect => "`with_advisory_lock`, one SELECT in it",
            Self::LockedUpdate => "`with_advisory_lock`, one UPDATE in it",
            Self::AcquireCommit => "`acquire`, `commit`",
            Self::Session => "session lock: `acquire`, `release`",
            Self::SessionDropped => "session lock: `acquire`, drop",
            Self::TransactionSelect => "`transaction`, one SELECT in it",
            Self::TransactionUpdate => "`transaction`, one UPDATE in it",
            Self::OptionsSelect => "`transaction_with` three timeouts, one SELECT in it",
            Self::OptionsUpdate => "`transaction_with` three timeouts, one UPDATE in it",
            Self::OptionsAlike => "… one SELECT in it, the others SET LOCAL the same",
        }
    }

    /// A name without spaces.
    #[must_use]
    pub fn id(self) -> &'static str {
        match self {
            Self::Nothing => "empty_statement",
            Self::LockedSelect => "with_advisory_lock_select",
            Self::LockedUpdate => "with_advisory_lock_update",
            Self::AcquireCommit => "acquire_commit",
            Self::Session => "session_acquire_release",
            Self::SessionDropped => "session_acquire_drop",
            Self::TransactionSelect => "transaction_select",
            Self::TransactionUpdate => "transaction_update",
            Self::OptionsSelect => "transaction_with_select",
            Self::OptionsUpdate => "transaction_with_update",
            Self::OptionsAlike => "transaction_with_select_set_local",
        }
    }

    /// Whether the peer has such a thing: by hand there is no guard to drop, and nobody else is asked for nothing.
    #[must_use]
    pub fn is_for(self, peer: Peer) -> bool {
        match self {
            Self::Nothing => peer == Peer::ByHand,
            Self::SessionDropped => peer != Peer::ByHand,
            _ => true,
        }
    }

    /// Those that have such a thing.
    pub fn peers(self) -> impl Iterator<Item = Peer> {
        Peer::ALL.into_iter().filter(move |peer| self.is_for(*peer))
    }

    fn statement(self) -> Option<&'static str> {
        match self {
            Self::LockedSelect
            | Self::TransactionSelect
            | Self::OptionsSelect
            | Self::OptionsAlike => Some(SELECT),
            Self::LockedUpdate | Self::TransactionUpdate | Self::OptionsUpdate => Some(UPDATE),
            _ => None,
        }
    }

    /// Whether a lock is taken before the statement.
    fn locks(self) -> bool {
        matches!(
            self,
            Self::LockedSelect | Self::LockedUpdate | Self::AcquireCommit
        )
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Makes the table that the statements are about, a row for each peer.
///
/// # Errors
/// The server's.
pub(crate) async fn prepare(client: &Client) -> Result<(), Failure> {
    client
        .batch_execute(
            "CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL); \
             INSERT INTO account SELECT id, 0 FROM generate_series(1, 100) AS id; ANALYZE account",
        )
        .await?;
    Ok(())
}

impl Pools {
    /// Makes the call `times` times, one after another, and says how long that took.
    ///
    /// # Errors
    /// The first call's that failed.
    pub async fn repeat(&self, case: Case, peer: Peer, times: u32) -> Result<Duration, Failure> {
        let started = Instant::now();
        for turn in 0..times {
            self.once(case, peer, turn).await?;
        }
        Ok(started.elapsed())
    }

    /// One call. The `turn` chooses the key where a lock may still be on its way back when the next is taken.
    pub(crate) async fn once(&self, case: Case, peer: Peer, turn: u32) -> Result<(), Failure> {
        match peer {
            Peer::Lockkeeper => self.lockkeeper(case, turn).await,
            Peer::ByHand => self.by_hand(case).await,
            Peer::Sqlx | Peer::SqlxUntested => self.sqlx_(case, peer, turn).await,
        }
    }

    async fn lockkeeper(&self, case: Case, turn: u32) -> Result<(), Failure> {
        let row = Peer::Lockkeeper.row();
        match case {
            Case::Nothing => return Err(NOT_MADE.into()),
            Case::LockedSelect => {
                self.keeper
                    .with_advisory_lock("invoice:42", async |tx| {
                        let statement = tx.prepare_cached(SELECT).await?;
                        tx.query_one(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
            Case::LockedUpdate => {
                self.keeper
                    .with_advisory_lock("invoice:42", async |tx| {
                        let statement = tx.prepare_cached(UPDATE).await?;
                        tx.execute(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
            Case::AcquireCommit => {
                let guard = self.keeper.advisory_lock("invoice:42").acquire().await?;
                guard.commit().await?;
            }
            Case::Session => {
                let lock = self.keeper.advisory_lock("invoice:42").session();
                lock.acquire().await?.release().await?;
            }
            Case::SessionDropped => {
                let name = self.name(turn);
                let lock = self.keeper.advisory_lock(name).session();
                drop(lock.acquire().await?);
            }
            Case::TransactionSelect => {
                self.keeper
                    .transaction(async |tx| {
                        let statement = tx.prepare_cached(SELECT).await?;
                        tx.query_one(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
            Case::TransactionUpdate => {
                self.keeper
                    .transaction(async |tx| {
                        let statement = tx.prepare_cached(UPDATE).await?;
                        tx.execute(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
            Case::OptionsSelect | Case::OptionsAlike => {
                self.keeper
                    .transaction_with(options(), async |tx| {
                        let statement = tx.prepare_cached(SELECT).await?;
                        tx.query_one(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
            Case::OptionsUpdate => {
                self.keeper
                    .transaction_with(options(), async |tx| {
                        let statement = tx.prepare_cached(UPDATE).await?;
                        tx.execute(&statement, &[&row]).await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
            }
        }
        Ok(())
    }

    async fn by_hand(&self, case: Case) -> Result<(), Failure> {
        let row = Peer::ByHand.row();
        let mut client = self.by_hand.get().await?;
        match case {
            Case::Nothing => client.batch_execute("").await?,
            Case::LockedSelect | Case::LockedUpdate | Case::AcquireCommit => {
                client.batch_execute("BEGIN").await?;
                let lock = client.prepare_cached(LOCK).await?;
                client.execute(&lock, &[&KEY]).await?;
                if let Some(sql) = case.statement() {
                    let statement = client.prepare_cached(sql).await?;
                    match case {
                        Case::LockedSelect => drop(client.query_one(&statement, &[&row]).await?),
                        _ => drop(client.execute(&statement, &[&row]).await?),
                    }
                }
                client.batch_execute("COMMIT").await?;
            }
            Case::Session => {
                let lock = client.prepare_cached(SESSION_LOCK).await?;
                client.execute(&lock, &[&KEY]).await?;
                let unlock = client.prepare_cached(SESSION_UNLOCK).await?;
                client.execute(&unlock, &[&KEY]).await?;
            }
            Case::SessionDropped => return Err(NOT_MADE.into()),
            Case::TransactionSelect | Case::OptionsSelect | Case::OptionsAlike => {
                let tx = client.transaction().await?;
                if case == Case::OptionsAlike {
                    tx.batch_execute(SET).await?;
                }
                let statement = tx.prepare_cached(SELECT).await?;
                tx.query_one(&statement, &[&row]).await?;
                tx.commit().await?;
            }
            Case::TransactionUpdate | Case::OptionsUpdate => {
                let tx = client.transaction().await?;
                let statement = tx.prepare_cached(UPDATE).await?;
                tx.execute(&statement, &[&row]).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    async fn sqlx_(&self, case: Case, peer: Peer, turn: u32) -> Result<(), Failure> {
        let row = peer.row();
        let pool = self.sqlx(peer);
        match case {
            Case::Nothing => return Err(NOT_MADE.into()),
            Case::Session => {
                let lock = &self.sqlx_locks[0];
                lock.acquire(pool.acquire().await?)
                    .await?
                    .release_now()
                    .await?;
                return Ok(());
            }
            Case::SessionDropped => {
                let lock = &self.sqlx_locks[self.number(turn)];
                drop(lock.acquire(pool.acquire().await?).await?);
                return Ok(());
            }
            _ => {}
        }
        let mut tx = pool.begin().await?;
        if case == Case::OptionsAlike {
            sqlx::raw_sql(SET).execute(&mut *tx).await?;
        }
        if case.locks() {
            sqlx::query(LOCK).bind(KEY).execute(&mut *tx).await?;
        }
        match case.statement() {
            Some(SELECT) => {
                sqlx::query(SELECT).bind(row).fetch_one(&mut *tx).await?;
            }
            Some(sql) => {
                sqlx::query(sql).bind(row).execute(&mut *tx).await?;
            }
            None => {}
        }
        tx.commit().await?;
        Ok(())
    }

    pub(crate) fn number(&self, turn: u32) -> usize {
        usize::try_from(turn).unwrap_or_default() % self.names.len()
    }

    pub(crate) fn name(&self, turn: u32) -> &str {
        &self.names[self.number(turn)]
    }
}

fn options() -> TransactionOptions {
    TransactionOptions::new()
        .lock_timeout(LOCK_TIMEOUT)
        .statement_timeout(STATEMENT_TIMEOUT)
        .idle_timeout(IDLE_TIMEOUT)
}
