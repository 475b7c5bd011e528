//! The part of the wait graph that belongs to the incident: its edges, the cycle that they form, and how complete it
//! is.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use crate::graph::{BackendId, Edge, LockObject, Relation, RowId, Snapshot};
use crate::key::LockKey;
use crate::postgres::message::{self, DeadlockDetail};

use super::edge::same_row;
use super::server::ServerMessage;
use super::{Completeness, Evidence, IncidentEdge, IncidentTrigger, WaitSample};

/// A queue of hundreds is not shown in full.
const MAX_SESSIONS: usize = 40;

/// The edges of an incident.
#[derive(Debug, Default)]
pub(super) struct ObservedGraph {
    pub(super) victim: Option<BackendId>,
    /// The edges of the cycle first, in its order, beginning with the victim.
    pub(super) edges: Vec<IncidentEdge>,
    /// How many edges form the cycle.
    pub(super) cycle: usize,
    /// The sample that the edges are from; if they are from several, the last one that contains any of them.
    pub(super) sample: Option<usize>,
    pub(super) completeness: Completeness,
    /// The number of sessions that blocked too, and are left out.
    pub(super) left_out: usize,
}

impl ObservedGraph {
    pub(super) fn new(evidence: &Evidence, message: &ServerMessage) -> Self {
        let names = Names::new(evidence);
        let mut detail = names.edges(&message.detail);
        let is_cycle = message.detail.is_cycle() && is_cycle(&detail);
        let own = evidence.victim.pid.map(BackendId::from);
        if let Some(own) = own.as_ref().filter(|_| is_cycle) {
            begin_with(&mut detail, own);
        }
        // The first line of DETAIL is about the session that the server failed (`DeadLockReport` in PostgreSQL's
        // `src/backend/storage/lmgr/deadlock.c`).
        let reported = detail.first().filter(|_| is_cycle);
        let Some(victim) = own.or_else(|| reported.map(|edge| edge.waiter.clone())) else {
            return Self::default();
        };
        let mut observed = Self {
            victim: Some(victim.clone()),
            ..Self::default()
        };
        // The server names the members. A sample whose cycle has other members is of another cycle.
        let reported = is_cycle.then(|| members(&detail));
        let seen = evidence.samples.iter().enumerate().rev();
        let seen = seen.filter_map(|(at, sample)| {
            let cycle = cycle(&sample.snapshot, &victim, evidence.trigger)?;
            let fits = reported
                .as_ref()
                .is_none_or(|reported| *reported == members(&cycle));
            fits.then_some((at, cycle))
        });
        if let Some((at, cycle)) = { seen }.next() {
            observed.take(at, &evidence.samples[at], cycle);
            observed.completeness = Completeness::Complete;
        } else if is_cycle {
            observed.take_detail(detail, &evidence.samples);
        } else if let Some((at, sample)) = last_wait(&evidence.samples, &victim) {
            observed.take(at, sample, Vec::new());
            observed.completeness = if evidence.trigger == IncidentTrigger::Deadlock {
                Completeness::Partial
            } else {
                Completeness::Complete
            };
        } else if !detail.is_empty() {
            observed.edges = detail;
            observed.completeness = Completeness::DetailOnly;
        }
        observed.describe(evidence, message, &names);
        observed
    }

    /// When the sample was taken, since the victim's statement began.
    pub(super) fn after(&self, samples: &[WaitSample]) -> Option<Duration> {
        Some(samples.get(self.sample?)?.after)
    }

