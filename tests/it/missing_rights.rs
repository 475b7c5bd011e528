//! A role without SELECT on `pg_locks`, or without EXECUTE on `pg_control_system()`: what can work without them works, and
//! what cannot says which right is missing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::resolver::ResolverPolicy;
use lockkeeper::{Error, ErrorKind, Keeper, RowLock, SettingsFindingKind, TransactionOptions};
use lockkeeper_testkit::{
    Fault, Proxy, Scene, Server, assert_error_in, eventually, in_time, is_pending,
    poll_times_and_drop, quoted,
};
use tokio_postgres::{IsolationLevel, NoTls};

const LOCKS: &str = "REVOKE SELECT ON pg_locks FROM PUBLIC";
const CONTROL: &str = "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC";
const GRANT: &str = "GRANT SELECT ON pg_locks";

/// A scene whose keeper's role lacks rights.
struct Restricted {
    scene: Scene,
    role: String,
}

impl Restricted {
    async fn new(revoked: &[&str], pool_size: usize) -> Self {
        let mut scene = Scene::new(2).await;
        let role = format!("restricted_{}", scene.database.name());
        let sql = format!(
            "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); INSERT INTO t VALUES (1, 0), (2, 0); \
             CREATE ROLE {role} LOGIN NOINHERIT; GRANT ALL ON t TO {role}; {}",
            revoked.join("; ")
        );
        scene.run(&sql).await;
        scene.pool = scene.database.pool_as(&role, pool_size);
        scene.keeper = scene.builder().build();
        Self { scene, role }
    }

    /// Nothing is left, the role included.
    async fn end(self) {
        let Self { scene, role } = self;
        scene.nothing_left().await;
        scene.pool.close();
        scene
            .run(&format!("DROP OWNED BY {0}; DROP ROLE {0}", quoted(&role)))
            .await;
    }
}

/// All combinations of what can be missing.
const COMBINATIONS: [(&str, &[&str]); 4] = [
    ("with both", &[]),
    ("without pg_locks", &[LOCKS]),
    ("without pg_control_system", &[CONTROL]),
    ("without either", &[LOCKS, CONTROL]),
];

async fn count_up(tx: &mut lockkeeper::Tx) -> Result<(), Error> {
    tx.execute("UPDATE t SET n = n + 1 WHERE id = 1", &[])
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_and_sections_work() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 3).await;
        let (scene, keeper) = (&restricted.scene, &restricted.scene.keeper);
        let mut expected = 0;
        // Twice: what a keeper has found out, and what it has prepared, changes what it sends.
        for _ in 0..2 {
            keeper
                .transaction(async |tx| count_up(tx).await)
                .await
                .expect(what);
            let resolving = TransactionOptions::new().resolve_commit();
            keeper
                .transaction_with(resolving, async |tx| count_up(tx).await)
                .await
                .expect(what);
            keeper
                .with_advisory_lock("k", async |tx| count_up(tx).await)
                .await
                .expect(what);
            let tried = keeper
                .try_with_advisory_lock("k", async |tx| count_up(tx).await)
                .await;
            assert_eq!(tried.expect(what), Some(()), "{what}");
            let guard = keeper.advisory_lock("k").acquire().await.expect(what);
            guard
                .execute("UPDATE t SET n = n + 1 WHERE id = 1", &[])
                .await
                .expect(what);
            guard.commit().await.expect(what);
            let snapshot = keeper
                .advisory_lock("k")
                .isolation(IsolationLevel::RepeatableRead);
            snapshot
                .acquire()
                .await
                .expect(what)
                .commit()
                .await
                .expect(what);
            expected += 5;
        }
        assert!(
            scene
                .is_true(&format!("n = {expected} FROM t WHERE id = 1"))
                .await,
            "{what}"
        );
        restricted.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contended_locks_work() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 3).await;
        let (scene, keeper) = (&restricted.scene, &restricted.scene.keeper);
        for session in [false, true] {
            let holder = scene.holder("k").await;
            let busy = if session {
                keeper
                    .advisory_lock("k")
                    .session()
                    .try_acquire()
                    .await
                    .expect(what)
                    .is_none()
            } else {
                keeper
                    .try_with_advisory_lock("k", async |tx| count_up(tx).await)
                    .await
                    .expect(what)
                    .is_none()
            };
            assert!(busy, "{what}");
            let short = keeper.advisory_lock("k").wait(Duration::from_millis(60));
            let error = if session {
                short.session().acquire().await.expect_err(what)
            } else {
                short.acquire().await.expect_err(what)
            };
            assert_timed_out(what, &error, revoked.contains(&LOCKS));
            let waiter = keeper.advisory_lock("k").wait(Duration::from_secs(20));
            let waiter = tokio::spawn(async move {
                if session {
                    waiter.session().acquire().await?.release().await
                } else {
                    waiter.acquire().await?.commit().await
                }
            });
            scene.until_awaited("k").await;
            drop(holder);
            in_time("the waiter", waiter).await.unwrap().expect(what);
        }
        restricted.end().await;
    }
}

