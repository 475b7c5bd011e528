//! Signals to backends, and the conditions for sending one.
//!
//! A process id is reused, and a blocking transaction may have ended since it was observed. So the statement that sends
//! a signal also checks that it is sent to the intended session.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use tokio_postgres::SimpleQueryMessage;

use crate::connection::sql::server::SIDE_NAME;
use crate::graph::Backend;
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// A signal to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// `pg_cancel_backend`: ends the running statement, if there is one.
    Cancel,
    /// `pg_terminate_backend`: ends the session.
    Terminate,
}

/// Sessions that are left alone in addition to those that always are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Exclusions {
    /// Those of superusers other than the role that signals.
    pub(crate) superusers: bool,
    /// Those that build an index, or rewrite a table.
    pub(crate) builds: bool,
    /// From termination: those that ran a statement when they were observed and run none any more.
    pub(crate) finished: bool,
}

/// The statement that sends the signal if the process id still belongs to the observed session, if that is still in the
/// observed transaction (or still in none), and if it has been idle ever since it was observed idle. A cancel is sent
/// only while a statement runs.
///
/// Conditions and signal are one statement, which reads the activity once. Only the time from reading the row to
/// calling the function remains for a change. The reply has a row with each of the conditions, and no row if the
/// session has ended. The conditions are columns of a subquery with OFFSET, so that they are evaluated before the
/// signal function.
pub(crate) fn statement(
    signal: Signal,
    backend: &Backend,
    pid: i32,
    exclusions: Exclusions,
) -> String {
    let seen = ObservedTimes::of(backend);
    let is_idle = backend
        .state()
        .is_some_and(|state| state.starts_with("idle"));
    let works = "COALESCE(pg_catalog.texteq(a.state, 'active') \
         OR pg_catalog.texteq(a.state, 'fastpath function call'), false)";
    let same_state = match signal {
        // In any state: a cancel ends a statement, and has no effect on a session that runs none.
        Signal::Cancel => works.to_owned(),
        // A session that was idle and runs a statement now is not in the observed state.
        Signal::Terminate if is_idle => same("a.state_change", seen.state_change),
        Signal::Terminate if exclusions.finished => works.to_owned(),
        Signal::Terminate => "true".to_owned(),
    };
    let kinds = match signal {
        Signal::Cancel => "'{client backend,autovacuum worker}'",
        Signal::Terminate => "'{client backend}'",
    };
    let function = match signal {
        Signal::Cancel => "pg_catalog.pg_cancel_backend(t.pid)",
        Signal::Terminate => "pg_catalog.pg_terminate_backend(t.pid)",
    };
    let mut sql = String::from(
        "SELECT t.*, CASE WHEN t.same_backend AND t.same_transaction AND t.same_state AND t.permitted \
         AND NOT t.hidden AND NOT t.own_session AND NOT t.side AND NOT t.other_kind AND NOT t.wraparound AND NOT t.backup \
         AND NOT t.committing",
    );
    if exclusions.superusers {
        sql.push_str(" AND NOT t.superuser");
    }
    if exclusions.builds {
        sql.push_str(" AND NOT t.builds");
    }
    let _ = write!(
        sql,
        " THEN {function} END AS signalled FROM (SELECT a.pid, a.state, a.backend_type, {} AS same_backend, \
         {} AS same_transaction, {same_state} AS same_state, a.backend_start IS NULL AS hidden, \
         pg_catalog.int4eq(a.pid, pg_catalog.pg_backend_pid()) AS own_session, \
         COALESCE(pg_catalog.texteq(a.application_name, {}), false) AS side, \
         NOT COALESCE(a.backend_type OPERATOR(pg_catalog.=) ANY ({kinds}::pg_catalog.text[]), true) AS other_kind, \
         {WRAPAROUND} AS wraparound, {TAKES_BACKUP} AS backup, {COMMITTING} AS committing, {BUILDS} AS builds, \
         COALESCE(r.rolsuper AND NOT pg_catalog.nameeq(r.rolname, CURRENT_USER), false) AS superuser, \
         {PERMITTED} AS permitted, r.oid IS NULL AS has_no_role, COALESCE(r.rolsuper, false) AS is_superusers, \
         {MEMBERSHIPS}, CURRENT_USER AS me, pg_catalog.current_setting('server_version_num') AS version \
         FROM pg_catalog.pg_stat_activity AS a \
         LEFT JOIN pg_catalog.pg_roles AS r ON r.oid OPERATOR(pg_catalog.=) a.usesysid \
         WHERE pg_catalog.int4eq(a.pid, {pid}) OFFSET 0) AS t",
        same("a.backend_start", seen.backend_start),
        match seen.transaction_start {
            Some(_) => same("a.xact_start", seen.transaction_start),
            None => "a.xact_start IS NULL".to_owned(),
        },
        literal(SIDE_NAME),
    );
    sql
}

