//! Properties of all reports, whatever the evidence.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use crate::graph::{BackendId, LockObject};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

use super::testing::*;
use super::{
    Evidence, Incident, IncidentHistory, IncidentTrigger, Journal, JournalEntry, Outcome,
    ServerError, WaitSample,
};

/// Part of each literal, and of nothing else.
const SECRET: &str = "Zq7";

/// Statements whose literals contain the secret, complete or truncated.
fn statement() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "UPDATE account SET a = 'Zq7'",
        "INSERT INTO public.audit VALUES ($$Zq7$$, E'\\'Zq7')",
        "SELECT * FROM account WHERE id = 'Zq7' FOR UPDATE",
        "/* Zq7 */ DELETE FROM \"account\" -- Zq7\n",
        "CREATE INDEX ON account (a) WHERE a = 'Zq7'",
        "SELECT pg_advisory_lock(hashtext('Zq7'))",
        "LOCK TABLE account; SELECT 'Zq7",
        "",
    ]);
    (piece, any::<prop::sample::Index>(), any::<bool>()).prop_map(|(sql, end, cut)| {
        let end = end.index(sql.len() + 1);
        if cut {
            sql[..end].to_owned()
        } else {
            sql.to_owned()
        }
    })
}

fn object() -> impl Strategy<Value = LockObject> {
    (0..9_u8, 1..4_u16).prop_map(|(what, number)| {
        let relation = || {
            table(
                16384 + u32::from(number),
                ["account", "audit"][usize::from(number % 2)],
            )
        };
        match what {
            0 | 1 => LockObject::Tuple(row(relation(), number)),
            2 | 3 => LockObject::Transaction(number.into()),
            4 => LockObject::Relation(relation()),
            5 => advisory(format!("key:{number}")),
            6 => LockObject::VirtualTransaction("3/15".into()),
            7 => LockObject::SpeculativeToken {
                transaction: None,
                token: number.into(),
            },
            _ => LockObject::Other("new".into()),
        }
    })
}

fn any_server() -> impl Strategy<Value = TestServer> {
    let modes = || {
        prop::sample::select(vec![
            "ShareLock",
            "ExclusiveLock",
            "AccessShareLock",
            "AccessExclusiveLock",
        ])
    };
    let state = prop::sample::select(vec!["active", "idle in transaction", "idle"]);
    let session = (9..16_i32, state, statement(), any::<bool>());
    let lock = (
        9..16_i32,
        object(),
        modes(),
        prop::collection::vec(9..16_i32, 0..4),
    );
    (
        prop::collection::vec(session, 0..6),
        prop::collection::vec((lock, any::<bool>()), 0..14),
    )
        .prop_map(|(sessions, locks)| {
            let server = sessions
                .into_iter()
                .fold(TestServer::default(), |server, session| {
                    let (pid, state, statement, hidden) = session;
                    if hidden {
                        server.hidden(pid, "other src/other.rs:5")
                    } else {
                        server.session(pid, "billing src/refund.rs:17", state, &statement)
                    }
                });
            locks
                .into_iter()
                .fold(server, |server, ((pid, object, mode, blockers), waits)| {
                    if waits {
                        let server = blockers.iter().fold(server, |server, blocker| {
                            server.holds(*blocker, &object, "ExclusiveLock")
                        });
                        server.waits(pid, &object, mode, 500, &blockers)
                    } else if pid == 9 {
                        server.holds(BackendId::Prepared(None), &object, mode)
                    } else {
                        server.holds(pid, &object, mode)
                    }
                })
        })
}

fn any_sample() -> impl Strategy<Value = WaitSample> {
    (any_server(), 0..5000_u64).prop_map(|(server, after)| {
        let keys = vec![(row(table(16385, "audit"), 1), key("id", "1"))];
        server.sample(after, keys)
    })
}

fn any_entry(text: BoxedStrategy<String>) -> impl Strategy<Value = JournalEntry> {
    let times = (any::<u32>(), prop::option::of(any::<u64>()));
    (
        times,
        prop::option::of(text),
        any::<bool>(),
        prop::option::of(0..4_i64),
    )
        .prop_map(|((after, took), text, failed, key)| JournalEntry {
            after: Duration::from_micros(after.into()),
            text: text.map(Arc::from),
            duration: took.map(Duration::from_secs),
            failed,
            advisory: key
                .map(|key| (LockKey::from(key), AdvisoryMode::Exclusive))
                .into_iter()
                .collect(),
        })
}

fn any_journal(text: BoxedStrategy<String>) -> impl Strategy<Value = Journal> {
    let entries = prop::collection::vec(any_entry(text), 0..6);
    (
        prop::option::of(9..16_i32),
        entries,
        0..1u64 << 40,
        0..3_usize,
    )
        .prop_map(|(pid, statements, began, dropped)| Journal {
            pid,
            dropped,
            ..journal(0, TRANSFER, began, statements)
        })
}