    /// Takes a cycle, and all other sessions that block its members, from a sample.
    fn take(&mut self, at: usize, sample: &WaitSample, cycle: Vec<IncidentEdge>) {
        self.sample = Some(at);
        self.cycle = cycle.len();
        self.edges = cycle;
        let Some(victim) = &self.victim else { return };
        let mut reached: Vec<BackendId> = vec![victim.clone()];
        let of_cycle = self.edges.iter().map(|edge| &edge.blocker);
        reached.extend(of_cycle.filter(|id| *id != victim).cloned());
        let mut known: HashSet<BackendId> = reached.iter().cloned().collect();
        let mut left_out = HashSet::new();
        let mut next = 0;
        while let Some(waiter) = reached.get(next).cloned() {
            next += 1;
            for edge in sample.snapshot.edges_of(&waiter) {
                if !known.contains(edge.blocker()) {
                    if known.len() >= MAX_SESSIONS {
                        left_out.insert(edge.blocker().clone());
                        continue;
                    }
                    known.insert(edge.blocker().clone());
                    reached.push(edge.blocker().clone());
                }
                let edge = IncidentEdge::from_sample(edge);
                let is_known = |known: &IncidentEdge| {
                    (&known.waiter, &known.blocker) == (&edge.waiter, &edge.blocker)
                        && known.object == edge.object
                };
                if !self.edges[..self.cycle].iter().any(is_known) {
                    self.edges.push(edge);
                }
            }
        }
        self.left_out = left_out.len();
    }

    /// Takes the cycle from the server's DETAIL, completed by the samples of its edges.
    fn take_detail(&mut self, detail: Vec<IncidentEdge>, samples: &[WaitSample]) {
        self.completeness = Completeness::DetailOnly;
        self.cycle = detail.len();
        self.edges = detail;
        for edge in &mut self.edges {
            edge.in_cycle = true;
            let seen = samples.iter().enumerate().rev().find_map(|(at, sample)| {
                let mut seen = sample.snapshot.edges_of(&edge.waiter);
                let seen = seen.find(|seen| {
                    seen.blocker() == &edge.blocker
                        && seen.object().locktype() == edge.object.locktype()
                })?;
                Some((at, IncidentEdge::from_sample(seen)))
            });
            if let Some((at, seen)) = seen {
                self.sample = self.sample.max(Some(at));
                self.completeness = Completeness::Partial;
                *edge = seen;
                edge.in_cycle = true;
            }
        }
    }

    fn describe(&mut self, evidence: &Evidence, message: &ServerMessage, names: &Names<'_>) {
        let samples = &evidence.samples[..];
        // The sample that the edges are from comes first, then the later ones.
        let best = self.sample.and_then(|at| samples.get(at));
        let keys = best.into_iter().chain(samples.iter().rev());
        let keys: Vec<_> = keys.flat_map(|sample| &sample.row_keys).collect();
        for edge in &mut self.edges {
            let row = edge.row.as_ref();
            let key = row.and_then(|row| keys.iter().find(|(of, _)| same_row(of, row)));
            edge.row_key = key.map(|(_, key)| key.clone());
            if let LockObject::Advisory { key, .. } = &mut edge.object {
                names.name(key);
            }
        }
        // A session waits for one lock at a time, so CONTEXT applies to all edges of the victim.
        for edge in &mut self.edges {
            let is_unknown_row =
                edge.row.is_none() && matches!(edge.object, LockObject::Transaction(_));
            if Some(&edge.waiter) == self.victim.as_ref() && is_unknown_row {
                edge.context.clone_from(&message.row);
                if let (Some(_), Some((relation, key))) = (&edge.context, &evidence.context_row) {
                    edge.context_relation = Some(relation.clone());
                    edge.row_key = Some(key.clone());
                }
            }
        }
    }
}

/// Rotates the cycle so that it begins with this session. A session that is not in it waited through a parallel worker
/// that no sample shows: it is the one that the server failed.
fn begin_with(cycle: &mut [IncidentEdge], own: &BackendId) {
    match cycle.iter().position(|edge| &edge.waiter == own) {
        Some(at) => cycle.rotate_left(at),
        None => {
            if let [first, .., last] = cycle {
                first.waiter.clone_from(own);
                last.blocker.clone_from(own);
            }
        }
    }
}