/// An autovacuum that must not be stopped, as its statement says (PostgreSQL's source, `autovacuum.c`,
/// `autovac_report_activity`). A client could imitate the text; it would then be spared without need.
const WRAPAROUND: &str = "COALESCE(pg_catalog.texteq(a.backend_type, 'autovacuum worker') \
     AND pg_catalog.int4gt(pg_catalog.strpos(a.query, '(to prevent wraparound)'), 0), false)";

/// Whether it sends a base backup, which makes it a walsender too, or has just begun a backup that a program copies
/// itself (version 14 has the older name) and that ends with its session.
const TAKES_BACKUP: &str = "(EXISTS (SELECT FROM pg_catalog.pg_stat_progress_basebackup AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid) \
     OR COALESCE(pg_catalog.int4gt(pg_catalog.strpos(pg_catalog.lower(a.query), 'pg_backup_start('), 0) \
     OR pg_catalog.int4gt(pg_catalog.strpos(pg_catalog.lower(a.query), 'pg_start_backup('), 0), false))";

/// Whether its transaction has committed, and only its client does not know yet. A cancel would end the wait with a
/// warning, and the commit would not be on the standby (PostgreSQL's source, `SyncRepWaitForLSN`).
const COMMITTING: &str = "COALESCE(pg_catalog.texteq(a.wait_event, 'SyncRep'), false)";

/// Whether it builds an index, or runs CLUSTER or VACUUM FULL.
const BUILDS: &str = "(EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid) OR EXISTS (SELECT FROM pg_catalog.pg_stat_progress_cluster AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid))";

/// Whether the server permits this role to signal that backend: those of its own role and of the roles it is a member
/// of; with `pg_signal_backend` those of every role except superusers; autovacuum workers with
/// `pg_signal_autovacuum_worker` (18+). The other processes belong to no role. PostgreSQL's documentation, "Server
/// Signaling Functions"; source, `signalfuncs.c`.
const PERMITTED: &str = "((SELECT m.rolsuper FROM pg_catalog.pg_roles AS m \
     WHERE pg_catalog.nameeq(m.rolname, CURRENT_USER)) OR CASE \
     WHEN r.oid IS NULL THEN EXISTS (SELECT FROM pg_catalog.pg_roles AS w \
     WHERE pg_catalog.nameeq(w.rolname, 'pg_signal_autovacuum_worker') \
     AND pg_catalog.pg_has_role(w.oid, 'USAGE'::pg_catalog.text) \
     AND COALESCE(pg_catalog.texteq(a.backend_type, 'autovacuum worker'), false)) \
     WHEN r.rolsuper THEN false \
     ELSE pg_catalog.pg_has_role(r.oid, 'USAGE'::pg_catalog.text) \
     OR pg_catalog.pg_has_role('pg_signal_backend'::pg_catalog.name, 'USAGE'::pg_catalog.text) END)";