/// Who holds the lock is in the error, or why that is not known.
fn assert_timed_out(what: &str, error: &Error, unknown: bool) {
    let text = if unknown { GRANT } else { "after" };
    assert_error_in(what, error, ErrorKind::LockTimeout, text);
    assert_eq!(error.blockers().is_empty(), unknown, "{what}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_guards_work() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 3).await;
        let (scene, keeper) = (&restricted.scene, &restricted.scene.keeper);
        for shared in [false, true] {
            let lock = || {
                let lock = keeper.advisory_locks(["a", "b"]);
                if shared {
                    lock.shared().session()
                } else {
                    lock.session()
                }
            };
            let mut guard = lock().acquire().await.expect(what);
            for resolve in [false, true] {
                let mut options = TransactionOptions::new();
                if resolve {
                    options = options.resolve_commit();
                }
                guard
                    .transaction_with(options, async |tx| count_up(tx).await)
                    .await
                    .expect(what);
                assert_eq!(scene.holders("a").await, scene.holders("b").await, "{what}");
                assert!(scene.is_held("a").await, "{what}");
            }
            guard.release().await.expect(what);
            scene.nothing_but(0).await;
        }
        // One that is lost.
        let guard = keeper
            .advisory_lock("a")
            .session()
            .acquire()
            .await
            .expect(what);
        scene.terminate(guard.backend_pid().unwrap()).await;
        in_time("the loss", guard.loss()).await;
        assert_error_in(
            what,
            &guard.release().await.unwrap_err(),
            ErrorKind::LockLost,
            "\"a\"",
        );
        restricted.end().await;
    }
}

/// The check at COMMIT does not need `pg_locks`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_lost_before_commit_is_found_out() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 2).await;
        let scene = &restricted.scene;
        for taken in [false, true] {
            let mut guard = scene
                .keeper
                .advisory_locks(["a", "b"])
                .session()
                .acquire()
                .await
                .expect(what);
            let other = scene.session().await;
            let key = lockkeeper_testkit::sql_key(&"b".into());
            let error = guard
                .transaction(async |tx| {
                    count_up(tx).await?;
                    tx.batch_execute(&format!("SELECT pg_advisory_unlock({key})"))
                        .await?;
                    if taken {
                        other.run(&format!("SELECT pg_advisory_lock({key})")).await;
                    }
                    Ok::<_, Error>(())
                })
                .await
                .expect_err(what);
            assert_error_in(
                what,
                &error,
                ErrorKind::LockLost,
                "the connection no longer holds it; nothing is committed",
            );
            drop(guard);
            drop(other);
            scene.nothing_left().await;
        }
        assert!(scene.is_true("n = 0 FROM t WHERE id = 1").await, "{what}");
        restricted.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_work() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 2).await;
        let scene = &restricted.scene;
        for _ in 0..2 {
            // Of a keeper that knows nothing yet, too.
            let fresh = scene.builder().build();
            for keeper in [&scene.keeper, &fresh] {
                let guard = keeper
                    .advisory_locks(0..200_i64)
                    .acquire()
                    .await
                    .expect(what);
                scene.nothing_but(200).await;
                guard.commit().await.expect(what);
                let guard = keeper
                    .advisory_locks(0..200_i64)
                    .session()
                    .acquire()
                    .await
                    .expect(what);
                guard.release().await.expect(what);
            }
            let inside = scene.keeper.transaction(async |tx| {
                tx.advisory_locks(0..200_i64).await?;
                count_up(tx).await
            });
            inside.await.expect(what);
        }
        // What no lock table has room for is refused before anything is locked.
        let error = scene
            .keeper
            .advisory_locks(0..100_000_i64)
            .acquire()
            .await
            .expect_err(what);
        assert_error_in(
            what,
            &error,
            ErrorKind::OutOfLocks,
            "100000 locks do not fit",
        );
        restricted.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_inside_a_transaction_work() {
    for (what, revoked) in COMBINATIONS {
        let restricted = Restricted::new(revoked, 2).await;
        let scene = &restricted.scene;
        let holder = scene.holder("busy").await;
        let section = scene.keeper.transaction(async |tx| {
            tx.advisory_lock("a").await?;
            tx.advisory_locks(["b", "c"]).await?;
            for wait in [Duration::ZERO, Duration::from_millis(60)] {
                let error = tx.advisory_lock("busy").wait(wait).await.unwrap_err();
                assert_timed_out(what, &error, revoked.contains(&LOCKS));
            }
            assert!(!tx.advisory_lock("busy").try_acquire().await?);
            tx.lock_rows("t", "id", [2, 1])
                .mode(RowLock::Update)
                .await?;
            // The transaction is still usable.
            count_up(tx).await
        });
        section.await.expect(what);
        drop(holder);
        assert!(scene.is_true("n = 1 FROM t WHERE id = 1").await, "{what}");
        restricted.end().await;
    }
}

