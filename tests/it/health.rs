//! The numbers of `Monitor::health`, against scenes that are known.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lockkeeper::graph::BackendId;
use lockkeeper::{Health, Keeper, LockKey, Monitor, ObservedValue};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Running, Scene, Server, Session, connect, eventually, pid_of,
    poll_times_and_drop,
};
use tokio_postgres::{Client, NoTls};

/// A server of one's own, where all numbers are known.
struct Alone {
    scene: Scene,
    monitor: Monitor,
}

impl Alone {
    async fn new(settings: &[(&str, &str)]) -> Self {
        // What it locks now and then would be counted.
        let settings = [settings, &[("autovacuum", "off")]].concat();
        let server = tokio::task::block_in_place(|| Server::start(&settings).unwrap());
        let scene = Scene::on(&server, 2).await;
        let monitor = scene.monitor();
        Self { scene, monitor }
    }

    async fn session(&self) -> Session {
        self.scene.session().await
    }

    async fn run(&self, sql: &str) {
        self.scene.observer.batch_execute(sql).await.unwrap();
    }

    /// Begins something that waits for a lock, and returns when it does.
    async fn waits(&self, session: &Session, sql: &str) -> Running {
        session.start_waiting(&self.scene.observer, sql).await
    }
}

/// A monitor of a role, over a side connection. Its pool is of the same role: a question that the side connection does not
/// answer in time is asked there.
fn monitor_as(scene: &Scene, role: &str) -> Monitor {
    let mut config = scene.database.config();
    config.user(role);
    let keeper = Keeper::builder(scene.database.pool_as(role, 2))
        .side_connection(config, NoTls)
        .build();
    keeper.monitor()
}

fn invalid(health: &Health) -> Vec<String> {
    let indexes = health.invalid_indexes().known().unwrap();
    assert_eq!(indexes.count(), indexes.first().len());
    indexes.first().iter().map(ToString::to_string).collect()
}