/// Whether this role is a member of the roles that would permit it, whether it inherits from them or not.
const MEMBERSHIPS: &str = "pg_catalog.pg_has_role('pg_read_all_stats'::pg_catalog.name, 'MEMBER'::pg_catalog.text) \
     AS pg_read_all_stats, \
     pg_catalog.pg_has_role('pg_signal_backend'::pg_catalog.name, 'MEMBER'::pg_catalog.text) AS pg_signal_backend, \
     EXISTS (SELECT FROM pg_catalog.pg_roles AS w \
     WHERE pg_catalog.nameeq(w.rolname, 'pg_signal_autovacuum_worker') \
     AND pg_catalog.pg_has_role(w.oid, 'MEMBER'::pg_catalog.text)) AS pg_signal_autovacuum_worker";

/// Compares a timestamp column with the observed time, to the microsecond.
fn same(column: &str, seen: Option<SystemTime>) -> String {
    match seen.and_then(micros) {
        Some(micros) => format!(
            "COALESCE(pg_catalog.int8eq((EXTRACT(epoch FROM {column}) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8, \
             '{micros}'::pg_catalog.int8), false)"
        ),
        None => "false".to_owned(),
    }
}

fn micros(time: SystemTime) -> Option<i64> {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).ok(),
        Err(before) => i64::try_from(before.duration().as_micros())
            .ok()
            .map(|n| -n),
    }
}

/// The times that identify an observed session and its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ObservedTimes {
    backend_start: Option<SystemTime>,
    transaction_start: Option<SystemTime>,
    /// All ages of a backend are relative to one moment, so each start can be computed from any other. An age that was
    /// cut off at zero gives a time that is not the session's, and so no signal.
    state_change: Option<SystemTime>,
}

impl ObservedTimes {
    fn of(backend: &Backend) -> Self {
        let seen_at = || {
            backend
                .backend_start()?
                .checked_add(backend.connection_age()?)
        };
        let back = |age: Option<Duration>| seen_at()?.checked_sub(age?);
        Self {
            backend_start: backend.backend_start(),
            transaction_start: backend.transaction_start(),
            state_change: back(backend.state_age()),
        }
    }
}

/// The conditions that [`statement`] evaluated, and whether it sent the signal.
#[derive(Clone, Debug)]
pub(crate) struct SignalReply {
    pub(crate) signalled: bool,
    pub(crate) same_backend: bool,
    pub(crate) same_transaction: bool,
    pub(crate) same_state: bool,
    pub(crate) state: Option<String>,
    /// The session is hidden from this role.
    pub(crate) hidden: bool,
    pub(crate) own_session: bool,
    pub(crate) side: bool,
    /// `backend_type`, if the signal is not sent to backends of this type.
    pub(crate) other_kind: Option<String>,
    pub(crate) wraparound: bool,
    pub(crate) backup: bool,
    /// It waits for a synchronous standby.
    pub(crate) committing: bool,
    pub(crate) builds: bool,
    /// It belongs to a superuser other than the current role.
    pub(crate) superuser: bool,
    /// What would permit the signal; `None` if it is permitted.
    pub(crate) needs: Option<String>,
}

