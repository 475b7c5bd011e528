//! Logs as the server writes them: whole, cut, mixed and damaged.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::graph::LockObject;
use crate::mode::LockMode;

/// A message that can be written in each format.
#[derive(Clone, Debug, Default)]
pub(super) struct Message {
    pub(super) error: bool,
    pub(super) sqlstate: &'static str,
    pub(super) text: String,
    pub(super) detail: String,
    pub(super) context: String,
    pub(super) statement: String,
}

const PREFIX: &str = "%m [%p] %q%u@%d %a ";

impl Message {
    pub(super) fn still_waiting() -> Self {
        Self {
            sqlstate: "00000",
            text: "process 12 still waiting for ShareLock on transaction 733 after 1000.123 ms"
                .into(),
            detail: "Process holding the lock: 11. Wait queue: 12, 13.".into(),
            context: "while updating tuple (0,9) in relation \"users\"".into(),
            statement: "UPDATE users\n\tSET name = 'secret'\n WHERE \"id\" = 7".into(),
            ..Self::default()
        }
    }

    pub(super) fn acquired() -> Self {
        Self {
            sqlstate: "00000",
            text: "process 12 acquired ShareLock on transaction 733 after 2500.000 ms".into(),
            ..Self::default()
        }
    }

    pub(super) fn deadlock() -> Self {
        Self {
            error: true,
            sqlstate: "40P01",
            text: "deadlock detected".into(),
            detail: "Process 12 waits for ShareLock on transaction 733; blocked by process 11.\n\
                     Process 11 waits for ExclusiveLock on advisory lock [5,0,7,1]; blocked by process 12.\n\
                     Process 12: UPDATE users\n\tSET name = 'secret'\n\
                     Process 11: SELECT pg_advisory_lock(7)"
                .into(),
            context: "while updating tuple (0,9) in relation \"users\"".into(),
            statement: "UPDATE users SET name = 'secret'".into(),
        }
    }

    pub(super) fn timeout() -> Self {
        Self {
            error: true,
            sqlstate: "55P03",
            text: "canceling statement due to lock timeout".into(),
            statement: "LOCK TABLE users".into(),
            ..Self::default()
        }
    }

    pub(super) fn other(text: &str) -> Self {
        Self {
            error: true,
            sqlstate: "22012",
            text: text.into(),
            detail: "Process 1 waits for ShareLock on transaction 2; blocked by process 2.".into(),
            statement: "SELECT 1/0".into(),
            ..Self::default()
        }
    }

    pub(super) fn stderr(&self) -> String {
        let prefix = "2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 ";
        let severity = if self.error { "ERROR" } else { "LOG" };
        let mut text = String::new();
        for (label, part) in [
            (severity, &self.text),
            ("DETAIL", &self.detail),
            ("CONTEXT", &self.context),
            ("STATEMENT", &self.statement),
        ] {
            if !part.is_empty() {
                let part = part.replace('\n', "\n\t");
                text.push_str(&format!("{prefix}{label}:  {part}\n"));
            }
        }
        text
    }

    pub(super) fn csv(&self) -> String {
        let quoted = |text: &str| match text {
            "" => String::new(),
            text => format!("\"{}\"", text.replace('"', "\"\"")),
        };
        let severity = if self.error { "ERROR" } else { "LOG" };
        format!(
            "2026-01-31 12:34:56.789 UTC,\"app\",\"shop\",12,\"127.0.0.1:5555\",65ba.c,3,\"UPDATE waiting\",\
             2026-01-31 12:00:00 UTC,3/15,733,{severity},{},{},{},,,,{},{},,,\"billing src/pay.rs:42\",\
             \"client backend\",,77\n",
            self.sqlstate,
            quoted(&self.text),
            quoted(&self.detail),
            quoted(&self.context),
            quoted(&self.statement),
        )
    }

    pub(super) fn json(&self) -> String {
        let severity = if self.error { "ERROR" } else { "LOG" };
        let mut object = serde_json::json!({
            "timestamp": "2026-01-31 12:34:56.789 UTC", "user": "app", "dbname": "shop", "pid": 12,
            "remote_port": 5555, "line_num": 3, "error_severity": severity,
            "message": self.text, "application_name": "billing src/pay.rs:42", "query_id": 77,
        });
        // The server leaves it out as well.
        if self.sqlstate != "00000" {
            object["state_code"] = self.sqlstate.into();
        }
        for (key, part) in [
            ("detail", &self.detail),
            ("context", &self.context),
            ("statement", &self.statement),
        ] {
            if !part.is_empty() {
                object[key] = part.as_str().into();
            }
        }
        format!("{object}\n")
    }
}

