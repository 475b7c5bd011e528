//! Issuing and checking fencing tokens.

use std::time::Duration;

use super::set_up::{SetUp, set_up};
use super::sql::fencing::{self as sql, FencingTables, IssuedRow};
use super::{Coordination, FencingToken, plain, table};
use crate::advisory::SessionGuard;
use crate::connection::Connections;
use crate::error::{
    Error, ErrorKind, classify, is_insufficient_privilege, is_missing_table, is_undefined_function,
};
use crate::key::LockKey;
use crate::key::names::named;
use crate::mode::AdvisoryMode;
use crate::transaction::Tx;

/// Numbers that increase with each tenure of a lock, so that what is written under a lock that was lost can be refused.
///
/// From [`Keeper::fencing`](crate::Keeper::fencing).
///
/// A session lock ends with its connection, and its holder learns of that a moment later, or much later if its process was
/// frozen or its network was cut. Until then two processes believe that they hold the lock. The holder therefore takes a
/// [`FencingToken`], passes it along with every write, and what is written to refuses any token that is older than the newest
/// it has seen.
///
/// - [`SessionGuard::fencing_token`] issues it.
/// - [`Tx::check_fencing`] checks it in a transaction in the same database.
/// - Elsewhere the protected resource checks it. A table in another database has a column for the newest token:
///
/// ```sql
/// ALTER TABLE account ADD COLUMN fence bigint NOT NULL DEFAULT 0;
/// -- $2 is FencingToken::to_i64. No row is updated where a newer token was seen: the writer has lost its lock.
/// UPDATE account SET balance = $3, fence = $2 WHERE id = $1 AND fence <= $2;
/// ```
///
/// # What a token is, and why
/// It is a row of the table `lockkeeper_fencing`, counted up and committed by the session that holds the lock, before the
/// token is used; with `synchronous_commit` at least `local`, since a commit that was not flushed is lost in a crash, and the
/// number would be issued again. A number of a sequence can repeat in the same way.
///
/// A failover can lose commits that had not reached the standby. So the counter has the server's timeline before it, which
/// each promotion increases.
///
/// `pg_upgrade`, a dump that is restored and a copy of the database set the tokens back, and all are found. The table
/// `lockkeeper_fencing_server` has the identifier of the cluster, the database and the table. No token is issued by others
/// ([`FencingNotSetUp`](ErrorKind::FencingNotSetUp)) until [`set_up`](Self::set_up) has raised the epoch.
///
/// # Limits
/// - Nothing in the server tells that tokens were lost in these cases. Call [`floor`](Self::floor) there with the newest token
///   that was seen:
///   - two standbys of one primary were promoted independently, which can choose the same timeline;
///   - a copy of the data directory was started in the original's place;
///   - a dump was restored that is older than the last failover, or than the last time that the epoch was raised (so also the
///     same dump twice);
///   - rows were restored into the tables that were there (`TRUNCATE` and `pg_restore --data-only`).
/// - Rows are never deleted, so there is one for each key that ever had a token. If they must be, call `set_up` with the newest
///   token of all as [`floor`](Self::floor), and let no leader run meanwhile: where there is no row, a new leader does not
///   wait for the one before.
/// - A lock of a transaction needs no token: what its transaction writes is rolled back if the lock is lost.
///
/// # Examples
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// keeper.fencing().set_up().await?;
/// let mut guard = keeper.advisory_lock("ledger").session().acquire().await?;
/// let token = guard.fencing_token().await?;
/// // On any connection, as long as no later holder of the lock has a token:
/// keeper
///     .transaction(async |tx| {
///         tx.check_fencing(token).await?;
///         tx.execute("UPDATE ledger SET total = total + 1", &[]).await?;
///         Ok::<_, lockkeeper::Error>(())
///     })
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is set up before `set_up` is awaited"]
pub struct Fencing {
    coordination: Coordination,
    floor: Option<i64>,
}

