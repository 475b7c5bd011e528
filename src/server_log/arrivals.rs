//! The forms in which logs arrive, and that nothing is left out without a word.

use proptest::prelude::*;

use super::tests::{Message, Write, formats, read};
use super::*;
use crate::mode::LockMode;

/// The prefix of [`Message::stderr`].
const WRITTEN: &str = "2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 ";

/// A wait and a deadlock, with another prefix.
fn scene(prefix: &str) -> String {
    let text = Message::still_waiting().stderr() + &Message::deadlock().stderr();
    text.replace(WRITTEN, prefix)
}

fn each_line(text: &str, before: &str) -> String {
    text.lines()
        .map(|line| format!("{before}{line}\n"))
        .collect()
}

/// Checks that both messages are read whole.
fn check(reader: Reader, text: &str, name: &str) -> Vec<LogEvent> {
    let events = read(reader, text);
    let kinds: Vec<_> = events.iter().map(LogEvent::kind).collect();
    assert_eq!(
        kinds,
        [LogEventKind::StillWaiting, LogEventKind::Deadlock],
        "{name}: {text}"
    );
    assert_eq!(
        (events[0].holders(), events[0].queue()),
        (&[11][..], &[12, 13][..]),
        "{name}"
    );
    assert_eq!(events[0].pid(), Some(12), "{name}");
    assert_eq!(events[0].mode(), Some(LockMode::Share), "{name}");
    let statement = events[0].statement().unwrap_or_else(|| panic!("{name}"));
    let squeezed: Vec<_> = statement.split_whitespace().collect();
    assert_eq!(
        squeezed.join(" "),
        "UPDATE users SET name = 'secret' WHERE \"id\" = 7",
        "{name}"
    );
    assert_eq!(events[1].waits().len(), 2, "{name}: {:?}", events[1]);
    assert_eq!(
        events[1].waits()[1].statement(),
        Some("SELECT pg_advisory_lock(7)"),
        "{name}"
    );
    assert_eq!(
        events[1].statement(),
        Some("UPDATE users SET name = 'secret'"),
        "{name}"
    );
    assert!(events[1].row().is_some(), "{name}");
    events
}

#[test]
fn prefixes_in_use_are_read_with_all_their_fields() {
    for (prefix, written) in [
        // Azure.
        ("%t-%c-", "2026-01-31 12:34:56 UTC-6055d3a0.c-"),
        // Cloud SQL.
        (
            "%m [%p]: [%l-1] db=%d,user=%u ",
            "2026-01-31 12:34:56.789 UTC [12]: [5-1] db=shop,user=app ",
        ),
        (
            "[%p]: [%l-1] db=%d,user=%u ",
            "[12]: [5-1] db=shop,user=app ",
        ),
        (
            "%t [%p]: [%l-1] user=%u,db=%d,app=%a,client=%h ",
            "2026-01-31 12:34:56 CEST [12]: [5-1] user=app,db=shop,app=a b,client=2001:db8::1 ",
        ),
        // RDS.
        (
            "%t:%r:%u@%d:[%p]:",
            "2026-01-31 12:34:56 UTC:2001:db8::1(5555):app@shop:[12]:",
        ),
        (
            "%t:%r:%u@%d:[%p]:%l:%e:%s:%v:%x:%c:%q%a:",
            "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[12]:5:00000:2026-01-31 12:00:00 UTC:3/15:0:65ba.c:a b:",
        ),
        (
            "%m|%u|%d|%c|",
            "2026-01-31 12:34:56.789 +0545|app|shop|6055d3a0.c|",
        ),
        (
            "< %m %p %u@%d >",
            "< 2026-01-31 12:34:56.789 +03 12 app@shop >",
        ),
    ] {
        // The deadlock's SQLSTATE differs from the wait's.
        let text = scene(written);
        let text = match text.split_once(":00000:") {
            None => text,
            Some(_) => {
                let wait = Message::still_waiting().stderr().replace(WRITTEN, written);
                let deadlock = Message::deadlock().stderr();
                wait + &deadlock.replace(WRITTEN, &written.replace(":00000:", ":40P01:"))
            }
        };
        for (reader, name) in [
            (Reader::stderr(prefix), "known"),
            (Reader::stderr_of_any_prefix(), "guessed"),
        ] {
            let events = check(reader, &text, &format!("{name} {prefix}"));
            let has_names = prefix.contains("%u");
            let is_guessable = name == "known" || !prefix.contains('|');
            if has_names && is_guessable {
                let names = (events[0].user(), events[0].database());
                assert_eq!(names, (Some("app"), Some("shop")), "{name} {prefix}");
            }
            if prefix.contains("%t") || prefix.contains("%m") {
                assert!(events[0].time_text().is_some(), "{name} {prefix}");
            }
        }
    }
}