/// An abandoned request returns its lock, and its connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_abandoned_is_undone() {
    let restricted = Restricted::new(&[LOCKS, CONTROL], 2).await;
    let scene = &restricted.scene;
    drop(
        scene
            .keeper
            .advisory_lock("k")
            .session()
            .acquire()
            .await
            .unwrap(),
    );
    scene.nothing_left().await;
    let pid = scene.next_pid().await;
    for polls in 1..6 {
        let acquiring = scene.keeper.advisory_lock("k").session().acquire();
        drop(poll_times_and_drop(acquiring, polls).await);
        scene.nothing_left().await;
        let what = "its connection was closed";
        eventually(what, async || scene.next_pid().await == pid).await;
    }
    restricted.end().await;
}

/// On a pool of one connection, too, which is not enough to compare two sessions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_is_enough() {
    let restricted = Restricted::new(&[LOCKS], 1).await;
    let scene = &restricted.scene;
    scene
        .keeper
        .with_advisory_lock("k", async |tx| count_up(tx).await)
        .await
        .unwrap();
    let guard = scene
        .keeper
        .advisory_lock("k")
        .session()
        .acquire()
        .await
        .unwrap();
    guard.release().await.unwrap();
    assert_eq!(scene.pool.status().max_size, 1);
    restricted.end().await;
}

/// Many first calls at once, each of which holds a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_first_calls_works() {
    let restricted = Restricted::new(&[LOCKS], 4).await;
    let keeper = &restricted.scene.keeper;
    let section = |n: i64| {
        let keeper: Keeper = keeper.clone();
        tokio::spawn(async move {
            keeper
                .with_advisory_lock(n, async |tx| count_up(tx).await)
                .await
        })
    };
    for section in (0..16).map(section).collect::<Vec<_>>() {
        in_time("a section", section).await.unwrap().unwrap();
    }
    restricted.end().await;
}

