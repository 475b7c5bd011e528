//! Who waited for whom, drawn.

use std::collections::HashSet;

use crate::graph::BackendId;

use super::super::{Incident, IncidentEdge, Participant, words};
use super::paper::Paper;

/// Edges that are drawn.
const MOST_DRAWN: usize = 30;
/// Deeper edges are not moved further to the right.
const DEEPEST: usize = 8;

/// Draws edges from the victim on; says how many.
pub(super) fn draw(incident: &Incident, paper: &mut Paper) -> usize {
    let mut picture = Picture {
        incident,
        drawn: 0,
        known: incident.victim().id().into_iter().collect(),
    };
    if let Some(id) = incident.victim().id() {
        picture.draw(paper, id, "  ", 0);
    }
    picture.drawn
}

struct Picture<'a> {
    incident: &'a Incident,
    drawn: usize,
    known: HashSet<&'a BackendId>,
}

impl<'a> Picture<'a> {
    fn draw(&mut self, paper: &mut Paper, waiter: &BackendId, indent: &str, depth: usize) {
        let edges = self
            .incident
            .edges()
            .iter()
            .filter(|edge| edge.waiter() == waiter);
        let edges: Vec<&'a IncidentEdge> = edges.collect();
        for (at, edge) in edges.iter().enumerate() {
            if self.drawn >= MOST_DRAWN {
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
                .map(|age| format!(" {}", words::age(age)))
                .unwrap_or_default();
            let what = match at {
                0 => format!(
                    "waited{waited} for {} ({}),",
                    words::thing(edge),
                    words::lock(edge)
                ),
                _ if edge.object() == edges[0].object() => "and".to_owned(),
                _ => format!(
                    "and{waited} for {} ({}),",
                    words::thing(edge),
                    words::lock(edge)
                ),
            };
            let how = match (edge.mode_held(), edge.mode_queued()) {
                (Some(mode), _) => format!("held in {mode} by"),
                (_, Some(mode)) => format!("queued behind one that wanted {mode},"),
                _ if edge.is_soft() => "queued behind".to_owned(),
                _ => "held by".to_owned(),
            };
            let blocker = self.incident.participant(edge.blocker());
            let name = blocker.map(words::who).unwrap_or_default();
            let is_new = self.known.insert(edge.blocker());
            let note = if blocker.is_some_and(Participant::is_victim) {
                ": the circle is closed"
            } else if !is_new {
                ": see above"
            } else {
                ""
            };
            paper.write(
                &format!("{indent}{branch}"),
                &hang,
                &format!("{what} {how} {name}{note}"),
            );
            if is_new {
                let deeper = if depth < DEEPEST { &hang } else { indent };
                self.draw(paper, edge.blocker(), deeper, depth + 1);
            }
        }
    }
}
