//! What a session was set to before a lock is what it is set to after it, and while it is held.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{
    AdvisoryLock, Error, ErrorKind, LockKey, SessionAdvisoryLock, TransactionOptions, Tx,
};
use lockkeeper_testkit::{
    Scene, assert_error, assert_error_in, eventually, lock_by_sql, pid_of, poll_times_and_drop,
    unlock_by_sql,
};
use tokio_postgres::{Client, IsolationLevel, Row};

/// Every setting there is, by name.
type Settings = BTreeMap<String, String>;

const ALL: &str = "SELECT name, setting FROM pg_catalog.pg_settings";

fn collected(rows: Vec<Row>) -> Settings {
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn settings_of(client: &Client) -> Settings {
    collected(client.query(ALL, &[]).await.unwrap())
}

/// What differs, as text: name, before, after.
fn difference(before: &Settings, after: &Settings) -> Vec<String> {
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| format!("{name}: {:?} was {:?}", after.get(name), before.get(name)))
        .collect()
}

/// Inside, only the backend's name may be another.
fn assert_as_before(before: &Settings, inside: Settings, what: &str) {
    let name = inside["application_name"].clone();
    assert!(
        name.starts_with("test ") && name.contains("settings.rs:"),
        "{what}: {name:?}"
    );
    let mut inside = inside;
    inside.insert(
        "application_name".into(),
        before["application_name"].clone(),
    );
    assert_eq!(difference(before, &inside), [""; 0], "{what}: inside");
}

/// How an application might have set its sessions: `lock_timeout`, `statement_timeout`, `application_name`, isolation.
const HABITS: [[&str; 4]; 5] = [
    ["1234ms", "7s", "plain", "read committed"],
    ["7s", "2min", "it''s an app", "repeatable read"],
    ["0", "0", "", "serializable"],
    ["2min", "1234ms", "a \"name\"; --", "read uncommitted"],
    ["1h", "1d", "100% $1 $$", "read committed"],
];

async fn apply(client: &Client, [lock, statement, name, isolation]: [&str; 4]) {
    client
        .batch_execute(&format!(
            "SET lock_timeout = '{lock}'; SET statement_timeout = '{statement}'; SET application_name = '{name}'; \
             SET default_transaction_isolation = '{isolation}'; SET idle_in_transaction_session_timeout = '11min'"
        ))
        .await
        .unwrap();
}

/// Each way to use a lock while another session holds `busy`; returns what the settings were inside, if there was one.
const USES: [&str; 21] = [
    "commit",
    "rollback",
    "drop",
    "section",
    "section error",
    "section aborted",
    "try section busy",
    "transaction",
    "transaction options",
    "timeout",
    "no wait",
    "several timeout",
    "try busy",
    "session release",
    "session drop",
    "session several",
    "session shared",
    "session failed",
    "session timeout",
    "session try busy",
    "session transaction",
];