pub(super) type Write = fn(&Message) -> String;

pub(super) fn formats() -> [(Reader, Write); 4] {
    [
        (Reader::stderr(PREFIX), Message::stderr),
        (Reader::stderr_of_any_prefix(), Message::stderr),
        (Reader::csv(), Message::csv),
        (Reader::json(), Message::json),
    ]
}

pub(super) fn read(mut reader: Reader, text: &str) -> Vec<LogEvent> {
    let mut events: Vec<_> = reader.push(text).collect();
    events.extend(reader.finish());
    events
}

#[test]
fn a_wait_is_read_in_every_format() {
    for (at, (reader, write)) in formats().into_iter().enumerate() {
        let text = format!(
            "{}{}",
            write(&Message::still_waiting()),
            write(&Message::acquired())
        );
        let events = read(reader, &text);
        let [event, acquired] = events.as_slice() else {
            panic!("{events:?} in {text}");
        };
        assert_eq!(event.kind(), LogEventKind::StillWaiting);
        assert_eq!(event.pid(), Some(12));
        assert_eq!(event.mode(), Some(LockMode::Share));
        assert_eq!(event.object(), Some(&LockObject::Transaction(733)));
        assert_eq!(event.waited(), Some(Duration::from_micros(1_000_123)));
        assert_eq!((event.holders(), event.queue()), (&[11][..], &[12, 13][..]));
        assert_eq!(
            event.statement(),
            Some("UPDATE users\n\tSET name = 'secret'\n WHERE \"id\" = 7")
        );
        let row = event.row().expect("a row");
        assert_eq!((row.relation(), row.page(), row.offset()), ("users", 0, 9));
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_862_896_789);
        assert_eq!(event.time(), Some(time));
        assert_eq!(event.time_text(), Some("2026-01-31 12:34:56.789 UTC"));
        assert_eq!(
            (event.user(), event.database()),
            (Some("app"), Some("shop"))
        );
        // Without the prefix, the beginning of a name with blanks is unknown.
        if at != 1 {
            assert_eq!(event.application_name(), Some("billing src/pay.rs:42"));
            assert_eq!(event.call_site(), Some("src/pay.rs:42"));
        }
        assert_eq!(event.query_id(), (at > 1).then_some(77));
        assert!(!format!("{event} {event:?}").contains("secret"));
        assert_eq!(acquired.kind(), LogEventKind::Acquired);
        assert_eq!((acquired.statement(), acquired.holders()), (None, &[][..]));
    }
}

#[test]
fn a_deadlock_is_read_in_every_format() {
    for (reader, write) in formats() {
        let text = write(&Message::other("division by zero")) + &write(&Message::deadlock());
        let events = read(reader, &text);
        let [event] = events.as_slice() else {
            panic!("{events:?} in {text}");
        };
        assert_eq!(event.kind(), LogEventKind::Deadlock);
        let waits: Vec<_> = event
            .waits()
            .iter()
            .map(|wait| (wait.waiter(), wait.blocker(), wait.statement()))
            .collect();
        assert_eq!(
            waits,
            [
                (12, 11, Some("UPDATE users\n\tSET name = 'secret'")),
                (11, 12, Some("SELECT pg_advisory_lock(7)")),
            ]
        );
        let key = event.waits()[1].object().advisory_key().expect("a key");
        assert_eq!(key.as_i64(), Some(7));
        assert_eq!(event.mode(), Some(LockMode::Share));
        let shown = event.to_string();
        assert!(
            shown.contains("failed as the victim of a deadlock for ShareLock on transaction 733 (row (0,9) of \"users\"); pid 12 waits")
                && !shown.contains("secret"),
            "{shown}"
        );
    }
}

