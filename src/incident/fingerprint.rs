//! What incidents have in common that are the same problem.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::graph::LockObject;

use super::scene::Scene;
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
    scene: &Scene,
    participants: &[Participant],
) -> Fingerprint {
    let who = |id| {
        participants
            .iter()
            .find(|participant| participant.id.as_ref() == Some(id))
    };
    let mut parts = vec![vec![class(kind).to_owned()]];
    if scene.cycle > 0 {
        // The circle as seen from each of its members; the least of these is the same for all.
        let links: Vec<_> = scene.edges[..scene.cycle]
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
        let of_victim = |edge: &&IncidentEdge| Some(&edge.waiter) == scene.victim.as_ref();
        let mut links: Vec<_> = scene
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
