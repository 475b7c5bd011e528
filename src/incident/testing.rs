//! Evidence for tests, without a server.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::call_site::CallSite;
use crate::graph::{
    Backend, BackendId, LockObject, LockRow, RawStatement, Relation, RowId, Visibility, assemble,
};
use crate::mode::LockMode;

use super::{
    Evidence, Incident, IncidentHistory, IncidentTrigger, Journal, JournalEntry, Outcome, RowKey,
    ServerError, WaitSample,
};

/// 2026-01-31T12:34:56Z
pub(super) const NOW: Duration = Duration::from_secs(1_769_862_896);

pub(super) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + NOW
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(super) fn table(oid: u32, name: &str) -> Relation {
    Relation {
        oid,
        name: Some(("public".into(), name.into())),
        kind: Some('r'),
        database: None,
    }
}

pub(super) fn account() -> Relation {
    table(16384, "account")
}

pub(super) fn row(relation: Relation, offset: u16) -> RowId {
    RowId {
        relation,
        page: 0,
        offset,
    }
}

pub(super) fn key(column: &str, value: &str) -> RowKey {
    RowKey::new([(column.to_owned(), Some(value.to_owned()))])
}

/// The sessions and locks of a server.
#[derive(Debug, Default)]
pub(super) struct TestServer {
    rows: Vec<LockRow>,
    backends: Vec<Backend>,
}

impl TestServer {
    pub(super) fn session(self, pid: i32, application: &str, state: &str, statement: &str) -> Self {
        self.session_for(pid, application, state, statement, 960)
    }

    /// With the time that it has been in its state.
    pub(super) fn session_for(
        mut self,
        pid: i32,
        application: &str,
        state: &str,
        statement: &str,
        millis: u64,
    ) -> Self {
        let mut backend = Backend::unknown(pid.into());
        backend.visibility = Visibility::Full;
        backend.backend_start = Some(now() - ms(60_000));
        backend.application_name = Some(application.into());
        backend.user = Some("app".into());
        backend.database = Some("shop".into());
        backend.client_address = Some("10.0.0.7".into());
        backend.backend_type = Some("client backend".into());
        backend.state = Some(state.into());
        backend.transaction_age = Some(ms(millis + 240));
        backend.state_age = Some(ms(millis));
        backend.statement = Some(RawStatement(statement.into()));
        backend.query_id = Some(i64::from(pid) * 1000);
        self.backends.push(backend);
        self
    }

    /// A session of another role.
    pub(super) fn hidden(mut self, pid: i32, application: &str) -> Self {
        let mut backend = Backend::unknown(pid.into());
        backend.visibility = Visibility::Hidden;
        backend.application_name = Some(application.into());
        backend.user = Some("other".into());
        self.backends.push(backend);
        self
    }

    pub(super) fn holds(
        mut self,
        who: impl Into<BackendId>,
        object: &LockObject,
        mode: &'static str,
    ) -> Self {
        self.rows.push(LockRow {
            owner: who.into(),
            object: object.clone(),
            mode: LockMode::from_pg_locks(mode).expect("a mode that there is"),
            granted: true,
            since: None,
            blockers: None,
        });
        self
    }

    pub(super) fn waits(
        mut self,
        pid: i32,
        object: &LockObject,
        mode: &'static str,
        millis: u64,
        blockers: &[i32],
    ) -> Self {
        self.rows.push(LockRow {
            owner: pid.into(),
            object: object.clone(),
            mode: LockMode::from_pg_locks(mode).expect("a mode that there is"),
            granted: false,
            since: Some(now() - ms(millis)),
            blockers: Some(blockers.to_vec()),
        });
        self
    }

    /// Waits for the transaction that locked the row. The transaction id is the blocker's pid.
    pub(super) fn waits_for_row(self, pid: i32, row: &RowId, blocker: i32, millis: u64) -> Self {
        let transaction = LockObject::Transaction(blocker.unsigned_abs());
        self.holds(blocker, &transaction, "ExclusiveLock")
            .holds(pid, &LockObject::Tuple(row.clone()), "ExclusiveLock")
            .waits(pid, &transaction, "ShareLock", millis, &[blocker])
    }

    pub(super) fn sample(self, after: u64, row_keys: Vec<(RowId, RowKey)>) -> WaitSample {
        let snapshot = assemble(&self.rows, self.backends, now(), ms(1));
        WaitSample {
            snapshot: Arc::new(snapshot),
            after: ms(after),
            row_keys,
        }
    }
}

pub(super) fn entry(after: u64, text: &str, duration: Option<u64>) -> JournalEntry {
    JournalEntry {
        after: ms(after),
        text: Some(text.into()),
        duration: duration.map(ms),
        failed: false,
        advisory: Vec::new(),
    }
}

