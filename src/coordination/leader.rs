//! Becoming the one leader among all processes.

use std::time::Duration;

use super::fencing::issue;
use super::sql::fencing::IssuedRow;
use super::term::Confirmed;
use super::{Coordination, FencingToken, Leadership, Term};
use crate::advisory::SessionGuard;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::transaction::AsyncFunc;

/// Between two attempts of a candidate.
const PAUSE: Duration = Duration::from_secs(1);
/// Less could not be kept on a busy machine.
const LEAST: Duration = Duration::from_millis(30);

/// One leader among all processes of a database, described.
///
/// From [`Keeper::leader`](crate::Keeper::leader). The leader holds a session lock, `("lockkeeper leader", name)`, on a
/// connection of the pool. The others try to take it, once a second by default, and hold no connection meanwhile. The number
/// of a term is a [`FencingToken`], so [`Fencing::set_up`](crate::Fencing::set_up) comes first.
///
/// # When there can be two leaders
/// The server frees the lock when the leader's session ends, and the leader learns of that later: its network may be cut, or its
/// process frozen. Two times keep its successor apart from it:
///
/// - **The leader steps down** when the server has not confirmed the lock for so long
///   ([`step_down_after`](Self::step_down_after), by default two thirds of
///   [`longest_silence`](crate::KeeperBuilder::longest_silence): 10 seconds). It asks three times as often.
///   [`Term::is_leader`] compares the clock itself, so it is right at once in a process that was frozen and resumes.
/// - **The successor waits** for [`takeover_delay`](Self::takeover_delay) (by default `longest_silence`, 15 seconds, or half as
///   long again as `step_down_after`, if that is longer) from its grant of the lock until its term begins, and its token is
///   issued before it waits. It need not wait where the leader before it has [resigned](Leadership::resign), or was its own
///   [`run`](Self::run), or where there has been none.
///
/// As long as the delay of each process is longer than the time after which the others step down, no two processes have
/// `is_leader()` true at the same time, to the precision with which their clocks run. What remains without tokens:
///
/// - An effect that was begun before the term ended: between the check and the effect a process can be frozen for any time.
/// - A machine that was suspended, until its clock is set.
/// - A delay that is shorter than another process's `step_down_after`: two leaders for as long as it is shorter. So give all
///   processes the same times, and when they are to be longer, the delay first.
/// - A failover in which the old primary lives on, and a leader stays connected to it: two leaders until one of the servers is
///   stopped. Also where the standby had not received the very first token of the name.
///
/// A fencing token closes all of these, where what is written checks it: [`Tx::check_fencing`](crate::Tx::check_fencing) in the
/// same database, and [`Fencing`](crate::Fencing) shows how elsewhere.
///
/// # Examples
/// ```no_run
/// # async fn next_job(_: &lockkeeper::Keeper) -> Result<(), lockkeeper::Error> { Ok(()) }
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// keeper.fencing().set_up().await?;
/// keeper
///     .leader("scheduler")
///     .run(async |term| {
///         loop {
///             keeper
///                 .transaction(async |tx| {
///                     tx.check_fencing(term.token()).await?;
///                     tx.execute("UPDATE job SET started = now() WHERE due < now()", &[]).await?;
///                     Ok::<_, lockkeeper::Error>(())
///                 })
///                 .await?;
///             tokio::time::sleep(std::time::Duration::from_secs(1)).await;
///         }
///     })
///     .await
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a description does nothing until it campaigns or runs"]
pub struct Leader {
    coordination: Coordination,
    name: String,
    step_down_after: Duration,
    takeover_delay: Option<Duration>,
    poll_interval: Duration,
    wait: Option<Duration>,
}

impl Leader {
    pub(crate) fn new(coordination: Coordination, name: String) -> Self {
        let silence = coordination.connections().longest_silence();
        Self {
            coordination,
            name,
            step_down_after: silence / 3 * 2,
            takeover_delay: None,
            poll_interval: PAUSE,
            wait: None,
        }
    }

