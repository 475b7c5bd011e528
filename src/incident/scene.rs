//! Which of what was seen belongs together: the edges of the incident, the circle they make, and how sure that is.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use crate::graph::{BackendId, Edge, LockObject, Relation, RowId, Snapshot};
use crate::key::LockKey;
use crate::postgres::message::{self, DeadlockDetail};

use super::edge::same_row;
use super::server::Message;
use super::{Evidence, IncidentEdge, Kind, Look, Quality};

/// A queue of hundreds is not shown in full.
const MOST_SESSIONS: usize = 40;

/// The edges of an incident.
#[derive(Debug, Default)]
pub(super) struct Scene {
    pub(super) victim: Option<BackendId>,
    /// Those of the circle first, in its order, from the victim on.
    pub(super) edges: Vec<IncidentEdge>,
    /// How many of them.
    pub(super) cycle: usize,
    /// The look they are from; the last one that showed any of them, where they are from several.
    pub(super) look: Option<usize>,
    pub(super) quality: Quality,
    /// Sessions that were in the way too, and are left out.
    pub(super) left_out: usize,
}

impl Scene {
    pub(super) fn new(evidence: &Evidence, message: &Message) -> Self {
        let names = Names::new(evidence);
        let mut detail = names.edges(&message.detail);
        let is_circle = message.detail.is_cycle() && is_circle(&detail);
        let own = evidence.victim.pid.map(BackendId::from);
        if let Some(own) = own.as_ref().filter(|_| is_circle) {
            begin_with(&mut detail, own);
        }
        // The DETAIL names first whom the server failed (`DeadLockReport` in PostgreSQL's
        // `src/backend/storage/lmgr/deadlock.c`).
        let told = detail.first().filter(|_| is_circle);
        let Some(victim) = own.or_else(|| told.map(|edge| edge.waiter.clone())) else {
            return Self::default();
        };
        let mut scene = Self {
            victim: Some(victim.clone()),
            ..Self::default()
        };
        // The server says who takes part, and a look with others in it was another circle.
        let told = is_circle.then(|| members(&detail));
        let seen = evidence.looks.iter().enumerate().rev();
        let seen = seen.filter_map(|(at, look)| {
            let circle = circle(&look.snapshot, &victim, evidence.kind)?;
            let fits = told.as_ref().is_none_or(|told| *told == members(&circle));
            fits.then_some((at, circle))
        });
        if let Some((at, circle)) = { seen }.next() {
            scene.take(at, &evidence.looks[at], circle);
            scene.quality = Quality::Complete;
        } else if is_circle {
            scene.take_detail(detail, &evidence.looks);
        } else if let Some((at, look)) = last_wait(&evidence.looks, &victim) {
            scene.take(at, look, Vec::new());
            scene.quality = if evidence.kind == Kind::Deadlock {
                Quality::Partial
            } else {
                Quality::Complete
            };
        } else if !detail.is_empty() {
            scene.edges = detail;
            scene.quality = Quality::DetailOnly;
        }
        scene.describe(&evidence.looks, message, &names);
        scene
    }

    /// When the look was taken, since the victim's statement began.
    pub(super) fn after(&self, looks: &[Look]) -> Option<Duration> {
        Some(looks.get(self.look?)?.after)
    }

    /// A circle, and who else is in the way of anybody in it.
    fn take(&mut self, at: usize, look: &Look, circle: Vec<IncidentEdge>) {
        self.look = Some(at);
        self.cycle = circle.len();
        self.edges = circle;
        let Some(victim) = &self.victim else { return };
        let mut reached: Vec<BackendId> = vec![victim.clone()];
        let of_circle = self.edges.iter().map(|edge| &edge.blocker);
        reached.extend(of_circle.filter(|id| *id != victim).cloned());
        let mut known: HashSet<BackendId> = reached.iter().cloned().collect();
        let mut left_out = HashSet::new();
        let mut next = 0;
        while let Some(waiter) = reached.get(next).cloned() {
            next += 1;
            for edge in look.snapshot.edges_of(&waiter) {
                if !known.contains(edge.blocker()) {
                    if known.len() >= MOST_SESSIONS {
                        left_out.insert(edge.blocker().clone());
                        continue;
                    }
                    known.insert(edge.blocker().clone());
                    reached.push(edge.blocker().clone());
                }
                let edge = IncidentEdge::of_look(edge);
                let is_told = |told: &IncidentEdge| {
                    (&told.waiter, &told.blocker) == (&edge.waiter, &edge.blocker)
                        && told.object == edge.object
                };
                if !self.edges[..self.cycle].iter().any(is_told) {
                    self.edges.push(edge);
                }
            }
        }
        self.left_out = left_out.len();
    }

