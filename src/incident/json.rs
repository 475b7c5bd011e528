//! The report as a JSON document. Its fields are documented at [`Incident`].

use serde::{Serialize, Serializer};

use crate::graph::json::{LockKeyJson, RelationJson, millis};
use crate::graph::{BackendId, EdgeKind};

use super::{
    Completeness, Incident, IncidentEdge, JournalLine, JournalMark, Outcome, Participant, RowKey,
    wording,
};

/// Incremented when a field changes its meaning or is removed. New fields do not count.
const VERSION: u32 = 1;

impl Serialize for Incident {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        IncidentJson::new(self).serialize(serializer)
    }
}

#[derive(Serialize)]
struct IncidentJson<'a> {
    version: u32,
    kind: &'a str,
    headline: String,
    fingerprint: String,
    occurred: String,
    first_seen: String,
    last_seen: String,
    previously_seen: Option<String>,
    count: u64,
    attempt: u32,
    attempts: u32,
    outcome: &'a str,
    pause_ms: Option<f64>,
    diagnosis: DiagnosisJson<'a>,
    quality: &'a str,
    captured_after_ms: Option<f64>,
    missing: Vec<&'a str>,
    error: Option<ErrorJson<'a>>,
    participants: Vec<ParticipantJson<'a>>,
    edges: Vec<IncidentEdgeJson<'a>>,
}

#[derive(Serialize)]
struct DiagnosisJson<'a> {
    cause: &'a str,
    certain: bool,
    text: &'a str,
    fix: Option<&'a str>,
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    sqlstate: &'a str,
    message: Option<&'a str>,
    detail: Option<&'a str>,
    context: Option<&'a str>,
}

#[derive(Serialize)]
struct ParticipantJson<'a> {
    pid: Option<i32>,
    prepared: Option<&'a str>,
    backend_start: Option<String>,
    call_site: Option<&'a str>,
    application_name: Option<&'a str>,
    user: Option<&'a str>,
    database: Option<&'a str>,
    client: Option<&'a str>,
    backend_type: Option<&'a str>,
    state: Option<&'a str>,
    in_state_ms: Option<f64>,
    transaction_age_ms: Option<f64>,
    wait_age_ms: Option<f64>,
    statement: Option<&'a str>,
    query_id: Option<String>,
    victim: bool,
    waiting: bool,
    hidden: bool,
    in_this_process: bool,
    seen_after_ms: Option<f64>,
    conflict_group: Option<LockKeyJson<'a>>,
    journal_dropped: usize,
    journal: Vec<JournalLineJson<'a>>,
}

#[derive(Serialize)]
struct JournalLineJson<'a> {
    after_ms: f64,
    text: Option<&'a str>,
    took_ms: Option<f64>,
    failed: bool,
    advisory: Vec<AdvisoryLockJson<'a>>,
    mark: Option<&'static str>,
}

#[derive(Serialize)]
struct AdvisoryLockJson<'a> {
    key: LockKeyJson<'a>,
    mode: &'static str,
}

#[derive(Serialize)]
struct IncidentEdgeJson<'a> {
    waiter: Option<usize>,
    blocker: Option<usize>,
    in_cycle: bool,
    kind: Option<&'static str>,
    mode_wanted: &'a str,
    mode_held: Option<&'a str>,
    mode_queued: Option<&'a str>,
    wait_age_ms: Option<f64>,
    locktype: &'a str,
    object: String,
    relation: Option<RelationJson<'a>>,
    ctid: Option<String>,
    row_key: Option<Vec<ColumnJson<'a>>>,
    advisory_key: Option<LockKeyJson<'a>>,
}

#[derive(Serialize)]
struct ColumnJson<'a> {
    column: &'a str,
    value: Option<&'a str>,
}

