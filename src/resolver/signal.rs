//! Cancelling and terminating one session, safely.

use std::fmt;

use super::Monitor;
use super::protection::{self, Protection};
use crate::error::Error;
use crate::graph::Backend;
use crate::resolver::sql::signal::{self, Sent, Signal, Spared};

/// What came of asking the server to signal a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SignalOutcome {
    /// The signal was sent. The backend acts on it as soon as it can, which is at once when it waits for a lock or for
    /// its client.
    Signalled,
    /// The session has ended. Its process id may be another backend's by now, which was not touched.
    Gone,
    /// The session lives, but is not in the state any more in which it was seen: what was in the way has ended or gone
    /// on.
    Changed(
        /// What is different.
        Box<str>,
    ),
    /// There is no statement to be cancelled: the session waits for its client. Only terminating it would end its
    /// transaction.
    NothingRuns,
    /// This role may not signal that session, or may not see enough of it to be sure whom it would signal.
    NotPermitted {
        /// The GRANT that would help, what gives effect to one that there is, or that none would.
        needs: Box<str>,
    },
    /// It is one of those sessions that are left alone.
    Protected(Protection),
    /// It is no session but a prepared transaction, which has no backend to be signalled.
    Prepared {
        /// The statement that ends it, for somebody who knows that its transaction manager will not: a transaction that
        /// was prepared may have been promised to others.
        by_hand: Option<Box<str>>,
    },
}

impl SignalOutcome {
    /// Whether a signal was sent.
    #[must_use]
    pub fn is_signalled(&self) -> bool {
        *self == Self::Signalled
    }
}

impl fmt::Display for SignalOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signalled => f.write_str("signalled"),
            Self::Gone => f.write_str("not signalled: the session has ended"),
            Self::Changed(what) => write!(f, "not signalled: {what}"),
            Self::NothingRuns => f.write_str("not signalled: it runs no statement to be cancelled"),
            Self::NotPermitted { needs } => write!(f, "not permitted: {needs}"),
            Self::Protected(why) => write!(f, "left alone: {why}"),
            Self::Prepared { by_hand: Some(sql) } => {
                write!(f, "a prepared transaction has no session; by hand: {sql}")
            }
            Self::Prepared { by_hand: None } => {
                f.write_str("a prepared transaction has no session; see pg_prepared_xacts")
            }
        }
    }
}

impl Monitor {
    /// Cancels the statement that a session runs, in the transaction that it was seen in: `pg_cancel_backend`.
    ///
    /// The signal is sent by the statement that compares process id, start of the backend and start of its transaction
    /// with what was seen, and only while a statement runs. So a process id that is another backend's by now is safe, and
    /// so is the session once that transaction has ended. Replication, base backups, a session whose last statement has
    /// begun a backup (`pg_backup_start`), autovacuum to prevent wraparound, a commit that
    /// waits for a synchronous standby, the server's own processes and the connection that asks are never signalled.
    ///
    /// A session that is idle in a transaction runs no statement: see [`terminate`](Self::terminate).
    ///
    /// # SQL
    /// A probe, which finds a connection that answers, so that nothing is sent twice; then one statement over
    /// `pg_stat_activity`, `pg_roles` and the views of progress, with the signal in it.
    ///
    /// # Errors
    /// As [`activity`](Self::activity). That no signal was sent is no error.
    ///
    /// # Cancel safety
    /// Dropped before it is done, the signal may or may not be sent.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let monitor = keeper.monitor();
    /// let snapshot = monitor.snapshot().await?;
    /// if let Some(root) = snapshot.roots().first() {
    ///     println!("{root}: {}", monitor.cancel(root).await?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn cancel(&self, backend: &Backend) -> Result<SignalOutcome, Error> {
        self.signal(Signal::Cancel, backend, Spared::default())
            .await
    }

    /// Ends a session, and so its transaction: `pg_terminate_backend`.
    ///
    /// As safe as [`cancel`](Self::cancel); and where the session was seen idle, in a transaction or not, it is signalled
    /// only if it has been since. Autovacuum workers are never terminated.
    ///
    /// # SQL
    /// As [`cancel`](Self::cancel).
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    ///
    /// # Cancel safety
    /// As [`cancel`](Self::cancel).
    pub async fn terminate(&self, backend: &Backend) -> Result<SignalOutcome, Error> {
        self.signal(Signal::Terminate, backend, Spared::default())
            .await
    }

    pub(super) async fn signal(
        &self,
        signal: Signal,
        backend: &Backend,
        spared: Spared,
    ) -> Result<SignalOutcome, Error> {
        let Some(pid) = backend.pid() else {
            return Ok(SignalOutcome::Prepared {
                by_hand: backend
                    .prepared_transaction()
                    .map(|gid| signal::rollback_prepared(gid).into()),
            });
        };
        if backend.is_gone() {
            return Ok(SignalOutcome::Gone);
        }
        let sql = signal::send(signal, backend, pid, spared);
        let reply = self.connections().ask_once(&sql).await?;
        let outcome = outcome(signal, spared, backend, signal::sent(&reply).as_ref());
        match &outcome {
            SignalOutcome::Signalled => {
                tracing::info!(pid, ?signal, "signalled a session");
            }
            _ => tracing::debug!(pid, ?signal, %outcome, "no signal sent"),
        }
        Ok(outcome)
    }
}