async fn use_lock(scene: &Scene, way: &str) -> Option<Settings> {
    let keeper = &scene.keeper;
    let free = || keeper.advisory_lock("free");
    let busy = || {
        keeper
            .advisory_lock("busy")
            .wait(Duration::from_millis(650))
    };
    let several = || {
        keeper
            .advisory_locks([LockKey::from("free"), "busy".into(), (1, 2).into()])
            .wait(Duration::from_millis(650))
    };
    let timed_out = |error: Error| {
        assert_error_in(way, &error, ErrorKind::LockTimeout, "holds ExclusiveLock");
        None
    };
    match way {
        "commit" | "rollback" | "drop" => {
            let guard = free().acquire().await.unwrap();
            let inside = collected(guard.query(ALL, &[]).await.unwrap());
            match way {
                "commit" => guard.commit().await.unwrap(),
                "rollback" => guard.rollback().await,
                _ => drop(guard),
            }
            Some(inside)
        }
        "section" => keeper
            .with_advisory_lock("free", async |tx| {
                Ok::<_, Error>(Some(collected(tx.query(ALL, &[]).await?)))
            })
            .await
            .unwrap(),
        "section error" => {
            let result = keeper.with_advisory_lock("free", async |tx| {
                tx.query("SELECT 1/0", &[]).await?;
                Ok::<_, Error>(())
            });
            result.await.unwrap_err();
            None
        }
        "section aborted" => {
            let result = keeper.with_advisory_lock("free", async |tx| {
                drop(tx.query("SELECT 1/0", &[]).await);
                Ok::<_, Error>(())
            });
            result.await.unwrap_err();
            None
        }
        "try section busy" => {
            let ran = keeper.try_with_advisory_lock("busy", async |_| Ok::<_, Error>(()));
            assert_eq!(ran.await.unwrap(), None);
            None
        }
        "transaction" => keeper
            .transaction(async |tx| Ok::<_, Error>(Some(collected(tx.query(ALL, &[]).await?))))
            .await
            .unwrap(),
        "transaction options" => {
            let options = TransactionOptions::new()
                .isolation(IsolationLevel::Serializable)
                .read_only(true)
                .deferrable(true)
                .lock_timeout(Duration::from_millis(77))
                .statement_timeout(Duration::from_millis(7777))
                .idle_timeout(Duration::from_secs(7));
            let inside = keeper
                .transaction_with(options, async |tx| {
                    Ok::<_, Error>(collected(tx.query(ALL, &[]).await?))
                })
                .await
                .unwrap();
            assert_eq!(inside["lock_timeout"], "77");
            assert_eq!(inside["statement_timeout"], "7777");
            assert_eq!(inside["transaction_isolation"], "serializable");
            assert_eq!(inside["transaction_deferrable"], "on");
            assert_eq!(inside["idle_in_transaction_session_timeout"], "7000");
            None
        }
        "timeout" => timed_out(busy().acquire().await.unwrap_err()),
        "no wait" => timed_out(busy().wait(Duration::ZERO).acquire().await.unwrap_err()),
        "several timeout" => timed_out(several().acquire().await.unwrap_err()),
        "try busy" => {
            assert!(busy().try_acquire().await.unwrap().is_none());
            assert!(several().try_acquire().await.unwrap().is_none());
            None
        }
        "session release" | "session drop" | "session several" | "session shared"
        | "session failed" => {
            let lock = match way {
                "session several" => keeper.advisory_locks(["free", "another"]).session(),
                "session shared" => free().shared().session(),
                _ => free().session(),
            };
            let guard = lock.acquire().await.unwrap();
            let inside = collected(guard.query(ALL, &[]).await.unwrap());
            match way {
                "session drop" | "session several" => drop(guard),
                "session failed" => {
                    guard.batch_execute("BEGIN; SELECT 1").await.unwrap();
                    guard.query("SELECT 1/0", &[]).await.unwrap_err();
                    guard.release().await.unwrap();
                }
                _ => guard.release().await.unwrap(),
            }
            Some(inside)
        }
        "session timeout" => {
            timed_out(busy().session().acquire().await.unwrap_err());
            timed_out(
                busy()
                    .wait(Duration::ZERO)
                    .session()
                    .acquire()
                    .await
                    .unwrap_err(),
            );
            timed_out(several().session().acquire().await.unwrap_err())
        }
        "session try busy" => {
            assert!(busy().session().try_acquire().await.unwrap().is_none());
            assert!(several().session().try_acquire().await.unwrap().is_none());
            None
        }
        "session transaction" => {
            let mut guard = free().session().acquire().await.unwrap();
            let inside = guard
                .transaction(async |tx| Ok::<_, Error>(collected(tx.query(ALL, &[]).await?)))
                .await
                .unwrap();
            let failed = guard.transaction(async |tx| {
                tx.query("SELECT 1/0", &[]).await?;
                Ok::<_, Error>(())
            });
            failed.await.unwrap_err();
            guard.release().await.unwrap();
            Some(inside)
        }
        _ => unreachable!("{way}"),
    }
}