impl<'a> IncidentJson<'a> {
    fn new(incident: &'a Incident) -> Self {
        let (outcome, pause) = match incident.outcome() {
            Outcome::Retried { pause } => ("retried", Some(pause)),
            Outcome::GaveUp => ("gave_up", None),
            Outcome::NotRetried => ("not_retried", None),
            Outcome::StillWaiting => ("still_waiting", None),
        };
        let diagnosis = incident.diagnosis();
        let position = |id: &BackendId| {
            let mut participants = incident.participants().iter();
            participants.position(|participant| participant.id() == Some(id))
        };
        Self {
            version: VERSION,
            kind: incident.kind().as_str(),
            headline: incident.headline(),
            fingerprint: incident.fingerprint().to_string(),
            occurred: wording::timestamp(incident.occurred()),
            first_seen: wording::timestamp(incident.first_seen()),
            last_seen: wording::timestamp(incident.last_seen()),
            previously_seen: incident.previously_seen().map(wording::timestamp),
            count: incident.count(),
            attempt: incident.attempt(),
            attempts: incident.attempts(),
            outcome,
            pause_ms: pause.map(millis),
            diagnosis: DiagnosisJson {
                cause: diagnosis.cause().as_str(),
                certain: diagnosis.is_certain(),
                text: diagnosis.text(),
                fix: diagnosis.fix(),
            },
            quality: match incident.completeness() {
                Completeness::Complete => "complete",
                Completeness::Partial => "partial",
                Completeness::DetailOnly => "detail_only",
                Completeness::Nothing => "nothing",
            },
            captured_after_ms: incident.captured_after().map(millis),
            missing: incident.caveats().collect(),
            error: incident.sqlstate().map(|sqlstate| ErrorJson {
                sqlstate,
                message: incident.message(),
                detail: incident.detail(),
                context: incident.context(),
            }),
            participants: incident
                .participants()
                .iter()
                .map(ParticipantJson::new)
                .collect(),
            edges: incident
                .edges()
                .iter()
                .map(|edge| IncidentEdgeJson::new(edge, position))
                .collect(),
        }
    }
}

impl<'a> ParticipantJson<'a> {
    fn new(participant: &'a Participant) -> Self {
        Self {
            pid: participant.pid(),
            prepared: participant.id().and_then(BackendId::prepared_transaction),
            backend_start: participant.backend_start().map(wording::timestamp),
            call_site: participant.call_site(),
            application_name: participant.application_name(),
            user: participant.user(),
            database: participant.database(),
            client: participant.client_address(),
            backend_type: participant.backend_type(),
            state: participant.state(),
            in_state_ms: participant.state_age().map(millis),
            transaction_age_ms: participant.transaction_age().map(millis),
            wait_age_ms: participant.wait_age().map(millis),
            statement: participant.statement(),
            query_id: participant.query_id().map(|id| id.to_string()),
            victim: participant.is_victim(),
            waiting: participant.is_waiting(),
            hidden: participant.is_hidden(),
            in_this_process: participant.is_in_this_process(),
            seen_after_ms: participant.seen_after().map(millis),
            conflict_group: participant.conflict_group().map(LockKeyJson::new),
            journal_dropped: participant.journal_dropped(),
            journal: participant
                .journal()
                .iter()
                .map(JournalLineJson::new)
                .collect(),
        }
    }
}

impl<'a> JournalLineJson<'a> {
    fn new(line: &'a JournalLine) -> Self {
        Self {
            after_ms: millis(line.after()),
            text: line.text(),
            took_ms: line.duration().map(millis),
            failed: line.failed(),
            advisory: line
                .advisory()
                .map(|(key, mode)| AdvisoryLockJson {
                    key: LockKeyJson::new(key),
                    mode: mode.as_pg_locks(),
                })
                .collect(),
            mark: line.mark().map(|mark| match mark {
                JournalMark::Took => "took",
                JournalMark::MayHaveTaken => "may_have_taken",
                JournalMark::Waited => "waited",
            }),
        }
    }
}

impl<'a> IncidentEdgeJson<'a> {
    fn new(edge: &'a IncidentEdge, position: impl Fn(&BackendId) -> Option<usize>) -> Self {
        Self {
            waiter: position(edge.waiter()),
            blocker: position(edge.blocker()),
            in_cycle: edge.is_in_cycle(),
            kind: edge.kind().map(|kind| match kind {
                EdgeKind::Hard => "hard",
                EdgeKind::Soft => "soft",
            }),
            mode_wanted: edge.mode_wanted(),
            mode_held: edge.mode_held(),
            mode_queued: edge.mode_queued(),
            wait_age_ms: edge.wait_age().map(millis),
            locktype: edge.object().locktype(),
            object: edge.object().to_string(),
            relation: edge.relation().map(RelationJson::new),
            ctid: edge.row().map(crate::graph::RowId::ctid),
            row_key: edge.row_key().map(columns),
            advisory_key: edge.object().advisory_key().map(LockKeyJson::new),
        }
    }
}