/// What the server's answer means: what is most certain first.
fn outcome(signal: Signal, spared: Spared, seen: &Backend, sent: Option<&Sent>) -> SignalOutcome {
    let Some(sent) = sent else {
        return SignalOutcome::Gone;
    };
    if sent.signalled {
        return SignalOutcome::Signalled;
    }
    if let Some(protection) = protection(spared, sent) {
        return SignalOutcome::Protected(protection);
    }
    if sent.hidden {
        return SignalOutcome::NotPermitted {
            needs: sent.lacks.as_deref().unwrap_or_default().into(),
        };
    }
    if seen.backend_start().is_none() {
        return SignalOutcome::Changed(
            "it was hidden when it was seen, and is not any more".into(),
        );
    }
    if !sent.same_backend {
        return SignalOutcome::Gone;
    }
    if !sent.same_transaction {
        return SignalOutcome::Changed("it is not in the transaction that it was seen in".into());
    }
    if let Some(needs) = &sent.lacks {
        return SignalOutcome::NotPermitted {
            needs: needs.as_str().into(),
        };
    }
    if !sent.same_state {
        return match signal {
            Signal::Cancel => SignalOutcome::NothingRuns,
            Signal::Terminate => {
                let state = sent.state.as_deref().unwrap_or("unknown");
                SignalOutcome::Changed(format!("it has gone on since, and is {state} now").into())
            }
        };
    }
    // All was as it should be, and the server found no process: it has ended in between.
    SignalOutcome::Gone
}

fn protection(spared: Spared, sent: &Sent) -> Option<Protection> {
    if sent.oneself {
        return Some(Protection::Oneself);
    }
    if sent.side {
        return Some(Protection::SideConnection);
    }
    if sent.committing {
        return Some(Protection::Committing);
    }
    if sent.backup {
        return Some(Protection::Backup);
    }
    if sent.wraparound {
        return Some(Protection::WraparoundVacuum);
    }
    if let Some(kind) = &sent.other_kind {
        return protection::of_kind(kind).or(Some(Protection::Autovacuum));
    }
    if sent.builds && spared.builds {
        return Some(Protection::IndexBuild);
    }
    (sent.superuser && spared.superusers).then_some(Protection::Superuser)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn seen() -> Backend {
        Backend {
            backend_start: Some(SystemTime::UNIX_EPOCH),
            ..Backend::unknown(7.into())
        }
    }

    fn sent() -> Sent {
        Sent {
            signalled: false,
            same_backend: true,
            same_transaction: true,
            same_state: true,
            state: Some("active".into()),
            hidden: false,
            oneself: false,
            side: false,
            other_kind: None,
            wraparound: false,
            backup: false,
            committing: false,
            builds: false,
            superuser: false,
            lacks: None,
        }
    }

    fn of(sent: &Sent) -> SignalOutcome {
        outcome(Signal::Terminate, Spared::default(), &seen(), Some(sent))
    }

    #[test]
    fn an_answer_says_what_kept_the_signal_back() {
        assert_eq!(
            outcome(Signal::Cancel, Spared::default(), &seen(), None),
            SignalOutcome::Gone
        );
        let other = Sent {
            same_backend: false,
            same_transaction: false,
            ..sent()
        };
        assert_eq!(of(&other), SignalOutcome::Gone);
        let ended = Sent {
            same_transaction: false,
            lacks: Some("GRANT x".into()),
            ..sent()
        };
        assert!(matches!(of(&ended), SignalOutcome::Changed(_)));
        let moved = Sent {
            same_state: false,
            ..sent()
        };
        assert!(matches!(of(&moved), SignalOutcome::Changed(what) if what.contains("active")));
        assert_eq!(
            outcome(Signal::Cancel, Spared::default(), &seen(), Some(&moved)),
            SignalOutcome::NothingRuns
        );
        let forbidden = Sent {
            lacks: Some("GRANT x".into()),
            ..sent()
        };
        assert_eq!(of(&forbidden).to_string(), "not permitted: GRANT x");
    }

    #[test]
    fn what_is_always_protected_and_what_only_if_asked_for() {
        let vacuum = Sent {
            other_kind: Some("autovacuum worker".into()),
            ..sent()
        };
        assert_eq!(
            of(&vacuum),
            SignalOutcome::Protected(Protection::Autovacuum)
        );
        let wraparound = Sent {
            wraparound: true,
            ..vacuum
        };
        assert_eq!(
            of(&wraparound),
            SignalOutcome::Protected(Protection::WraparoundVacuum)
        );
        let build = Sent {
            builds: true,
            superuser: true,
            signalled: false,
            ..sent()
        };
        let spared = Spared {
            superusers: true,
            ..Spared::default()
        };
        assert_eq!(
            outcome(Signal::Cancel, spared, &seen(), Some(&build)),
            SignalOutcome::Protected(Protection::Superuser)
        );
        let spared = Spared {
            builds: true,
            ..spared
        };
        assert_eq!(
            outcome(Signal::Cancel, spared, &seen(), Some(&build)),
            SignalOutcome::Protected(Protection::IndexBuild)
        );
    }
}
