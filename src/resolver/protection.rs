//! The sessions that are left alone, and why.

use std::fmt;
use std::sync::Arc;

/// Why a session is not signalled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protection {
    /// It is the session that monitors and sends the signals.
    SignallingSession,
    /// It is the side connection of a [`Keeper`](crate::Keeper), which holds nothing that other sessions wait for.
    SideConnection,
    /// A live guard or transaction of this process owns it.
    OwnSession,
    /// It sends the write-ahead log to a standby, an archive or a subscriber, or applies what it receives.
    Replication,
    /// It takes a backup.
    Backup,
    /// It is an autovacuum that has to complete before transaction ids run out; it would only start again.
    WraparoundVacuum,
    /// It is an autovacuum worker. It may be cancelled, as the server itself does when one blocks another session, but
    /// is never terminated.
    Autovacuum,
    /// It is another of the server's own processes, such as the checkpointer or a background worker.
    ServerProcess,
    /// Its transaction has committed and waits for a synchronous standby to receive it. A signal would not undo the
    /// commit, but would report it to the client before the standby has it.
    Committing,
    /// It belongs to a superuser other than the role that signals.
    Superuser,
    /// It changes the schema, or holds the lock of a program that does.
    Migration,
    /// It builds an index, or rewrites a table (CLUSTER, VACUUM FULL).
    IndexBuild,
    /// Its `application_name` matches this pattern of the policy.
    Application(Arc<str>),
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::SignallingSession => "it is the session that looks",
            Self::SideConnection => "it is a keeper's side connection",
            Self::OwnSession => "a guard or a transaction of this process has it",
            Self::Replication => "it is replication",
            Self::Backup => "it is a backup",
            Self::WraparoundVacuum => "it is an autovacuum to prevent wraparound",
            Self::Autovacuum => "it is an autovacuum, which is never terminated",
            Self::ServerProcess => "it is one of the server's own processes",
            Self::Committing => "it has committed and waits for a synchronous standby",
            Self::Superuser => "it is of another role, which is a superuser",
            Self::Migration => "it is a migration",
            Self::IndexBuild => "it builds an index or writes a table anew",
            Self::Application(pattern) => {
                return write!(f, "its application_name matches {pattern:?}");
            }
        };
        f.write_str(text)
    }
}

/// The protection that the backend type alone gives.
pub(crate) fn of_backend_type(backend_type: &str) -> Option<Protection> {
    match backend_type {
        "client backend" | "autovacuum worker" => None,
        "walsender" | "walreceiver" | "startup" | "slotsync worker" => {
            Some(Protection::Replication)
        }
        // `logical replication launcher`, `… worker` (15 and before), `… apply worker`, `… tablesync worker`, …
        kind if kind.starts_with("logical replication") => Some(Protection::Replication),
        _ => Some(Protection::ServerProcess),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clients_and_autovacuum_are_ever_signalled() {
        assert_eq!(of_backend_type("client backend"), None);
        assert_eq!(of_backend_type("autovacuum worker"), None);
        for kind in [
            "walsender",
            "walreceiver",
            "startup",
            "logical replication worker",
            "logical replication parallel worker",
            "logical replication launcher",
        ] {
            assert_eq!(
                of_backend_type(kind),
                Some(Protection::Replication),
                "{kind}"
            );
        }
        for kind in [
            "checkpointer",
            "autovacuum launcher",
            "parallel worker",
            "pg_cron launcher",
            "",
        ] {
            assert_eq!(
                of_backend_type(kind),
                Some(Protection::ServerProcess),
                "{kind}"
            );
        }
    }
}
