//! What incidents have in common that are the same problem.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::graph::LockObject;

use super::observed_graph::ObservedGraph;
use super::{IncidentEdge, IncidentKind, Participant};

/// The same for incidents that are one problem: the same statements of the same places in the code, that met in the same
/// way.
///
/// It is made from the kind of incident, call sites (the file without its folders, and the line), statements without
/// their literals, lock modes and relation names; not from process ids, times, transactions, rows, keys or literals. It
/// does not depend on which of the sessions in a deadlock was the victim, and is the same in every process and build.
///
/// What was not seen cannot be in it: with less evidence the same problem may have another one.
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
    let who = |id| {
        participants
            .iter()
            .find(|participant| participant.id.as_ref() == Some(id))
    };
    let mut parts = vec![vec![class(kind).to_owned()]];
    if observed.cycle > 0 {
        // The cycle as seen from each of its members; the least of these is the same for all.
        let links: Vec<_> = observed.edges[..observed.cycle]
            .iter()
            .map(|edge| [waiter(who(&edge.waiter)), contest(edge)].concat())
            .collect();
        let turned = (0..links.len()).map(|by| {
            let mut links = links.clone();
            links.rotate_left(by);
            links
        });
        parts.extend(turned.min().unwrap_or_default());
    } else {
        parts.push(waiter(participants.first()));
        let of_victim = |edge: &&IncidentEdge| Some(&edge.waiter) == observed.victim.as_ref();
        let mut links: Vec<_> = observed
            .edges
            .iter()
            .filter(of_victim)
            .map(|edge| [contest(edge), blocker(who(&edge.blocker))].concat())
            .collect();
        // How many of them there are is chance.
        links.sort();
        links.dedup();
        parts.extend(links);
    }
    hash(&parts)
}

/// A deadlock is the same problem whether the server found it or a timeout hid it.
fn class(kind: IncidentKind) -> &'static str {
    match kind {
        IncidentKind::Deadlock | IncidentKind::HiddenDeadlock => "deadlock",
        IncidentKind::LockTimeout => "lock timeout",
        IncidentKind::LongWait => "long wait",
    }
}

fn waiter(participant: Option<&Participant>) -> Vec<String> {
    let site = participant.and_then(|participant| participant.site_key.as_deref());
    let statement = participant.and_then(|participant| participant.fingerprint);
    vec![
        site.unwrap_or_default().to_owned(),
        statement
            .map(|fingerprint| fingerprint.to_string())
            .unwrap_or_default(),
    ]
}

/// What one that does not wait runs at the moment is chance, as long as its call site says who it is.
fn blocker(participant: Option<&Participant>) -> Vec<String> {
    let site = participant.and_then(|participant| participant.site_key.as_deref());
    match site {
        Some(site) => vec![site.to_owned(), String::new()],
        None => waiter(participant),
    }
}

fn contest(edge: &IncidentEdge) -> Vec<String> {
    // Who waits for a row waits for its transaction if he is the first, and for his turn otherwise.
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

    /// What stays the same of one transaction in a deadlock: it waits for the next one.
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

    /// What does not.
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
            let name = call_site::application_name(accident.prefix, Some(&part.site));
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
        fn accidents_do_not_change_it((parts, one, other) in scenes()) {
            let (one, other) = (report(found(&parts, &one)), report(found(&parts, &other)));
            prop_assert_eq!(one.cycle().len(), parts.len());
            prop_assert_eq!(one.fingerprint(), other.fingerprint(), "{}\n{}", one, other);
        }

        /// As long as the parts are not the same, seen from another one.
        #[test]
        fn another_problem_has_another_one((parts, one, other) in scenes(), changed in part()) {
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
    fn of_a_wait_it_does_not_matter_how_many_are_in_the_way() {
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
    fn it_is_the_same_in_every_build() {
        let report = report(transfers());
        assert_eq!(report.fingerprint().to_string(), "5b62a63f352df502");
    }
}
