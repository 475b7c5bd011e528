//! A number of permits that all processes share.

use std::sync::Arc;
use std::time::Duration;

use super::Coordination;
use super::line::Line;
use super::sql::semaphore::{MOST, NAMESPACE, PermitKeys};
use crate::advisory::SessionGuard;
use crate::connection::{Loss, Reply};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, is_insufficient_privilege};
use crate::key::LockKey;

/// Between two questions of the first in line whether a permit is free that another process held.
const PAUSE: Duration = Duration::from_millis(200);
/// The first of them after this process has released one: its unlock may be on its way still.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// How long a connection to ask on is waited for.
const SPARE: Duration = Duration::from_secs(1);

/// A number of permits that all processes of a database share, described.
///
/// From [`Keeper::semaphore`](crate::Keeper::semaphore). Each permit is a session lock of its own, so a process that crashes
/// returns its permits with its connections, and none is ever lost.
///
/// - **All have to agree on the number.** It is part of the locks' keys. Who asks for a permit while another process holds one
///   of a semaphore of the same name with another number gets an error that names both. That needs SELECT on `pg_locks`, which
///   every role has by default; without it two numbers are two semaphores.
/// - **Within a keeper waiters are served in the order in which they found it busy.** The first of them tries as soon as the
///   keeper releases a permit, and else every 200 ms. There is no order between processes.
/// - A permit occupies a connection of the pool; a waiter occupies none.
/// - The readable name is in the keys (`"lockkeeper semaphore"/"thumbnails, permit 2 of 4"`), which errors and the monitor of
///   the same process show.
///
/// # Examples
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let permit = keeper.semaphore("thumbnails", 4).acquire().await?;
/// // At most four do this at a time, in all processes together.
/// permit.release().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a description takes no permit until it is acquired"]
pub struct Semaphore {
    coordination: Coordination,
    name: String,
    permits: u32,
    wait: Duration,
}

impl Semaphore {
    pub(crate) fn new(coordination: Coordination, name: String, permits: u32) -> Self {
        Self {
            wait: coordination.lock_wait,
            coordination,
            name,
            permits,
        }
    }

    /// How long to wait in all; instead of the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait). Zero tries once.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Takes a permit, waiting for one as long as [`wait`](Self::wait) says.
    ///
    /// # SQL
    /// Three round trips if one is free: a query of `pg_locks` that shows which are, and whether all agree on the number,
    /// `pg_try_advisory_lock` of one permit's key, and the query once more. One if none is.
    ///
    /// # Errors
    /// [`LockTimeout`](ErrorKind::LockTimeout) when all are held until the wait is over; [`Config`](ErrorKind::Config) for no
    /// permits or more than 4096, and where another process has another number of them, which both are named then; otherwise as
    /// [`SessionAdvisoryLock::try_acquire`](crate::SessionAdvisoryLock::try_acquire).
    ///
    /// # Cancel safety
    /// May be dropped at any point, and loses its place in the line; a permit that was granted meanwhile is released.
    ///
    /// # Longest silence
    /// The wait, and one [`longest_silence`](crate::KeeperBuilder::longest_silence).
    pub async fn acquire(self) -> Result<SemaphorePermit, Error> {
        let attempts = Attempts::new(&self, self.wait)?;
        let deadline = Deadline::after(self.wait);
        if attempts.line.is_empty() {
            if let Some(permit) = attempts.attempt(&deadline).await? {
                return Ok(permit);
            }
            if deadline.has_passed() {
                return Err(self.timeout(&deadline));
            }
        }
        let line = Arc::clone(&attempts.line);
        // Cancel safety: place and turn are given up when this is dropped, and the next one has its turn.
        let _place = line.enter();
        let Some(_turn) = deadline.bound(Duration::ZERO, line.turn.lock()).await else {
            return Err(self.timeout(&deadline));
        };
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(permit) = attempts.attempt(&deadline).await? {
                return Ok(permit);
            }
            if deadline.has_passed() {
                return Err(self.timeout(&deadline));
            }
            // Cancel safety: nothing is held between two attempts.
            tokio::select! {
                biased;
                () = line.released.notified() => pause = FIRST_PAUSE,
                () = tokio::time::sleep(pause.min(deadline.remaining())) => pause = (2 * pause).min(PAUSE),
            }
        }
    }

    /// The same if a permit is free and no other task of this keeper waits for one; `None` otherwise. Never waits for a permit, only
    /// for a connection.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`acquire`](Self::acquire).
    ///
    /// # Longest silence
    /// The keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait), and one
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of the messages.
    pub async fn try_acquire(self) -> Result<Option<SemaphorePermit>, Error> {
        let wait = self.coordination.lock_wait;
        let attempts = Attempts::new(&self, wait)?;
        if !attempts.line.is_empty() {
            return Ok(None);
        }
        let deadline = Deadline::after(wait);
        attempts.attempt(&deadline).await
    }

    fn key(&self) -> LockKey {
        LockKey::from((NAMESPACE, &self.name))
    }

    fn timeout(&self, deadline: &Deadline) -> Error {
        Error::new(ErrorKind::LockTimeout)
            .with_key(&self.key())
            .with_detail(match self.permits {
                1 => "the one permit is held, or waited for".to_owned(),
                permits => format!("all {permits} permits are held, or waited for"),
            })
            .with_waited(deadline.waited())
    }
}

