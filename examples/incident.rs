//! An incident rehearsed, from the pile-up to the recovery: an import that has gone to sleep in its transaction, a report
//! that holds rows for ages, and writers who wait for both.
//!
//! `cargo run --example incident` finds or starts a PostgreSQL by itself. It prints who waits for whom, what the
//! resolver would do, what it does, and how the waits fall; it ends with an error where they have not.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, Keeper, LoadChange, RecoveryCriterion, ResolverPolicy};
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinSet;
use tokio_postgres::Client;

const WRITERS: i32 = 6;
/// How often to look while the scene is set.
const MOMENT: Duration = Duration::from_millis(50);

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    let pool = usize::try_from(WRITERS)? + 2;
    let keeper = Keeper::builder(database.pool(pool))
        .application("shop")
        // Opened beside the pool, which is what a pile-up uses up.
        .side_connection(database.config(), NoTls)
        .build();
    let (import, report) = scene(&database).await?;
    let mut writers = JoinSet::new();
    for account in 1..=WRITERS {
        let keeper = keeper.clone();
        writers.spawn(async move { deposit(&keeper, account).await });
    }

    println!("{WRITERS} deposits wait for an import and a report …\n");
    let monitor = keeper.monitor();
    let tree = loop {
        let tree = monitor.lock_tree().await?;
        let here = |name: Option<&str>| name == Some(database.name());
        let waiters = tree.snapshot().waiters().into_iter();
        if waiters.filter(|waiter| here(waiter.database())).count() >= pool - 2 {
            break tree;
        }
        tokio::time::sleep(MOMENT).await;
    };
    println!("The pile-up:\n\n{tree}");
    let name = format!("lockkeeper-incident-{}.html", std::process::id());
    let page = std::env::temp_dir().join(name);
    std::fs::write(&page, tree.to_html())?;
    println!("The same as a page: {}\n", page.display());

    // Heavy jobs look at this before each piece of work.
    let paused = Arc::new(AtomicBool::new(false));
    let jobs = Arc::clone(&paused);
    let calm = RecoveryCriterion::no_waits().checks(3);
    // Short graces, since nobody wants to watch for minutes.
    let policy = ResolverPolicy::new()
        .database(database.name())
        .wait(Duration::from_secs(1))
        .idle_grace(Duration::from_secs(2))
        .poll(Duration::from_millis(100))
        .recovered_when(calm)
        .shed_load(move |change| match change {
            LoadChange::Shed => jobs.store(true, Ordering::Relaxed),
            LoadChange::Resume => jobs.store(false, Ordering::Relaxed),
            // Somebody has to look at it first.
            _ => {}
        });
    let plan = keeper.resolver(policy.clone()).plan(&tree);
    println!("What the resolver would do:\n\n{plan}");

    let log = keeper.resolver(policy.execute(true)).run().await?;
    println!("What it has done:\n\n{log}");

    let mut recovery = monitor.recovery(calm)?;
    let last = recovery
        .wait(Duration::from_millis(200), Duration::from_secs(30))
        .await?;
    println!("Now: {last}");
    while let Some(written) = writers.join_next().await {
        written??;
    }
    println!("{WRITERS} deposits made, in the end");

    for (name, client) in [("import", &import), ("report", &*report)] {
        let lives = client.batch_execute("ROLLBACK").await.is_ok();
        println!(
            "the {name}'s session {}",
            if lives { "lives" } else { "is gone" }
        );
    }
    if !log.is_recovered() || !last.is_recovered() || paused.load(Ordering::Relaxed) {
        return Err("the incident is not over".into());
    }
    Ok(())
}

/// An import that was left in the middle of its transaction, and a report that locks what it reads.
async fn scene(database: &Database) -> Result<(Client, Arc<Client>), tokio_postgres::Error> {
    let import = database.connect().await;
    import
        .batch_execute(
            "SET application_name = 'nightly import'; \
             CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL); \
             INSERT INTO account SELECT id, 100 FROM generate_series(1, 6) AS id",
        )
        .await?;
    import
        .batch_execute("BEGIN; UPDATE account SET balance = balance + 1 WHERE id <= 4")
        .await?;
    let report = database.connect().await;
    report
        .batch_execute(
            "SET application_name = 'monthly report'; \
             BEGIN; \
             SELECT FROM account WHERE id > 4 FOR UPDATE",
        )
        .await?;
    let report = Arc::new(report);
    let running = Arc::clone(&report);
    drop(tokio::spawn(async move {
        // It ends with an error: somebody cancels it.
        running.batch_execute("SELECT pg_sleep(600)").await.ok();
    }));
    Ok((import, report))
}

/// What a customer waits for.
async fn deposit(keeper: &Keeper, account: i32) -> Result<(), Error> {
    keeper
        .transaction(async |tx| {
            tx.execute(
                "UPDATE account SET balance = balance + 30 WHERE id = $1",
                &[&account],
            )
            .await?;
            Ok(())
        })
        .await
}