#[test]
fn a_line_number_without_a_process_id_is_not_one() {
    let mut text = String::new();
    for (number, line) in (5..).zip(scene("").lines()) {
        match line.starts_with('\t') {
            true => text.push_str(line),
            false => text.push_str(&format!("[{number}-1] db=shop {line}")),
        }
        text.push('\n');
    }
    check(Reader::stderr_of_any_prefix(), &text, "[%l-1]");
}

#[test]
fn what_carries_a_log_is_removed() {
    let plain = scene("2026-01-31 12:34:56.789 UTC [12] ");
    let prefix = "%m [%p] ";
    let syslog = |head: &str, tab: &str, text: &str| -> String {
        let mut message = 0;
        let mut chunk = 0;
        let mut lines = String::new();
        for line in text.lines() {
            if line.contains("LOG:") || line.contains("ERROR:") {
                (message, chunk) = (message + 1, 0);
            }
            chunk += 1;
            let line = line.replace('\t', tab);
            lines.push_str(&format!("{head}[{message}-{chunk}] {line}\n"));
        }
        lines
    };
    let heroku = scene(" sql_error_code = 40P01 ")
        .replacen("40P01", "00000", 4)
        .replace("LOG:  ", "LOG: ");
    let docker: String = plain
        .lines()
        .map(|line| {
            let log = serde_json::json!({"log": format!("{line}\n"), "stream": "stderr", "time": "2026-01-31T12:34:56.8Z"});
            format!("{log}\n")
        })
        .collect();
    let cri = "2026-01-31T12:34:56.789012345Z stderr F ";
    let cases = [
        ("compose", each_line(&plain, "db_1  | ")),
        (
            "compose in colour",
            each_line(&plain, "\u{1b}[36mdb-1  |\u{1b}[0m "),
        ),
        ("CRI", each_line(&plain, cri)),
        ("kubectl", each_line(&plain, "[pod/a/b] ")),
        (
            "kubectl with CRI",
            each_line(&plain, &format!("[pod/a/b] {cri}")),
        ),
        (
            "docker logs -t",
            each_line(&plain, "2026-01-31T12:34:56.789012345Z "),
        ),
        (
            "syslog",
            syslog("Jan 31 12:34:56 host postgres[12]: ", "#011", &plain),
        ),
        (
            "rsyslog",
            syslog(
                "2026-01-31T12:34:56.789+01:00 host postgres[12]: ",
                "#011",
                &plain,
            ),
        ),
        (
            "RFC 5424",
            syslog(
                "<134>1 2026-01-31T12:34:56.789Z host postgres 12 - - ",
                "#011",
                &plain,
            ),
        ),
        (
            "journal",
            each_line(&plain, "Feb  1 12:34:56 host postgres[12]: "),
        ),
        ("docker", docker.clone()),
        ("docker in compose", each_line(&docker, "db-1  | ")),
        ("blanks", plain.replace('\t', "        ")),
        ("four blanks", plain.replace('\t', "    ")),
        ("a byte-order mark", format!("\u{feff}{plain}")),
        ("line ends", plain.replace('\n', "\r\n")),
    ];
    for (name, text) in &cases {
        check(Reader::stderr(prefix), text, name);
        check(Reader::stderr_of_any_prefix(), text, name);
        let mut reader = Reader::stderr(prefix);
        drop(reader.push(text));
        assert_eq!(reader.lines_skipped(), 0, "{name}");
    }
    // Without a process id in the prefix, syslog's is used.
    let bare = syslog("Jan 31 12:34:56 host postgres[12]: ", "#011", &scene(""));
    let heroku = syslog(
        "2026-01-31T12:34:56+00:00 app[postgres.405]: [GREEN] ",
        "#011",
        &heroku,
    );
    for (name, text) in [("syslog alone", &bare), ("Heroku", &heroku)] {
        let events = check(Reader::stderr_of_any_prefix(), text, name);
        assert_eq!(events[1].pid(), Some(12), "{name}");
    }
    check(Reader::stderr(""), &bare, "syslog without a prefix");
    // `syslog_split_messages = off`: line ends are escaped, and there are no numbers.
    let mut whole = String::new();
    for line in plain.lines() {
        let begins = line.contains("LOG:") || line.contains("ERROR:");
        whole.push_str(match begins {
            true => "\nJan 31 12:34:56 host postgres[12]: ",
            false => "#012",
        });
        whole.push_str(&line.replace('\t', "#011"));
    }
    check(Reader::stderr(prefix), &whole, "syslog in one line");
}