/// The attempts of one call.
struct Attempts<'a> {
    semaphore: &'a Semaphore,
    keys: PermitKeys,
    line: Arc<Line>,
    /// When no more permits are tried, also in the first attempt.
    end: Deadline,
}

impl<'a> Attempts<'a> {
    fn new(semaphore: &'a Semaphore, wait: Duration) -> Result<Self, Error> {
        let permits = semaphore.permits;
        if permits == 0 || permits > MOST {
            return Err(Error::config(format!(
                "a semaphore of {permits} permits; at least 1, at most {MOST}"
            ))
            .with_key(&semaphore.key()));
        }
        let silence = semaphore.coordination.connections().longest_silence();
        Ok(Self {
            semaphore,
            keys: PermitKeys::new(&semaphore.name, permits),
            line: semaphore.coordination.lines.of(&semaphore.name),
            end: Deadline::after(wait.saturating_add(silence)),
        })
    }

    /// A permit, if one is free.
    ///
    /// Cancel safety: dropped, what was granted is released.
    async fn attempt(&self, deadline: &Deadline) -> Result<Option<SemaphorePermit>, Error> {
        let permits = self.semaphore.permits;
        let random = self.semaphore.coordination.advisory.runner.jitter.next();
        let first = u32::try_from(random % u64::from(permits)).unwrap_or_default();
        // Before anything is taken: a call with a wrong number is refused here, and no call with the right one sees its lock.
        let held = match self.held(deadline).await {
            Ok(held) => held,
            Err(error) if error.kind() == ErrorKind::Config => return Err(error),
            // The pool's connection was dead, or all are in use. This finds another one, or fails.
            Err(error) => {
                tracing::debug!(key = %self.semaphore.key(), %error, "not known which permits are held");
                if let Some(guard) = self.try_permit(first, deadline).await? {
                    return self.admit(guard, first).await.map(Some);
                }
                match self.held(deadline).await {
                    Ok(held) => held,
                    // All connections are in use, and nothing could be taken on them.
                    Err(error) if error.kind() == ErrorKind::Pool => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        };
        for permit in (0..permits).map(|n| (first + n) % permits) {
            if held.contains(&permit) {
                continue;
            }
            if let Some(guard) = self.try_permit(permit, deadline).await? {
                return self.admit(guard, permit).await.map(Some);
            }
            if self.end.has_passed() {
                break;
            }
        }
        Ok(None)
    }

    /// The permits that are held, as far as this role may know.
    ///
    /// # Errors
    /// `Config` where there is another number of them elsewhere.
    async fn held(&self, deadline: &Deadline) -> Result<Vec<u32>, Error> {
        let connections = self.semaphore.coordination.connections();
        let spare = SPARE.min(deadline.remaining());
        match connections.ask_within(spare, &self.keys.held()).await {
            Ok(reply) => self.read(&reply),
            // It may not know. So each is tried.
            Err(error) if is_insufficient_privilege(&error) => Ok(Vec::new()),
            Err(error) => Err(error.with_key(&self.semaphore.key())),
        }
    }

    async fn try_permit(
        &self,
        permit: u32,
        deadline: &Deadline,
    ) -> Result<Option<SessionGuard>, Error> {
        let Semaphore {
            coordination, name, ..
        } = self.semaphore;
        let key = self.keys.key(name, permit);
        // Only a connection is waited for.
        let lock = coordination.lock_within(key, deadline.remaining());
        lock.session().try_acquire().await
    }

    /// Gives a permit out, unless another process has another number of them.
    ///
    /// Each holds its lock before it asks, so that of two who disagree at least the later one sees the other.
    async fn admit(&self, guard: SessionGuard, number: u32) -> Result<SemaphorePermit, Error> {
        let permit = SemaphorePermit {
            loss: guard.loss(),
            guard: Some(guard),
            line: Arc::clone(&self.line),
            number,
        };
        let reply = match permit.guard() {
            Some(guard) => guard.session().message(&self.keys.held()).await,
            None => return Ok(permit),
        };
        let checked = match reply.map_err(Error::from) {
            Ok(reply) => self.read(&reply).map(drop),
            Err(error) if is_insufficient_privilege(&error) => Ok(()),
            Err(error) => Err(error.with_key(&self.semaphore.key())),
        };
        match checked {
            Ok(()) => Ok(permit),
            Err(error) => {
                // The error is the disagreement, also if the permit was lost meanwhile.
                drop(permit.release().await);
                Err(error)
            }
        }
    }

    fn read(&self, reply: &Reply) -> Result<Vec<u32>, Error> {
        self.keys.read_held(reply).map_err(|others| {
            Error::config(format!(
                "this call has a semaphore of {} permits, and it is held elsewhere as one of {others}",
                self.semaphore.permits
            ))
            .with_key(&self.semaphore.key())
        })
    }
}

/// One of the permits of a [`Semaphore`].
///
/// It is a session lock on a connection of the pool, and lives no longer than that: [`is_lost`](Self::is_lost) and
/// [`loss`](Self::loss) tell.
///
/// # Dropping
/// The permit is released at once, without waiting.
#[must_use = "dropping the permit releases it at once"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct SemaphorePermit {
    // `None` after the end.
    guard: Option<SessionGuard>,
    loss: Loss,
    line: Arc<Line>,
    number: u32,
}

impl SemaphorePermit {
    getters! {
        /// Which one it is, from 0: no two that are held at a time have the same number, so it can stand for a slot, a port or a
        /// folder.
        number: u32;
    }

    fn guard(&self) -> Option<&SessionGuard> {
        self.guard.as_ref()
    }

    /// Whether the permit's connection has ended, and the permit with it: another process may have it.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.guard().is_none_or(SessionGuard::is_lost)
    }

    /// A future that completes when the permit is lost, or returned: see [`SessionGuard::loss`].
    pub fn loss(&self) -> Loss {
        self.loss.clone()
    }

    /// Returns the permit, and reports whether it was held to the end.
    ///
    /// # SQL
    /// As [`SessionGuard::release`].
    ///
    /// # Errors
    /// As [`SessionGuard::release`].
    ///
    /// # Cancel safety
    /// As [`SessionGuard::release`].
    ///
    /// # Longest silence
    /// As [`SessionGuard::release`].
    pub async fn release(mut self) -> Result<(), Error> {
        match self.guard.take() {
            // The next one is told when `self` is dropped: after this.
            Some(guard) => guard.release().await,
            None => Ok(()),
        }
    }
}

impl Drop for SemaphorePermit {
    fn drop(&mut self) {
        drop(self.guard.take());
        self.line.released.notify_one();
    }
}