impl Fencing {
    pub(crate) fn new(coordination: Coordination) -> Self {
        Self {
            coordination,
            floor: None,
        }
    }

    /// Has [`set_up`](Self::set_up) raise the epoch so far that every token from then on is newer than this one: a
    /// [`FencingToken`], or its two numbers. It holds when `set_up` returns: tokens that are being issued meanwhile are waited
    /// for.
    pub fn floor(mut self, token: impl Into<(i64, i64)>) -> Self {
        self.floor = Some(token.into().0);
        self
    }

    /// Makes the tables of the fencing tokens where they are missing, and has this server issue them. Where nothing is
    /// missing it changes nothing, so every process may call it when it starts.
    ///
    /// It also raises the epoch where cluster, database or table is another one than before (`pg_upgrade`, a restored dump), or
    /// where a [`floor`](Self::floor) asks for it.
    ///
    /// # SQL
    /// One transaction under an advisory lock of its own: two queries, and what [`sql`](Self::sql) shows, as far as something
    /// is missing; where the epoch is raised, under `LOCK TABLE` of `lockkeeper_fencing`, with the keeper's
    /// [`lock_wait`](crate::KeeperBuilder::lock_wait) as `lock_timeout`. Roles that take tokens need `SELECT, INSERT, UPDATE` on `lockkeeper_fencing`, `SELECT` on
    /// `lockkeeper_fencing_server` and `EXECUTE` on `pg_control_system()`, which every role has by default.
    ///
    /// # Errors
    /// [`Database`](ErrorKind::Database) with what to grant, where the role may not do it;
    /// [`LockTimeout`](ErrorKind::LockTimeout) where a token that is being issued is not committed in time; as
    /// [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire) and [`XactGuard::commit`](crate::XactGuard::commit) besides.
    ///
    /// # Cancel safety
    /// Dropped, it is rolled back. Dropped during COMMIT, it may have committed. It can be called again.
    ///
    /// # Longest silence
    /// As [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire), and then as a transaction.
    pub async fn set_up(&self) -> Result<(), Error> {
        let tables = tables(self.coordination.connections())?;
        let what = SetUp {
            tables: &[&tables.tokens, &tables.server],
            create: sql::create(&tables),
            is_done: Some(sql::is_adopted(&tables, self.floor)),
            finish: Some(sql::adopt(&tables, self.floor)),
            more_rights: IDENTITY,
            documented: "Fencing::sql",
        };
        set_up(&self.coordination, &what).await
    }

    /// The statements of [`set_up`](Self::set_up), for a role that may run them; they can be run again at any time.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) where no schema can have the name that the keeper was built with.
    pub fn sql(&self) -> Result<String, Error> {
        let tables = tables(self.coordination.connections())?;
        let (create, adopt) = (sql::create(&tables), sql::adopt_alone(&tables, self.floor));
        Ok(format!("{create};\n{adopt};\n"))
    }
}

fn tables(connections: &Connections) -> Result<FencingTables, Error> {
    Ok(FencingTables {
        tokens: table(connections, sql::TOKENS)?,
        server: table(connections, sql::SERVER)?,
    })
}

/// What tells which cluster it is needs a right, too.
const IDENTITY: &str = ", and GRANT EXECUTE ON FUNCTION pg_control_system()";