/// The server's error, or an error raised by a function.
fn any_error(
    text: BoxedStrategy<String>,
    detail: BoxedStrategy<String>,
) -> impl Strategy<Value = ServerError> {
    let pids = prop::collection::vec(9..16_i32, 2..5);
    let own = pids.prop_map(|pids| {
        let next = pids.iter().cycle().skip(1);
        let lines = pids.iter().zip(next).map(|(waiter, blocker)| {
            format!("Process {waiter} waits for ShareLock on transaction 7; blocked by process {blocker}.")
        });
        (lines.collect::<Vec<_>>().join("\n"), "DeadLockReport")
    });
    let raised = detail
        .clone()
        .prop_map(|detail| (detail, "exec_stmt_raise"));
    let statement = text.prop_map(|sql| {
        format!("while updating tuple (0,1) in relation \"account\"\nSQL statement \"{sql}\"\nPL/pgSQL function f() line 3 at EXECUTE")
    });
    let context = prop_oneof![
        statement,
        detail.prop_map(|detail| format!("COPY account, line 3, column a: \"{detail}\"")),
    ];
    (prop_oneof![own, raised], prop::option::of(context)).prop_map(
        |((detail, routine), context)| ServerError {
            sqlstate: "40P01".into(),
            message: if routine == "DeadLockReport" {
                "deadlock detected".into()
            } else {
                detail.clone()
            },
            detail: Some(detail),
            context,
            routine: Some(routine.into()),
        },
    )
}

fn any_evidence(
    text: BoxedStrategy<String>,
    detail: BoxedStrategy<String>,
) -> impl Strategy<Value = Evidence> {
    let kinds = prop::sample::select(vec![
        IncidentTrigger::Deadlock,
        IncidentTrigger::LockTimeout,
        IncidentTrigger::LongWait,
    ]);
    let journals = prop::collection::vec(any_journal(text.clone()), 0..4);
    (
        (
            kinds,
            any_journal(text.clone()),
            prop::option::of(any_error(text, detail)),
        ),
        (
            prop::collection::vec(any_sample(), 0..4),
            journals,
            0..1u64 << 40,
        ),
    )
        .prop_map(
            |((trigger, victim, error), (samples, others, occurred))| Evidence {
                occurred: SystemTime::UNIX_EPOCH + Duration::from_millis(occurred),
                victim,
                error,
                samples,
                others,
                outcome: Outcome::NotRetried,
                relations: Vec::new(),
                context_row: None,
                ..evidence(trigger)
            },
        )
}

/// All texts of a report.
fn all_texts(report: &Incident) -> String {
    let json = {
        #[cfg(feature = "serde")]
        let json = serde_json::to_string_pretty(report).expect("JSON");
        #[cfg(not(feature = "serde"))]
        let json = String::new();
        json
    };
    format!("{report}\n{report:?}\n{json}\n{}", report.headline())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_literal_is_in_any_text(
        evidence in any_evidence(statement().boxed(), Just(format!("it was {SECRET}")).boxed()),
    ) {
        let debug = format!("{evidence:?}");
        prop_assert!(!debug.contains(SECRET), "{}", debug);
        let redaction = all_texts(&report(evidence));
        prop_assert!(!redaction.contains(SECRET), "{}", redaction);
    }

    #[test]
    fn literals_are_there_when_asked_for(evidence in any_evidence(statement().boxed(), Just(SECRET.to_owned()).boxed())) {
        let shown = |line: &JournalEntry| line.text.as_deref().is_some_and(|text| text.contains(SECRET));
        let any = evidence.victim.statements.iter().any(shown);
        let report = report(Evidence { literals: true, ..evidence });
        prop_assert!(!any || all_texts(&report).contains(SECRET));
    }

    /// Any text, any times, any edges.
    #[test]
    fn every_report_is_a_page(
        evidence in any_evidence(any::<String>().boxed(), any::<String>().boxed()),
        again in any::<bool>(),
    ) {
        let history = IncidentHistory::default();
        if again {
            Incident::new(evidence.clone(), &history);
        }
        let report = Incident::new(evidence.clone(), &history);
        let page = all_texts(&report);
        prop_assert!(!page.is_empty());
        for line in report.to_string().lines() {
            // The tests of `text_wrap` check characters that are two columns wide.
            prop_assert!(line.chars().count() <= 100, "{}", line);
            prop_assert!(!line.contains(char::is_control), "{:?}", line);
        }
        prop_assert!(!report.headline().contains(char::is_control));
        let [victim, others @ ..] = report.participants() else {
            panic!("nobody");
        };
        prop_assert!(victim.is_victim() && !others.iter().any(super::Participant::is_victim));
        for edge in report.edges() {
            for id in [edge.waiter(), edge.blocker()] {
                prop_assert!(report.participant(id).is_some());
            }
        }
        let cycle = report.cycle();
        for (edge, next) in cycle.iter().zip(cycle.iter().cycle().skip(1)) {
            prop_assert_eq!(edge.blocker(), next.waiter());
        }
        prop_assert!(cycle.is_empty() || Some(cycle[0].waiter()) == victim.id());
        prop_assert_eq!(report.count(), if again { 2 } else { 1 });
        prop_assert_eq!(Incident::new(evidence, &history).fingerprint(), report.fingerprint());
    }
}