#[test]
fn lock_timeouts_and_nowait_are_distinguished() {
    let nowait = Message {
        text: "could not obtain lock on row in relation \"users\"".into(),
        ..Message::timeout()
    };
    for (at, (reader, write)) in formats().into_iter().enumerate() {
        let events = read(reader, &(write(&Message::timeout()) + &write(&nowait)));
        let kinds: Vec<_> = events.iter().map(LogEvent::kind).collect();
        assert_eq!(kinds[0], LogEventKind::LockTimeout);
        assert_eq!(events[0].statement(), Some("LOCK TABLE users"));
        assert_eq!(kinds.get(1), Some(&LogEventKind::NotAvailable), "{at}");
    }
    let verbose = "LOG:  00000: x\nERROR:  55P03: could not obtain lock on row in relation \"users\"\nERROR:  40P01: x\n";
    let kinds: Vec<_> = read(Reader::stderr(""), verbose)
        .iter()
        .map(LogEvent::kind)
        .collect();
    assert_eq!(kinds, [LogEventKind::NotAvailable, LogEventKind::Deadlock]);
}

#[test]
fn messages_that_are_not_about_locks_are_skipped() {
    let forged = Message {
        sqlstate: "00000",
        text:
            "statement: SELECT 'process 12 acquired ShareLock on transaction 733 after 2500.000 ms'"
                .into(),
        ..Message::default()
    };
    let of_another = Message {
        text: Message::acquired().text.replace("process 12", "process 13"),
        ..Message::acquired()
    };
    for (reader, write) in formats() {
        let text = format!(
            "{}\n\u{1}\u{fffd}nonsense\n\t\n\n,,,\n{{}}\n[]\n{{\"a\"\n\"\n\"\n{}{}{}",
            write(&Message::other("a")),
            write(&forged),
            write(&of_another),
            write(&Message::other("b")),
        );
        assert_eq!(read(reader, &text), [], "{text}");
    }
}

#[test]
fn interleaved_lines_of_other_backends_are_not_mixed_in() {
    let waits = Message::still_waiting().stderr();
    let (first, rest) = waits.split_once('\n').expect("lines");
    let other = first.replace("[12]", "[99]").replace("LOG:  ", "DETAIL:  ");
    let events = read(
        Reader::stderr(PREFIX),
        &format!("{first}\n{other}\n\tmore\n{rest}"),
    );
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].holders(), [11]);
}

#[test]
fn after_a_gap_the_next_message_is_read() {
    for (reader, write) in formats() {
        let whole = write(&Message::deadlock());
        let next = write(&Message::timeout());
        for cut in (0..whole.len()).filter(|cut| whole.is_char_boundary(*cut)) {
            let mut reader = reader.clone();
            let mut events: Vec<_> = reader.push(&whole[cut..]).collect();
            events.extend(reader.push(&next).chain(reader.clone().finish()));
            let last = events.last().map(LogEvent::kind);
            assert_eq!(last, Some(LogEventKind::LockTimeout), "{:?}", &whole[cut..]);
        }
    }
}

#[test]
fn an_unterminated_quote_is_abandoned() {
    let mut reader = Reader::csv();
    let line = format!("{}\n", "x".repeat(1 << 20));
    let mut found: Vec<_> = reader.push("2026-01-31 12:34:56.789 UTC,\"app\n").collect();
    for _ in 0..6 {
        found.extend(reader.push(&line));
    }
    assert!(found.is_empty());
    assert_eq!(reader.push(&Message::timeout().csv()).count(), 1);
    let mut reader = Reader::json();
    for _ in 0..6 {
        assert_eq!(reader.push(&"x".repeat(1 << 20)).count(), 0);
    }
    assert!(reader.line.len() <= MAX_LINE_BYTES);
    assert_eq!(
        reader
            .push(&format!("\n{}", Message::timeout().json()))
            .count(),
        1
    );
}

#[test]
fn reading_can_continue_after_finish() {
    let mut reader = Reader::stderr(PREFIX);
    let text = Message::timeout().stderr();
    assert_eq!(reader.push(&text).count(), 0);
    assert_eq!(reader.finish().count(), 1);
    assert_eq!(reader.finish().count(), 0);
    for line in text.lines() {
        assert_eq!(reader.push_line(line).count(), 0);
    }
    assert_eq!(reader.finish().count(), 1);
    assert!(format!("{reader:?}").starts_with("Reader { format: \"stderr\""));
}

