//! How a transaction begins.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{IsolationLevel, SimpleQueryMessage};

use crate::connection::sql::server::{
    FRESH, IS_FRESH, SERVER, Server, XACT_START, XACT_START_VALUE, server,
};
use crate::connection::sql::{PreparedName, Probe};
use crate::deadline::timeout_millis;
use crate::postgres::sql::{
    Message, fields, is_true, literal, parsed, push_literal, push_select_fields, rows, set_config,
    set_local,
};

pub(crate) const PID_VALUE: &str = "pg_catalog.pg_backend_pid()";

/// [`PID_VALUE`] as a column.
pub(crate) const PID: &str = "pg_catalog.pg_backend_pid() AS pid";

/// What a transaction begins with: one message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Begin {
    pub(crate) isolation: Option<IsolationLevel>,
    pub(crate) read_only: Option<bool>,
    pub(crate) deferrable: Option<bool>,
    pub(crate) application_name: Option<Arc<str>>,
    pub(crate) lock_timeout: Option<Duration>,
    pub(crate) statement_timeout: Option<Duration>,
    pub(crate) idle_in_transaction_session_timeout: Option<Duration>,
}

impl Begin {
    /// What bounds each wait for a lock, where that is known.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        let timeouts = [self.lock_timeout, self.statement_timeout];
        timeouts.into_iter().flatten().min()
    }

    /// `BEGIN …; SET LOCAL …; `: all that is set ends with the transaction.
    pub(crate) fn message(&self) -> String {
        let mut sql = self.message_bare();
        for (setting, value) in self.settings() {
            value.set_local(&mut sql, setting);
        }
        sql
    }

    /// The same without `application_name`, for a statement after it that sets it.
    pub(crate) fn message_unnamed(&self) -> String {
        let mut sql = self.message_bare();
        for (setting, value) in self.settings() {
            if let Value::Timeout(_) = value {
                value.set_local(&mut sql, setting);
            }
        }
        sql
    }

    /// How many statements [`message_unnamed`](Self::message_unnamed) has.
    pub(crate) fn statements_unnamed(&self) -> usize {
        let timeouts = self
            .settings()
            .filter(|(_, value)| matches!(value, Value::Timeout(_)));
        1 + timeouts.count()
    }

    /// The statement that is worth preparing for it: transactions that set the same settings can begin with one. `None`
    /// where nothing is set.
    pub(crate) fn prepared_name(&self) -> Option<PreparedName> {
        let shape = self
            .all_settings()
            .iter()
            .enumerate()
            .map(|(n, (_, value))| u8::from(value.is_some()) << n)
            .sum();
        (shape > 0).then_some(PreparedName::Begin(shape))
    }

    /// `BEGIN …; `
    fn message_bare(&self) -> String {
        let mut sql = String::with_capacity(512);
        sql.push_str("BEGIN");
        if let Some(level) = self.isolation {
            sql.push_str(" ISOLATION LEVEL ");
            sql.push_str(isolation_name(level));
        }
        match self.read_only {
            Some(true) => sql.push_str(" READ ONLY"),
            Some(false) => sql.push_str(" READ WRITE"),
            None => {}
        }
        match self.deferrable {
            Some(true) => sql.push_str(" DEFERRABLE"),
            Some(false) => sql.push_str(" NOT DEFERRABLE"),
            None => {}
        }
        sql.push_str("; ");
        sql
    }

    fn settings(&self) -> impl Iterator<Item = (&'static str, Value<'_>)> {
        self.all_settings()
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
    }

    fn all_settings(&self) -> [(&'static str, Option<Value<'_>>); 4] {
        [
            ("lock_timeout", self.lock_timeout.map(Value::Timeout)),
            (
                "statement_timeout",
                self.statement_timeout.map(Value::Timeout),
            ),
            (
                "idle_in_transaction_session_timeout",
                self.idle_in_transaction_session_timeout.map(Value::Timeout),
            ),
            (
                "application_name",
                self.application_name.as_deref().map(Value::Name),
            ),
        ]
    }
}

/// What a setting is set to.
#[derive(Clone, Copy)]
enum Value<'a> {
    Timeout(Duration),
    Name(&'a str),
}

impl Value<'_> {
    fn set_local(self, sql: &mut String, setting: &str) {
        match self {
            Self::Timeout(timeout) => {
                set_local(sql, setting, &timeout_millis(timeout).to_string());
            }
            Self::Name(name) => set_local(sql, setting, &literal(name)),
        }
    }
}