/// What to do about an error of a statement that needs the tables.
fn explain(error: tokio_postgres::Error, tables: &FencingTables, key: &LockKey) -> Error {
    if is_undefined_function(&error) {
        return Error::new(ErrorKind::FencingNotSetUp)
            .with_key(key)
            .with_detail("the server cannot say which timeline it is on, as PostgreSQL does with pg_walfile_name")
            .with_source(error);
    }
    let failure = classify(&error);
    let error = Error::from(error).with_key(key);
    if is_missing_table(&error) {
        return error.with_kind(ErrorKind::FencingNotSetUp).with_detail(format!(
            "there is no {}; call keeper.fencing().set_up() once, or have the SQL of Fencing::sql run",
            tables.tokens
        ));
    }
    if is_insufficient_privilege(&error) {
        return error.with_detail(format!(
            "fencing tokens need GRANT SELECT, INSERT, UPDATE ON {}, GRANT SELECT ON {}, USAGE on their schema{IDENTITY}",
            tables.tokens, tables.server
        ));
    }
    match failure.kind() {
        ErrorKind::LockTimeout => error.with_detail(
            "a transaction that has checked an older fencing token has not ended, or the token of this lock is taken elsewhere",
        ),
        _ => error,
    }
}

/// Issues the next token of a guard's lock. It is committed when this returns.
///
/// Cancel safety: dropped, no token is issued, or one is left out; the guard keeps its lock.
pub(super) async fn issue(guard: &mut SessionGuard) -> Result<IssuedRow, Error> {
    let key = guard.held_keys()[0].clone();
    if guard.held_keys().len() > 1 {
        return Err(Error::config(
            "a fencing token is of one lock, and the guard holds several; take the lock that counts by itself",
        )
        .with_key(&key));
    }
    if guard.mode() != AdvisoryMode::Exclusive {
        return Err(Error::config(
            "a shared lock has several holders at a time, so that their tenures have no order; fencing tokens are of \
             exclusive locks",
        )
        .with_key(&key));
    }
    let tables = tables(guard.session().connections())?;
    // Who has checked the token before is waited for, until its COMMIT.
    let wait = guard.lock_wait().max(Duration::from_millis(1));
    let text = sql::issue(&tables, key.id());
    let (tables, key) = (&tables, &key);
    let text = &text;
    // READ COMMITTED: the statement sees what the holder before has committed. And COMMIT is run only if the connection
    // still holds the lock.
    let issued = guard
        .transaction_with(plain().lock_timeout(wait), async |tx| {
            let reply = tx.session().message_waiting(text, wait).await;
            let reply = reply.map_err(|error| explain(error, tables, key))?;
            sql::read_issued(&reply).ok_or_else(|| {
                Error::new(ErrorKind::FencingNotSetUp).with_key(key).with_detail(format!(
                    "{} is of another server or table (pg_upgrade, a restored dump), or there is a token of a later epoch; call \
                     keeper.fencing().set_up()",
                    tables.server
                ))
            })
        })
        .await?;
    *guard.issued() = Some(issued.token);
    Ok(issued)
}

/// Records that the holder of a token has given its lock up in order, as far as the token is the newest.
///
/// Cancel safety: dropped, it is recorded or not; the guard keeps its lock.
pub(super) async fn resign(guard: &mut SessionGuard, token: FencingToken) -> Result<(), Error> {
    let key = token.key();
    let tables = tables(guard.session().connections())?;
    let text = sql::resign(&tables, key.id(), token.into());
    let (tables, key, text) = (&tables, &key, &text);
    let wait = guard.lock_wait().max(Duration::from_millis(1));
    guard
        .transaction_with(plain().lock_timeout(wait), async |tx| {
            let reply = tx.session().message_waiting(text, wait).await;
            reply.map(drop).map_err(|error| explain(error, tables, key))
        })
        .await
}