    /// The circle that the server told of, with what was seen of its edges.
    fn take_detail(&mut self, detail: Vec<IncidentEdge>, looks: &[Look]) {
        self.quality = Quality::DetailOnly;
        self.cycle = detail.len();
        self.edges = detail;
        for edge in &mut self.edges {
            edge.in_cycle = true;
            let seen = looks.iter().enumerate().rev().find_map(|(at, look)| {
                let mut seen = look.snapshot.edges_of(&edge.waiter);
                let seen = seen.find(|seen| {
                    seen.blocker() == &edge.blocker
                        && seen.object().locktype() == edge.object.locktype()
                })?;
                Some((at, IncidentEdge::of_look(seen)))
            });
            if let Some((at, seen)) = seen {
                self.look = self.look.max(Some(at));
                self.quality = Quality::Partial;
                *edge = seen;
                edge.in_cycle = true;
            }
        }
    }

    fn describe(&mut self, looks: &[Look], message: &Message, names: &Names<'_>) {
        // The look they are from first, then the later ones.
        let best = self.look.and_then(|at| looks.get(at));
        let keys = best.into_iter().chain(looks.iter().rev());
        let keys: Vec<_> = keys.flat_map(|look| &look.row_keys).collect();
        for edge in &mut self.edges {
            let row = edge.row.as_ref();
            let key = row.and_then(|row| keys.iter().find(|(of, _)| same_row(of, row)));
            edge.row_key = key.map(|(_, key)| key.clone());
            if let LockObject::Advisory { key, .. } = &mut edge.object {
                names.name(key);
            }
        }
        // The victim waits for one thing at a time: what CONTEXT says of it holds for all its edges.
        for edge in &mut self.edges {
            let is_unseen = edge.row.is_none() && matches!(edge.object, LockObject::Transaction(_));
            if Some(&edge.waiter) == self.victim.as_ref() && is_unseen {
                edge.context.clone_from(&message.row);
            }
        }
    }
}

/// Turns the circle so that it begins with this session. One that is not in it waited by a parallel worker that nobody
/// saw: the one whom the server failed.
fn begin_with(circle: &mut [IncidentEdge], own: &BackendId) {
    match circle.iter().position(|edge| &edge.waiter == own) {
        Some(at) => circle.rotate_left(at),
        None => {
            if let [first, .., last] = circle {
                first.waiter.clone_from(own);
                last.blocker.clone_from(own);
            }
        }
    }
}

fn members(edges: &[IncidentEdge]) -> HashSet<BackendId> {
    edges.iter().map(|edge| edge.waiter.clone()).collect()
}

/// Also when parallel workers have been replaced by their leaders.
fn is_circle(edges: &[IncidentEdge]) -> bool {
    let next = edges.iter().cycle().skip(1);
    edges.len() > 1
        && edges
            .iter()
            .zip(next)
            .all(|(edge, next)| edge.blocker == next.waiter)
        && members(edges).len() == edges.len()
}

/// The last look in which the session waited.
fn last_wait<'a>(looks: &'a [Look], id: &BackendId) -> Option<(usize, &'a Look)> {
    let mut looks = looks.iter().enumerate().rev();
    looks.find(|(_, look)| look.snapshot.edges_of(id).next().is_some())
}

/// A shortest circle through the victim, of hard edges if there is one. One over a lock's queue is a deadlock only if
/// the server says so: it could still let waiters overtake.
fn circle(snapshot: &Snapshot, victim: &BackendId, kind: Kind) -> Option<Vec<IncidentEdge>> {
    let hard = shortest_circle(snapshot, victim, |edge| !edge.is_soft());
    let any = || shortest_circle(snapshot, victim, |_| true);
    let circle = hard.or_else(|| any().filter(|_| kind == Kind::Deadlock))?;
    let told = circle.into_iter().map(|edge| IncidentEdge {
        in_cycle: true,
        ..IncidentEdge::of_look(edge)
    });
    Some(told.collect())
}

