//! Cancelling or terminating exactly the session that was observed.

use std::fmt;

use super::Monitor;
use super::protection::{self, Protection};
use crate::error::Error;
use crate::graph::Backend;
use crate::resolver::sql::signal::{self, Exclusions, Signal, SignalReply};

/// The result of asking the server to signal a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SignalOutcome {
    /// The signal was sent. The backend acts on it as soon as it can, which is at once while it waits for a lock or for
    /// its client.
    Signalled,
    /// The session has ended. Its process id may now be that of another backend, which was not signalled.
    Gone,
    /// The session exists, but it is no longer in the observed state: what blocked others has ended or continued.
    Changed(
        /// What is different.
        Box<str>,
    ),
    /// There is no statement to cancel: the session waits for its client. Only terminating it would end its
    /// transaction.
    NothingRuns,
    /// This role may not signal that session, or sees too little of it to be sure which session it would signal.
    NotPermitted {
        /// The GRANT that would permit it, or what makes an existing grant effective, or that no GRANT would.
        needs: Box<str>,
    },
    /// The session is one of those that are left alone.
    Protected(Protection),
    /// It is not a session but a prepared transaction, which has no backend to signal.
    Prepared {
        /// The statement that ends it. Run it only if you know that the transaction manager will not: a prepared
        /// transaction may have been promised to other participants.
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
    /// Cancels the statement that a session runs in the observed transaction: `pg_cancel_backend`.
    ///
    /// One statement compares the process id, the start of the backend and the start of its transaction with the
    /// observed values and sends the signal, and only while a statement runs. So another backend that now has the
    /// process id is not signalled, nor is the session once that transaction has ended. These are never signalled:
    /// replication, base backups, a session whose last statement has begun a backup (`pg_backup_start`), autovacuum to
    /// prevent wraparound, a commit that waits for a synchronous standby, the server's own processes, and the
    /// connection that sends the signal.
    ///
    /// A session that is idle in a transaction runs no statement: see [`terminate`](Self::terminate).
    ///
    /// # SQL
    /// A probe that finds a responsive connection, so that the signal is not sent twice; then one statement over
    /// `pg_stat_activity`, `pg_roles` and the progress views that includes the signal.
    ///
    /// # Errors
    /// As [`activity`](Self::activity). It is not an error if no signal was sent.
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// If the call is dropped before it completes, the signal may or may not be sent.
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
        self.signal(Signal::Cancel, backend, Exclusions::default())
            .await
    }

    /// Ends a session, and so its transaction: `pg_terminate_backend`.
    ///
    /// As safe as [`cancel`](Self::cancel). A session that was observed idle, in a transaction or not, is signalled
    /// only if it has been idle ever since. Autovacuum workers are never terminated.
    ///
    /// # SQL
    /// As [`cancel`](Self::cancel).
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    ///
    /// # Longest silence
    /// As [`cancel`](Self::cancel).
    ///
    /// # Cancel safety
    /// As [`cancel`](Self::cancel).
    pub async fn terminate(&self, backend: &Backend) -> Result<SignalOutcome, Error> {
        self.signal(Signal::Terminate, backend, Exclusions::default())
            .await
    }

    pub(super) async fn signal(
        &self,
        signal: Signal,
        backend: &Backend,
        exclusions: Exclusions,
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
        let sql = signal::statement(signal, backend, pid, exclusions);
        let reply = self.connections().ask_once(&sql).await?;
        let outcome = outcome(
            signal,
            exclusions,
            backend,
            signal::read_reply(&reply).as_ref(),
        );
        // Not of target `lockkeeper::resolver`, which has one event for each entry of a `RunLog`.
        match &outcome {
            SignalOutcome::Signalled => {
                tracing::info!(target: "lockkeeper::monitor::signal", pid, ?signal, "signalled a session");
            }
            _ => {
                tracing::debug!(target: "lockkeeper::monitor::signal", pid, ?signal, %outcome, "no signal sent");
            }
        }
        Ok(outcome)
    }
}