/// Fencing tokens.
impl SessionGuard {
    /// The fencing token of this tenure: greater than that of each earlier holder of the same lock, through lost connections,
    /// other processes, hand-overs, restarts of the server and failover. See [`Fencing`].
    ///
    /// The first call issues it, and later calls of the same guard give the same one. The guard has to hold one key,
    /// exclusively.
    ///
    /// It waits for transactions that have checked an older token ([`Tx::check_fencing`]) to end: what they write comes before
    /// it.
    ///
    /// # SQL
    /// One transaction on the guard's connection: BEGIN, a message that waits for those who have checked a token
    /// (`pg_advisory_xact_lock`) and updates the lock's row in `lockkeeper_fencing`, and
    /// COMMIT, which is run only if the connection still holds the lock, with `synchronous_commit` at least `local`.
    ///
    /// # Errors
    /// [`FencingNotSetUp`](ErrorKind::FencingNotSetUp), before anything is written, with what to do;
    /// [`LockLost`](ErrorKind::LockLost); [`LockTimeout`](ErrorKind::LockTimeout) when a transaction that has checked an older
    /// token outlasts the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait); [`Config`](ErrorKind::Config) for a shared
    /// guard, one of several keys, or one with a transaction left open; otherwise as
    /// [`transaction_with`](Self::transaction_with).
    ///
    /// # Cancel safety
    /// May be dropped at any point; the lock stays held. A number may be left out then.
    ///
    /// # Longest silence
    /// As [`transaction_with`](Self::transaction_with), and the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait) for the
    /// statement.
    pub async fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        let key = self.held_keys()[0].clone();
        if self.is_lost() {
            return Err(Error::new(ErrorKind::LockLost).with_key(&key));
        }
        let token = match *self.issued() {
            Some(token) => token,
            None => issue(self).await?.token,
        };
        Ok(FencingToken::of(&key, token))
    }
}

/// Fencing tokens.
impl Tx {
    /// Fails where a newer token of the same lock was seen. Otherwise no newer one is issued until this transaction ends.
    ///
    /// So what the transaction writes is ordered with the tenures: it is committed before a later holder of the lock has its
    /// token, or it is not committed. The guard may be lost meanwhile, and may be of another connection or process.
    ///
    /// A token that is newer than all that this database knows, because another server has issued it, is noted, and is the
    /// newest from the COMMIT on.
    ///
    /// # SQL
    /// `pg_advisory_xact_lock_shared` of a key of its own (`"lockkeeper fencing"` and the key's number), so that a token that is
    /// being issued has its turn, and `SELECT … FOR SHARE` of the lock's row in `lockkeeper_fencing`: one round trip. Two more
    /// where the row is older.
    ///
    /// # Errors
    /// [`Fenced`](ErrorKind::Fenced), with both tokens; [`FencingNotSetUp`](ErrorKind::FencingNotSetUp);
    /// [`Serialization`](ErrorKind::Serialization) where the transaction's snapshot is older than the newest token, after which
    /// a transaction of the keeper is run again; the server's otherwise. The transaction has to be rolled back then.
    ///
    /// # Cancel safety
    /// As the query methods.
    ///
    /// # Longest silence
    /// As a statement of the caller: it may wait for a row lock, as long as the transaction's
    /// [`lock_timeout`](crate::TransactionOptions::lock_timeout) says.
    pub async fn check_fencing(&self, token: FencingToken) -> Result<(), Error> {
        let key = named(token.key());
        let tables = tables(self.session().connections())?;
        let own = token.into();
        let newest_locked = sql::newest_locked(&tables, key.id(), own);
        let look = async || {
            let reply = self.simple_query(&newest_locked).await;
            let reply = reply.map_err(|error| explain(error, &tables, &key))?;
            Ok::<_, Error>(sql::read_newest(&reply))
        };
        let mut newest = look().await?;
        if newest.is_none() {
            let note = self.simple_query(&sql::note(&tables, key.id(), own)).await;
            note.map_err(|error| explain(error, &tables, &key))?;
            newest = look().await?;
        }
        match newest {
            Some(newest) if newest == own => Ok(()),
            newest => {
                let newest = newest.map_or_else(
                    || "unknown".to_owned(),
                    |newest| FencingToken::of(&key, newest).to_string(),
                );
                Err(Error::new(ErrorKind::Fenced)
                    .with_key(&key)
                    .with_detail(format!("{token} is not the newest, which is {newest}")))
            }
        }
    }
}