/// Begins a transaction and says on what: one message.
pub(crate) fn begin_transaction(begin: &Begin, probe: &Probe) -> Message {
    let (Probe::Prepare(statement) | Probe::Execute(statement)) = probe else {
        let mut sql = begin.message();
        let _ = write!(sql, "SELECT {FRESH}{PID}, {XACT_START}");
        if let Probe::Full(_) = probe {
            sql.push_str(SERVER);
        }
        return sql.into();
    };
    // What is set by the statement is not set before it.
    let mut sql = begin.message_bare();
    if let Probe::Prepare(_) = probe {
        let _ = write!(sql, "PREPARE {statement} (");
        for n in 0..begin.settings().count() {
            sql.push_str(if n > 0 { ", " } else { "" });
            sql.push_str("pg_catalog.text");
        }
        sql.push_str(") AS ");
        let sets: Vec<_> = (begin.settings().enumerate())
            .map(|(n, (name, _))| set_config(name, &format!("${}", n + 1), true))
            .collect();
        let set = sets.join(" OPERATOR(pg_catalog.||) ");
        push_select_fields(&mut sql, &[XACT_START_VALUE, IS_FRESH, PID_VALUE, &set]);
        sql.push_str("; ");
    }
    let _ = write!(sql, "EXECUTE {statement}");
    for (n, (_, value)) in begin.settings().enumerate() {
        sql.push_str(if n > 0 { ", " } else { " (" });
        match value {
            Value::Name(name) => push_literal(&mut sql, name),
            Value::Timeout(timeout) => {
                let _ = write!(sql, "'{}'", timeout_millis(timeout));
            }
        }
    }
    sql.push(')');
    match probe {
        Probe::Execute(_) => Message::of(2, sql),
        _ => sql.into(),
    }
}

/// The reply of [`begin_transaction`].
#[derive(Clone, Debug)]
pub(crate) struct Begun {
    pub(crate) pid: i32,
    /// See [`XACT_START`].
    pub(crate) xact_start: Option<i64>,
    /// False where the connection came with an open transaction, which BEGIN only warns of.
    pub(crate) fresh: bool,
    /// What a first message on a connection asks in addition.
    pub(crate) server: Option<Server>,
}

pub(crate) fn begun(reply: &[SimpleQueryMessage]) -> Option<Begun> {
    if let Some(mut fields) = fields(reply) {
        let (_, pid, fresh, xact_start) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        return Some(Begun {
            pid: pid.parse().ok()?,
            xact_start: xact_start.parse().ok(),
            fresh: fresh == "t",
            server: None,
        });
    }
    let row = rows(reply).next()?;
    Some(Begun {
        pid: parsed(row, "pid")?,
        xact_start: parsed(row, "xact_start"),
        fresh: is_true(row, "fresh"),
        server: server(row),
    })
}

fn isolation_name(level: IsolationLevel) -> &'static str {
    match level {
        IsolationLevel::ReadUncommitted => "READ UNCOMMITTED",
        IsolationLevel::RepeatableRead => "REPEATABLE READ",
        IsolationLevel::Serializable => "SERIALIZABLE",
        // The driver's enum may grow; READ COMMITTED is what the server calls the default.
        _ => "READ COMMITTED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_says_only_what_was_asked_for() {
        assert_eq!(Begin::default().message(), "BEGIN; ");
        let begin = Begin {
            isolation: Some(IsolationLevel::Serializable),
            read_only: Some(true),
            deferrable: Some(true),
            application_name: Some("billing src/pay.rs:7".into()),
            lock_timeout: Some(Duration::from_micros(400)),
            ..Begin::default()
        };
        assert_eq!(
            begin.message(),
            "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE; \
             SET LOCAL lock_timeout = 1; SET LOCAL application_name = 'billing src/pay.rs:7'; "
        );
    }

    #[test]
    fn a_prepared_begin_sets_the_same() {
        let begin = Begin {
            application_name: Some("o'clock".into()),
            lock_timeout: Some(Duration::from_secs(2)),
            read_only: Some(true),
            ..Begin::default()
        };
        let prepare = begin_transaction(&begin, &Probe::Prepare("p".into())).text;
        let execute = begin_transaction(&begin, &Probe::Execute("p".into())).text;
        assert_eq!(execute, "BEGIN READ ONLY; EXECUTE p ('2000', 'o''clock')");
        assert!(
            prepare.starts_with("BEGIN READ ONLY; PREPARE p (pg_catalog.text, pg_catalog.text) AS SELECT")
                && prepare.contains("set_config('lock_timeout', $1, true), 0) OPERATOR(pg_catalog.||) \
                    pg_catalog.left(pg_catalog.set_config('application_name', $2, true), 0)) AS fields; ")
                && prepare.ends_with("EXECUTE p ('2000', 'o''clock')"),
            "{prepare}"
        );
    }
}