fn columns(key: &RowKey) -> Vec<ColumnJson<'_>> {
    let columns = key.columns();
    columns
        .map(|(column, value)| ColumnJson { column, value })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::IncidentTrigger;
    use super::super::testing::*;
    use super::*;
    use crate::mode::AdvisoryMode;

    #[test]
    fn a_whole_document() {
        let mut evidence = transfers();
        evidence.samples.remove(0);
        evidence.victim.statements.remove(1);
        evidence.others[0].statements.truncate(1);
        let document = serde_json::to_string_pretty(&report(evidence)).expect("a document");
        assert_eq!(document, DOCUMENT);
    }

    /// Programs read this: a change of its contents requires a new [`VERSION`].
    const DOCUMENT: &str = r#"{
  "version": 1,
  "kind": "deadlock",
  "headline": "Deadlock on public.account: src/transfer.rs:41 and src/refund.rs:17 waited for one another",
  "fingerprint": "5b62a63f352df502",
  "occurred": "2026-01-31T12:34:56.000000Z",
  "first_seen": "2026-01-31T12:34:56.000000Z",
  "last_seen": "2026-01-31T12:34:56.000000Z",
  "previously_seen": null,
  "count": 1,
  "attempt": 1,
  "attempts": 5,
  "outcome": "retried",
  "pause_ms": 12.0,
  "diagnosis": {
    "cause": "order_inversion",
    "certain": true,
    "text": "The same locks were taken in different orders: pid 11 (src/transfer.rs:41) held row id = 1 of public.account and wanted row id = 2 of public.account; pid 12 (src/refund.rs:17) held row id = 2 of public.account and wanted row id = 1 of public.account.",
    "fix": "Lock the rows of public.account in one order in every transaction, that of id, before the first of them is written: SELECT … ORDER BY id FOR NO KEY UPDATE."
  },
  "quality": "complete",
  "captured_after_ms": 960.0,
  "missing": [],
  "error": {
    "sqlstate": "40P01",
    "message": "deadlock detected",
    "detail": "Process 11 waits for ShareLock on transaction 12; blocked by process 12.\nProcess 12 waits for ShareLock on transaction 11; blocked by process 11.",
    "context": "while updating tuple (0,2) in relation \"account\""
  },
  "participants": [
    {
      "pid": 11,
      "prepared": null,
      "backend_start": "2026-01-31T12:33:56.000000Z",
      "call_site": "src/transfer.rs:41",
      "application_name": "billing src/transfer.rs:41",
      "user": "app",
      "database": "shop",
      "client": "10.0.0.7",
      "backend_type": "client backend",
      "state": "active",
      "in_state_ms": 960.0,
      "transaction_age_ms": 1200.0,
      "wait_age_ms": 958.0,
      "statement": "UPDATE account SET balance = balance + ? WHERE id = ?",
      "query_id": "11000",
      "victim": true,
      "waiting": true,
      "hidden": false,
      "in_this_process": true,
      "seen_after_ms": 960.0,
      "conflict_group": null,
      "journal_dropped": 0,
      "journal": [
        {
          "after_ms": 1.0,
          "text": "UPDATE account SET balance = balance - ? WHERE id = ?",
          "took_ms": 1.0,
          "failed": false,
          "advisory": [],
          "mark": "may_have_taken"
        },
        {
          "after_ms": 240.0,
          "text": "UPDATE account SET balance = balance + ? WHERE id = ?",
          "took_ms": null,
          "failed": true,
          "advisory": [],
          "mark": "waited"
        }
      ]
    },
    {
      "pid": 12,
      "prepared": null,
      "backend_start": "2026-01-31T12:33:56.000000Z",
      "call_site": "src/refund.rs:17",
      "application_name": "billing src/refund.rs:17",
      "user": "app",
      "database": "shop",
      "client": "10.0.0.7",
      "backend_type": "client backend",
      "state": "active",
      "in_state_ms": 412.0,
      "transaction_age_ms": 652.0,
      "wait_age_ms": 412.0,
      "statement": "UPDATE account SET balance = balance - ?, note = ? WHERE id = ?",
      "query_id": "12000",
      "victim": false,
      "waiting": true,
      "hidden": false,
      "in_this_process": true,
      "seen_after_ms": 960.0,
      "conflict_group": null,
      "journal_dropped": 0,
      "journal": [
        {
          "after_ms": 0.0,
          "text": "SELECT ?",
          "took_ms": 1.0,
          "failed": false,
          "advisory": [],
          "mark": null
        }
      ]
    }
  ],
  "edges": [
    {
      "waiter": 0,
      "blocker": 1,
      "in_cycle": true,
      "kind": "hard",
      "mode_wanted": "ShareLock",
      "mode_held": "ExclusiveLock",
      "mode_queued": null,
      "wait_age_ms": 958.0,
      "locktype": "transactionid",
      "object": "transaction 12",
      "relation": {
        "oid": 16384,
        "schema": "public",
        "name": "account"
      },
      "ctid": "(0,2)",
      "row_key": [
        {
          "column": "id",
          "value": "2"
        }
      ],
      "advisory_key": null
    },
    {
      "waiter": 1,
      "blocker": 0,
      "in_cycle": true,
      "kind": "hard",
      "mode_wanted": "ShareLock",
      "mode_held": "ExclusiveLock",
      "mode_queued": null,
      "wait_age_ms": 412.0,
      "locktype": "transactionid",
      "object": "transaction 11",
      "relation": {
        "oid": 16384,
        "schema": "public",
        "name": "account"
      },
      "ctid": "(0,1)",
      "row_key": [
        {
          "column": "id",
          "value": "1"
        }
      ],
      "advisory_key": null
    }
  ]
}"#;

    #[test]
    fn an_advisory_lock_by_name() {
        let mut entry = entry(0, "", Some(1));
        entry.text = None;
        entry.advisory = vec![(("billing", "invoice:42").into(), AdvisoryMode::Shared)];
        let mut evidence = evidence(IncidentTrigger::LongWait);
        evidence.victim.statements = vec![entry];
        evidence.outcome = Outcome::StillWaiting;
        let document = serde_json::to_value(report(evidence)).expect("a document");
        let line = &document["participants"][0]["journal"][0];
        let taken = &line["advisory"][0];
        assert_eq!(taken["key"]["namespace"], "billing");
        assert_eq!(taken["key"]["name"], "invoice:42");
        assert_eq!(taken["key"]["objsubid"], 1);
        assert_eq!(taken["mode"], "ShareLock");
        assert_eq!(document["error"], serde_json::Value::Null);
        assert_eq!(document["outcome"], "still_waiting");
        assert_eq!(document["pause_ms"], serde_json::Value::Null);
    }

    /// Each field of the document is in the tables of the documentation.
    #[test]
    fn every_field_is_documented() {
        let table = include_str!("mod.rs");
        let document: serde_json::Value = serde_json::from_str(DOCUMENT).expect("JSON");
        let line = &document["participants"][0]["journal"][0];
        let edge = &document["edges"][0];
        for object in [
            &document,
            &document["diagnosis"],
            &document["error"],
            &document["participants"][0],
            line,
            edge,
        ] {
            for field in object.as_object().expect("an object").keys() {
                assert!(table.contains(&format!("`{field}`")), "{field}");
            }
        }
    }

    #[test]
    fn milliseconds_have_three_digits_at_most() {
        for (micros, expected) in [
            (0, "0.0"),
            (412, "0.412"),
            (1_500_000, "1500.0"),
            (86_400_000_001, "86400000.001"),
        ] {
            let text =
                serde_json::to_string(&millis(Duration::from_micros(micros))).expect("a document");
            assert_eq!(text, expected);
        }
        assert!(millis(Duration::MAX).is_finite());
    }
}