/// A right that is taken away while the section runs: the error names it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_names_the_grant() {
    let restricted = Restricted::new(&[CONTROL], 2).await;
    let scene = &restricted.scene;
    scene
        .run(&format!(
            "GRANT EXECUTE ON FUNCTION pg_control_system() TO {}",
            restricted.role
        ))
        .await;
    let revoke = format!(
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM {}",
        restricted.role
    );
    let resolving = TransactionOptions::new().resolve_commit();
    let error = scene
        .keeper
        .transaction_with(resolving, async |tx| {
            count_up(tx).await?;
            scene.run(&revoke).await;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_error_in(
        "revoked meanwhile",
        &error,
        ErrorKind::Database,
        "(SQLSTATE 42501), for want of GRANT EXECUTE ON FUNCTION pg_control_system()",
    );
    let mut acquiring = Box::pin(scene.keeper.advisory_lock("k").acquire());
    assert!(is_pending(&mut acquiring).await);
    drop(acquiring.await.unwrap());
    restricted.end().await;
}

/// What only `pg_locks` can tell says which right is missing; the rest works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn features_work_or_name_the_grant() {
    let restricted = Restricted::new(&[LOCKS, CONTROL], 3).await;
    let (scene, role) = (&restricted.scene, &restricted.role);
    let database = scene.database.name();
    let sql = format!(
        "ALTER TABLE t OWNER TO {role}; GRANT CREATE ON SCHEMA public TO {role}; \
         GRANT CREATE ON DATABASE {database} TO {role}"
    );
    scene.run(&sql).await;
    let mut side = scene.database.config();
    side.user(role);
    for keeper in [
        scene.builder().build(),
        scene.builder().side_connection(side, NoTls).build(),
    ] {
        let (monitor, schema) = (keeper.monitor(), keeper.schema());
        let resolver = keeper.resolver(ResolverPolicy::new());
        let age = Duration::from_secs(1);
        for (what, answer) in [
            ("snapshot", monitor.snapshot().await.err()),
            ("blocking", monitor.blocking().await.err()),
            ("lock tree", monitor.lock_tree().await.err()),
            ("advisory locks", monitor.advisory_locks().await.err()),
            ("leaks", monitor.leaks(age).await.err()),
            ("health", monitor.health().await.err()),
            ("resolver", resolver.run().await.err()),
            (
                "preflight",
                schema.preflight("ALTER TABLE t ADD y int").await.err(),
            ),
            (
                "dry run",
                schema.dry_run("ALTER TABLE t ADD y int").await.err(),
            ),
            ("index", schema.create_index("t", ["n"]).await.err()),
        ] {
            let error = answer.expect(what);
            let text = format!("(SQLSTATE 42501), for want of {GRANT}");
            assert_error_in(what, &error, ErrorKind::Database, &text);
        }
        monitor.activity().await.unwrap();
        for sql in ["ALTER TABLE t ADD x int", "ALTER TABLE t DROP x"] {
            schema.change(sql).run().await.unwrap();
        }
        schema.drop_index("t_n_idx").run().await.unwrap();
        let once = schema.migrate_once("m", async |_| Ok::<_, Error>(()));
        once.await.unwrap();
        let settings = monitor.settings().await.unwrap();
        let finding = settings.finding(SettingsFindingKind::ReadLocks).unwrap();
        assert_eq!(finding.value(), format!("not to be read by \"{role}\""));
        let grant = format!("GRANT SELECT ON pg_catalog.pg_locks TO \"{role}\"");
        assert_eq!(finding.statement(), Some(&*grant));
    }
    restricted.end().await;
}

/// A COMMIT whose answer is lost is looked up all the same, while the server has not been started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_commit_is_found_out() {
    for side_too in [false, true] {
        let restricted = Restricted::new(&[CONTROL], 2).await;
        let (scene, role) = (&restricted.scene, &restricted.role);
        let mut direct = scene.database.config();
        let proxy = Proxy::before(scene.database.server());
        // The role that asks lacks the right, or the one that has committed does, or both.
        let side = {
            let mut side = direct.clone();
            side.user(role);
            side
        };
        if side_too {
            direct.user(role);
        }
        let pool = proxy.pool(&direct, 2);
        let keeper = Keeper::builder(pool.clone())
            .side_connection(side, NoTls)
            .build();
        for (cut, runs) in [(Fault::CutBefore, 2), (Fault::CutAnswer, 1)] {
            proxy.fault("COMMIT", cut);
            let ran = AtomicU32::new(0);
            let resolving = TransactionOptions::new().resolve_commit();
            let answer = keeper.transaction_with(resolving, async |tx| {
                ran.fetch_add(1, Ordering::Relaxed);
                count_up(tx).await
            });
            answer.await.unwrap();
            assert_eq!(ran.load(Ordering::Relaxed), runs, "{side_too}");
        }
        assert!(scene.is_true("n = 2 FROM t WHERE id = 1").await);
        pool.close();
        restricted.end().await;
    }
}

