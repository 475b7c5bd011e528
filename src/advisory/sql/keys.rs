//! Keys as arguments and as rows.

use std::fmt::Write as _;

use crate::connection::sql::PreparedName;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

/// The keys of one request, in locking order, and the mode they are all taken in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Locks<'a> {
    pub(crate) keys: &'a [LockKey],
    pub(crate) mode: AdvisoryMode,
}

impl Locks<'_> {
    /// The `try` that is worth preparing for them; `None` for several keys.
    pub(crate) fn prepared_name(self, session: bool) -> Option<PreparedName> {
        let [key] = self.keys else { return None };
        Some(PreparedName::Try {
            session,
            shared: self.mode == AdvisoryMode::Shared,
            pair: key.as_i32_pair().is_some(),
        })
    }
}

/// Several keys of one key space as rows, in their order: for sets too large for a target list.
pub(super) struct KeyRows<'a> {
    keys: &'a [LockKey],
    pairs: bool,
}

impl<'a> KeyRows<'a> {
    /// One group for each run of keys of one space; sorted keys have at most two.
    pub(super) fn of(keys: &'a [LockKey]) -> impl Iterator<Item = KeyRows<'a>> {
        keys.chunk_by(|a, b| a.as_i64().is_some() == b.as_i64().is_some())
            .map(|keys| KeyRows {
                keys,
                pairs: keys[0].as_i32_pair().is_some(),
            })
    }

    pub(super) fn call(&self, sql: &mut String, function: &str, mode: AdvisoryMode) {
        let shared = shared_suffix(mode);
        let arguments = if self.pairs { "k.a, k.b" } else { "k.a" };
        let _ = write!(sql, "pg_catalog.{function}{shared}({arguments})");
    }

    /// `FROM …`: a function scan returns an array's elements in their order.
    pub(super) fn from(&self, sql: &mut String) {
        let array = |sql: &mut String, of: &dyn Fn(&LockKey) -> i64, of_type: &str| {
            sql.push_str("pg_catalog.unnest('{");
            for (n, key) in self.keys.iter().enumerate() {
                let comma = if n > 0 { "," } else { "" };
                let _ = write!(sql, "{comma}{}", of(key));
            }
            let _ = write!(sql, "}}'::pg_catalog.{of_type}[])");
        };
        if self.pairs {
            sql.push_str("FROM ROWS FROM (");
            array(
                sql,
                &|key| key.as_i32_pair().unwrap_or_default().0.into(),
                "int4",
            );
            sql.push_str(", ");
            array(
                sql,
                &|key| key.as_i32_pair().unwrap_or_default().1.into(),
                "int4",
            );
            sql.push_str(") AS k (a, b)");
        } else {
            sql.push_str("FROM ");
            array(sql, &|key| key.as_i64().unwrap_or_default(), "int8");
            sql.push_str(" AS k (a)");
        }
    }
}

/// `f(k1) AND f(k2) …`: evaluated in this order, and none after the first false.
pub(super) fn all_of(sql: &mut String, locks: Locks<'_>, function: &str) {
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(" AND ");
        }
        call(sql, function, locks.mode, key);
    }
}

/// Takes each session lock, as one boolean column: the functions return void.
pub(super) fn take_each(sql: &mut String, locks: Locks<'_>) {
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(" OR ");
        }
        sql.push('(');
        call(sql, "pg_advisory_lock", locks.mode, key);
        sql.push_str(" IS NULL)");
    }
}

/// `pg_catalog.function[_shared](key)`. The cast literals keep the parser from looking up a `-` operator, and choose
/// the key space: one int8, or two int4.
pub(super) fn call(sql: &mut String, function: &str, mode: AdvisoryMode, key: &LockKey) {
    let shared = shared_suffix(mode);
    let _ = write!(sql, "pg_catalog.{function}{shared}");
    push_arguments(sql, key);
}

pub(super) fn push_arguments(sql: &mut String, key: &LockKey) {
    let _ = match key.as_i32_pair() {
        Some((a, b)) => write!(sql, "('{a}'::pg_catalog.int4, '{b}'::pg_catalog.int4)"),
        None => write!(
            sql,
            "('{}'::pg_catalog.int8)",
            key.as_i64().unwrap_or_default()
        ),
    };
}

pub(super) fn shared_suffix(mode: AdvisoryMode) -> &'static str {
    match mode {
        AdvisoryMode::Exclusive => "",
        AdvisoryMode::Shared => "_shared",
    }
}
