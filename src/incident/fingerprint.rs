//! A hash that incidents of the same problem have in common.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::graph::LockObject;

use super::observed_graph::ObservedGraph;
use super::{IncidentEdge, IncidentKind, Participant};

/// Equal for incidents of the same problem: the same statements, at the same places in the code, that blocked each
/// other in the same way.
///
/// It is made from the kind of the incident, call sites (the file name without folders, and the line), statements
/// without literals, lock modes and relation names. It does not depend on process ids, times, transactions, rows, keys
/// or literals, nor on which session of a deadlock was the victim. It is the same in every process and build.
///
/// It depends on what was observed: with less evidence the same problem may have another fingerprint.
///
/// `Display` shows 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub(super) u64);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

pub(super) fn fingerprint(
    kind: IncidentKind,
    observed: &ObservedGraph,
    participants: &[Participant],
) -> Fingerprint {
    let find_participant = |id| {
        participants
            .iter()
            .find(|participant| participant.id.as_ref() == Some(id))
    };
    let mut parts = vec![vec![kind_part(kind).to_owned()]];
    if observed.cycle > 0 {
        // The cycle as it appears from each of its members; the smallest of these is the same for all.
        let links: Vec<_> = observed.edges[..observed.cycle]
            .iter()
            .map(|edge| {
                [
                    waiter_parts(find_participant(&edge.waiter)),
                    lock_parts(edge),
                ]
                .concat()
            })
            .collect();
        let rotations = (0..links.len()).map(|by| {
            let mut links = links.clone();
            links.rotate_left(by);
            links
        });
        parts.extend(rotations.min().unwrap_or_default());
    } else {
        parts.push(waiter_parts(participants.first()));
        let of_victim = |edge: &&IncidentEdge| Some(&edge.waiter) == observed.victim.as_ref();
        let mut links: Vec<_> = observed
            .edges
            .iter()
            .filter(of_victim)
            .map(|edge| {
                [
                    lock_parts(edge),
                    blocker_parts(find_participant(&edge.blocker)),
                ]
                .concat()
            })
            .collect();
        // Their number is accidental.
        links.sort();
        links.dedup();
        parts.extend(links);
    }
    hash(&parts)
}

/// A deadlock is the same problem whether the server detected it or a timeout hid it.
fn kind_part(kind: IncidentKind) -> &'static str {
    match kind {
        IncidentKind::Deadlock | IncidentKind::HiddenDeadlock => "deadlock",
        IncidentKind::LockTimeout => "lock timeout",
        IncidentKind::LongWait => "long wait",
    }
}

fn waiter_parts(participant: Option<&Participant>) -> Vec<String> {
    let site = participant.and_then(|participant| participant.site_key.as_deref());
    let statement = participant.and_then(|participant| participant.fingerprint);
    vec![
        site.unwrap_or_default().to_owned(),
        statement
            .map(|fingerprint| fingerprint.to_string())
            .unwrap_or_default(),
    ]
}

/// The current statement of a session that does not wait is accidental, as long as its call site identifies it.
fn blocker_parts(participant: Option<&Participant>) -> Vec<String> {
    let site = participant.and_then(|participant| participant.site_key.as_deref());
    match site {
        Some(site) => vec![site.to_owned(), String::new()],
        None => waiter_parts(participant),
    }
}

fn lock_parts(edge: &IncidentEdge) -> Vec<String> {
    // The first waiter for a row waits for its transaction, and the others for its tuple lock.
    let is_row = edge.row.is_some();
    let is_transaction = matches!(edge.object, LockObject::Transaction(_));
    let (what, mode) = if is_row || is_transaction {
        ("row", "")
    } else {
        (edge.object.locktype(), &*edge.mode_wanted)
    };
    let relation = edge.relation();
    let schema = relation.and_then(|relation| relation.schema());
    let name = relation.and_then(|relation| relation.name());
    [
        what,
        mode,
        schema.unwrap_or_default(),
        name.unwrap_or_default(),
    ]
    .map(str::to_owned)
    .to_vec()
}

