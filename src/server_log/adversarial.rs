//! Texts with which a client tries to forge server messages, or to slow down reading.

use std::time::Duration;

use super::tests::{Message, Write, read};
use super::*;

/// A record that a client tries to have read as the server's.
fn forged() -> String {
    Message::timeout().csv().replace("LOCK TABLE", "forged")
}

#[test]
fn the_end_of_a_long_statement_is_not_a_record() {
    for filler in ["y".repeat(5 << 20), "y\n".repeat(5 << 19)] {
        let long = Message {
            statement: format!("SELECT '{filler}\n{}'", forged()),
            ..Message::timeout()
        };
        let text = long.csv() + &Message::deadlock().csv();
        let events = read(Reader::csv(), &text);
        let kinds: Vec<_> = events.iter().map(LogEvent::kind).collect();
        assert_eq!(kinds, [LogEventKind::LockTimeout, LogEventKind::Deadlock]);
        let statement = events[0].statement().expect("the beginning of it");
        assert!(statement.starts_with("SELECT 'yy") || statement.starts_with("SELECT 'y\ny"));
        assert!(!statement.contains("forged"));
        // The same in pieces.
        let mut reader = Reader::csv();
        let mut kinds = Vec::new();
        for piece in text.as_bytes().chunks(70_001) {
            let piece = std::str::from_utf8(piece).expect("ASCII");
            kinds.extend(reader.push(piece).map(|event| event.kind()));
        }
        assert_eq!(kinds, [LogEventKind::LockTimeout, LogEventKind::Deadlock]);
    }
}

/// A record whose end is missing is joined with the next one. The joined record produces no event.
#[test]
fn two_joined_records_are_not_an_event() {
    let whole = Message::deadlock().csv();
    let mut next = Message::other("x").csv();
    next.push_str(&Message::timeout().csv());
    for cut in (1..whole.len() - 1).filter(|cut| whole.is_char_boundary(*cut)) {
        let mut events = read(Reader::csv(), &format!("{}{next}", &whole[..cut]));
        assert_eq!(
            events.pop().map(|event| event.kind()),
            Some(LogEventKind::LockTimeout)
        );
        // If only unused fields are missing, the event is the original one.
        for event in events {
            assert_eq!(event.pid(), Some(12), "{:?}", &whole[..cut]);
            assert_eq!(event.waits().len(), 2, "{:?}", &whole[..cut]);
            let statement = Message::deadlock().statement;
            assert_eq!(event.statement(), Some(&*statement), "{:?}", &whole[..cut]);
            assert_eq!(event.application_name(), Some("billing src/pay.rs:42"));
        }
    }
}

#[test]
fn line_ends_in_a_statement_are_kept() {
    let message = Message {
        statement: "SELECT\r\n 1\r".into(),
        ..Message::timeout()
    };
    for (reader, write) in [
        (Reader::csv(), Message::csv as Write),
        (Reader::json(), Message::json),
    ] {
        // The log's own lines can have either line end.
        for text in [
            write(&message),
            write(&message).trim_end().to_owned() + "\r\n",
        ] {
            let events = read(reader.clone(), &text);
            assert_eq!(events.len(), 1, "{text:?}");
            assert_eq!(events[0].statement(), Some("SELECT\r\n 1\r"));
        }
    }
}

#[test]
fn an_event_is_shown_on_one_line() {
    let mut message = Message::deadlock();
    message.statement = "SELECT 1 AS \"a\n\u{1b}[31m\u{202e}b\"".into();
    message.detail = message.detail.replace(
        "SELECT pg_advisory_lock(7)",
        "SELECT 1 AS \"c\n\u{1b}[31md\"",
    );
    let events = read(Reader::json(), &message.json());
    let shown = events[0].to_string();
    assert!(
        shown.contains("SELECT ? AS \"a") && shown.contains("SELECT ? AS \"c"),
        "{shown}"
    );
    assert!(
        !shown.contains(char::is_control) && !shown.contains('\u{202e}'),
        "{shown:?}"
    );
}

#[test]
fn a_prefix_of_any_length_is_accepted() {
    for prefix in [
        "%a".repeat(200_000),
        "%q".repeat(200_000),
        "x%a".repeat(300),
    ] {
        let events = read(Reader::stderr(&prefix), &Message::timeout().stderr());
        assert!(events.len() < 2);
    }
}

#[test]
fn time_and_pid_are_found_anywhere_in_an_unknown_prefix() {
    for prefix in [
        "[2026-01-31 12:34:56.789 UTC] [12] app@shop ",
        "[2026-01-31 12:34:56 UTC] 12 app@shop ",
        "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[12]:",
        "2026-01-31 12:34:56.789 UTC [12-3] app@shop ",
        "2026-01-31 12:34:56.789 UTC [12:3] user=app,db=shop ",
        "< 2026-01-31 12:34:56.789 UTC 12 app@shop >",
        // The message contains the process id.
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

/// Any client can raise errors with any DETAIL and CONTEXT. With quadratic time these take minutes, not a second.
#[test]
fn reading_time_is_not_quadratic() {
    let cycle = (1..=9_000).map(|pid| format!("{pid} aLock {}\n", pid % 9_000 + 1));
    let cycle: String = cycle.collect();
    let no_statements = "9:\n".repeat(40_000);
    let start = std::time::Instant::now();
    for detail in [
        format!("{cycle}{no_statements}"),
        format!("1 aLock 2\n{no_statements}"),
        format!("{no_statements}{cycle}"),
        cycle,
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
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(60), "{elapsed:?}");
}