/// Reads the reply to [`statement`]; `None` if there is no such backend.
pub(crate) fn read_reply(reply: &[SimpleQueryMessage]) -> Option<SignalReply> {
    let row = rows(reply).next()?;
    let permitted = is_true(row, "permitted");
    let hidden = is_true(row, "hidden");
    let me = text(row, "me").unwrap_or_default();
    let version = parsed(row, "version").unwrap_or(0);
    let missing = |role| MissingPrivilege {
        role,
        is_member: is_true(row, role),
    };
    let mut roles = Vec::new();
    if hidden {
        roles.push(missing("pg_read_all_stats"));
    }
    let mut needs = None;
    if !permitted {
        let kind = text(row, "backend_type");
        if is_true(row, "is_superusers") {
            needs =
                Some("nothing to GRANT: only a superuser may signal a superuser's session".into());
        } else if !is_true(row, "has_no_role") {
            roles.push(missing("pg_signal_backend"));
        } else if version >= 180_000 && kind.as_deref() == Some("autovacuum worker") {
            roles.push(missing("pg_signal_autovacuum_worker"));
        } else {
            needs = Some(
                "nothing to GRANT: only a superuser may signal the server's own processes".into(),
            );
        }
    }
    if !roles.is_empty() && needs.is_none() {
        needs = Some(grant(&roles, &me, version));
    }
    Some(SignalReply {
        signalled: is_true(row, "signalled"),
        same_backend: is_true(row, "same_backend"),
        same_transaction: is_true(row, "same_transaction"),
        same_state: is_true(row, "same_state"),
        state: text(row, "state"),
        hidden,
        own_session: is_true(row, "own_session"),
        side: is_true(row, "side"),
        other_kind: text(row, "backend_type").filter(|_| is_true(row, "other_kind")),
        wraparound: is_true(row, "wraparound"),
        backup: is_true(row, "backup"),
        committing: is_true(row, "committing"),
        builds: is_true(row, "builds"),
        superuser: is_true(row, "superuser"),
        needs,
    })
}

/// A predefined role whose privileges the current role does not have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MissingPrivilege {
    pub(crate) role: &'static str,
    /// The current role is a member, but does not inherit the privileges.
    pub(crate) is_member: bool,
}

/// What gives a role the privileges of these predefined roles. A GRANT gives a member nothing more: whether privileges
/// are inherited is a property of the member, and since version 16 of the membership (PostgreSQL's documentation, "Role
/// Membership").
pub(crate) fn grant(roles: &[MissingPrivilege], to: &str, version: u32) -> String {
    let to = identifier(to);
    let names = |roles: &mut dyn Iterator<Item = &MissingPrivilege>| {
        let names: Vec<_> = roles.map(|missing| missing.role).collect();
        names.join(", ")
    };
    if roles.iter().all(|missing| !missing.is_member) {
        return format!("GRANT {} TO {to}", names(&mut roles.iter()));
    }
    if version >= 160_000 {
        let all = names(&mut roles.iter());
        return format!("GRANT {all} TO {to} WITH INHERIT TRUE");
    }
    let mut needed = format!("ALTER ROLE {to} INHERIT");
    let others = names(&mut roles.iter().filter(|missing| !missing.is_member));
    if !others.is_empty() {
        let _ = write!(needed, "; GRANT {others} TO {to}");
    }
    needed
}

