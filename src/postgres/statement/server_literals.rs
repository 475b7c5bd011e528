//! Compares redaction with the server: what it read as data must not remain in a redacted statement.

#![allow(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

use lockkeeper_testkit::Server;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use tokio_postgres::SimpleQueryMessage;

use super::redact;

/// Literals of every form, and text that moves their end. Data is a `Z`.
fn expressions() -> impl Strategy<Value = String> {
    let inside = || r#"([Z ab"$/*\\-]|''|\\'|\\\\|'|\n){0,5}"#;
    let expression = prop_oneof![
        4 => inside().prop_map(|text| format!("'{text}'")),
        // Complete if \ does not escape, unterminated if it does.
        2 => "[Z a]{0,3}".prop_map(|text| format!(r"'{text}\'")),
        4 => inside().prop_map(|text| format!("E'{text}'")),
        1 => inside().prop_map(|text| format!("N'{text}'")),
        1 => inside().prop_map(|text| format!("U&'{text}'")),
        2 => inside().prop_map(|text| format!("$${text}$$")),
        2 => (inside(), "(a|é1)").prop_map(|(text, tag)| format!("${tag}${text}${tag}$")),
        1 => inside().prop_map(|text| format!("/*{text}*/ 'Z'")),
        1 => inside().prop_map(|text| format!("'Z' --{text}\n")),
        1 => (inside(), inside()).prop_map(|(a, b)| format!("'{a}'\n'{b}'")),
        1 => (inside(), inside()).prop_map(|(a, b)| format!("E'{a}' -- Z\n '{b}'")),
        1 => Just("1".to_owned()),
    ];
    prop::collection::vec(expression, 1..4).prop_map(|all| format!("SELECT {}", all.join(", ")))
}

#[tokio::test]
async fn what_the_server_reads_as_data_is_redacted() {
    let database = Server::shared().database().await;
    let client = database.connect().await;
    let mut runner = TestRunner::new_with_rng(
        ProptestConfig::default(),
        TestRng::deterministic_rng(RngAlgorithm::ChaCha),
    );
    for conforming in ["on", "off"] {
        client
            .batch_execute(&format!(
                "SET standard_conforming_strings = {conforming}; SET escape_string_warning = off; \
                 SET backslash_quote = on"
            ))
            .await
            .unwrap();
        let (mut with_data, mut kept_something) = (0, 0);
        for _ in 0..1500 {
            let sql = expressions().new_tree(&mut runner).unwrap().current();
            // The server gives no result for invalid texts.
            let Ok(messages) = client.simple_query(&sql).await else {
                continue;
            };
            let mut data = false;
            let mut alias = false;
            for message in &messages {
                match message {
                    SimpleQueryMessage::Row(row) => {
                        data |=
                            (0..row.len()).any(|at| row.get(at).is_some_and(|v| v.contains('Z')));
                    }
                    SimpleQueryMessage::RowDescription(columns) => {
                        alias |= columns
                            .iter()
                            .any(|column| column.name().contains(['z', 'Z']));
                    }
                    _ => {}
                }
            }
            // Text after a literal, such as a word, is the column's name.
            if alias {
                continue;
            }
            let redacted = redact(&sql);
            assert!(!redacted.contains('Z'), "{conforming}: {sql} → {redacted}");
            with_data += i32::from(data);
            kept_something += i32::from(redacted.contains("?, ?"));
        }
        assert!(
            with_data > 150 && kept_something > 50,
            "{with_data} {kept_something}"
        );
    }
}
