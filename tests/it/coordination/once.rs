//! What runs once in a period runs once, and what has failed has not run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::{Error, ErrorKind, Keeper, Once};
use lockkeeper_testkit::{
    ENDLESS, Scene, assert_error, in_time, is_pending, poll_times_and_drop, quoted,
};

use super::process;

const DAY: Duration = Duration::from_secs(86_400);
const HOUR: Duration = Duration::from_secs(3600);

async fn scene() -> Scene {
    let scene = Scene::new(3).await;
    scene.keeper.once("any", DAY).set_up().await.unwrap();
    scene.run("CREATE TABLE run (n int)").await;
    scene
}

/// Work that leaves a row.
async fn work(once: &Once) -> Option<u64> {
    let ran = once
        .clone()
        .run(async |tx| Ok::<_, Error>(tx.execute("INSERT INTO run VALUES (1)", &[]).await?));
    ran.await.unwrap()
}

/// As if the last run had been so much earlier.
async fn earlier(scene: &Scene, by: &str) {
    let sql = format!(
        "UPDATE public.lockkeeper_once SET bucket = bucket - interval '{by}', ran_at = ran_at - interval '{by}'"
    );
    scene.run(&sql).await;
}

#[tokio::test]
async fn it_runs_once_in_each_bucket_of_the_calendar() {
    let scene = scene().await;
    let daily = scene.keeper.once("daily", DAY);
    assert_eq!(work(&daily).await, Some(1));
    assert_eq!(work(&daily).await, None);
    assert_eq!(work(&process(&scene).once("daily", DAY)).await, None);
    // A bucket is a day of the server's clock, and its name is its beginning.
    let row = "(SELECT bucket = date_trunc('day', ran_at AT TIME ZONE 'UTC') AND ran_by LIKE 'test %once.rs:% as %' \
               FROM public.lockkeeper_once WHERE name = 'daily')";
    assert!(scene.is_true(row).await);
    earlier(&scene, "1 day").await;
    assert_eq!(work(&daily).await, Some(1));
    assert_eq!(work(&daily).await, None);
    // A clock that was put back repeats nothing.
    earlier(&scene, "-3 days").await;
    assert_eq!(work(&daily).await, None);

    // Weeks begin on Mondays, and days where the zone says.
    let weekly = scene.keeper.once("weekly", 7 * DAY);
    assert_eq!(work(&weekly).await, Some(1));
    let in_zone = scene
        .keeper
        .once("in a zone", DAY)
        .time_zone("Pacific/Kiritimati");
    assert_eq!(work(&in_zone).await, Some(1));
    assert_eq!(work(&in_zone).await, None);
    let rows = "(SELECT bool_and(bucket = CASE name WHEN 'weekly' THEN date_trunc('week', ran_at AT TIME ZONE 'UTC') \
                ELSE date_trunc('day', ran_at AT TIME ZONE 'Pacific/Kiritimati') END) \
                FROM public.lockkeeper_once WHERE name IN ('weekly', 'in a zone'))";
    assert!(scene.is_true(rows).await);
    let brief = scene.keeper.once("brief", Duration::from_millis(1500));
    assert_eq!(work(&brief).await, Some(1));
    assert_eq!(scene.count("run").await, 5);
    scene.nothing_left().await;
}