/// The statement that ends a prepared transaction. Run it only if you know that its transaction manager will not.
pub(crate) fn rollback_prepared(gid: &str) -> String {
    format!("ROLLBACK PREPARED {}", literal(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
    }

    fn seen() -> Backend {
        Backend {
            backend_start: Some(at(1_000_001)),
            connection_age: Some(Duration::from_micros(500)),
            state_age: Some(Duration::from_micros(100)),
            state: Some("idle in transaction".into()),
            ..Backend::unknown(7.into())
        }
    }

    #[test]
    fn the_state_change_is_computed_from_the_ages() {
        let times = ObservedTimes::of(&seen());
        assert_eq!(times.state_change, Some(at(1_000_401)));
        assert_eq!(
            ObservedTimes::of(&Backend::unknown(7.into())).state_change,
            None
        );
    }

    #[test]
    fn nothing_is_sent_to_an_unknown_session() {
        for signal in [Signal::Cancel, Signal::Terminate] {
            let sql = statement(
                signal,
                &Backend::unknown(7.into()),
                7,
                Exclusions::default(),
            );
            assert!(sql.contains("false AS same_backend"), "{sql}");
        }
    }

    #[test]
    fn an_idle_session_is_identified_by_the_start_of_its_idleness() {
        let sql = statement(Signal::Terminate, &seen(), 7, Exclusions::default());
        assert!(
            sql.contains("a.state_change") && sql.contains("1000401"),
            "{sql}"
        );
        assert!(
            sql.contains("a.xact_start IS NULL AS same_transaction"),
            "{sql}"
        );
    }

    /// Process ids are reused too seldom to wait for one; here one of the times differs instead.
    #[tokio::test]
    async fn another_backend_with_the_same_process_id_is_safe() {
        let database = lockkeeper_testkit::Server::shared().database().await;
        let (client, victim) = (database.connect().await, database.connect().await);
        victim.batch_execute("BEGIN").await.expect("it begins");
        let sql = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::int8, \
             (extract(epoch FROM xact_start) * 1000000)::int8, (extract(epoch FROM state_change) * 1000000)::int8 \
             FROM pg_stat_activity WHERE pid = $1";
        let pid = victim.query_one("SELECT pg_backend_pid()", &[]).await;
        let pid: i32 = pid.expect("it lives").get(0);
        let row = client.query_one(sql, &[&pid]).await.expect("it is there");
        let time = |column| at(u64::try_from(row.get::<_, i64>(column)).expect("after 1970"));
        let tick = Duration::from_micros(1);
        let right = Backend {
            backend_start: Some(time(1)),
            transaction_start: Some(time(2)),
            connection_age: Some(Duration::from_secs(60)),
            state_age: (time(1) + Duration::from_secs(60))
                .duration_since(time(3))
                .ok(),
            ..seen()
        };
        let earlier = |time: Option<SystemTime>| time.map(|time| time - tick);
        let mut wrong = vec![right.clone(); 5];
        wrong[0].backend_start = earlier(right.backend_start);
        wrong[1].transaction_start = earlier(right.transaction_start);
        wrong[2].transaction_start = None;
        wrong[3].state_age = right.state_age.map(|age| age + tick);
        wrong[4].backend_start = None;
        let ask = async |signal, backend: &Backend| {
            let sql = statement(signal, backend, pid, Exclusions::default());
            read_reply(&client.simple_query(&sql).await.expect("it answers")).expect("it is there")
        };
        for (at, backend) in wrong.iter().enumerate() {
            let reply = ask(Signal::Terminate, backend).await;
            assert!(!reply.signalled, "{at}: {reply:?}");
            assert_eq!(reply.same_backend, !matches!(at, 0 | 4), "{reply:?}");
        }
        victim.batch_execute("SELECT").await.expect("it lives");
        // The right session, but it has run a statement since.
        assert!(!ask(Signal::Terminate, &right).await.signalled);
        let row = client.query_one(sql, &[&pid]).await.expect("it is there");
        let used = at(u64::try_from(row.get::<_, i64>(3)).expect("after 1970"));
        let again = Backend {
            state_age: (time(1) + Duration::from_secs(60))
                .duration_since(used)
                .ok(),
            ..right
        };
        assert!(ask(Signal::Terminate, &again).await.signalled);
    }

    /// The session as a monitor's query to `pg_stat_activity` would show it.
    async fn observed(client: &tokio_postgres::Client, pid: i32) -> Backend {
        let sql = "SELECT (extract(epoch FROM backend_start) * 1000000)::int8, \
             (extract(epoch FROM xact_start) * 1000000)::int8 FROM pg_stat_activity WHERE pid = $1";
        let row = client.query_one(sql, &[&pid]).await.expect("it is there");
        let time = |micros: i64| at(u64::try_from(micros).expect("after 1970"));
        Backend {
            backend_start: Some(time(row.get(0))),
            transaction_start: row.get::<_, Option<i64>>(1).map(time),
            state: Some("active".into()),
            ..Backend::unknown(pid.into())
        }
    }

    #[tokio::test]
    async fn exclusions_are_checked_by_the_statement_too() {
        let database = lockkeeper_testkit::Server::shared().database().await;
        let client = database.connect().await;
        let role = format!("boss {}", database.name());
        let sql = format!(
            "CREATE ROLE \"{role}\" SUPERUSER LOGIN PASSWORD 'secret'; CREATE TABLE t AS SELECT 1 AS a; \
             CREATE FUNCTION slow(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(600); RETURN $1; END $$"
        );
        client.batch_execute(&sql).await.expect("it is made");
        let mut config = database.config();
        config.user(&role).password("secret");
        let (boss, connection) = config
            .connect(tokio_postgres::NoTls)
            .await
            .expect("it may log in");
        let ended = tokio::spawn(connection);
        let row = boss.query_one("SELECT pg_backend_pid()", &[]).await;
        let pid: i32 = row.expect("it lives").get(0);
        let building =
            tokio::spawn(async move { boss.batch_execute("CREATE INDEX ON t (slow(a))").await });
        loop {
            let sql = "SELECT FROM pg_stat_progress_create_index WHERE pid = $1";
            if client
                .query_opt(sql, &[&pid])
                .await
                .expect("it answers")
                .is_some()
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let backend = observed(&client, pid).await;
        let ask = async |signal, superusers, builds| {
            let exclusions = Exclusions {
                superusers,
                builds,
                ..Exclusions::default()
            };
            let sql = statement(signal, &backend, pid, exclusions);
            read_reply(&client.simple_query(&sql).await.expect("it answers")).expect("it is there")
        };
        for (superusers, builds) in [(true, false), (false, true), (true, true)] {
            for signal in [Signal::Cancel, Signal::Terminate] {
                let reply = ask(signal, superusers, builds).await;
                assert!(
                    !reply.signalled && reply.superuser && reply.builds,
                    "{reply:?}"
                );
            }
        }
        assert!(!building.is_finished());
        assert!(ask(Signal::Terminate, false, false).await.signalled);
        assert!(building.await.expect("no panic").is_err());
        drop(ended.await);
        let sql = format!("DROP ROLE \"{role}\"");
        client.batch_execute(&sql).await.expect("nobody uses it");
    }

    #[tokio::test]
    async fn a_session_that_has_finished_its_statement_is_excluded_if_requested() {
        let database = lockkeeper_testkit::Server::shared().database().await;
        let (client, victim) = (database.connect().await, database.connect().await);
        victim.batch_execute("BEGIN").await.expect("it begins");
        let pid = victim.query_one("SELECT pg_backend_pid()", &[]).await;
        let pid: i32 = pid.expect("it lives").get(0);
        victim.batch_execute("SELECT").await.expect("it lives");
        // As it was observed while it ran a statement.
        let backend = observed(&client, pid).await;
        let ask = async |finished| {
            let exclusions = Exclusions {
                finished,
                ..Exclusions::default()
            };
            let sql = statement(Signal::Terminate, &backend, pid, exclusions);
            read_reply(&client.simple_query(&sql).await.expect("it answers")).expect("it is there")
        };
        let kept = ask(true).await;
        assert!(
            !kept.signalled && !kept.same_state && kept.same_transaction,
            "{kept:?}"
        );
        assert!(ask(false).await.signalled);
    }

    #[test]
    fn names_are_quoted() {
        let missing = |role, is_member| MissingPrivilege { role, is_member };
        let signal = missing("pg_signal_backend", false);
        assert_eq!(
            grant(&[signal], "O'Hara \"x\"", 150_000),
            "GRANT pg_signal_backend TO \"O'Hara \"\"x\"\"\""
        );
        let both = [missing("pg_read_all_stats", true), signal];
        assert_eq!(
            grant(&both, "ops", 150_018),
            "ALTER ROLE \"ops\" INHERIT; GRANT pg_signal_backend TO \"ops\""
        );
        assert_eq!(
            grant(&both, "ops", 160_000),
            "GRANT pg_read_all_stats, pg_signal_backend TO \"ops\" WITH INHERIT TRUE"
        );
        assert_eq!(rollback_prepared("it's"), "ROLLBACK PREPARED 'it''s'");
    }
}