#[test]
fn json_is_read_with_all_its_escapes() {
    let line = r#" { "message" : "deadlock \u0064etected\ud83d\ude00\ud83d!\n\"\\\/" , "state_code":"40P01",
        "pid":12,"x":[1,{"pid":13},[]],"y":null,"z":{} } "#
        .replace('\n', " ");
    let events = read(Reader::json(), &line);
    assert_eq!(events.len(), 1);
    assert_eq!(
        (events[0].kind(), events[0].pid()),
        (LogEventKind::Deadlock, Some(12))
    );
    for bad in [
        r#"{"state_code":"40P01""#,
        r#"{"state_code":"40P01"} x"#,
        r#"{"state_code":"40P01",}"#,
        r#"{"state_code":"\x"}"#,
        r#"["state_code","40P01"]"#,
        r#"{"state_code":["40P01"]}"#,
    ] {
        assert_eq!(read(Reader::json(), bad), [], "{bad}");
    }
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert_eq!(read(Reader::json(), &deep), []);
}

/// Any statement that the formats can represent.
fn statement() -> impl Strategy<Value = String> {
    "[^\0\r\u{1}-\u{8}]{1,60}|[\"',\n\t\\\\:a]{1,30}"
        .prop_filter("it is not blank", |text| !text.trim().is_empty())
}

fn message() -> impl Strategy<Value = Message> {
    let kinds = prop::sample::select(vec![
        Message::still_waiting(),
        Message::acquired(),
        Message::deadlock(),
        Message::timeout(),
        Message::other("x"),
    ]);
    (kinds, statement()).prop_map(|(kind, statement)| Message { statement, ..kind })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn statements_are_read_whole(messages in prop::collection::vec(message(), 1..6)) {
        for (reader, write) in formats() {
            let text: String = messages.iter().map(write).collect();
            let events = read(reader, &text);
            let expected: Vec<_> = messages
                .iter()
                .filter(|message| message.sqlstate != "22012")
                .map(|message| Some(message.statement.as_str()))
                .collect();
            let found: Vec<_> = events.iter().map(LogEvent::statement).collect();
            prop_assert_eq!(found, expected, "{}", text);
        }
    }

    /// The events do not depend on how the text is cut into pieces.
    #[test]
    fn pieces_make_no_difference(
        messages in prop::collection::vec(message(), 1..5),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        for (mut reader, write) in formats() {
            let text: String = messages.iter().map(write).collect();
            let whole = read(reader.clone(), &text);
            let mut ends: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            ends.retain(|end| text.is_char_boundary(*end));
            ends.sort_unstable();
            let mut events = Vec::new();
            let mut from = 0;
            for end in ends.into_iter().chain([text.len()]) {
                events.extend(reader.push(&text[from..end]));
                from = end;
            }
            events.extend(reader.finish());
            prop_assert_eq!(events, whole);
        }
    }

    #[test]
    fn any_text_is_read_without_panic(texts in prop::collection::vec(any::<String>(), 0..6), prefix in any::<String>()) {
        let readers = formats().into_iter().map(|(reader, _)| reader);
        for mut reader in readers.chain([Reader::stderr(&prefix)]) {
            for text in &texts {
                drop(reader.push(text));
                drop(reader.push_line(text));
            }
            drop(reader.finish());
        }
    }

    /// Bytes are changed, inserted or removed anywhere: reading does not panic, and every event can be shown.
    #[test]
    fn damaged_text_is_read_without_panic(
        messages in prop::collection::vec(message(), 1..4),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..12),
    ) {
        for (reader, write) in formats() {
            let text: String = messages.iter().map(write).collect();
            let mut bytes = text.into_bytes();
            for (place, byte, what) in &edits {
                let at = place.index(bytes.len() + 1);
                match what {
                    0 => bytes.insert(at, *byte),
                    1 if at < bytes.len() => bytes[at] = *byte,
                    _ if at < bytes.len() => drop(bytes.remove(at)),
                    _ => {}
                }
            }
            for event in read(reader, &String::from_utf8_lossy(&bytes)) {
                let shown = [event.to_string(), format!("{event:?}")];
                prop_assert!(shown.iter().all(|text| !text.is_empty()));
            }
        }
    }
}