fn members(edges: &[IncidentEdge]) -> HashSet<BackendId> {
    edges.iter().map(|edge| edge.waiter.clone()).collect()
}

/// Also holds after parallel workers have been replaced by their leaders.
fn is_cycle(edges: &[IncidentEdge]) -> bool {
    let next = edges.iter().cycle().skip(1);
    edges.len() > 1
        && edges
            .iter()
            .zip(next)
            .all(|(edge, next)| edge.blocker == next.waiter)
        && members(edges).len() == edges.len()
}

/// The last sample in which the session waited.
fn last_wait<'a>(samples: &'a [WaitSample], id: &BackendId) -> Option<(usize, &'a WaitSample)> {
    let mut samples = samples.iter().enumerate().rev();
    samples.find(|(_, sample)| sample.snapshot.edges_of(id).next().is_some())
}

/// A shortest cycle through the victim, of hard edges if there is one. A cycle over a lock's queue is a deadlock only
/// if the server reports one: it could still let waiters overtake.
fn cycle(
    snapshot: &Snapshot,
    victim: &BackendId,
    trigger: IncidentTrigger,
) -> Option<Vec<IncidentEdge>> {
    let hard = shortest_cycle(snapshot, victim, |edge| !edge.is_soft());
    let any = || shortest_cycle(snapshot, victim, |_| true);
    let cycle = hard.or_else(|| any().filter(|_| trigger == IncidentTrigger::Deadlock))?;
    let edges = cycle.into_iter().map(|edge| IncidentEdge {
        in_cycle: true,
        ..IncidentEdge::from_sample(edge)
    });
    Some(edges.collect())
}

fn shortest_cycle<'a>(
    snapshot: &'a Snapshot,
    victim: &BackendId,
    allowed: impl Fn(&Edge) -> bool,
) -> Option<Vec<&'a Edge>> {
    // For each session the edge over which it was reached first.
    let mut reached: HashMap<&BackendId, &Edge> = HashMap::new();
    let mut left = VecDeque::from([victim]);
    while let Some(at) = left.pop_front() {
        for edge in snapshot.edges_of(at).filter(|edge| allowed(edge)) {
            if edge.blocker() == victim {
                let mut cycle = vec![edge];
                let mut waiter = edge.waiter();
                while waiter != victim {
                    let edge = reached.get(waiter)?;
                    cycle.push(edge);
                    waiter = edge.waiter();
                }
                cycle.reverse();
                return Some(cycle);
            }
            if !reached.contains_key(edge.blocker()) {
                reached.insert(edge.blocker(), edge);
                left.push_back(edge.blocker());
            }
        }
    }
    None
}

/// The names of oids, process ids and keys, as far as samples and journals have them.
struct Names<'a> {
    relations: HashMap<u32, &'a Relation>,
    leaders: HashMap<i32, i32>,
    keys: Vec<&'a LockKey>,
}

impl<'a> Names<'a> {
    fn new(evidence: &'a Evidence) -> Self {
        let mut names = Self {
            relations: HashMap::new(),
            leaders: HashMap::new(),
            keys: Vec::new(),
        };
        let asked = evidence.relations.iter();
        names.relations = asked.map(|relation| (relation.oid, relation)).collect();
        for sample in &evidence.samples {
            for edge in sample.snapshot.edges() {
                let of_row = edge.row().map(RowId::relation);
                for relation in edge.object().relation().into_iter().chain(of_row) {
                    names.relations.insert(relation.oid, relation);
                }
                if let (Some(worker), Some(leader)) = (edge.worker(), edge.waiter().pid()) {
                    names.leaders.insert(worker, leader);
                }
            }
            for backend in sample.snapshot.backends() {
                if let (Some(worker), Some(leader)) = (backend.pid(), backend.leader_pid()) {
                    names.leaders.insert(worker, leader);
                }
            }
        }
        for journal in std::iter::once(&evidence.victim).chain(&evidence.others) {
            let taken = journal.statements.iter().flat_map(|entry| &entry.advisory);
            let keys = taken.map(|(key, _)| key).chain(&journal.conflict_group);
            names.keys.extend(keys.filter(|key| key.name().is_some()));
        }
        names
    }

