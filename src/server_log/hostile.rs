//! Texts that clients choose so as to be taken for the server's, or to be slow.

use std::time::Duration;

use super::tests::{Message, read};
use super::*;

fn a_prefix_of_any_length_is_taken() {
    for prefix in [
        "%a".repeat(200_000),
        "%q".repeat(200_000),
        "x%a".repeat(300),
    ] {
        let events = read(Reader::stderr(&prefix), &Message::timeout().stderr());
        assert!(events.len() < 2);
    }
}

fn a_prefix_that_is_not_known_has_its_time_and_pid_anywhere() {
    for prefix in [
        "[2026-01-31 12:34:56.789 UTC] [12] app@shop ",
        "[2026-01-31 12:34:56 UTC] 12 app@shop ",
        "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[12]:",
        "2026-01-31 12:34:56.789 UTC [12-3] app@shop ",
        "2026-01-31 12:34:56.789 UTC [12:3] user=app,db=shop ",
        "< 2026-01-31 12:34:56.789 UTC 12 app@shop >",
        // The process is told by the message.
        "2026-01-31 12:34:56.789 UTC [65b9] app@shop ",
        "2026-01-31 12:34:56.789 UTC 7 12 app@shop ",
    ] {
        let text: String = Message::still_waiting().stderr().replace(
            "2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 ",
            prefix,
        );
        let events = read(Reader::stderr_of_any_prefix(), &text);
        assert_eq!(events.len(), 1, "{text}");
        let event = &events[0];
        assert_eq!(event.pid(), Some(12), "{prefix}");
        assert_eq!(
            (event.user(), event.database()),
            (Some("app"), Some("shop")),
            "{prefix}"
        );
        assert!(event.time().is_some(), "{prefix}");
        assert_eq!(
            (event.holders(), event.queue()),
            (&[11][..], &[12, 13][..]),
            "{prefix}"
        );
    }
}

fn texts_made_to_be_slow_are_not() {
    let ring = (1..=9_000).map(|pid| format!("{pid} aLock {}\n", pid % 9_000 + 1));
    let ring: String = ring.collect();
    let no_statements = "9:\n".repeat(40_000);
    let start = std::time::Instant::now();
    for detail in [
        format!("{ring}{no_statements}"),
        format!("1 aLock 2\n{no_statements}"),
        format!("{no_statements}{ring}"),
        ring,
    ] {
        let message = Message {
            detail,
            ..Message::deadlock()
        };
        assert_eq!(read(Reader::json(), &message.json()).len(), 1);
    }
    let message = Message {
        context: "1 ".repeat(1 << 20) + &"\n1 ".repeat(64),
        ..Message::timeout()
    };
    assert_eq!(read(Reader::json(), &message.json()).len(), 1);
    let line = "a:".repeat(1 << 21) + "\n";
    assert!(read(Reader::stderr_of_any_prefix(), &line).is_empty());
    let took = start.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
}