#[test]
fn a_line_that_its_carrier_has_cut_is_put_together() {
    let text = scene("2026-01-31 12:34:56.789 UTC [12] ");
    let mut cri = String::new();
    let mut syslog = String::new();
    for (number, line) in text.lines().enumerate() {
        let middle = line.len() / 2;
        let (first, second) = line.split_at(middle);
        let head = "2026-01-31T12:34:56.789012345Z stderr";
        cri.push_str(&format!("{head} P {first}\n{head} F {second}\n"));
        let head = "Jan 31 12:34:56 host postgres[12]:";
        // The second chunk begins without a prefix.
        let chunk = number * 2;
        if line.starts_with('\t') {
            syslog.push_str(&format!("{head} [8-{}] {line}\n", chunk + 1));
        } else {
            let cut = line.rfind(' ').unwrap_or(middle);
            let (first, second) = line.split_at(cut);
            syslog.push_str(&format!(
                "{head} [8-{}] {first}\n{head} [8-{}] {second}\n",
                chunk + 1,
                chunk + 2
            ));
        }
    }
    check(Reader::stderr("%m [%p] "), &cri, "CRI");
    check(Reader::stderr("%m [%p] "), &syslog, "syslog");
}

#[test]
fn json_of_other_programs_is_read() {
    let record = |message: &Message| {
        serde_json::json!({
            "log_time": "2026-01-31 12:34:56.789 UTC", "user_name": "app", "database_name": "shop",
            "process_id": "12", "error_severity": if message.error { "ERROR" } else { "LOG" },
            "sql_state_code": message.sqlstate, "message": message.text, "detail": message.detail,
            "context": message.context, "query": message.statement, "application_name": "billing",
            "query_id": "77", "backend_type": "client backend",
        })
    };
    let cloud_native: Vec<_> = [Message::still_waiting(), Message::deadlock()]
        .iter()
        .map(|message| {
            serde_json::json!({"level": "info", "ts": "2026-01-31T12:34:57Z", "logger": "postgres",
                "msg": "record", "logging_pod": "c-1", "record": record(message)})
        })
        .collect();
    let lines: String = cloud_native.iter().map(|one| format!("{one}\n")).collect();
    let events = check(Reader::json(), &lines, "CloudNativePG");
    assert_eq!(
        (events[0].user(), events[0].database(), events[0].query_id()),
        (Some("app"), Some("shop"), Some(77))
    );
    check(
        Reader::stderr("%m [%p] "),
        &lines,
        "CloudNativePG as stderr",
    );
    let in_cri = each_line(&lines, "2026-01-31T12:34:56.789012345Z stdout F ");
    check(Reader::json(), &in_cri, "CloudNativePG in CRI");

    let prefix = "2026-01-31 12:34:56.789 UTC [12]: [5-1] db=shop,user=app ";
    let messages: Vec<String> = [Message::still_waiting(), Message::deadlock()]
        .iter()
        .map(|message| message.stderr().replace(WRITTEN, prefix))
        .collect();
    // Cloud SQL: an object for each line, or for each message.
    let entry = |text: &str| {
        serde_json::json!({"insertId": "x", "logName": "projects/p/logs/cloudsql.googleapis.com%2Fpostgres.log",
            "resource": {"type": "cloudsql_database", "labels": {"database_id": "p:i"}},
            "severity": "ERROR", "textPayload": text, "timestamp": "2026-01-31T12:34:56.789Z"})
    };
    let lines = messages.concat();
    let of_lines: Vec<_> = lines.lines().map(entry).collect();
    let of_messages: Vec<_> = messages.iter().map(|text| entry(text.trim_end())).collect();
    for (name, entries) in [("Cloud SQL, lines", of_lines), ("Cloud SQL", of_messages)] {
        let text: String = entries.iter().map(|one| format!("{one}\n")).collect();
        let events = check(Reader::json(), &text, name);
        assert_eq!(events[0].database(), Some("shop"), "{name}");
        // As `gcloud logging read --format=json` prints it.
        let list = serde_json::Value::from(entries);
        let pretty = serde_json::to_string_pretty(&list).expect("JSON");
        check(Reader::json(), &pretty, "a list");
        check(Reader::json(), &list.to_string(), "a list in one line");
    }

    // Azure: the single server's fields, and the flexible server's lines.
    let single: String = [Message::still_waiting(), Message::deadlock()]
        .iter()
        .map(|message| {
            let one = serde_json::json!({"LogicalServerName": "s", "category": "PostgreSQLLogs",
                "operationName": "LogEvent", "time": "2026-01-31T12:34:57Z", "properties": {
                    "prefix": "2026-01-31 12:34:56 UTC-6055d3a0.c-", "message": message.text,
                    "detail": message.detail, "errorLevel": if message.error { "ERROR" } else { "LOG" },
                    "context": message.context, "statement": message.statement, "domain": "postgres-11",
                    "sqlerrcode": message.sqlstate}});
            format!("{one}\n")
        })
        .collect();
    check(Reader::json(), &single, "Azure's single server");
    let flexible: String = scene("2026-01-31 12:34:56 UTC-6055d3a0.c-")
        .replace("\n\t", "\u{1}\t")
        .lines()
        .map(|line| {
            let one = serde_json::json!({"category": "PostgreSQLLogs", "time": "2026-01-31T12:34:57Z",
                "properties": {"timestamp": "2026-01-31 12:34:56.789 UTC", "processId": 12,
                    "errorLevel": "LOG", "sqlerrcode": "00000", "message": line.replace('\u{1}', "\n")}});
            format!("{one}\n")
        })
        .collect();
    check(Reader::json(), &flexible, "Azure's flexible server");
}