    fn edges(&self, detail: &DeadlockDetail) -> Vec<IncidentEdge> {
        let waits = detail.waits().map(|wait| {
            let session = |pid| BackendId::Pid(self.leaders.get(&pid).copied().unwrap_or(pid));
            let object = self.object(&wait.object);
            IncidentEdge::from_detail(
                session(wait.waiter),
                session(wait.blocker),
                object,
                &wait.mode,
            )
        });
        waits.collect()
    }

    /// Adds the name by which a transaction of this process knows the key.
    fn name(&self, key: &mut LockKey) {
        if key.name().is_none()
            && let Some(named) = self.keys.iter().find(|named| named.same_lock(key))
        {
            *key = LockKey::clone(named);
        }
    }

    fn relation(&self, oid: u32) -> Relation {
        let known = self.relations.get(&oid);
        known.map_or_else(
            || Relation {
                oid,
                name: None,
                kind: None,
                database: None,
            },
            |relation| Relation::clone(relation),
        )
    }

    fn object(&self, object: &message::LockTag) -> LockObject {
        LockObject::from_tag(object, |oid| self.relation(oid))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Cause, Incident, IncidentHistory, IncidentKind, Participant};
    use super::*;
    use crate::graph::Backend;
    use crate::mode::AdvisoryMode;

    fn pids(report: &Incident) -> Vec<i32> {
        report
            .participants()
            .iter()
            .filter_map(Participant::pid)
            .collect()
    }

    fn completeness(report: &Incident) -> (Completeness, Option<u64>) {
        let after = report.captured_after();
        let after = after.map(|after| u64::try_from(after.as_millis()).expect("a short time"));
        (report.completeness(), after)
    }

    /// A cycle in which each session waits for a row of the next one.
    fn cycle(members: &[i32]) -> TestServer {
        let next = members.iter().cycle().skip(1);
        let waits = members.iter().zip(next).enumerate();
        waits.fold(TestServer::default(), |server, (at, (waiter, blocker))| {
            let offset = u16::try_from(at).expect("a small number") + 1;
            server.waits_for_row(*waiter, &row(account(), offset), *blocker, 100)
        })
    }