#[tokio::test]
async fn settings_of_a_session_are_the_same_inside_and_after_every_use() {
    let scene = Scene::new(1).await;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "busy").await;
    for habits in HABITS {
        let object = scene.pool.get().await.unwrap();
        apply(&object, habits).await;
        let pid = pid_of(&object).await;
        let before = settings_of(&object).await;
        assert_eq!(before["application_name"], habits[2].replace("''", "'"));
        drop(object);
        for way in USES {
            let what = format!("{way} with {habits:?}");
            if let Some(inside) = use_lock(&scene, way).await {
                assert_as_before(&before, inside, &what);
            }
            let object = scene.pool.get().await.unwrap();
            assert_eq!(pid_of(&object).await, pid, "{what}: the connection is kept");
            let after = settings_of(&object).await;
            assert_eq!(difference(&before, &after), [""; 0], "{what}: after");
        }
    }
    drop(holder);
    scene.nothing_left().await;
}

/// A lock that had to be waited for leaves no trace of how it was waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_the_same_inside_when_the_lock_was_waited_for() {
    let scene = Scene::new(1).await;
    let holder = scene.database.connect().await;
    for habits in HABITS {
        let object = scene.pool.get().await.unwrap();
        apply(&object, habits).await;
        let pid = pid_of(&object).await;
        let before = settings_of(&object).await;
        drop(object);
        for way in [
            "guard",
            "several",
            "section",
            "session",
            "several session",
            "in a transaction",
            "several in one",
        ] {
            if way.contains("in ") && !habits[3].starts_with("read ") {
                continue;
            }
            let what = format!("{way} with {habits:?}");
            let keys = || [LockKey::from("busy"), 1.into(), (1, 2).into()];
            for key in keys() {
                lock_by_sql(&holder, key).await;
            }
            let keeper = scene.keeper.clone();
            let waiting = async {
                let wait = Duration::from_secs(20);
                match way {
                    "guard" | "several" => {
                        let lock = match way {
                            "several" => keeper.advisory_locks(keys()),
                            _ => keeper.advisory_lock("busy"),
                        };
                        let guard = lock.wait(wait).acquire().await.unwrap();
                        let inside = collected(guard.query(ALL, &[]).await.unwrap());
                        guard.commit().await.unwrap();
                        inside
                    }
                    "session" | "several session" => {
                        let lock = match way {
                            "several session" => keeper.advisory_locks(keys()),
                            _ => keeper.advisory_lock("busy"),
                        };
                        let guard = lock.session().wait(wait).acquire().await.unwrap();
                        let inside = collected(guard.query(ALL, &[]).await.unwrap());
                        guard.release().await.unwrap();
                        inside
                    }
                    "section" => keeper
                        .with_advisory_lock("busy", async |tx| {
                            Ok::<_, Error>(collected(tx.query(ALL, &[]).await?))
                        })
                        .await
                        .unwrap(),
                    _ => keeper
                        .transaction(async |tx: &mut Tx| {
                            let lock = match way {
                                "several in one" => tx.advisory_locks(keys()),
                                _ => tx.advisory_lock("busy"),
                            };
                            lock.wait(wait).await?;
                            Ok::<_, Error>(collected(tx.query(ALL, &[]).await?))
                        })
                        .await
                        .unwrap(),
                }
            };
            let releasing = async {
                // One after another, each when it is waited for.
                let mut keys = keys().to_vec();
                keys.sort();
                for key in keys {
                    if way.starts_with("several") || key == LockKey::from("busy") {
                        eventually("no waiter", async || scene.waiters(&key).await == [pid]).await;
                    }
                    unlock_by_sql(&holder, key).await;
                }
            };
            let (inside, ()) = tokio::join!(waiting, releasing);
            assert_as_before(&before, inside, &what);
            let object = scene.pool.get().await.unwrap();
            assert_eq!(pid_of(&object).await, pid, "{what}: the connection is kept");
            assert_eq!(
                difference(&before, &settings_of(&object).await),
                [""; 0],
                "{what}: after"
            );
        }
    }
    scene.nothing_left().await;
}

