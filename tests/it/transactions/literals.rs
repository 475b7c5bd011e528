//! No literal of the user's SQL gets into what the library says.

use lockkeeper::{Error, TransactionOptions};
use lockkeeper_testkit::{CapturedLog, Scene};

/// What our errors and log lines say of themselves. A source says what it likes, to who asks for it.
#[tokio::test]
async fn no_literal_of_the_users_sql_is_in_our_errors_and_logs() {
    const SECRET: &str = "sekret-4711";
    let scene = Scene::with_two_rows(1).await;
    scene
        .observer
        .batch_execute(&format!(
            "CREATE TABLE s (name text UNIQUE, c text CHECK (c <> '{SECRET}')); INSERT INTO s VALUES ('{SECRET}')"
        ))
        .await
        .unwrap();
    let (log, logging) = CapturedLog::start();
    let mut errors: Vec<Error> = Vec::new();
    for sql in [
        format!("INSERT INTO s VALUES ('{SECRET}')"),
        format!("INSERT INTO s VALUES ('x', '{SECRET}')"),
        format!("SELECT '{SECRET}'::int"),
        format!("SELECT '{SECRET}' nonsense nonsense"),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING DETAIL = '{SECRET}', HINT = '{SECRET}'; END $$"
        ),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '40001', DETAIL = '{SECRET}'; END $$"
        ),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '55P03', DETAIL = '{SECRET}'; END $$"
        ),
        format!("SELECT pg_terminate_backend(pg_backend_pid()), '{SECRET}'"),
    ] {
        for swallow in [false, true] {
            let options = TransactionOptions::new().attempts(2);
            let answer = scene
                .keeper
                .transaction_with(options, async |tx| {
                    let failed = tx.batch_execute(&sql).await;
                    if !swallow {
                        failed?;
                    }
                    Ok::<_, Error>(())
                })
                .await;
            errors.push(answer.expect_err(&sql));
            let answer = scene
                .keeper
                .transaction_with(TransactionOptions::new().attempts(2), async |tx| {
                    let inner = tx.savepoint(async |tx| {
                        let failed = tx.batch_execute(&sql).await;
                        if !swallow {
                            failed?;
                        }
                        Ok::<_, Error>(())
                    });
                    inner.await
                })
                .await;
            errors.push(answer.expect_err(&sql));
        }
    }
    drop(logging);
    let log = log.text();
    assert!(log.contains("attempt=1"), "nothing was logged");
    assert!(!log.contains(SECRET), "{log}");
    for error in &errors {
        let text = error.to_string();
        assert!(!text.contains(SECRET), "Display: {text}");
    }
    for error in &errors {
        let text = format!("{error:?}");
        assert!(!text.contains(SECRET), "Debug: {text}");
    }
    scene.nothing_left().await;
}