/// The meaning of the server's reply, the most certain conclusion first.
fn outcome(
    signal: Signal,
    exclusions: Exclusions,
    seen: &Backend,
    reply: Option<&SignalReply>,
) -> SignalOutcome {
    let Some(reply) = reply else {
        return SignalOutcome::Gone;
    };
    if reply.signalled {
        return SignalOutcome::Signalled;
    }
    if let Some(protection) = protection(exclusions, reply) {
        return SignalOutcome::Protected(protection);
    }
    if reply.hidden {
        return SignalOutcome::NotPermitted {
            needs: reply.needs.as_deref().unwrap_or_default().into(),
        };
    }
    if seen.backend_start().is_none() {
        return SignalOutcome::Changed(
            "it was hidden when it was seen, and is not any more".into(),
        );
    }
    if !reply.same_backend {
        return SignalOutcome::Gone;
    }
    if !reply.same_transaction {
        return SignalOutcome::Changed("it is not in the transaction that it was seen in".into());
    }
    if let Some(needs) = &reply.needs {
        return SignalOutcome::NotPermitted {
            needs: needs.as_str().into(),
        };
    }
    if !reply.same_state {
        return match signal {
            Signal::Cancel => SignalOutcome::NothingRuns,
            Signal::Terminate => {
                let state = reply.state.as_deref().unwrap_or("unknown");
                SignalOutcome::Changed(format!("it has gone on since, and is {state} now").into())
            }
        };
    }
    // All conditions held, but the server found no process: it ended in between.
    SignalOutcome::Gone
}

fn protection(exclusions: Exclusions, reply: &SignalReply) -> Option<Protection> {
    let always = [
        (reply.own_session, Protection::SignallingSession),
        (reply.side, Protection::SideConnection),
        (reply.committing, Protection::Committing),
        (reply.backup, Protection::Backup),
        (reply.wraparound, Protection::WraparoundVacuum),
    ];
    if let Some((_, protection)) = always.into_iter().find(|(is_so, _)| *is_so) {
        return Some(protection);
    }
    if let Some(kind) = &reply.other_kind {
        return protection::of_backend_type(kind).or(Some(Protection::Autovacuum));
    }
    if reply.builds && exclusions.builds {
        return Some(Protection::IndexBuild);
    }
    (reply.superuser && exclusions.superusers).then_some(Protection::Superuser)
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

    fn reply() -> SignalReply {
        SignalReply {
            signalled: false,
            same_backend: true,
            same_transaction: true,
            same_state: true,
            state: Some("active".into()),
            hidden: false,
            own_session: false,
            side: false,
            other_kind: None,
            wraparound: false,
            backup: false,
            committing: false,
            builds: false,
            superuser: false,
            needs: None,
        }
    }

    fn of(reply: &SignalReply) -> SignalOutcome {
        outcome(
            Signal::Terminate,
            Exclusions::default(),
            &seen(),
            Some(reply),
        )
    }

    #[test]
    fn a_reply_says_why_no_signal_was_sent() {
        assert_eq!(
            outcome(Signal::Cancel, Exclusions::default(), &seen(), None),
            SignalOutcome::Gone
        );
        let other = SignalReply {
            same_backend: false,
            same_transaction: false,
            ..reply()
        };
        assert_eq!(of(&other), SignalOutcome::Gone);
        let ended = SignalReply {
            same_transaction: false,
            needs: Some("GRANT x".into()),
            ..reply()
        };
        assert!(matches!(of(&ended), SignalOutcome::Changed(_)));
        let moved = SignalReply {
            same_state: false,
            ..reply()
        };
        assert!(matches!(of(&moved), SignalOutcome::Changed(what) if what.contains("active")));
        assert_eq!(
            outcome(Signal::Cancel, Exclusions::default(), &seen(), Some(&moved)),
            SignalOutcome::NothingRuns
        );
        let not_permitted = SignalReply {
            needs: Some("GRANT x".into()),
            ..reply()
        };
        assert_eq!(of(&not_permitted).to_string(), "not permitted: GRANT x");
    }

    #[test]
    fn some_protections_always_apply_and_others_only_if_requested() {
        let vacuum = SignalReply {
            other_kind: Some("autovacuum worker".into()),
            ..reply()
        };
        assert_eq!(
            of(&vacuum),
            SignalOutcome::Protected(Protection::Autovacuum)
        );
        let wraparound = SignalReply {
            wraparound: true,
            ..vacuum
        };
        assert_eq!(
            of(&wraparound),
            SignalOutcome::Protected(Protection::WraparoundVacuum)
        );
        let build = SignalReply {
            builds: true,
            superuser: true,
            signalled: false,
            ..reply()
        };
        let exclusions = Exclusions {
            superusers: true,
            ..Exclusions::default()
        };
        assert_eq!(
            outcome(Signal::Cancel, exclusions, &seen(), Some(&build)),
            SignalOutcome::Protected(Protection::Superuser)
        );
        let exclusions = Exclusions {
            builds: true,
            ..exclusions
        };
        assert_eq!(
            outcome(Signal::Cancel, exclusions, &seen(), Some(&build)),
            SignalOutcome::Protected(Protection::IndexBuild)
        );
    }
}