/// Settings that the transaction itself has changed before it took one more lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_more_lock_keeps_what_the_transaction_has_set() {
    let scene = Scene::new(1).await;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "busy").await;
    let before = settings_of(&scene.pool.get().await.unwrap()).await;
    let options = TransactionOptions::new().statement_timeout(Duration::from_millis(1500));
    let in_vain = AtomicBool::new(false);
    let section = scene.keeper.transaction_with(options, async |tx| {
        tx.batch_execute("SET LOCAL lock_timeout = '33s'; SET LOCAL work_mem = '5MB'")
            .await?;
        let inside = collected(tx.query(ALL, &[]).await?);
        assert_eq!(
            (&*inside["statement_timeout"], &*inside["lock_timeout"]),
            ("1500", "33000")
        );
        // Neither the transaction's lock_timeout nor its statement_timeout ends the wait.
        let began = Instant::now();
        let error = tx
            .advisory_lock("busy")
            .wait(Duration::from_secs(2))
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""busy" after"#);
        assert!(began.elapsed() >= Duration::from_secs(2));
        assert_eq!(
            difference(&inside, &collected(tx.query(ALL, &[]).await?)),
            [""; 0]
        );
        assert!(!tx.advisory_lock("busy").try_acquire().await?);
        tx.advisory_lock("busy")
            .wait(Duration::ZERO)
            .await
            .unwrap_err();
        assert_eq!(
            difference(&inside, &collected(tx.query(ALL, &[]).await?)),
            [""; 0]
        );

        in_vain.store(true, Ordering::Relaxed);
        tx.advisory_lock("busy")
            .wait(Duration::from_secs(20))
            .await?;
        assert_eq!(
            difference(&inside, &collected(tx.query(ALL, &[]).await?)),
            [""; 0]
        );
        Ok::<_, Error>(())
    });
    let release = async {
        eventually("no waiter", async || {
            in_vain.load(Ordering::Relaxed) && !scene.waiters("busy").await.is_empty()
        })
        .await;
        let longer_than_the_timeout = Duration::from_millis(1800);
        scene
            .until_awaited_for(longer_than_the_timeout, "busy")
            .await;
        unlock_by_sql(&holder, "busy").await;
    };
    let (done, ()) = tokio::join!(section, release);
    done.unwrap();
    let after = settings_of(&scene.pool.get().await.unwrap()).await;
    assert_eq!(difference(&before, &after), [""; 0]);
    scene.nothing_left().await;
}

/// Polls so many times and drops, and does not wait for the polls of a long wait.
async fn given_up<F: Future>(future: F, polls: usize) {
    let polled = poll_times_and_drop(future, polls);
    drop(tokio::time::timeout(Duration::from_millis(100), polled).await);
}

