//! The report as a JSON document. Its fields are documented at [`Incident`].

use serde::ser::SerializeStruct as _;
use serde::{Serialize, Serializer};

use crate::graph::json::{LockKeyJson, RelationJson, kind_name, millis};
use crate::graph::{BackendId, RowId};

use super::{
    Completeness, Diagnosis, Incident, IncidentEdge, JournalLine, JournalMark, Outcome,
    Participant, wording,
};

/// Incremented when a field changes its meaning or is removed. New fields do not count.
const VERSION: u32 = 1;

impl Serialize for Incident {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (outcome, pause) = match self.outcome() {
            Outcome::Retried { pause } => ("retried", Some(pause)),
            Outcome::GaveUp => ("gave_up", None),
            Outcome::NotRetried => ("not_retried", None),
            Outcome::StillWaiting => ("still_waiting", None),
            Outcome::CaughtBySavepoint => ("caught_by_savepoint", None),
        };
        let quality = match self.completeness() {
            Completeness::Complete => "complete",
            Completeness::Partial => "partial",
            Completeness::DetailOnly => "detail_only",
            Completeness::Nothing => "nothing",
        };
        let error = self.sqlstate().map(|sqlstate| ErrorJson {
            sqlstate,
            message: self.message(),
            detail: self.detail(),
            context: self.context(),
        });
        let participants: Vec<_> = self.participants().iter().map(ParticipantJson).collect();
        let edges = self.edges().iter().map(|edge| EdgeJson(self, edge));
        let previously_seen = self.previously_seen().map(wording::timestamp);
        let mut document = serializer.serialize_struct("Incident", 20)?;
        document.serialize_field("version", &VERSION)?;
        document.serialize_field("kind", self.kind().as_str())?;
        document.serialize_field("headline", &self.headline())?;
        document.serialize_field("fingerprint", &self.fingerprint().to_string())?;
        document.serialize_field("occurred", &wording::timestamp(self.occurred()))?;
        document.serialize_field("first_seen", &wording::timestamp(self.first_seen()))?;
        document.serialize_field("last_seen", &wording::timestamp(self.last_seen()))?;
        document.serialize_field("previously_seen", &previously_seen)?;
        document.serialize_field("count", &self.count())?;
        document.serialize_field("attempt", &self.attempt())?;
        document.serialize_field("attempts", &self.attempts())?;
        document.serialize_field("outcome", outcome)?;
        document.serialize_field("pause_ms", &pause.map(millis))?;
        document.serialize_field("diagnosis", &DiagnosisJson(self.diagnosis()))?;
        document.serialize_field("quality", quality)?;
        document.serialize_field("captured_after_ms", &self.captured_after().map(millis))?;
        document.serialize_field("missing", &self.caveats().collect::<Vec<_>>())?;
        document.serialize_field("error", &error)?;
        document.serialize_field("participants", &participants)?;
        document.serialize_field("edges", &edges.collect::<Vec<_>>())?;
        document.end()
    }
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    sqlstate: &'a str,
    message: Option<&'a str>,
    detail: Option<&'a str>,
    context: Option<&'a str>,
}

struct DiagnosisJson<'a>(&'a Diagnosis);

impl Serialize for DiagnosisJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut document = serializer.serialize_struct("Diagnosis", 4)?;
        document.serialize_field("cause", self.0.cause().as_str())?;
        document.serialize_field("certain", &self.0.is_certain())?;
        document.serialize_field("text", self.0.text())?;
        document.serialize_field("fix", &self.0.fix())?;
        document.end()
    }
}

struct ParticipantJson<'a>(&'a Participant);