/// Leaves an INVALID index behind.
async fn fail_to_build(client: &Client, index: &str, table: &str) {
    let sql = format!("CREATE UNIQUE INDEX CONCURRENTLY {index} ON {table} (v)");
    let failed = client.batch_execute(&sql).await;
    let code = failed.as_ref().err().and_then(tokio_postgres::Error::code);
    assert_eq!(code.map(|code| code.code()), Some("23505"), "{failed:?}");
}

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, 1 FROM generate_series(1, 9) n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiet_server_is_healthy() {
    let alone = Alone::new(&[("max_connections", "50")]).await;
    let health = alone.monitor.health().await.unwrap();
    assert_eq!((health.lock_waiters(), health.longest_wait()), (0, None));
    assert_eq!((health.root_blockers(), health.cycles()), (&[][..], 0));
    assert_eq!(health.hidden_sessions(), 0);
    assert_eq!(health.oldest_transaction(), &ObservedValue::Known(None));
    assert_eq!(
        health.oldest_idle_in_transaction(),
        &ObservedValue::Known(None)
    );
    let deadlocks = health.deadlocks().unwrap();
    assert_eq!(deadlocks.count(), 0);
    let prepared = health.prepared_transactions();
    assert_eq!((prepared.count(), prepared.oldest()), (0, None));
    assert_eq!(invalid(&health), [""; 0]);
    assert_eq!(health.advisory_locks_held(), 0);
    assert_eq!(health.database(), alone.scene.database.name());
    // 50 clients, 8 workers, 5 walsenders, 3 autovacuum workers and their launcher, 20 prepared transactions.
    let processes = if alone.scene.database.server().major() < 18 {
        50 + 8 + 5 + 3 + 1 + 20
    } else {
        50 + 8 + 5 + 16 + 1 + 20
    };
    assert_eq!(health.lock_table().capacity(), 64 * processes);
    assert!(health.lock_table().fill() < 0.01, "{}", health.lock_table());
    let text = health.to_string();
    assert!(
        text.starts_with("nobody waits for a lock\noldest transaction: none\n"),
        "{text}"
    );
    assert!(
        text.ends_with("0 prepared transactions\n0 INVALID indexes\n"),
        "{text}"
    );

    // What is reset is told.
    alone.run("SELECT pg_stat_reset()").await;
    let before = SystemTime::now() - Duration::from_secs(60);
    eventually("no time of the reset", async || {
        let health = alone.monitor.health().await.unwrap();
        health
            .deadlocks()
            .unwrap()
            .since()
            .is_some_and(|since| since > before)
    })
    .await;
    // What is not counted is unknown, not 0.
    alone.run("ALTER SYSTEM SET track_counts = off").await;
    alone.run("SELECT pg_reload_conf()").await;
    eventually("deadlocks are still counted", async || {
        alone.monitor.health().await.unwrap().deadlocks().is_none()
    })
    .await;
    let text = alone.monitor.health().await.unwrap().to_string();
    assert!(text.contains("deadlocks not counted"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_is_told_in_numbers() {
    let alone = Alone::new(&[("deadlock_timeout", "10min")]).await;
    alone.run(TABLE).await;
    let root = alone.session().await;
    root.run("BEGIN; UPDATE t SET v = v WHERE id = 1").await;
    let second = alone.session().await;
    second.run("BEGIN; UPDATE t SET v = v WHERE id = 2").await;
    let mut waiting = vec![
        alone
            .waits(&second, "UPDATE t SET v = v WHERE id = 1")
            .await,
    ];
    let third = alone.session().await;
    waiting.push(alone.waits(&third, "UPDATE t SET v = v WHERE id = 2").await);
    let other = alone.session().await;
    other.run("SELECT pg_advisory_lock(1)").await;
    let fourth = alone.session().await;
    waiting.push(alone.waits(&fourth, "SELECT pg_advisory_lock(1)").await);

    let health = alone.monitor.health().await.unwrap();
    assert_eq!((health.lock_waiters(), health.cycles()), (3, 0));
    let longest = health.longest_wait().unwrap();
    assert!(
        longest > Duration::ZERO && longest < GIVE_UP_AFTER,
        "{longest:?}"
    );
    let roots = [
        (BackendId::Pid(root.pid), 2),
        (BackendId::Pid(other.pid), 1),
    ];
    assert_eq!(health.root_blockers(), roots);
    // Not the sessions that wait, though theirs is a transaction too, nor that of this sample.
    let oldest = health.oldest_transaction().known().unwrap();
    assert_eq!(oldest.as_ref().unwrap().pid(), Some(root.pid));
    let idle = health.oldest_idle_in_transaction().known().unwrap();
    assert_eq!(idle.as_ref().unwrap().pid(), Some(root.pid));
    assert!(idle.as_ref().unwrap().state_age().unwrap() < GIVE_UP_AFTER);
    // Held, not awaited.
    assert_eq!(health.advisory_locks_held(), 1);
    let text = health.to_string();
    let blockers = format!(
        "; root blockers: pid {} (blocks 2), pid {} (blocks 1)\n",
        root.pid, other.pid
    );
    assert!(
        text.starts_with("3 sessions waiting for a lock, the longest for ")
            && text.contains(&blockers),
        "{text}"
    );
    assert_eq!(health.snapshot().roots().len(), 2);

    // A cycle has no root, and is not to be overlooked for that.
    waiting.push(alone.waits(&root, "UPDATE t SET v = v WHERE id = 2").await);
    let health = alone.monitor.health().await.unwrap();
    assert_eq!((health.lock_waiters(), health.cycles()), (4, 1));
    assert_eq!(health.root_blockers(), &roots[1..]);
    assert_eq!(
        health.oldest_idle_in_transaction(),
        &ObservedValue::Known(None)
    );
    for waiting in waiting {
        waiting.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlocks_and_prepared_transactions_are_counted() {
    let alone = Alone::new(&[("deadlock_timeout", "10ms")]).await;
    alone.run(TABLE).await;
    let a = alone.session().await;
    let b = alone.session().await;
    for (client, id) in [(&a, 1), (&b, 2)] {
        // The other one notices.
        client
            .run(&format!(
                "SET deadlock_timeout = '{id}0s'; BEGIN; UPDATE t SET v = v WHERE id = {id}"
            ))
            .await;
    }
    b.run("SET deadlock_timeout = '10ms'").await;
    let waiting = alone.waits(&a, "UPDATE t SET v = v WHERE id = 2").await;
    b.start("UPDATE t SET v = v WHERE id = 1")
        .await
        .unwrap()
        .unwrap_err();
    b.run("ROLLBACK").await;
    waiting.await.unwrap().unwrap();
    // The backend reports its statistics when it is idle.
    eventually("the deadlock is not counted", async || {
        let health = alone.monitor.health().await.unwrap();
        health.deadlocks().unwrap().count() == 1
    })
    .await;
    a.run("PREPARE TRANSACTION 'one'").await;
    b.run("BEGIN; UPDATE t SET v = v WHERE id = 9; PREPARE TRANSACTION 'two'")
        .await;
    let health = alone.monitor.health().await.unwrap();
    let prepared = health.prepared_transactions();
    assert_eq!(prepared.count(), 2);
    assert!(prepared.oldest().unwrap() < GIVE_UP_AFTER);
    // They are no session's.
    assert_eq!(health.oldest_transaction(), &ObservedValue::Known(None));
    let text = health.to_string();
    assert!(
        text.contains("\n2 prepared transactions, the oldest for "),
        "{text}"
    );
    assert!(text.contains(": 1 deadlock "), "{text}");
    // In another database it is the same server's, but not the same database's.
    let elsewhere = alone.scene.database.server().database().await;
    let other = Keeper::builder(elsewhere.pool(2))
        .side_connection(elsewhere.config(), NoTls)
        .build();
    let health = other.monitor().health().await.unwrap();
    assert_eq!(health.database(), elsewhere.name());
    assert_eq!(health.deadlocks().unwrap().count(), 0);
    assert_eq!(health.prepared_transactions().count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_table_counts_objects_that_are_in_it() {
    let alone = Alone::new(&[]).await;
    alone.run(TABLE).await;
    let before = alone.monitor.health().await.unwrap().lock_table().entries();
    let a = alone.session().await;
    let b = alone.session().await;
    // On the fast path, and predicate locks.
    a.run("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM t WHERE id = 1")
        .await;
    let locks = "SELECT pg_advisory_lock_shared(n) FROM generate_series(1, 300) n";
    for client in [&a, &b] {
        client.run(locks).await;
    }
    let health = alone.monitor.health().await.unwrap();
    assert_eq!(health.lock_table().entries(), before + 300);
    assert_eq!(health.advisory_locks_held(), 600);
    let text = health.lock_table().to_string();
    assert!(
        text.starts_with(&format!("lock table: {} of ", before + 300)),
        "{text}"
    );
}

#[tokio::test]
async fn invalid_indexes_are_named_unless_a_session_works_on_them() {
    let scene = Scene::new(2).await;
    let observer = &scene.observer;
    let monitor = scene.monitor();
    let sql = r#"CREATE SCHEMA "Odd ""schema"; CREATE TABLE "Odd ""schema".t (v int);
                 INSERT INTO "Odd ""schema".t VALUES (1), (1); CREATE TABLE empty (v int)"#;
    observer.batch_execute(sql).await.unwrap();
    observer.batch_execute(TABLE).await.unwrap();
    fail_to_build(observer, "plain", "t").await;
    fail_to_build(observer, r#""It's ""one""""#, r#""Odd ""schema".t"#).await;
    let left = [r#""Odd ""schema"."It's ""one""""#, "public.plain"];
    assert_eq!(invalid(&monitor.health().await.unwrap()), left);
    let text = monitor.health().await.unwrap().to_string();
    assert!(
        text.contains(r#"2 INVALID indexes: "Odd ""schema"."It's ""one""", public.plain"#),
        "{text}"
    );
    // On a search path without that schema, or with something planted on it, the same.
    let role = format!("builder_{}", scene.database.name());
    let sql = format!(
        "CREATE ROLE {role} LOGIN; ALTER TABLE t OWNER TO {role}; ALTER TABLE empty OWNER TO {role}; GRANT ALL ON SCHEMA public TO {role}"
    );
    observer.batch_execute(&sql).await.unwrap();
    let stranger = monitor_as(&scene, &role);
    assert_eq!(invalid(&stranger.health().await.unwrap()), left);

    // What waits for an old transaction in the middle of its work.
    let old = scene.database.connect().await;
    let old_pid = pid_of(&old).await;
    for work in [
        "CREATE INDEX CONCURRENTLY built ON t (v)",
        "REINDEX INDEX CONCURRENTLY t_pkey",
        "REINDEX TABLE CONCURRENTLY t",
        "DROP INDEX CONCURRENTLY done",
    ] {
        observer
            .batch_execute("CREATE INDEX IF NOT EXISTS done ON t (v)")
            .await
            .unwrap();
        // A writer holds up the first phase, a reader with a snapshot the others.
        for keeps in [
            "BEGIN; UPDATE t SET v = v WHERE id = 1",
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM empty",
            "BEGIN; SELECT FROM t",
        ] {
            old.batch_execute(keeps).await.unwrap();
            let worker = Arc::new(scene.database.connect().await);
            let pid = pid_of(&worker).await;
            let building = {
                let worker = Arc::clone(&worker);
                tokio::spawn(async move { worker.batch_execute(work).await })
            };
            // Either it waits for the old transaction, or that is not in its way.
            eventually("it neither waits nor ends", async || {
                let sql = "SELECT $2 = ANY (pg_blocking_pids($1))";
                let row = observer.query_one(sql, &[&pid, &old_pid]).await.unwrap();
                row.get(0) || building.is_finished()
            })
            .await;
            let health = monitor.health().await.unwrap();
            assert_eq!(invalid(&health), left, "{work} after {keeps}");
            // Hidden from a role without privileges, it is left open whether `plain`, on the same table, is its work.
            let health = stranger.health().await.unwrap();
            match health.invalid_indexes() {
                ObservedValue::Known(_) => {
                    assert_eq!(invalid(&health), left, "{work} after {keeps}")
                }
                ObservedValue::AtLeast(indexes) => {
                    assert!(
                        work.starts_with("CREATE") || work.starts_with("REINDEX"),
                        "{work}"
                    );
                    assert_eq!(indexes.count(), 1, "{indexes}");
                    assert_eq!(indexes.first()[0].to_string(), left[0]);
                    assert!(health.to_string().contains("at least 1 INVALID index: "));
                }
                reading => panic!("{reading:?}"),
            }
            old.batch_execute("ROLLBACK").await.unwrap();
            building.await.unwrap().unwrap();
            let clean = "DROP INDEX IF EXISTS built; CREATE INDEX IF NOT EXISTS done ON t (v)";
            observer.batch_execute(clean).await.unwrap();
        }
    }
    drop(stranger);
    let sql = format!("REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}");
    observer.batch_execute(&sql).await.unwrap();
    eventually("the role is still in use", async || {
        observer
            .batch_execute(&format!("DROP ROLE {role}"))
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test]
async fn many_invalid_indexes_are_counted_and_some_named() {
    let scene = Scene::new(2).await;
    scene.observer.batch_execute(TABLE).await.unwrap();
    for at in 0..23 {
        fail_to_build(&scene.observer, &format!("i{at:02}"), "t").await;
    }
    // One that waits for its partitions' is none that costs anything, but not VALID either.
    let sql = "CREATE TABLE p (v int) PARTITION BY LIST (v); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
               CREATE INDEX a_parent ON ONLY p (v)";
    scene.observer.batch_execute(sql).await.unwrap();
    let health = scene.keeper.monitor().health().await.unwrap();
    let indexes = health.invalid_indexes().known().unwrap();
    assert_eq!((indexes.count(), indexes.first().len()), (24, 20));
    assert_eq!(
        (indexes.first()[0].name(), indexes.first()[0].kind()),
        (Some("a_parent"), Some('I'))
    );
    assert_eq!(indexes.first()[19].name(), Some("i18"));
    assert!(indexes.to_string().ends_with("public.i18, …"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_role_may_not_see_is_unknown_and_never_nothing() {
    // A server of its own: other tests would see the session that is hidden.
    let alone = Alone::new(&[]).await;
    let scene = &alone.scene;
    let role = format!("stranger_{}", scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN");
    scene.observer.batch_execute(&create).await.unwrap();
    let open = scene.database.connect().await;
    open.batch_execute("BEGIN; SELECT pg_advisory_xact_lock(7)")
        .await
        .unwrap();
    let waiter = scene.session().await;
    let waiting = alone
        .waits(&waiter, "SELECT pg_advisory_xact_lock(7)")
        .await;

    let mut config = scene.database.config();
    config.user(&role);
    let monitor = monitor_as(scene, &role);
    let health = monitor.health().await.unwrap();
    assert!(health.hidden_sessions() >= 2);
    assert_eq!(health.oldest_transaction(), &ObservedValue::Hidden);
    assert_eq!(health.oldest_idle_in_transaction(), &ObservedValue::Hidden);
    // What every role may see.
    assert!(health.lock_waiters() >= 1 && health.longest_wait().is_some());
    let blocker = BackendId::Pid(pid_of_holder(scene).await);
    assert!(health.root_blockers().contains(&(blocker, 1)));
    assert_eq!(health.advisory_locks_held(), 1);
    assert!(health.deadlocks().is_some());
    let text = health.to_string();
    assert!(
        text.contains("oldest transaction: unknown, ") && !text.contains("none"),
        "{text}"
    );

    // Its own it sees, and that there may be others.
    let own = connect(&config).await;
    own.batch_execute("BEGIN").await.unwrap();
    let own_pid = pid_of(&own).await;
    let health = monitor.health().await.unwrap();
    for reading in [
        health.oldest_transaction(),
        health.oldest_idle_in_transaction(),
    ] {
        let ObservedValue::AtLeast(Some(backend)) = reading else {
            panic!("{reading:?}");
        };
        assert_eq!((backend.pid(), reading.is_known()), (Some(own_pid), false));
    }
    assert!(
        health
            .to_string()
            .contains(" sessions hidden from this role\n")
    );
    drop(own);

    let grant = format!("GRANT pg_read_all_stats TO {role}");
    scene.observer.batch_execute(&grant).await.unwrap();
    let health = monitor.health().await.unwrap();
    assert_eq!(health.hidden_sessions(), 0);
    assert!(health.oldest_transaction().known().unwrap().is_some());

    // One that does not tell is not seen by anybody.
    let silent = scene.database.connect().await;
    silent
        .batch_execute("SET track_activities = off")
        .await
        .unwrap();
    assert_eq!(monitor.health().await.unwrap().hidden_sessions(), 1);
    drop((silent, monitor));
    waiting.abort();
    eventually("the role is still in use", async || {
        scene
            .observer
            .batch_execute(&format!("DROP ROLE {role}"))
            .await
            .is_ok()
    })
    .await;
}

async fn pid_of_holder(scene: &Scene) -> i32 {
    scene.holders(LockKey::from(7_i64)).await[0]
}

/// Wherever it is dropped, nothing is left of it and the next one is answered.
#[tokio::test]
async fn a_sample_of_health_may_be_dropped_anywhere() {
    for side in [false, true] {
        let scene = Scene::new(1).await;
        let monitor = if side {
            scene.monitor()
        } else {
            scene.keeper.monitor()
        };
        for polls in 0.. {
            assert!(polls < 100, "a sample has no end");
            let health = poll_times_and_drop(monitor.health(), polls).await;
            let settings = poll_times_and_drop(monitor.settings(), polls).await;
            // What was dropped gives the pool's only connection back in the background.
            scene.pool_is_whole_within(GIVE_UP_AFTER).await;
            monitor.health().await.unwrap();
            monitor.settings().await.unwrap();
            if let (Some(health), Some(settings)) = (health, settings) {
                health.unwrap();
                settings.unwrap();
                break;
            }
        }
        scene.nothing_left().await;
    }
}

/// Every few seconds for ever, so it has to be cheap even in a pile-up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_cheap_in_a_pile_up() {
    let settings = [("max_connections", "300"), ("deadlock_timeout", "10min")];
    let alone = Alone::new(&settings).await;
    let holder = alone.session().await;
    holder.run("BEGIN; SELECT pg_advisory_xact_lock(1)").await;
    let mut waiting = Vec::new();
    for _ in 0..200 {
        let client = alone.session().await;
        waiting.push(client.start("SELECT pg_advisory_xact_lock(1)"));
    }
    eventually("not all of them wait", async || {
        alone.monitor.health().await.unwrap().lock_waiters() == 200
    })
    .await;
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        let health = alone.monitor.health().await.unwrap();
        best = best.min(started.elapsed());
        assert_eq!(health.root_blockers()[0].1, 200);
    }
    assert!(best < Duration::from_secs(5), "{best:?}");
    for waiting in waiting {
        waiting.abort();
    }
}
