//! What is to be done after a commit is done once, in order, after a commit, and not otherwise.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use lockkeeper::{ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    AppError, Fault, Proxy, Random, Scene, assert_error_in, poll_times_and_drop, raise,
};

/// What hooks have done, in their order.
#[derive(Clone, Default)]
struct Done(Arc<Mutex<Vec<i32>>>);

impl Done {
    /// A hook that leaves a number.
    fn hook(&self, number: i32) -> impl FnOnce() + Send + 'static {
        let done = self.clone();
        move || done.0.lock().unwrap().push(number)
    }

    fn take(&self) -> Vec<i32> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A scene with a table `t (n, id)`; `n` counts the insertions.
async fn rows(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene
        .observer
        .batch_execute("CREATE TABLE t (n serial, id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        .await
        .unwrap();
    scene
}

/// The rows in the order they were inserted.
async fn inserted(scene: &Scene) -> Vec<i32> {
    let rows = scene.observer.query("SELECT id FROM t ORDER BY n", &[]);
    rows.await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// A row, and a hook of the same number.
async fn insert(tx: &mut Tx, id: i32, done: &Done) -> Result<(), AppError> {
    tx.execute("INSERT INTO t (id) VALUES ($1)", &[&id]).await?;
    tx.after_commit(done.hook(id));
    Ok(())
}

#[tokio::test]
async fn hooks_run_in_order_once_the_server_has_committed() {
    let scene = rows(1).await;
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION hold(); SELECT pg_advisory_lock(1)",
        )
        .await
        .unwrap();
    let done = Done::default();
    let pool = scene.pool.clone();
    // A watcher without a side connection would ask for one of the pool.
    let keeper = Keeper::builder(pool.clone()).watch(false).build();
    let transaction = keeper.transaction(async |tx| {
        for id in 1..=3 {
            insert(tx, id, &done).await?;
        }
        // By then the connection is free for others.
        let (pool, done) = (pool.clone(), done.clone());
        tx.after_commit(move || {
            let free = pool.status().available;
            done.hook(i32::try_from(free).unwrap() * 100)();
        });
        Ok::<_, AppError>("value")
    });
    let (value, ()) = tokio::join!(transaction, async {
        scene.until_awaited(1).await;
        assert!(done.take().is_empty(), "before COMMIT was answered");
        scene
            .observer
            .batch_execute("SELECT pg_advisory_unlock(1)")
            .await
            .unwrap();
    });
    assert_eq!(value.unwrap(), "value");
    assert_eq!(done.take(), [1, 2, 3, 100]);
    scene.nothing_left().await;
}

#[tokio::test]
async fn hooks_do_not_run_where_nothing_was_committed() {
    let scene = rows(1).await;
    let done = Done::default();
    for way in ["error", "server", "swallowed", "commit", "panic", "retried"] {
        let options = TransactionOptions::new().attempts(2);
        let transaction = scene.keeper.transaction_with(options, async |tx| {
            insert(tx, 1, &done).await?;
            match way {
                "error" => return Err(AppError::Own(1)),
                "server" => tx.batch_execute("SELECT 1/0").await?,
                "swallowed" => drop(tx.batch_execute("SELECT 1/0").await),
                "commit" => insert(tx, 1, &done).await?,
                "retried" => tx.batch_execute(&raise("40001")).await?,
                _ => assert!(tx.backend_pid().is_none(), "on purpose"),
            }
            Ok(())
        });
        let answer = AssertUnwindSafe(transaction).catch_unwind().await;
        assert!(!matches!(answer, Ok(Ok(()))), "{way}");
        assert!(done.take().is_empty(), "{way}");
        scene.nothing_left().await;
        assert!(inserted(&scene).await.is_empty(), "{way}");
    }
}

#[tokio::test]
async fn hooks_of_attempts_that_failed_are_not_run() {
    let scene = rows(1).await;
    let done = Done::default();
    let runs = AtomicU32::new(0);
    scene
        .keeper
        .transaction(async |tx| {
            let run = 10 * (1 + runs.fetch_add(1, Ordering::Relaxed).cast_signed());
            insert(tx, run, &done).await?;
            match run {
                10 => tx.batch_execute(&raise("40001")).await?,
                20 => tx.batch_execute(&raise("40P01")).await?,
                _ => {}
            }
            insert(tx, run + 1, &done).await
        })
        .await
        .unwrap();
    assert_eq!(done.take(), [30, 31]);
    assert_eq!(inserted(&scene).await, [30, 31]);
    scene.nothing_left().await;
}

/// Dropped before COMMIT nothing is committed; dropped later it may be, and the hook is not run.
#[tokio::test]
async fn hooks_of_a_dropped_transaction_are_not_run() {
    let scene = rows(1).await;
    let done = Done::default();
    let mut polls = 0;
    loop {
        let transaction = scene
            .keeper
            .transaction(async |tx| insert(tx, 1, &done).await);
        let finished = poll_times_and_drop(transaction, polls).await;
        scene.nothing_left().await;
        let hooks = done.take();
        if finished.is_some() {
            assert_eq!(hooks, [1]);
            break;
        }
        assert!(hooks.is_empty(), "{polls} polls");
        let sql = "TRUNCATE t";
        scene.observer.batch_execute(sql).await.unwrap();
        polls += 1;
    }
    assert!(polls > 3, "only {polls} polls");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_are_not_run_when_the_outcome_is_unknown() {
    let scene = rows(1).await;
    let proxy = Proxy::before(scene.database.server());
    // Nothing but the test's own transactions is to end with COMMIT.
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::builder(pool).watch(false).build();
    let done = Done::default();
    for way in ["transaction", "guard", "session"] {
        proxy.fault("COMMIT", Fault::CutAnswer);
        let error = match way {
            "transaction" => {
                let transaction = keeper.transaction(async |tx| insert(tx, 1, &done).await);
                match transaction.await {
                    Err(AppError::Keeper(error)) => error,
                    other => panic!("{other:?}"),
                }
            }
            "guard" => {
                let mut guard = keeper.advisory_lock("k").acquire().await.unwrap();
                guard
                    .execute("INSERT INTO t (id) VALUES (1)", &[])
                    .await
                    .unwrap();
                guard.after_commit(done.hook(1));
                guard.commit().await.unwrap_err()
            }
            _ => {
                let lock = keeper.advisory_lock("k").session();
                let mut guard = lock.acquire().await.unwrap();
                let transaction = guard.transaction(async |tx| insert(tx, 1, &done).await);
                match transaction.await {
                    Err(AppError::Keeper(error)) => error,
                    other => panic!("{other:?}"),
                }
            }
        };
        assert_error_in(way, &error, ErrorKind::CommitUnknown, "outcome unknown");
        assert!(done.take().is_empty(), "{way}");
        // It was committed.
        assert_eq!(inserted(&scene).await, [1], "{way}");
        scene.observer.batch_execute("TRUNCATE t").await.unwrap();
    }
}

#[tokio::test]
async fn hooks_run_for_every_owner_of_the_transaction() {
    let scene = rows(1).await;
    let done = Done::default();
    let keeper = &scene.keeper;
    keeper
        .with_advisory_lock("k", async |tx| insert(tx, 1, &done).await)
        .await
        .unwrap();
    assert_eq!(done.take(), [1]);
    let tried = keeper.try_with_advisory_lock("k", async |tx| insert(tx, 2, &done).await);
    assert!(tried.await.unwrap().is_some());
    assert_eq!(done.take(), [2]);

    for commits in [true, false] {
        let mut guard = keeper.advisory_lock("k").acquire().await.unwrap();
        guard.after_commit(done.hook(3));
        guard
            .savepoint(async |tx| insert(tx, 4, &done).await)
            .await
            .unwrap();
        if commits {
            guard.commit().await.unwrap();
            assert_eq!(done.take(), [3, 4]);
        } else {
            guard.rollback().await;
            assert!(done.take().is_empty());
        }
        scene.observer.batch_execute("TRUNCATE t").await.unwrap();
    }
    let mut guard = keeper.advisory_lock("k").acquire().await.unwrap();
    guard.after_commit(done.hook(5));
    drop(guard);
    scene.nothing_left().await;
    assert!(done.take().is_empty());

    let lock = keeper.advisory_lock("k").session();
    let mut guard = lock.acquire().await.unwrap();
    for _ in 0..2 {
        let kept = guard.transaction(async |tx| insert(tx, 6, &done).await);
        kept.await.unwrap();
        assert_eq!(done.take(), [6]);
        // The unique constraint is deferred.
        let fails = guard.transaction(async |tx| insert(tx, 6, &done).await);
        assert!(fails.await.is_err());
        let fails = guard.transaction(async |tx| {
            insert(tx, 7, &done).await?;
            Err::<(), _>(AppError::Own(1))
        });
        assert!(fails.await.is_err());
        assert!(done.take().is_empty());
        scene.observer.batch_execute("TRUNCATE t").await.unwrap();
    }
    guard.release().await.unwrap();
    scene.nothing_left().await;
    assert!(done.take().is_empty());
}

/// The transaction has been committed: a hook cannot change that, nor keep others from running.
#[tokio::test]
async fn a_hook_that_panics_does_no_harm() {
    let scene = rows(1).await;
    let done = Done::default();
    let pid = scene
        .keeper
        .transaction(async |tx| {
            insert(tx, 1, &done).await?;
            tx.after_commit(|| panic!("on purpose"));
            insert(tx, 2, &done).await?;
            Ok::<_, AppError>(tx.backend_pid())
        })
        .await
        .unwrap();
    assert_eq!(done.take(), [1, 2]);
    assert_eq!(inserted(&scene).await, [1, 2]);
    let again = scene
        .keeper
        .transaction(async |tx| Ok::<_, AppError>(tx.backend_pid()));
    assert_eq!(again.await.unwrap(), pid, "the connection was thrown away");
    scene.nothing_left().await;
}

/// What is done in a savepoint, and how it ends.
#[derive(Debug)]
enum Step {
    Insert(i32),
    Inside(Vec<Step>, End),
}

#[derive(Clone, Copy, Debug)]
enum End {
    Ok,
    Err,
    /// A statement fails, and its error is swallowed.
    Swallowed,
    Panic,
    /// Dropped after so many polls.
    Dropped(usize),
}

fn steps(random: &mut Random, depth: u32, next: &mut i32) -> Vec<Step> {
    (0..1 + random.below(4))
        .map(|_| {
            if depth == 4 || random.below(2) == 0 {
                *next += 1;
                return Step::Insert(*next);
            }
            let inside = steps(random, depth + 1, next);
            let end = match random.below(9) {
                0..=3 => End::Ok,
                4 => End::Err,
                5 => End::Swallowed,
                6 => End::Panic,
                _ => End::Dropped(usize::try_from(random.below(12)).unwrap()),
            };
            Step::Inside(inside, end)
        })
        .collect()
}

fn act<'a>(tx: &'a mut Tx, steps: &'a [Step], done: &'a Done) -> BoxFuture<'a, ()> {
    Box::pin(async move {
        for step in steps {
            let (inside, end) = match step {
                Step::Insert(id) => {
                    insert(tx, *id, done).await.unwrap();
                    continue;
                }
                Step::Inside(inside, end) => (inside, *end),
            };
            let savepoint = tx.savepoint(async move |tx| {
                act(tx, inside, done).await;
                match end {
                    End::Err => return Err(AppError::Own(1)),
                    End::Swallowed => drop(tx.batch_execute("SELECT 1/0").await),
                    End::Panic => assert!(tx.call_site().is_none(), "on purpose"),
                    End::Ok | End::Dropped(_) => {}
                }
                Ok(())
            });
            match end {
                End::Dropped(polls) => drop(poll_times_and_drop(savepoint, polls).await),
                _ => drop(AssertUnwindSafe(savepoint).catch_unwind().await),
            }
        }
    })
}

/// Whatever becomes of the savepoints: a hook is run for each row that stays, and for no other.
#[tokio::test]
async fn hooks_go_and_stay_with_their_savepoints() {
    let scene = rows(1).await;
    let (mut kept, mut lost) = (0, 0);
    for seed in 0..60 {
        let mut next = 0;
        let plan = steps(&mut Random::new(seed), 0, &mut next);
        let done = Done::default();
        scene
            .keeper
            .transaction(async |tx| {
                act(tx, &plan, &done).await;
                Ok::<_, AppError>(())
            })
            .await
            .unwrap();
        let rows = inserted(&scene).await;
        assert_eq!(done.take(), rows, "{plan:#?}");
        kept += rows.len();
        lost += usize::try_from(next).unwrap() - rows.len();
        scene.observer.batch_execute("TRUNCATE t").await.unwrap();
    }
    assert!(kept > 50 && lost > 50, "{kept} rows kept, {lost} lost");
    scene.nothing_left().await;
}