/// A cancelled wait closes its connection or gives it back as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_the_same_after_every_cancellation() {
    const POLLS: [usize; 9] = [0, 1, 2, 3, 4, 5, 6, 8, 12];
    let scene = Scene::new(1).await;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "busy").await;
    // What every session starts with, and what one was set to since.
    scene
        .observer
        .batch_execute(&format!(
            "ALTER DATABASE {0} SET lock_timeout = '4321ms'; ALTER DATABASE {0} SET statement_timeout = '3min'; \
             ALTER DATABASE {0} SET application_name = 'of the database'",
            scene.database.name()
        ))
        .await
        .unwrap();
    let fresh = settings_of(&scene.database.connect().await).await;
    assert_eq!(fresh["lock_timeout"], "4321");
    let mut known: Option<(i32, Settings)> = None;
    let mut replaced = 0;
    for key in ["free", "busy"] {
        for way in [
            "guard",
            "try",
            "section",
            "session",
            "session try",
            "in a transaction",
            "snapshot",
            "several",
        ] {
            for polls in POLLS {
                {
                    // A connection that was not seen before is as the server makes it; then it is set.
                    let object = scene.pool.get().await.unwrap();
                    let pid = pid_of(&object).await;
                    if known.as_ref().is_none_or(|(known, _)| *known != pid) {
                        let before = settings_of(&object).await;
                        assert_eq!(
                            difference(&fresh, &before),
                            [""; 0],
                            "{way} {key} {polls}: new"
                        );
                        apply(&object, HABITS[0]).await;
                        known = Some((pid, settings_of(&object).await));
                        replaced += 1;
                    }
                }
                let keeper = &scene.keeper;
                let lock = keeper.advisory_lock(key);
                match way {
                    "guard" => given_up(lock.acquire(), polls).await,
                    "try" => given_up(lock.try_acquire(), polls).await,
                    "session" => given_up(lock.session().acquire(), polls).await,
                    "session try" => given_up(lock.session().try_acquire(), polls).await,
                    "snapshot" => {
                        let lock = lock.isolation(IsolationLevel::Serializable);
                        given_up(lock.acquire(), polls).await;
                    }
                    "several" => {
                        let lock = keeper.advisory_locks([key, "another"]).session();
                        given_up(lock.acquire(), polls).await;
                    }
                    "section" => {
                        let section = keeper.with_advisory_lock(key, async |tx| {
                            tx.query("SELECT 1", &[]).await?;
                            Ok::<_, Error>(())
                        });
                        given_up(section, polls).await;
                    }
                    _ => {
                        let section = keeper.transaction(async |tx| tx.advisory_lock(key).await);
                        given_up(section, polls).await;
                    }
                }
                let what = format!("{way} {key} {polls}");
                let object = scene.pool.get().await.unwrap();
                let pid = pid_of(&object).await;
                let (known_pid, set) = known.as_ref().unwrap();
                let expected = if pid == *known_pid { set } else { &fresh };
                assert_eq!(
                    difference(expected, &settings_of(&object).await),
                    [""; 0],
                    "{what}"
                );
            }
        }
    }
    assert!(replaced > 1, "no wait was cancelled");
    drop(holder);
    scene.nothing_left().await;
}

/// The server writes some characters of a name as `\xNN`, and keeps a backslash as it is.
#[tokio::test]
async fn an_application_name_with_a_backslash_comes_back_as_it_was() {
    let scene = Scene::new(1).await;
    for name in [r"C:\jobs", r"back\", r"\'quote", "zoë"] {
        let object = scene.pool.get().await.unwrap();
        object
            .execute("SELECT set_config('application_name', $1, false)", &[&name])
            .await
            .unwrap();
        let before = settings_of(&object).await;
        let pid = pid_of(&object).await;
        drop(object);
        for way in ["release", "drop", "tried in vain"] {
            let lock = scene.keeper.advisory_lock("k").session();
            match way {
                "release" => lock.acquire().await.unwrap().release().await.unwrap(),
                "drop" => drop(lock.acquire().await.unwrap()),
                _ => drop(poll_times_and_drop(lock.acquire(), 2).await),
            }
            let object = scene.pool.get().await.unwrap();
            assert_eq!(
                difference(&before, &settings_of(&object).await),
                [""; 0],
                "{name} {way}"
            );
            assert_eq!(
                pid_of(&object).await,
                pid,
                "{name} {way}: the connection is kept"
            );
        }
    }
    scene.nothing_left().await;
}

enum Lock {
    Xact(AdvisoryLock),
    Session(SessionAdvisoryLock),
}

impl Lock {
    /// Takes the lock, and returns it at once.
    async fn take(self) -> Result<(), Error> {
        match self {
            Self::Xact(lock) => lock.acquire().await?.rollback().await,
            Self::Session(lock) => lock.acquire().await?.release().await?,
        }
        Ok(())
    }
}

/// Keys with `busy` among them, waited for in every way.
fn every_lock(scene: &Scene, wait: Duration) -> Vec<(&'static str, Lock)> {
    let one = || scene.keeper.advisory_lock("busy").wait(wait);
    let several = || {
        let keys = [LockKey::from("busy"), i64::MIN.into(), (i32::MAX, 1).into()];
        scene.keeper.advisory_locks(keys).wait(wait)
    };
    vec![
        ("one", Lock::Xact(one())),
        ("several", Lock::Xact(several())),
        ("shared", Lock::Xact(one().shared())),
        ("session", Lock::Session(one().session())),
        ("several session", Lock::Session(several().session())),
        (
            "snapshot",
            Lock::Xact(one().isolation(IsolationLevel::RepeatableRead)),
        ),
        (
            "several snapshot",
            Lock::Xact(several().isolation(IsolationLevel::Serializable)),
        ),
    ]
}

