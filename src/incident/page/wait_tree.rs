//! The waits as a tree.

use std::collections::HashSet;

use crate::graph::BackendId;

use super::super::{Incident, IncidentEdge, Participant, wording};
use super::text_wrap::WrappedText;

/// The maximum number of edges to draw.
const MAX_DRAWN: usize = 30;
/// Deeper edges are not indented further.
const MAX_INDENT: usize = 8;

/// Draws the edges, beginning with the victim, and returns how many were drawn.
pub(super) fn draw(incident: &Incident, out: &mut WrappedText) -> usize {
    let mut tree = WaitTree {
        incident,
        drawn: 0,
        known: incident.victim().id().into_iter().collect(),
    };
    if let Some(id) = incident.victim().id() {
        tree.draw(out, id, "  ", 0);
    }
    tree.drawn
}

struct WaitTree<'a> {
    incident: &'a Incident,
    drawn: usize,
    known: HashSet<&'a BackendId>,
}

impl<'a> WaitTree<'a> {
    fn draw(&mut self, out: &mut WrappedText, waiter: &BackendId, indent: &str, depth: usize) {
        let edges = self
            .incident
            .edges()
            .iter()
            .filter(|edge| edge.waiter() == waiter);
        let edges: Vec<&'a IncidentEdge> = edges.collect();
        for (at, edge) in edges.iter().enumerate() {
            if self.drawn >= MAX_DRAWN {
                return;
            }
            self.drawn += 1;
            let (branch, below) = if at + 1 < edges.len() {
                ("├─ ", "│  ")
            } else {
                ("└─ ", "   ")
            };
            let hang = format!("{indent}{below}");
            let waited = edge
                .wait_age()
                .map(|age| format!(" {}", wording::age(age)))
                .unwrap_or_default();
            let what = match at {
                0 => format!(
                    "waited{waited} for {} ({}),",
                    wording::object(edge),
                    wording::lock(edge)
                ),
                _ if edge.object() == edges[0].object() => "and".to_owned(),
                _ => format!(
                    "and{waited} for {} ({}),",
                    wording::object(edge),
                    wording::lock(edge)
                ),
            };
            let how = match (edge.mode_held(), edge.mode_queued()) {
                _ if wording::is_row_queue(edge) => "queued behind".to_owned(),
                (Some(mode), _) => format!("held in {mode} by"),
                (_, Some(mode)) => format!("queued behind one that wanted {mode},"),
                _ if edge.is_soft() => "queued behind".to_owned(),
                _ => "held by".to_owned(),
            };
            let blocker = self.incident.participant(edge.blocker());
            let name = blocker.map(wording::name).unwrap_or_default();
            let is_new = self.known.insert(edge.blocker());
            let note = if blocker.is_some_and(Participant::is_victim) {
                ": the cycle is closed"
            } else if !is_new {
                ": see above"
            } else {
                ""
            };
            out.write(
                &format!("{indent}{branch}"),
                &hang,
                &format!("{what} {how} {name}{note}"),
            );
            if is_new {
                let deeper = if depth < MAX_INDENT { &hang } else { indent };
                self.draw(out, edge.blocker(), deeper, depth + 1);
            }
        }
    }
}