impl Serialize for ParticipantJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(participant) = self;
        let prepared = participant.id().and_then(BackendId::prepared_transaction);
        let backend_start = participant.backend_start().map(wording::timestamp);
        let query_id = participant.query_id().map(|id| id.to_string());
        let group = participant.conflict_group().map(LockKeyJson::new);
        let journal: Vec<_> = participant.journal().iter().map(LineJson).collect();
        let mut document = serializer.serialize_struct("Participant", 24)?;
        document.serialize_field("letter", participant.letter())?;
        document.serialize_field("pid", &participant.pid())?;
        document.serialize_field("prepared", &prepared)?;
        document.serialize_field("backend_start", &backend_start)?;
        document.serialize_field("call_site", &participant.call_site())?;
        document.serialize_field("application_name", &participant.application_name())?;
        document.serialize_field("user", &participant.user())?;
        document.serialize_field("database", &participant.database())?;
        document.serialize_field("client", &participant.client_address())?;
        document.serialize_field("backend_type", &participant.backend_type())?;
        document.serialize_field("state", &participant.state())?;
        document.serialize_field("in_state_ms", &participant.state_age().map(millis))?;
        let transaction_age = participant.transaction_age().map(millis);
        document.serialize_field("transaction_age_ms", &transaction_age)?;
        document.serialize_field("wait_age_ms", &participant.wait_age().map(millis))?;
        document.serialize_field("statement", &participant.statement())?;
        document.serialize_field("query_id", &query_id)?;
        document.serialize_field("victim", &participant.is_victim())?;
        document.serialize_field("waiting", &participant.is_waiting())?;
        document.serialize_field("hidden", &participant.is_hidden())?;
        document.serialize_field("in_this_process", &participant.is_in_this_process())?;
        document.serialize_field("seen_after_ms", &participant.seen_after().map(millis))?;
        document.serialize_field("conflict_group", &group)?;
        document.serialize_field("journal_dropped", &participant.journal_dropped())?;
        document.serialize_field("journal", &journal)?;
        document.end()
    }
}

struct LineJson<'a>(&'a JournalLine);

impl Serialize for LineJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(line) = self;
        let advisory = line.advisory().map(|(key, mode)| AdvisoryLockJson {
            key: LockKeyJson::new(key),
            mode: mode.as_pg_locks(),
        });
        let mark = line.mark().map(|mark| match mark {
            JournalMark::Took => "took",
            JournalMark::MayHaveTaken => "may_have_taken",
            JournalMark::Waited => "waited",
        });
        let mut document = serializer.serialize_struct("JournalLine", 6)?;
        document.serialize_field("after_ms", &millis(line.after()))?;
        document.serialize_field("text", &line.text())?;
        document.serialize_field("took_ms", &line.duration().map(millis))?;
        document.serialize_field("failed", &line.failed())?;
        document.serialize_field("advisory", &advisory.collect::<Vec<_>>())?;
        document.serialize_field("mark", &mark)?;
        document.end()
    }
}

#[derive(Serialize)]
struct AdvisoryLockJson<'a> {
    key: LockKeyJson<'a>,
    mode: &'static str,
}

struct EdgeJson<'a>(&'a Incident, &'a IncidentEdge);

impl Serialize for EdgeJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(incident, edge) = self;
        let object = edge.object();
        let row_key = edge.row_key().map(|key| {
            let columns = key.columns();
            let columns = columns.map(|(column, value)| ColumnJson { column, value });
            columns.collect::<Vec<_>>()
        });
        let mut document = serializer.serialize_struct("IncidentEdge", 14)?;
        document.serialize_field("waiter", &incident.position(edge.waiter()))?;
        document.serialize_field("blocker", &incident.position(edge.blocker()))?;
        document.serialize_field("in_cycle", &edge.is_in_cycle())?;
        document.serialize_field("kind", &edge.kind().map(kind_name))?;
        document.serialize_field("mode_wanted", edge.mode_wanted())?;
        document.serialize_field("mode_held", &edge.mode_held())?;
        document.serialize_field("mode_queued", &edge.mode_queued())?;
        document.serialize_field("wait_age_ms", &edge.wait_age().map(millis))?;
        document.serialize_field("locktype", object.locktype())?;
        document.serialize_field("object", &object.to_string())?;
        document.serialize_field("relation", &edge.relation().map(RelationJson::new))?;
        document.serialize_field("ctid", &edge.row().map(RowId::ctid))?;
        document.serialize_field("row_key", &row_key)?;
        document.serialize_field("advisory_key", &object.advisory_key().map(LockKeyJson::new))?;
        document.end()
    }
}

#[derive(Serialize)]
struct ColumnJson<'a> {
    column: &'a str,
    value: Option<&'a str>,
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
    "text": "The same locks were taken in different orders: A held row id = 1 of public.account and wanted row id = 2 of public.account; B held row id = 2 of public.account and wanted row id = 1 of public.account.",
    "fix": "Lock the rows of public.account in one order in every transaction, that of id, before the first of them is written: tx.lock_rows(\"public.account\", \"id\", ids), or SELECT … ORDER BY id FOR NO KEY UPDATE."
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
      "letter": "A",
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
      "letter": "B",
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
