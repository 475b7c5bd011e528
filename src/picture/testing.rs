//! Pictures for tests.

use super::{Card, Line, Link, Look, Picture};

pub(super) fn small() -> Picture {
    Picture {
        cards: vec![
            Card {
                name: "pid 1".into(),
                badge: Some("blocks 2".into()),
                lines: vec![Line::keeping_end("billing \"x\" src/pay.rs:42")],
                look: Look::Root,
                row: Some("s0".into()),
                ..Card::default()
            },
            Card {
                name: "pid 2".into(),
                lines: vec![Line::new("waits 3.2s for ShareLock")],
                above: Some(0),
                ..Card::default()
            },
            Card {
                name: "1 more session".into(),
                look: Look::Fold,
                above: Some(0),
                ..Card::default()
            },
        ],
        links: vec![
            Link {
                waiter: 1,
                blocker: 0,
                label: "ExclusiveLock".into(),
                hint: "pid 2 waits for pid 1".into(),
                soft: false,
                in_circle: false,
            },
            Link {
                waiter: 2,
                blocker: 0,
                label: String::new(),
                hint: String::new(),
                soft: true,
                in_circle: false,
            },
        ],
        ..Picture::default()
    }
}