#[test]
fn csv_with_quotes_around_every_field_is_read() {
    let quoted = |message: &Message| {
        let text = message.csv();
        text.replacen(
            "2026-01-31 12:34:56.789 UTC",
            "\"2026-01-31 12:34:56.789 UTC\"",
            1,
        )
    };
    let text = quoted(&Message::still_waiting()) + &quoted(&Message::deadlock());
    check(Reader::csv(), &text, "csv");
}

#[test]
fn errors_are_read_without_a_sqlstate() {
    let nowait = "ERROR:  could not obtain lock on row in relation \"t\"\nSTATEMENT:  SELECT 1\n";
    let terse = "ERROR:  deadlock detected\nSTATEMENT:  SELECT 2\n";
    for (text, kind) in [
        (nowait, LogEventKind::NotAvailable),
        (terse, LogEventKind::Deadlock),
        (
            "FEHLER:  Verklemmung (Deadlock) entdeckt\n",
            LogEventKind::Deadlock,
        ),
        (
            "ERROR:  could not obtain lock on relation \"t\" at character 15\n",
            LogEventKind::NotAvailable,
        ),
    ] {
        let events = read(Reader::stderr(""), text);
        assert_eq!(events.len(), 1, "{text}");
        assert_eq!(events[0].kind(), kind, "{text}");
        assert_eq!(
            events[0].statement().is_some(),
            text.contains("STATEMENT"),
            "{text}"
        );
    }
    assert!(read(Reader::stderr(""), "ERROR:  the deadlock detected\n").is_empty());
}