#[tokio::test]
async fn or_a_period_after_the_last_run() {
    let scene = scene().await;
    let hourly = scene.keeper.once("hourly", HOUR).since_last_run();
    assert_eq!(work(&hourly).await, Some(1));
    assert_eq!(work(&hourly).await, None);
    // Another bucket of the calendar, and not another hour.
    earlier(&scene, "59 minutes").await;
    assert_eq!(work(&hourly).await, None);
    earlier(&scene, "1 minute").await;
    assert_eq!(work(&hourly).await, Some(1));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_processes_one_runs_it() {
    let scene = scene().await;
    let processes: Vec<Keeper> = (0..4).map(|_| process(&scene)).collect();
    for round in 0..5 {
        let ran = Arc::new(AtomicU32::new(0));
        let tasks: Vec<_> = (0..12)
            .map(|n| {
                let once = processes[n % 4].once(format!("round {round}"), DAY);
                // Some wait for the others.
                let once = if n % 3 == 0 { once.wait(ENDLESS) } else { once };
                let ran = Arc::clone(&ran);
                tokio::spawn(async move {
                    let result = once.run(async |tx| {
                        // The first one fails, which does not count.
                        if ran.fetch_add(1, Ordering::Relaxed) == 0 {
                            tx.execute("INSERT INTO run VALUES (0)", &[]).await?;
                            return Err(Error::from(
                                tx.batch_execute("SELECT 1/0").await.unwrap_err(),
                            ));
                        }
                        tx.execute("INSERT INTO run VALUES (1)", &[]).await?;
                        Ok(())
                    });
                    result.await
                })
            })
            .collect();
        let mut failed = 0;
        for task in tasks {
            failed += u32::from(in_time("a run", task).await.unwrap().is_err());
        }
        assert_eq!(failed, 1);
        // The waiting ones see to it.
        assert_eq!(ran.load(Ordering::Relaxed), 2);
        assert_eq!(scene.count("run").await, round + 1);
    }
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_run_under_way_is_waited_for_where_that_is_asked_for() {
    let scene = scene().await;
    let other = process(&scene);
    let running = scene.keeper.once("k", DAY);
    let ran = running.run(async |tx| {
        assert_eq!(work(&other.once("k", DAY)).await, None);
        let short = other.once("k", DAY).wait(Duration::from_millis(30));
        let error = short.run(async |_| Ok::<_, Error>(())).await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "\"lockkeeper once\"/\"k\"");
        tx.execute("INSERT INTO run VALUES (1)", &[]).await?;
        Ok::<_, Error>(())
    });
    assert_eq!(ran.await.unwrap(), Some(()));
    let long = other.once("k", DAY).wait(ENDLESS);
    earlier(&scene, "1 day").await;
    let holder = scene.holder(("lockkeeper once", "k")).await;
    let mut waiting = Box::pin(work(&long));
    assert!(is_pending(&mut waiting).await);
    drop(holder);
    assert_eq!(in_time("the wait", waiting).await, Some(1));
    scene.nothing_left().await;
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let scene = Scene::new(2).await;
    let role = format!("once_{}", scene.database.name());
    scene.run(&format!("CREATE ROLE {role} LOGIN")).await;
    let restricted = Keeper::new(scene.database.pool_as(&role, 2));
    let once = restricted.once("k", DAY);
    let run = async |once: &Once| {
        once.clone()
            .run(async |_| Ok::<_, Error>(()))
            .await
            .unwrap_err()
    };
    let error = run(&once).await;
    let text = "there is no \"public\".\"lockkeeper_once\"; call set_up() of keeper.once(…)";
    assert_error(&error, ErrorKind::Database, text);
    scene.run(&once.sql().unwrap()).await;
    scene.run(&once.sql().unwrap()).await;
    let error = run(&once).await;
    let text = "GRANT SELECT, INSERT, UPDATE ON \"public\".\"lockkeeper_once\"";
    assert_error(&error, ErrorKind::Database, text);
    // It is there.
    once.set_up().await.unwrap();
    scene
        .run(&format!(
            "GRANT SELECT, INSERT, UPDATE ON lockkeeper_once TO {role}"
        ))
        .await;
    assert_eq!(
        once.clone()
            .run(async |_| Ok::<_, Error>(()))
            .await
            .unwrap(),
        Some(())
    );
    let error = run(&restricted.once("l", DAY).time_zone("Europe/Nowhere")).await;
    assert_error(&error, ErrorKind::Database, "(SQLSTATE 22023)");
    let text = "the server has no time zone \"Europe/Nowhere\"";
    assert_error(&error, ErrorKind::Database, text);
    for (once, text) in [
        (restricted.once("k\0", DAY), "NUL"),
        (
            restricted.once("k", Duration::ZERO),
            "between 1 ms and 68 years",
        ),
        (
            restricted.once("k", Duration::MAX),
            "between 1 ms and 68 years",
        ),
        (restricted.once("k", HOUR).time_zone("UTC"), "whole days"),
        (
            restricted.once("k", DAY).time_zone("UTC").since_last_run(),
            "since the last run",
        ),
    ] {
        assert_error(&run(&once).await, ErrorKind::Config, text);
    }
    scene.nothing_left().await;
    scene
        .run(&format!("DROP OWNED BY {0}; DROP ROLE {0}", quoted(&role)))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_it_has_run_or_has_not() {
    let scene = scene().await;
    for polls in 0.. {
        let once = scene.keeper.once(format!("after {polls} polls"), DAY);
        let completed = poll_times_and_drop(work(&once), polls).await.is_some();
        scene.nothing_left().await;
        let recorded = scene
            .count(&format!(
                "public.lockkeeper_once WHERE name = 'after {polls} polls'"
            ))
            .await;
        assert_eq!(scene.count("run").await, recorded, "after {polls} polls");
        scene.run("TRUNCATE run").await;
        if completed {
            assert_eq!(recorded, 1);
            break;
        }
    }
}
