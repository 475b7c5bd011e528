//! Texts that a connection needs to be given only once.

use std::sync::Arc;

/// How much the first message of a transaction, or a `try`, asks besides what it is for, and how.
///
/// All but `Full` are for a connection that has answered a full probe, and ask only what can change between messages: a
/// server does not turn into a standby under its connections, and a direct connection does not turn into a pooled one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// Everything, and nothing is granted on a standby or behind a pooler that is refused.
    Full(Refusal),
    Minimal,
    /// The same, and the statement is prepared under this name in the same message.
    Prepare(Arc<str>),
    /// By the statement of this name: parsing the text is a good part of what a `try` costs.
    Execute(Arc<str>),
}

/// Behind which poolers nothing is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    None,
    /// Behind all, which answer with another pid than that of the login, but those in front of these servers.
    Pooled {
        login_pid: i32,
        but_before: Vec<Arc<str>>,
    },
}

/// A statement that is worth preparing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PreparedName {
    /// The `try` for one key, by scope, mode and key space; with a session lock's go its unlock and its handing over.
    Try {
        session: bool,
        shared: bool,
        pair: bool,
    },
    /// The begin of a transaction, by the settings it makes.
    Begin(u8),
}

impl PreparedName {
    /// A name of its own among the statements of `owner`.
    pub(crate) fn name(self, owner: &str) -> String {
        match self {
            Self::Begin(shape) => format!("lockkeeper_{owner}_b{shape}"),
            Self::Try {
                session,
                shared,
                pair,
            } => format!(
                "lockkeeper_{owner}_{}{}{}",
                if session { 's' } else { 'x' },
                if shared { 's' } else { 'e' },
                if pair { '4' } else { '8' }
            ),
        }
    }
}

/// What the statement is called that hands a lock over, and goes with the `try` of this name.
pub(crate) fn hand_over_of(statement: &str) -> String {
    format!("{statement}_h")
}

/// What the unlock is called that goes with the `try` of this name.
pub(crate) fn unlock_of(statement: &str) -> String {
    format!("{statement}_u")
}