/// A transaction of this process that began this long before the incident.
pub(super) fn journal(
    pid: i32,
    site: CallSite,
    began: u64,
    statements: Vec<JournalEntry>,
) -> Journal {
    Journal {
        pid: Some(pid),
        call_site: Some(site),
        application_name: Some(format!("billing {site}").into()),
        began: now() - ms(began),
        gap: statements.len() / 2,
        statements,
        dropped: 0,
        conflict_group: None,
    }
}

pub(super) const TRANSFER: CallSite = CallSite::at("src/transfer.rs", 41);
pub(super) const REFUND: CallSite = CallSite::at("src/refund.rs", 17);

/// The minimal evidence, for pid 11.
pub(super) fn evidence(trigger: IncidentTrigger) -> Evidence {
    Evidence {
        trigger,
        occurred: now(),
        victim: journal(11, TRANSFER, 1240, Vec::new()),
        attempt: 1,
        attempts: 5,
        outcome: Outcome::retried(ms(12)),
        error: None,
        samples: Vec::new(),
        relations: Vec::new(),
        context_row: None,
        others: Vec::new(),
        caveats: Vec::new(),
        literals: false,
    }
}

pub(super) fn report(evidence: Evidence) -> Incident {
    Incident::new(evidence, &IncidentHistory::default())
}

pub(super) fn deadlock_error(detail: &str, context: &str) -> ServerError {
    ServerError {
        sqlstate: "40P01".into(),
        message: "deadlock detected".into(),
        detail: Some(detail.into()),
        context: Some(context.into()),
        routine: Some("DeadLockReport".into()),
    }
}

pub(super) fn timeout_error(context: Option<&str>) -> ServerError {
    ServerError {
        sqlstate: "55P03".into(),
        message: "canceling statement due to lock timeout".into(),
        detail: None,
        context: context.map(Into::into),
        routine: Some("ProcessInterrupts".into()),
    }
}

pub(super) const TRANSFER_SQL: &str = "UPDATE account SET balance = balance + 250 WHERE id = 2";
pub(super) const REFUND_SQL: &str =
    "UPDATE account SET balance = balance - 13, note = 'secret' WHERE id = 1";

/// Two sessions of this process that update two rows in opposite orders.
pub(super) fn transfers() -> Evidence {
    let (first, second) = (row(account(), 1), row(account(), 2));
    let keys = vec![
        (first.clone(), key("id", "1")),
        (second.clone(), key("id", "2")),
    ];
    let early = TestServer::default()
        .session(11, "billing src/transfer.rs:41", "active", TRANSFER_SQL)
        .session(
            12,
            "billing src/refund.rs:17",
            "active",
            "UPDATE account SET x = 1",
        )
        .waits_for_row(11, &second, 12, 5)
        .sample(8, Vec::new());
    let late = TestServer::default()
        .session(11, "billing src/transfer.rs:41", "active", TRANSFER_SQL)
        .session_for(12, "billing src/refund.rs:17", "active", REFUND_SQL, 412)
        .waits_for_row(11, &second, 12, 958)
        .waits_for_row(12, &first, 11, 412)
        .sample(960, keys);
    let mut failed = entry(240, TRANSFER_SQL, None);
    failed.failed = true;
    let victim = vec![
        entry(
            1,
            "UPDATE account SET balance = balance - 250 WHERE id = 1",
            Some(1),
        ),
        entry(3, "INSERT INTO log VALUES ('secret')", Some(0)),
        failed,
    ];
    let other = vec![
        entry(0, "SELECT 'secret'", Some(1)),
        entry(
            2,
            "UPDATE account SET balance = balance + 13 WHERE id = 2",
            Some(1),
        ),
        entry(400, REFUND_SQL, Some(411)),
        entry(900, "SELECT 'later'", Some(1)),
    ];
    Evidence {
        victim: journal(11, TRANSFER, 1240, victim),
        error: Some(deadlock_error(
            "Process 11 waits for ShareLock on transaction 12; blocked by process 12.\n\
             Process 12 waits for ShareLock on transaction 11; blocked by process 11.",
            "while updating tuple (0,2) in relation \"account\"",
        )),
        samples: vec![early, late],
        others: vec![journal(12, REFUND, 812, other)],
        ..evidence(IncidentTrigger::Deadlock)
    }
}

/// A lock timeout of a session that waits behind these sessions.
pub(super) fn timeout(server: TestServer) -> Evidence {
    Evidence {
        error: Some(timeout_error(None)),
        samples: vec![server.sample(960, Vec::new())],
        ..evidence(IncidentTrigger::LockTimeout)
    }
}

/// A deadlock of these sessions.
pub(super) fn deadlock(server: TestServer) -> Evidence {
    Evidence {
        samples: vec![server.sample(960, Vec::new())],
        ..evidence(IncidentTrigger::Deadlock)
    }
}

pub(super) fn advisory(key: impl Into<crate::key::LockKey>) -> LockObject {
    LockObject::Advisory {
        key: key.into(),
        database: None,
    }
}
