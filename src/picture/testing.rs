//! Diagrams for tests.

use super::{Arrow, Diagram, Node, NodeStyle, TextLine};

pub(super) fn small() -> Diagram {
    Diagram {
        nodes: vec![
            Node {
                name: "pid 1".into(),
                badge: Some("blocks 2".into()),
                lines: vec![TextLine::keeping_end("billing \"x\" src/pay.rs:42")],
                style: NodeStyle::Root,
                row: Some("s0".into()),
                ..Node::default()
            },
            Node {
                name: "pid 2".into(),
                lines: vec![TextLine::new("waits 3.2s for ShareLock")],
                parent: Some(0),
                ..Node::default()
            },
            Node {
                name: "1 more session".into(),
                style: NodeStyle::Collapsed,
                parent: Some(0),
                ..Node::default()
            },
        ],
        arrows: vec![
            Arrow {
                waiter: 1,
                blocker: 0,
                label: "ExclusiveLock".into(),
                hint: "pid 2 waits for pid 1".into(),
                soft: false,
                in_cycle: false,
            },
            Arrow {
                waiter: 2,
                blocker: 0,
                label: String::new(),
                hint: String::new(),
                soft: true,
                in_cycle: false,
            },
        ],
        ..Diagram::default()
    }
}