    /// After how long without the server's word the leader's term ends; two thirds of the keeper's
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) by default, at least 30 ms.
    pub fn step_down_after(mut self, time: Duration) -> Self {
        self.step_down_after = time;
        self
    }

    /// How long a successor waits between its grant of the lock and its term, where the leader before it has not resigned; the
    /// keeper's [`longest_silence`](crate::KeeperBuilder::longest_silence) by default, or one and a half times
    /// [`step_down_after`](Self::step_down_after) if that is longer. It has to be longer than every process's
    /// `step_down_after`; than its own, this is checked.
    pub fn takeover_delay(mut self, delay: Duration) -> Self {
        self.takeover_delay = Some(delay);
        self
    }

    /// Between two attempts of a candidate, give or take a quarter; a second by default, at least 10 ms.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.poll_interval = interval;
        self
    }

    /// How long [`campaign`](Self::campaign) waits until its term begins, the takeover delay included; without end by default.
    /// [`run`](Self::run) takes no notice of it.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    fn key(&self) -> LockKey {
        LockKey::from(("lockkeeper leader", &self.name))
    }

    /// From the grant of the lock to the term, where the leader before may believe still that it leads.
    fn delay(&self) -> Duration {
        self.takeover_delay.unwrap_or_else(|| {
            let longer = self
                .step_down_after
                .saturating_add(self.step_down_after / 2);
            let silence = self.coordination.connections().longest_silence();
            silence.max(longer)
        })
    }

    fn check(&self) -> Result<(), Error> {
        let flaw = if self.step_down_after < LEAST {
            "step_down_after has to be at least 30 ms"
        } else if self.poll_interval < Duration::from_millis(10) {
            "poll_interval has to be at least 10 ms"
        } else if self.delay() <= self.step_down_after {
            "takeover_delay has to be longer than step_down_after, or there would be two leaders"
        } else {
            return Ok(());
        };
        Err(Error::config(flaw).with_key(&self.key()))
    }

    /// Waits until this process leads.
    ///
    /// # SQL
    /// Once in each [`poll_interval`](Self::poll_interval) a `pg_try_advisory_lock`. When it is granted, a transaction that
    /// issues the term's token, and until the takeover delay is over a statement that takes and returns the lock once more.
    ///
    /// # Errors
    /// [`FencingNotSetUp`](ErrorKind::FencingNotSetUp); [`Config`](ErrorKind::Config) for times that are too short, or a takeover
    /// delay that is not longer than [`step_down_after`](Self::step_down_after); [`LockTimeout`](ErrorKind::LockTimeout) when
    /// [`wait`](Self::wait) is over, also during the takeover delay; otherwise as
    /// [`SessionAdvisoryLock::try_acquire`](crate::SessionAdvisoryLock::try_acquire) and
    /// [`SessionGuard::fencing_token`](crate::SessionGuard::fencing_token), for instance while the server restarts. A lock that is
    /// lost again before its term begins is no error.
    ///
    /// # Cancel safety
    /// May be dropped at any point: a lock that was granted is released.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) for each message, and the keeper's
    /// [`lock_wait`](crate::KeeperBuilder::lock_wait) for a connection. The candidacy has no end but that of
    /// [`wait`](Self::wait).
    pub async fn campaign(self) -> Result<Leadership, Error> {
        self.elect(self.wait, None).await
    }

    /// Leads whenever this process is elected, until the work is done: through lost connections, restarts and failover.
    ///
    /// Each term runs a clone of the closure. **When a term ends, its future is dropped where it stands**, and the process is a
    /// candidate again; what it has spawned continues, and has to ask [`Term::is_leader`] or [`Term::loss`]. When the closure
    /// returns, the leader resigns, and its result is the result of this.
    ///
    /// A closure that fails because its connection or its lock was lost often notices before the term does. So when it returns
    /// an error the server is asked; if the term has ended too, the process is a candidate again.
    ///
    /// Errors of the server that can pass (no connection, a restart, a standby that is not promoted yet) are logged, and tried
    /// again after a pause.
    ///
    /// # SQL
    /// As [`campaign`](Self::campaign) and [`Leadership::resign`]; while it leads, three times in
    /// [`step_down_after`](Self::step_down_after) a statement that takes and returns the lock once more.
    ///
    /// # Errors
    /// The closure's own, from a term that lasts. [`FencingNotSetUp`](ErrorKind::FencingNotSetUp),
    /// [`Config`](ErrorKind::Config), and what else does not pass by itself.
    ///
    /// # Cancel safety
    /// May be dropped at any point, which ends the term and the work. The successor waits for its takeover delay then.
    ///
    /// # Longest silence
    /// As [`campaign`](Self::campaign) for each message. It ends with the work.
    pub async fn run<R, E, F>(self, f: F) -> Result<R, E>
    where
        F: AsyncFnOnce(Term) -> Result<R, E>
            + AsyncFunc<Term, Result<R, E>, Fut: Send>
            + Send
            + Clone,
        E: From<Error> + Send,
        R: Send,
    {
        let mut last = None;
        loop {
            let leadership = match self.elect(None, last).await {
                Ok(leadership) => leadership,
                Err(error) if can_pass(error.kind()) => {
                    tracing::warn!(key = %self.key(), %error, "candidacy failed, and is repeated");
                    tokio::time::sleep(self.pause()).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            last = Some(leadership.token());
            let term = leadership.term().clone();
            let Some(result) = term.run(f.clone()(term.clone())).await else {
                continue;
            };
            // Cancel safety: dropped, the leadership ends.
            let mut is_over = result.is_ok();
            if !is_over {
                is_over = leadership.confirm().await;
            }
            if is_over {
                if let Err(error) = leadership.resign().await {
                    tracing::debug!(key = %self.key(), %error, "the work is done, and the resignation not recorded");
                }
                return result;
            }
        }
    }

    /// Three quarters to five quarters of the interval: candidates should not come at the same time.
    fn pause(&self) -> Duration {
        let random = self.coordination.advisory.runner.jitter.next();
        let part = u32::try_from(random % 512).unwrap_or_default();
        self.poll_interval.saturating_mul(768 + part) / 1024
    }

    /// `last` is the token of this candidate's own last term, which has ended.
    async fn elect(
        &self,
        wait: Option<Duration>,
        last: Option<FencingToken>,
    ) -> Result<Leadership, Error> {
        self.check()?;
        let end = wait.map(Deadline::after);
        loop {
            let lock = self.coordination.lock(self.key()).session();
            if let Some(guard) = lock.try_acquire().await?
                && let Some(leadership) = self.take_over(guard, last, end.as_ref()).await?
            {
                return Ok(leadership);
            }
            let mut pause = self.pause();
            if let Some(end) = &end {
                if end.has_passed() {
                    return Err(self.timeout(end, "another process leads"));
                }
                pause = pause.min(end.remaining());
            }
            // Cancel safety: nothing is held between two attempts.
            tokio::time::sleep(pause).await;
        }
    }

    fn timeout(&self, end: &Deadline, why: &str) -> Error {
        Error::new(ErrorKind::LockTimeout)
            .with_key(&self.key())
            .with_detail(why)
            .with_waited(end.waited())
    }

    /// Begins a term with a lock that was granted, after the takeover delay; `None` where the lock is lost again.
    ///
    /// Cancel safety: dropped, the lock is released, and the next one waits as long.
    async fn take_over(
        &self,
        mut guard: SessionGuard,
        last: Option<FencingToken>,
        end: Option<&Deadline>,
    ) -> Result<Option<Leadership>, Error> {
        // At once: what the leader before writes with its token is refused from now on.
        let issued = match issue(&mut guard).await {
            Ok(issued) => issued,
            Err(error) if matches!(error.kind(), ErrorKind::LockLost | ErrorKind::LockTimeout) => {
                tracing::debug!(key = %self.key(), %error, "the lock was granted, and no token");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let key = self.key();
        let token = FencingToken::of(&key, issued.token);
        let delay = match may_live(&issued, last.map(Into::into)) {
            true => self.delay(),
            false => Duration::ZERO,
        };
        let delay = Deadline::after(delay);
        loop {
            let sent = Confirmed::now();
            if let Err(error) = guard.confirm().await {
                tracing::debug!(%key, %error, "the lock was lost before the term has begun");
                return Ok(None);
            }
            if delay.has_passed() {
                return Leadership::begin(guard, token, sent, self.step_down_after).map(Some);
            }
            let mut pause = (self.step_down_after / 3).min(delay.remaining());
            if let Some(end) = end {
                if end.has_passed() {
                    let why =
                        "the takeover delay is not over, and the leader before has not resigned";
                    return Err(self.timeout(end, why));
                }
                pause = pause.min(end.remaining());
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Whether the leader before may believe still that it leads.
///
/// The token before may not be the last one: where it is of an earlier epoch, those after it, and what became of their terms, can
/// have been lost in a failover; and its row may have been read just before it was updated once more.
fn may_live(issued: &IssuedRow, own: Option<(i64, i64)>) -> bool {
    let Some(before) = issued.before else {
        return false;
    };
    let is_last = before.0 == issued.token.0 && before.1.checked_add(1) == Some(issued.token.1);
    !(is_last && (issued.resigned || own == Some(before)))
}

/// Whether an error of a candidate can pass by itself.
fn can_pass(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::LockTimeout
            | ErrorKind::Deadlock
            | ErrorKind::Serialization
            | ErrorKind::CommitUnknown
            | ErrorKind::ConnectionLost
            | ErrorKind::LockLost
            | ErrorKind::OutOfLocks
            | ErrorKind::ReadOnlyServer
            | ErrorKind::Cancelled
            | ErrorKind::Pool
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_ended_for_sure_is_not_waited_for() {
        let issued = |before, resigned| IssuedRow {
            token: (2, 8),
            before,
            resigned,
        };
        assert!(!may_live(&issued(None, false), None));
        assert!(may_live(&issued(Some((2, 7)), false), None));
        assert!(!may_live(&issued(Some((2, 7)), true), None));
        assert!(!may_live(&issued(Some((2, 7)), false), Some((2, 7))));
        // Another one has led since.
        assert!(may_live(&issued(Some((2, 7)), false), Some((2, 6))));
        assert!(may_live(&issued(Some((2, 6)), true), None));
        assert!(may_live(&issued(Some((2, 6)), false), Some((2, 6))));
        assert!(may_live(&issued(Some((2, i64::MAX)), true), None));
        // Before a failover, which may have lost later terms.
        assert!(may_live(&issued(Some((1, 7)), true), None));
        assert!(may_live(&issued(Some((1, 7)), false), Some((1, 7))));
    }
}