async fn limit_statements_of_the_role(scene: &Scene, lock_timeout: &str, statement_timeout: &str) {
    scene
        .observer
        .batch_execute(&format!(
            "ALTER ROLE CURRENT_USER IN DATABASE {0} SET lock_timeout = '{lock_timeout}'; \
             ALTER ROLE CURRENT_USER IN DATABASE {0} SET statement_timeout = '{statement_timeout}'",
            scene.database.name()
        ))
        .await
        .unwrap();
}

/// The wait asked for is the wait, whatever the role's own timeouts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timeouts_of_the_role_do_not_end_a_wait() {
    const WAIT: Duration = Duration::from_secs(2);
    let scene = Scene::new(2).await;
    // Shorter than the wait; room for a small statement on a slow machine.
    limit_statements_of_the_role(&scene, "60ms", "400ms").await;
    assert_eq!(scene.show("statement_timeout").await, "400ms");
    lock_by_sql(&scene.observer, "busy").await;
    for (way, lock) in every_lock(&scene, WAIT) {
        let began = Instant::now();
        let error = lock.take().await.expect_err(way);
        let took = began.elapsed();
        assert_error_in(
            format_args!("{way} after {took:?}"),
            &error,
            ErrorKind::LockTimeout,
            "holds ExclusiveLock",
        );
        assert!(took >= WAIT && took < WAIT * 2, "{way}: {took:?}");
        assert_eq!(scene.advisory_locks().await, 1, "{way}");
    }
    let began = Instant::now();
    let section = scene.keeper.transaction(async |tx| {
        let error = tx.advisory_lock("busy").wait(WAIT).await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""busy" after"#);
        tx.query_one("SELECT 1", &[]).await?;
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    assert!(began.elapsed() >= WAIT && began.elapsed() < WAIT * 2);
    unlock_by_sql(&scene.observer, "busy").await;
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_is_granted_after_a_wait_longer_than_the_roles_timeouts() {
    let scene = Scene::new(2).await;
    limit_statements_of_the_role(&scene, "60ms", "400ms").await;
    let holder = scene.database.connect().await;
    for (way, lock) in every_lock(&scene, Duration::from_secs(20)) {
        lock_by_sql(&holder, "busy").await;
        let release = async {
            scene
                .until_awaited_for(Duration::from_millis(1200), "busy")
                .await;
            unlock_by_sql(&holder, "busy").await;
        };
        let (taken, ()) = tokio::join!(lock.take(), release);
        taken.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        scene.nothing_left().await;
    }
}

/// Several keys are waited for in one statement, however long that takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_several_keys_is_not_ended_by_the_roles_statement_timeout() {
    const WAIT: Duration = Duration::from_millis(4500);
    let scene = Scene::new(2).await;
    limit_statements_of_the_role(&scene, "0", "750ms").await;
    let (first, second) = (
        scene.database.connect().await,
        scene.database.connect().await,
    );
    lock_by_sql(&second, 2).await;
    for round in 0..8 {
        lock_by_sql(&first, 1).await;
        let lock = scene.keeper.advisory_locks([1, 2, 3]).wait(WAIT);
        let release = async {
            // Before and after the role's timeout.
            let time = Duration::from_millis(450 + 185 * round);
            scene.until_awaited_for(time, 1).await;
            unlock_by_sql(&first, 1).await;
        };
        let (result, ()) = tokio::join!(lock.acquire(), release);
        let error = result.unwrap_err();
        assert_error_in(
            format_args!("round {round}"),
            &error,
            ErrorKind::LockTimeout,
            "1: and 2 more after",
        );
    }
    drop((first, second));
    scene.nothing_left().await;
}