/// After a restart it is not known whether it is the same server, so the outcome stays unknown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_commit_stays_unknown_after_a_restart() {
    let server = tokio::task::block_in_place(|| Server::start(&[]).unwrap());
    let database = server.database().await;
    let observer = database.connect().await;
    let sql = format!(
        "CREATE TABLE t (id int, n int); INSERT INTO t VALUES (1, 0); \
         CREATE ROLE blind LOGIN; GRANT ALL ON t TO blind; {CONTROL}"
    );
    observer.batch_execute(&sql).await.unwrap();
    let mut direct = database.config();
    direct.user("blind");
    let proxy = Proxy::before(&server);
    let keeper = Keeper::new(proxy.pool(&direct, 2));
    proxy.fault("COMMIT", Fault::CutAnswer);
    let resolving = TransactionOptions::new().resolve_commit();
    let section = keeper.transaction_with(resolving, async |tx| {
        count_up(tx).await?;
        // What is asked afterwards has to wait until the server is back.
        proxy.refuse(true);
        Ok::<_, Error>(())
    });
    let (answer, ()) = tokio::join!(section, async {
        eventually("COMMIT is not run", async || {
            let sql = "SELECT n FROM t";
            observer.query_one(sql, &[]).await.unwrap().get::<_, i32>(0) == 1
        })
        .await;
        tokio::task::block_in_place(|| server.restart());
        proxy.refuse(false);
    });
    let error = answer.unwrap_err();
    assert_error_in(
        "restarted",
        &error,
        ErrorKind::CommitUnknown,
        "for want of GRANT EXECUTE ON FUNCTION pg_control_system()",
    );
}

/// A call that is refused names the object, the GRANT, and the option that does without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_call_names_the_object_and_the_grant() {
    let restricted = Restricted::new(
        &[
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "CREATE TABLE secret (id int PRIMARY KEY)",
            "CREATE SCHEMA own",
        ],
        3,
    )
    .await;
    let (scene, keeper) = (&restricted.scene, &restricted.scene.keeper);
    let role = quoted(&restricted.role);
    let migrate = async |schema: &str| {
        let schema = keeper.schema().bookkeeping(schema);
        schema.migrate_once("m", async |_| Ok::<_, Error>(())).await
    };
    let refused = async |schema: &str, parts: &[&str]| {
        let error = migrate(schema).await.expect_err(schema);
        assert_error_in(schema, &error, ErrorKind::Database, "SQLSTATE 42501");
        for part in parts {
            assert_error_in(schema, &error, ErrorKind::Database, part);
        }
    };
    let create = [
        "lockkeeper_migration",
        "GRANT CREATE ON SCHEMA \"public\"",
        "Schema::bookkeeping",
    ];
    refused("public", &create).await;
    // Each grant leads to the next one that is missing, and the last one to success.
    scene
        .run(&format!("GRANT USAGE ON SCHEMA own TO {role}"))
        .await;
    refused("own", &["GRANT CREATE ON SCHEMA \"own\""]).await;
    let table = "CREATE TABLE own.lockkeeper_migration (key text PRIMARY KEY, \
                 done_at timestamptz NOT NULL DEFAULT now(), done_by text NOT NULL)";
    scene.run(table).await;
    let use_it = ["GRANT SELECT, INSERT ON", "Schema::bookkeeping"];
    refused("own", &use_it).await;
    scene
        .run(&format!(
            "GRANT SELECT ON own.lockkeeper_migration TO {role}"
        ))
        .await;
    refused("own", &use_it).await;
    scene
        .run(&format!(
            "GRANT INSERT ON own.lockkeeper_migration TO {role}"
        ))
        .await;
    assert_eq!(migrate("own").await.unwrap(), Some(()));
    let error = keeper
        .transaction(async |tx| {
            tx.lock_rows("secret", "id", [1]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_error_in(
        "lock_rows",
        &error,
        ErrorKind::Database,
        "GRANT SELECT, UPDATE ON",
    );
    let error = keeper
        .transaction(async |tx| {
            tx.execute("SELECT * FROM secret", &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    let named = "for want of a right on table secret (GRANT SELECT";
    assert_error_in("statement", &error, ErrorKind::Database, named);
    restricted.end().await;
}