fn shortest_circle<'a>(
    snapshot: &'a Snapshot,
    victim: &BackendId,
    allowed: impl Fn(&Edge) -> bool,
) -> Option<Vec<&'a Edge>> {
    // Of each session the edge over which it was reached first.
    let mut reached: HashMap<&BackendId, &Edge> = HashMap::new();
    let mut left = VecDeque::from([victim]);
    while let Some(at) = left.pop_front() {
        for edge in snapshot.edges_of(at).filter(|edge| allowed(edge)) {
            if edge.blocker() == victim {
                let mut circle = vec![edge];
                let mut waiter = edge.waiter();
                while waiter != victim {
                    let edge = reached.get(waiter)?;
                    circle.push(edge);
                    waiter = edge.waiter();
                }
                circle.reverse();
                return Some(circle);
            }
            if !reached.contains_key(edge.blocker()) {
                reached.insert(edge.blocker(), edge);
                left.push_back(edge.blocker());
            }
        }
    }
    None
}

/// What oids, process ids and numbers are called, as far as looks and journals tell.
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
        for look in &evidence.looks {
            for edge in look.snapshot.edges() {
                let of_row = edge.row().map(RowId::relation);
                for relation in edge.object().relation().into_iter().chain(of_row) {
                    names.relations.insert(relation.oid, relation);
                }
                if let (Some(worker), Some(leader)) = (edge.worker(), edge.waiter().pid()) {
                    names.leaders.insert(worker, leader);
                }
            }
            for backend in look.snapshot.backends() {
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
            IncidentEdge::of_detail(
                session(wait.waiter),
                session(wait.blocker),
                object,
                &wait.mode,
            )
        });
        waits.collect()
    }

    /// Gives the key the name by which a transaction of this process knows it.
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

    fn object(&self, object: &message::LockObject) -> LockObject {
        LockObject::of_message(object, |oid| self.relation(oid))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Cause, History, Incident, IncidentKind, Participant};
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

    fn quality(report: &Incident) -> (Quality, Option<u64>) {
        let after = report.captured_after();
        let after = after.map(|after| u64::try_from(after.as_millis()).expect("a short time"));
        (report.quality(), after)
    }

    /// Each waits for a row of the next one, in a circle.
    fn circle(members: &[i32]) -> Server {
        let next = members.iter().cycle().skip(1);
        let waits = members.iter().zip(next).enumerate();
        waits.fold(Server::default(), |server, (at, (waiter, blocker))| {
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

    fn told(members: &[i32], looks: Vec<Look>) -> Evidence {
        Evidence {
            error: Some(deadlock_error(&detail(members), "")),
            looks,
            ..evidence(Kind::Deadlock)
        }
    }

    #[test]
    fn the_last_look_with_the_whole_circle_counts() {
        let late = Server::default().waits_for_row(11, &row(account(), 9), 13, 1);
        let looks = vec![
            circle(&[11, 12]).look(1, Vec::new()),
            circle(&[11, 12]).look(2, Vec::new()),
            late.look(3, Vec::new()),
        ];
        let report = report(told(&[11, 12], looks));
        assert_eq!(quality(&report), (Quality::Complete, Some(2)));
        assert_eq!(pids(&report), [11, 12]);
        assert_eq!(report.cycle().len(), 2);
        assert!(report.edges().iter().all(IncidentEdge::was_seen));
        assert!(report.victim().is_victim() && report.victim().pid() == Some(11));
    }

    #[test]
    fn a_circle_of_others_is_another_one() {
        let look = circle(&[11, 13]).look(2, Vec::new());
        let report = report(told(&[11, 12], vec![look]));
        assert_eq!(quality(&report), (Quality::DetailOnly, None));
        assert_eq!(pids(&report), [11, 12]);
    }

    #[test]
    fn what_was_seen_completes_what_was_told() {
        let server = Server::default().waits_for_row(11, &row(account(), 9), 12, 700);
        let looks = vec![server.look(800, vec![(row(account(), 9), key("id", "9"))])];
        let report = report(told(&[11, 12], looks));
        assert_eq!(quality(&report), (Quality::Partial, Some(800)));
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
                .contains("Part of the circle was seen 800ms after")
        );
    }

    #[test]
    fn a_wait_alone_is_not_a_circle() {
        let server = Server::default().waits_for_row(11, &row(account(), 9), 12, 700);
        let mut evidence = told(&[11, 12], vec![server.look(800, Vec::new())]);
        evidence.error = None;
        let found = report(evidence);
        assert_eq!(quality(&found), (Quality::Partial, Some(800)));
        assert!(found.cycle().is_empty());
        assert!(
            found
                .to_string()
                .contains("The victim's wait was seen 800ms after")
        );
        // The server's message, with a line that cannot be read.
        let mut evidence = told(&[11, 12], Vec::new());
        let text = format!("??\n{}", detail(&[11, 12]).lines().next().expect("a line"));
        evidence.error = Some(deadlock_error(&text, ""));
        let found = report(evidence);
        assert_eq!(quality(&found), (Quality::DetailOnly, None));
        assert_eq!((found.cycle().len(), found.edges().len()), (0, 1));
    }

    #[test]
    fn a_timeout_may_hide_a_deadlock() {
        for (kind, expected) in [
            (Kind::LockTimeout, IncidentKind::HiddenDeadlock),
            (Kind::LongWait, IncidentKind::HiddenDeadlock),
            (Kind::Deadlock, IncidentKind::Deadlock),
        ] {
            let looks = vec![circle(&[12, 13, 11]).look(2, Vec::new())];
            let report = report(Evidence {
                looks,
                ..evidence(kind)
            });
            assert_eq!(report.kind(), expected);
            assert_eq!(pids(&report), [11, 12, 13], "from the victim on");
            assert_eq!(report.diagnosis().cause(), Cause::OrderInversion);
        }
        // A circle that the victim only waits for is not its own.
        let server = circle(&[12, 13]).waits_for_row(11, &row(account(), 9), 12, 700);
        assert_eq!(report(timeout(server)).kind(), IncidentKind::LockTimeout);
    }

    #[test]
    fn a_queue_may_be_overtaken() {
        let object = LockObject::Relation(account());
        let server = || {
            Server::default()
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
    fn hundreds_are_not_all_named() {
        let object = LockObject::Relation(account());
        let many: Vec<i32> = (100..300).collect();
        let server = many.iter().fold(Server::default(), |server, pid| {
            server.holds(*pid, &object, "RowExclusiveLock")
        });
        let report = report(timeout(server.waits(11, &object, "ShareLock", 900, &many)));
        assert_eq!(report.participants().len(), MOST_SESSIONS);
        let left = 200 - (MOST_SESSIONS - 1);
        let text = format!("{left} more sessions in the way are left out");
        assert!(report.missing().any(|line| line == text));
        assert!(report.to_string().contains("THE OTHERS"));
    }

    #[test]
    fn without_a_pid_the_server_says_who_failed() {
        let mut evidence = told(&[12, 11], vec![circle(&[12, 11]).look(2, Vec::new())]);
        evidence.victim.pid = None;
        let found = report(evidence.clone());
        assert_eq!(found.victim().pid(), Some(12));
        assert_eq!(found.quality(), Quality::Complete);
        evidence.error = None;
        let found = report(evidence);
        assert_eq!(
            (found.victim().id(), found.quality()),
            (None, Quality::Nothing)
        );
    }

    #[test]
    fn parallel_workers_are_their_leaders() {
        let object = LockObject::Relation(account());
        let mut worker = Backend::unknown(21.into());
        worker.leader_pid = Some(11);
        let mut look = Server::default()
            .waits(11, &object, "ShareLock", 5, &[12])
            .look(5, Vec::new());
        let edges = look.snapshot.edges().to_vec();
        look.snapshot = Snapshot::new(vec![worker], edges, now(), ms(1)).into();
        let mut evidence = told(&[21, 12], vec![look]);
        evidence.victim.pid = Some(11);
        let found = report(evidence);
        assert_eq!(pids(&found), [11, 12]);
        assert_eq!(
            found.quality(),
            Quality::DetailOnly,
            "another lock was seen"
        );
        // Which nobody saw.
        let mut evidence = told(&[21, 12], Vec::new());
        evidence.victim.pid = Some(11);
        assert_eq!(pids(&report(evidence)), [11, 12]);
        let mut evidence = told(&[12, 11], Vec::new());
        evidence.victim.pid = Some(11);
        assert_eq!(pids(&report(evidence)), [11, 12]);
    }

    #[test]
    fn what_is_told_by_number_is_called_by_name() {
        let look = Server::default()
            .waits(77, &LockObject::Relation(account()), "ShareLock", 5, &[78])
            .look(5, Vec::new());
        let named = LockKey::from("invoice:42");
        let (a, b) = (named.classid(), named.objid());
        let detail = format!(
            "Process 11 waits for ShareLock on relation 16384 of database 5; blocked by process 12.\n\
             Process 12 waits for ExclusiveLock on advisory lock [5,{a},{b},1]; blocked by process 11."
        );
        let mut evidence = told(&[11, 12], vec![look]);
        evidence.error = Some(deadlock_error(&detail, ""));
        let mut lock = entry(1, "SELECT pg_advisory_xact_lock($1)", Some(1));
        lock.advisory = vec![(named, AdvisoryMode::Exclusive)];
        evidence.victim.statements = vec![lock];
        let found = Incident::new(evidence, &History::default());
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