fn hash(parts: &[Vec<String>]) -> Fingerprint {
    let mut hash = Sha256::new();
    for part in parts {
        for text in part {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        hash.update([0xff]);
    }
    let digest = hash.finalize();
    let first = digest.iter().take(8);
    Fingerprint(first.fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::*;
    use super::super::{Evidence, IncidentTrigger, Journal, RowKey, WaitSample};
    use super::*;
    use crate::call_site::{self, CallSite};
    use crate::graph::{Relation, RowId};

    /// The constant facts of one transaction in a deadlock, which waits for the next one.
    #[derive(Clone, Debug)]
    struct Part {
        site: CallSite,
        /// With `{}` for a literal.
        statement: &'static str,
        relation: &'static str,
        what: What,
    }

    #[derive(Clone, Copy, Debug)]
    enum What {
        Row,
        Table,
        Advisory,
    }

    /// The accidental facts.
    #[derive(Clone, Debug)]
    struct Accident {
        pids: Vec<i32>,
        victim: usize,
        literal: u32,
        oid: u32,
        offset: u16,
        millis: u64,
        /// Which of the others are transactions of this process.
        own: Vec<bool>,
        prefix: &'static str,
        hidden: bool,
    }

    fn part() -> impl Strategy<Value = Part> {
        let site = prop::sample::select(vec![
            CallSite::at("src/transfer.rs", 41),
            CallSite::at("src/refund.rs", 17),
            CallSite::at(
                "crates/a-folder-with-a-long-name/another-one/src/billing/refund.rs",
                170,
            ),
        ]);
        let statement = prop::sample::select(vec![
            "UPDATE account SET balance = {} WHERE id = {}",
            "DELETE FROM account WHERE id = {}",
            "SELECT f({})",
        ]);
        let relation = prop::sample::select(vec!["account", "audit"]);
        let what = prop::sample::select(vec![What::Row, What::Table, What::Advisory]);
        (site, statement, relation, what).prop_map(|(site, statement, relation, what)| Part {
            site,
            statement,
            relation,
            what,
        })
    }

    fn accident(members: usize) -> impl Strategy<Value = Accident> {
        (
            prop::collection::hash_set(1..100_000_i32, members),
            0..members,
            (any::<u32>(), 1..1_000_000_u32, 1..1000_u16, 0..5000_u64),
            prop::collection::vec(any::<bool>(), members),
            prop::sample::select(vec!["billing", ""]),
            any::<bool>(),
        )
            .prop_map(
                |(pids, victim, (literal, oid, offset, millis), own, prefix, hidden)| Accident {
                    pids: pids.into_iter().collect(),
                    victim,
                    literal,
                    oid,
                    offset,
                    millis,
                    own,
                    prefix,
                    hidden,
                },
            )
    }

    fn sql(part: &Part, accident: &Accident) -> String {
        part.statement
            .replace("{}", &format!("'{}'", accident.literal))
    }

    fn relation(part: &Part, accident: &Accident) -> Relation {
        let number = u32::try_from(part.relation.len()).expect("a short name");
        table(accident.oid + number, part.relation)
    }

    fn sample(parts: &[Part], accident: &Accident) -> WaitSample {
        let mut server = TestServer::default();
        let mut keys: Vec<(RowId, RowKey)> = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let waiter = accident.pids[at];
            let blocker = accident.pids[(at + 1) % parts.len()];
            let name =
                call_site::ApplicationNames::new(accident.prefix.to_owned()).of(Some(&part.site));
            server = server.session(waiter, &name, "active", &sql(part, accident));
            let number = u16::try_from(at).expect("a small number");
            server = match part.what {
                What::Row => {
                    let row = row(relation(part, accident), accident.offset + number);
                    keys.push((row.clone(), key("id", &accident.literal.to_string())));
                    server.waits_for_row(waiter, &row, blocker, accident.millis)
                }
                What::Table => {
                    let object = LockObject::Relation(relation(part, accident));
                    let server = server.holds(blocker, &object, "ExclusiveLock");
                    server.waits(waiter, &object, "ShareLock", accident.millis, &[blocker])
                }
                What::Advisory => {
                    let object = advisory(format!("{}:{}", accident.literal, number));
                    let server = server.holds(blocker, &object, "ExclusiveLock");
                    server.waits(waiter, &object, "ShareLock", accident.millis, &[blocker])
                }
            };
        }
        server.sample(accident.millis, keys)
    }

    fn journal_of(at: usize, parts: &[Part], accident: &Accident) -> Journal {
        let began = accident.millis + 100;
        let text = sql(&parts[at], accident);
        journal(
            accident.pids[at],
            parts[at].site,
            began,
            vec![entry(50, &text, None)],
        )
    }

    fn found(parts: &[Part], accident: &Accident) -> Evidence {
        let others = (0..parts.len()).filter(|at| *at != accident.victim && accident.own[*at]);
        Evidence {
            victim: journal_of(accident.victim, parts, accident),
            others: others.map(|at| journal_of(at, parts, accident)).collect(),
            samples: vec![sample(parts, accident)],
            ..evidence(if accident.hidden {
                IncidentTrigger::LockTimeout
            } else {
                IncidentTrigger::Deadlock
            })
        }
    }

    fn scenes() -> impl Strategy<Value = (Vec<Part>, Accident, Accident)> {
        (2..5_usize).prop_flat_map(|members| {
            let parts = prop::collection::vec(part(), members);
            (parts, accident(members), accident(members))
        })
    }

    proptest! {
        #[test]
        fn accidental_facts_do_not_change_it((parts, one, other) in scenes()) {
            let (one, other) = (report(found(&parts, &one)), report(found(&parts, &other)));
            prop_assert_eq!(one.cycle().len(), parts.len());
            prop_assert_eq!(one.fingerprint(), other.fingerprint(), "{}\n{}", one, other);
        }

        /// Unless the parts are equal when the cycle is rotated.
        #[test]
        fn another_problem_has_another_fingerprint((parts, one, other) in scenes(), changed in part()) {
            let mut changed_parts = parts.clone();
            changed_parts[0] = changed;
            let shown = |parts: &[Part]| {
                let mut shown: Vec<_> = parts.iter().map(|part| match part.what {
                    // Which key it is does not matter.
                    What::Advisory => format!("{:?}", (part.site, part.statement)),
                    _ => format!("{part:?}"),
                }).collect();
                shown.sort();
                shown
            };
            prop_assume!(shown(&parts) != shown(&changed_parts));
            let (one, other) = (report(found(&parts, &one)), report(found(&changed_parts, &other)));
            prop_assert_ne!(one.fingerprint(), other.fingerprint());
        }
    }

    #[test]
    fn the_number_of_blockers_of_a_wait_does_not_matter() {
        let object = LockObject::Relation(account());
        let server = |pids: &[i32], statement: &str| {
            let server = pids.iter().fold(TestServer::default(), |server, pid| {
                let server = server.session(*pid, "billing src/refund.rs:17", "active", statement);
                server.holds(*pid, &object, "RowExclusiveLock")
            });
            server.waits(11, &object, "ShareLock", 900, pids)
        };
        let one = report(timeout(server(&[12], "SELECT 1")));
        let many = report(timeout(server(&[21, 22, 23], "SELECT now()")));
        assert_eq!(one.fingerprint(), many.fingerprint());
        let mut long = timeout(server(&[12], "SELECT 1"));
        long.trigger = IncidentTrigger::LongWait;
        assert_ne!(report(long).fingerprint(), one.fingerprint());
        let mut elsewhere = timeout(server(&[12], "SELECT 1"));
        elsewhere.victim.call_site = Some(REFUND);
        assert_ne!(report(elsewhere).fingerprint(), one.fingerprint());
    }

    #[test]
    fn it_is_stable() {
        let report = report(transfers());
        assert_eq!(report.fingerprint().to_string(), "5b62a63f352df502");
    }
}