    fn detail(members: &[i32]) -> String {
        let next = members.iter().cycle().skip(1);
        let lines = members.iter().zip(next).map(|(waiter, blocker)| {
            format!("Process {waiter} waits for ShareLock on transaction {blocker}; blocked by process {blocker}.")
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn detail_evidence(members: &[i32], samples: Vec<WaitSample>) -> Evidence {
        Evidence {
            error: Some(deadlock_error(&detail(members), "")),
            samples,
            ..evidence(IncidentTrigger::Deadlock)
        }
    }

    #[test]
    fn the_last_sample_with_the_whole_cycle_is_used() {
        let late = TestServer::default().waits_for_row(11, &row(account(), 9), 13, 1);
        let samples = vec![
            cycle(&[11, 12]).sample(1, Vec::new()),
            cycle(&[11, 12]).sample(2, Vec::new()),
            late.sample(3, Vec::new()),
        ];
        let report = report(detail_evidence(&[11, 12], samples));
        assert_eq!(completeness(&report), (Completeness::Complete, Some(2)));
        assert_eq!(pids(&report), [11, 12]);
        assert_eq!(report.cycle().len(), 2);
        assert!(report.edges().iter().all(IncidentEdge::was_seen));
        assert!(report.victim().is_victim() && report.victim().pid() == Some(11));
    }

    #[test]
    fn a_cycle_of_other_sessions_is_ignored() {
        let sample = cycle(&[11, 13]).sample(2, Vec::new());
        let report = report(detail_evidence(&[11, 12], vec![sample]));
        assert_eq!(completeness(&report), (Completeness::DetailOnly, None));
        assert_eq!(pids(&report), [11, 12]);
    }

    #[test]
    fn samples_complete_the_detail() {
        let server = TestServer::default().waits_for_row(11, &row(account(), 9), 12, 700);
        let samples = vec![server.sample(800, vec![(row(account(), 9), key("id", "9"))])];
        let report = report(detail_evidence(&[11, 12], samples));
        assert_eq!(completeness(&report), (Completeness::Partial, Some(800)));
        let [first, second] = report.cycle() else {
            panic!("{:?}", report.edges());
        };
        assert_eq!(first.row_key(), Some(&key("id", "9")));
        assert_eq!(first.mode_held(), Some("ExclusiveLock"));
        assert!(first.was_seen() && !second.was_seen());
        assert_eq!(second.object(), &LockObject::Transaction(11));
        assert!(
            report
                .to_string()
                .contains("Part of the cycle was seen 800ms after")
        );
    }

    #[test]
    fn a_single_wait_is_not_a_cycle() {
        let server = TestServer::default().waits_for_row(11, &row(account(), 9), 12, 700);
        let mut evidence = detail_evidence(&[11, 12], vec![server.sample(800, Vec::new())]);
        evidence.error = None;
        let found = report(evidence);
        assert_eq!(completeness(&found), (Completeness::Partial, Some(800)));
        assert!(found.cycle().is_empty());
        assert!(
            found
                .to_string()
                .contains("The victim's wait was seen 800ms after")
        );
        // The server's message, with a line that cannot be parsed.
        let mut evidence = detail_evidence(&[11, 12], Vec::new());
        let text = format!("??\n{}", detail(&[11, 12]).lines().next().expect("a line"));
        evidence.error = Some(deadlock_error(&text, ""));
        let found = report(evidence);
        assert_eq!(completeness(&found), (Completeness::DetailOnly, None));
        assert_eq!((found.cycle().len(), found.edges().len()), (0, 1));
    }

    #[test]
    fn a_timeout_may_hide_a_deadlock() {
        for (kind, expected) in [
            (IncidentTrigger::LockTimeout, IncidentKind::HiddenDeadlock),
            (IncidentTrigger::LongWait, IncidentKind::HiddenDeadlock),
            (IncidentTrigger::Deadlock, IncidentKind::Deadlock),
        ] {
            let samples = vec![cycle(&[12, 13, 11]).sample(2, Vec::new())];
            let report = report(Evidence {
                samples,
                ..evidence(kind)
            });
            assert_eq!(report.kind(), expected);
            assert_eq!(pids(&report), [11, 12, 13], "from the victim on");
            assert_eq!(report.diagnosis().cause(), Cause::OrderInversion);
        }
        // A cycle that the victim only waits for is not its own.
        let server = cycle(&[12, 13]).waits_for_row(11, &row(account(), 9), 12, 700);
        assert_eq!(report(timeout(server)).kind(), IncidentKind::LockTimeout);
    }

    #[test]
    fn a_queue_may_be_overtaken() {
        let object = LockObject::Relation(account());
        let server = || {
            TestServer::default()
                .holds(13, &object, "AccessShareLock")
                .waits(12, &object, "AccessExclusiveLock", 958, &[13])
                .waits(11, &object, "AccessShareLock", 400, &[12])
                .waits_for_row(13, &row(table(7, "audit"), 3), 11, 100)
        };
        let found = report(timeout(server()));
        assert_eq!(
            (found.kind(), found.cycle().len()),
            (IncidentKind::LockTimeout, 0)
        );
        let found = report(deadlock(server()));
        assert_eq!(
            (found.kind(), found.cycle().len()),
            (IncidentKind::Deadlock, 3)
        );
    }

    #[test]
    fn of_hundreds_of_blockers_some_are_left_out() {
        let object = LockObject::Relation(account());
        let many: Vec<i32> = (100..300).collect();
        let server = many.iter().fold(TestServer::default(), |server, pid| {
            server.holds(*pid, &object, "RowExclusiveLock")
        });
        let report = report(timeout(server.waits(11, &object, "ShareLock", 900, &many)));
        assert_eq!(report.participants().len(), MAX_SESSIONS);
        let left = 200 - (MAX_SESSIONS - 1);
        let text = format!("{left} more sessions in the way are left out");
        assert!(report.caveats().any(|line| line == text));
        assert!(report.to_string().contains("THE OTHERS"));
    }

    #[test]
    fn without_a_pid_the_detail_identifies_the_victim() {
        let mut evidence = detail_evidence(&[12, 11], vec![cycle(&[12, 11]).sample(2, Vec::new())]);
        evidence.victim.pid = None;
        let found = report(evidence.clone());
        assert_eq!(found.victim().pid(), Some(12));
        assert_eq!(found.completeness(), Completeness::Complete);
        evidence.error = None;
        let found = report(evidence);
        assert_eq!(
            (found.victim().id(), found.completeness()),
            (None, Completeness::Nothing)
        );
    }

    #[test]
    fn parallel_workers_belong_to_their_leaders() {
        let object = LockObject::Relation(account());
        let mut worker = Backend::unknown(21.into());
        worker.leader_pid = Some(11);
        let mut sample = TestServer::default()
            .waits(11, &object, "ShareLock", 5, &[12])
            .sample(5, Vec::new());
        let edges = sample.snapshot.edges().to_vec();
        sample.snapshot = Snapshot::new(vec![worker], edges, now(), ms(1)).into();
        let mut evidence = detail_evidence(&[21, 12], vec![sample]);
        evidence.victim.pid = Some(11);
        let found = report(evidence);
        assert_eq!(pids(&found), [11, 12]);
        assert_eq!(
            found.completeness(),
            Completeness::DetailOnly,
            "another lock was seen"
        );
        // No sample shows the worker.
        let mut evidence = detail_evidence(&[21, 12], Vec::new());
        evidence.victim.pid = Some(11);
        assert_eq!(pids(&report(evidence)), [11, 12]);
        let mut evidence = detail_evidence(&[12, 11], Vec::new());
        evidence.victim.pid = Some(11);
        assert_eq!(pids(&report(evidence)), [11, 12]);
    }

    #[test]
    fn oids_and_keys_get_their_names() {
        let sample = TestServer::default()
            .waits(77, &LockObject::Relation(account()), "ShareLock", 5, &[78])
            .sample(5, Vec::new());
        let named = LockKey::from("invoice:42");
        let (a, b) = (named.classid(), named.objid());
        let detail = format!(
            "Process 11 waits for ShareLock on relation 16384 of database 5; blocked by process 12.\n\
             Process 12 waits for ExclusiveLock on advisory lock [5,{a},{b},1]; blocked by process 11."
        );
        let mut evidence = detail_evidence(&[11, 12], vec![sample]);
        evidence.error = Some(deadlock_error(&detail, ""));
        let mut lock = entry(1, "SELECT pg_advisory_xact_lock($1)", Some(1));
        lock.advisory = vec![(named, AdvisoryMode::Exclusive)];
        evidence.victim.statements = vec![lock];
        let found = Incident::new(evidence, &IncidentHistory::default());
        let shown: Vec<_> = found
            .edges()
            .iter()
            .map(|edge| edge.object().to_string())
            .collect();
        assert_eq!(
            shown,
            ["relation public.account", "advisory lock \"invoice:42\""]
        );
        assert!(
            found
                .headline()
                .starts_with("Deadlock on advisory lock \"invoice:42\", table public.account:")
        );
    }
}