#[test]
fn a_message_is_put_together_across_other_lines() {
    let prefix = "%m [%p] ";
    let ours = scene("2026-01-31 12:34:56.789 UTC [12] ");
    let others = [
        "2026-01-31 12:34:56.789 UTC [99] LOG:  checkpoint starting: time",
        "2026-01-31 12:34:56.789 UTC [98] ERROR:  division by zero",
        "2026-01-31 12:34:56.789 UTC [98] STATEMENT:  SELECT 1/0",
    ];
    // Sessions write each of their lines whole, with its continuation lines.
    let mut text = String::new();
    for line in ours.replace("\n\t", "\u{1}").lines() {
        let line = line.replace('\u{1}', "\n\t");
        text.push_str(&format!("{line}\n{}\n", others.join("\n")));
    }
    for reader in [Reader::stderr(prefix), Reader::stderr_of_any_prefix()] {
        check(reader, &text, "other sessions");
    }
    // Other containers write between any lines.
    let mut text = String::new();
    for line in ours.lines() {
        text.push_str(&format!(
            "db-1  | {line}\nweb-1  | GET / ERROR:  x\nweb-1  | \tat x\n"
        ));
    }
    check(Reader::stderr(prefix), &text, "other containers");
    // A program without a prefix writes between the lines of a deadlock.
    let text = ours.replace("\n\tProcess", "\nnpm WARN something\n\tProcess");
    let mut reader = Reader::stderr(prefix);
    check(reader.clone(), &text, "a program");
    drop(reader.push(&text));
    assert_eq!(reader.lines_skipped(), 3);
}

#[test]
fn lines_that_are_not_read_are_counted() {
    for (reader, write) in formats() {
        for (text, expected) in [
            ("nonsense\n\nmore nonsense\n".to_owned(), 2),
            (write(&Message::timeout()), 0),
            (format!("nonsense\n{}", write(&Message::deadlock())), 1),
        ] {
            let mut reader = reader.clone();
            drop(reader.push(&text));
            drop(reader.finish());
            assert_eq!(reader.lines_skipped(), expected, "{reader:?}: {text}");
            assert_eq!(
                reader.lines_read() > 0,
                text.len() > 30,
                "{reader:?}: {text}"
            );
        }
    }
    let mut reader = Reader::json();
    drop(reader.push("{\"level\":\"info\",\"count\":1}\n{\"a\":\n"));
    drop(reader.finish());
    assert_eq!(reader.lines_skipped(), 2);
    let wrong = Message::deadlock().csv();
    let mut reader = Reader::stderr("%m [%p] ");
    drop(reader.push(&wrong));
    assert_eq!((reader.lines_read(), reader.lines_skipped()), (0, 5));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// No text is passed over in silence: each line that is not empty is read or counted.
    #[test]
    fn never_a_silent_nothing(
        lines in prop::collection::vec("[ -~]{0,40}|\t[ -~]{0,10}|[\\{\\[\\}a:\",0 ]{1,20}|db  \\| [ -~]{0,20}", 0..8),
        kind in 0..4_usize,
        at in any::<prop::sample::Index>(),
    ) {
        let (reader, write): (Reader, Write) = formats().into_iter().nth(kind).expect("a format");
        let message = write(&Message::timeout());
        for with_message in [false, true] {
            let mut all: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
            if with_message {
                all.insert(at.index(all.len() + 1), message.clone());
            }
            let text = all.concat();
            let mut reader = reader.clone();
            let mut events: Vec<_> = reader.push(&text).collect();
            events.extend(reader.finish());
            let some = text.lines().any(|line| !line.trim().is_empty());
            prop_assert!(!some || reader.lines_read() + reader.lines_skipped() > 0, "{text:?}");
        }
    }
}
