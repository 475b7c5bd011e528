//! Every future may be dropped at every point: soon afterwards nothing is held or awaited, the next borrower of the
//! connection is not delayed, and all of the pool can be had.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use futures::future::{BoxFuture, FutureExt, join_all};
use futures::{SinkExt, StreamExt, TryStreamExt};
use lockkeeper::{Error, ErrorKind, Keeper, SessionGuard, TransactionOptions, Tx, XactGuard};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Proxy, Random, Scene, Server, eventually_within,
    poll_times_and_drop,
};
use tokio_postgres::IsolationLevel;

/// What the calls ask for, and what is held by somebody else in a busy scene.
const KEY: i64 = 71;
/// Free in every scene; sorted before and after [`KEY`].
const BEFORE: i64 = 70;
const AFTER: i64 = 72;

/// More polls than any call needs.
const MOST_POLLS: usize = 300;

type Call = fn(Keeper) -> BoxFuture<'static, Result<(), Error>>;

/// Every asynchronous public function, whole lives of guards included. The wait is the keeper's.
const CALLS: &[(&str, Call)] = &[
    ("acquire", |keeper| {
        async move { keeper.advisory_lock(KEY).acquire().await.map(drop) }.boxed()
    }),
    ("try_acquire", |keeper| {
        async move { keeper.advisory_lock(KEY).try_acquire().await.map(drop) }.boxed()
    }),
    ("shared acquire", |keeper| {
        async move { keeper.advisory_lock(KEY).shared().acquire().await.map(drop) }.boxed()
    }),
    ("session acquire", |keeper| {
        async move {
            keeper
                .advisory_lock(KEY)
                .session()
                .acquire()
                .await
                .map(drop)
        }
        .boxed()
    }),
    ("session try_acquire", |keeper| {
        async move {
            let lock = keeper.advisory_lock(KEY).session();
            lock.try_acquire().await.map(drop)
        }
        .boxed()
    }),
    ("shared session acquire", |keeper| {
        async move {
            let lock = keeper.advisory_lock(KEY).session().shared();
            lock.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("several acquire", |keeper| {
        async move {
            let locks = keeper.advisory_locks([AFTER, KEY, BEFORE]);
            locks.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("several try_acquire", |keeper| {
        async move {
            let locks = keeper.advisory_locks([AFTER, KEY, BEFORE]);
            locks.try_acquire().await.map(drop)
        }
        .boxed()
    }),
    ("several session acquire", |keeper| {
        async move {
            let locks = keeper.advisory_locks([AFTER, KEY, BEFORE]).session();
            locks.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("several session try_acquire", |keeper| {
        async move {
            let locks = keeper.advisory_locks([AFTER, KEY, BEFORE]).session();
            locks.try_acquire().await.map(drop)
        }
        .boxed()
    }),
    ("so many that the lock table is asked first", |keeper| {
        async move {
            let locks = keeper.advisory_locks((0..130).map(|n| KEY + n));
            locks.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("acquire before a snapshot", |keeper| {
        async move {
            let lock = keeper.advisory_lock(KEY);
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await?.commit().await
        }
        .boxed()
    }),
    ("try_acquire before a snapshot", |keeper| {
        async move {
            let locks = keeper.advisory_locks([KEY, AFTER]);
            let locks = locks.isolation(IsolationLevel::Serializable);
            locks.try_acquire().await.map(drop)
        }
        .boxed()
    }),
    ("with_advisory_lock", |keeper| {
        async move {
            let section = keeper.with_advisory_lock(KEY, async |tx| {
                tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                Ok::<_, Error>(())
            });
            section.await
        }
        .boxed()
    }),
    ("try_with_advisory_lock", |keeper| {
        async move {
            let section = keeper.try_with_advisory_lock(KEY, async |tx| {
                tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                Ok::<_, Error>(())
            });
            section.await.map(drop)
        }
        .boxed()
    }),
    ("transaction that takes a lock", |keeper| {
        async move {
            let transaction = keeper.transaction(async |tx| {
                tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                tx.advisory_lock(BEFORE).await?;
                tx.advisory_lock(KEY).await?;
                Ok::<_, Error>(())
            });
            transaction.await
        }
        .boxed()
    }),
    ("transaction_with that takes several locks", |keeper| {
        async move {
            let options = TransactionOptions::new().attempts(2);
            let transaction = keeper.transaction_with(options, async |tx| {
                tx.advisory_locks([AFTER, KEY, BEFORE]).shared().await?;
                Ok::<_, Error>(())
            });
            transaction.await
        }
        .boxed()
    }),
    ("transaction that tries a lock", |keeper| {
        async move {
            let transaction = keeper.transaction(async |tx| {
                tx.advisory_locks([KEY, AFTER]).try_acquire().await?;
                Ok::<_, Error>(())
            });
            transaction.await
        }
        .boxed()
    }),
    ("transaction that fails", |keeper| {
        async move {
            let transaction = keeper.transaction(async |tx| {
                tx.batch_execute("SELECT 1/0").await?;
                Ok::<_, Error>(())
            });
            match transaction.await {
                Err(error) if error.kind() == ErrorKind::Database => Ok(()),
                other => panic!("{other:?}"),
            }
        }
        .boxed()
    }),
    ("lock, work, commit", |keeper| {
        async move {
            let mut guard = keeper.advisory_lock(KEY).acquire().await?;
            work(&guard).await?;
            guard
                .savepoint(async |tx| {
                    tx.advisory_lock(AFTER).await?;
                    tx.batch_execute("SELECT 1").await?;
                    Ok::<_, Error>(())
                })
                .await?;
            guard.advisory_lock(BEFORE).try_acquire().await?;
            guard.commit().await
        }
        .boxed()
    }),
    ("lock, failing savepoint, rollback", |keeper| {
        async move {
            let mut guard = keeper.advisory_lock(KEY).acquire().await?;
            let failed = guard.savepoint(async |tx| {
                tx.batch_execute("SELECT 1/0").await?;
                Ok::<_, Error>(())
            });
            assert!(failed.await.is_err());
            guard.rollback().await;
            Ok(())
        }
        .boxed()
    }),
    ("session lock, transactions, release", |keeper| {
        async move {
            let mut guard = keeper.advisory_lock(KEY).session().acquire().await?;
            guard.batch_execute("SELECT 1").await?;
            guard
                .transaction(async |tx| {
                    tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                    Ok::<_, Error>(())
                })
                .await?;
            let failed = guard.transaction(async |tx| {
                tx.batch_execute("SELECT 1/0").await?;
                Ok::<_, Error>(())
            });
            assert!(failed.await.is_err());
            guard.release().await
        }
        .boxed()
    }),
    (
        "session lock left in a failed transaction, release",
        |keeper| {
            async move {
                let guard = keeper.advisory_lock(KEY).session().acquire().await?;
                assert!(guard.batch_execute("BEGIN; SELECT 1/0").await.is_err());
                guard.release().await
            }
            .boxed()
        },
    ),
    ("session lock, wait for its loss", |keeper| {
        async move {
            let guard = keeper.advisory_lock(KEY).session().acquire().await?;
            tokio::select! {
                () = guard.lost() => panic!("lost"),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            guard.release().await
        }
        .boxed()
    }),
];

/// The query methods, one after another.
async fn work(guard: &XactGuard) -> Result<(), Error> {
    guard.execute("INSERT INTO note VALUES ($1)", &[&2]).await?;
    guard.query("SELECT id FROM note", &[]).await?;
    guard.query_one("SELECT 1", &[]).await?;
    guard.query_opt("SELECT 1 WHERE false", &[]).await?;
    guard.simple_query("SELECT 1").await?;
    let statement = guard.prepare_cached("SELECT $1::int4").await?;
    let rows = guard.query_raw(&statement, [7]).await?;
    rows.try_collect::<Vec<_>>().await?;
    let sink = guard.copy_in("COPY note FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from_static(b"3\n")).await?;
    sink.finish().await?;
    let rows = guard.copy_out("COPY note TO STDOUT").await?;
    rows.try_collect::<Vec<_>>().await?;
    Ok(())
}

async fn with_table(scene: Scene) -> Scene {
    let create = scene.observer.batch_execute("CREATE TABLE note (id int4)");
    create.await.unwrap();
    scene
}

/// A keeper that has seen nothing of its server yet.
fn new_keeper(pool: &Pool, wait: Duration) -> Keeper {
    Keeper::builder(pool.clone())
        .application("test")
        .lock_wait(wait)
        .build()
}

/// All advisory locks of the scene's database: backend and whether it is granted.
async fn locks(scene: &Scene) -> Vec<(i32, bool)> {
    let rows = scene
        .observer
        .query(
            "SELECT pid, granted FROM pg_locks WHERE locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY pid",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Asserts that a call which was dropped (or is over) has left nothing: `holder` alone holds a lock, nobody waits, no
/// transaction is open, the next borrower and all others are served at once.
async fn assert_no_trace(scene: &Scene, holder: Option<i32>, within: Duration, what: &str) {
    let borrower = async {
        let object = scene.pool.get().await.unwrap();
        if let Err(error) = object.batch_execute("SELECT 1").await {
            panic!("{what}: the next borrower gets {error:?}");
        }
    };
    if tokio::time::timeout(within, borrower).await.is_err() {
        panic!("{what}: the next borrower is delayed");
    }
    let expected: Vec<_> = holder.iter().map(|&pid| (pid, true)).collect();
    let complaint = format!("{what}: there is more in pg_locks than should be");
    eventually_within(within, &complaint, async || locks(scene).await == expected).await;
    let complaint = format!("{what}: a transaction is left open");
    eventually_within(within, &complaint, async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND pid <> pg_backend_pid() AND xact_start IS NOT NULL";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    let whole = scene.pool_is_whole_within(within);
    if std::panic::AssertUnwindSafe(whole)
        .catch_unwind()
        .await
        .is_err()
    {
        panic!("{what}: the pool is not whole");
    }
}

/// Polls a call 0, 1, 2, … times until it completes with an outcome that is `expected`.
async fn drop_at_every_poll(
    scene: &Scene,
    (name, call): (&str, Call),
    keeper: impl Fn() -> Keeper,
    holder: Option<i32>,
    within: Duration,
    expected: impl Fn(&Result<(), Error>) -> bool,
) {
    for polls in 0..MOST_POLLS {
        let outcome = poll_times_and_drop(call(keeper()), polls).await;
        let what = format!("{name}, dropped after {polls} polls");
        assert_no_trace(scene, holder, within, &what).await;
        if let Some(outcome) = outcome {
            assert!(expected(&outcome), "{name}: {outcome:?}");
            assert!(polls > 0, "{name}: done without being polled");
            return;
        }
    }
    panic!("{name}: not done after {MOST_POLLS} polls");
}

/// What the scenes end with, a few of them at a time: each has connections of its own, and the server is shared.
async fn few_at_a_time<F: Future>(scenes: impl Iterator<Item = F>) -> Vec<F::Output> {
    futures::stream::iter(scenes).buffered(6).collect().await
}

/// Busy is `None`, `false` or a timeout.
fn is_busy(outcome: &Result<(), Error>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::LockTimeout,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_find_the_lock_free_leave_nothing_wherever_they_are_dropped() {
    let scene = with_table(Scene::new(1).await).await;
    let known = new_keeper(&scene.pool, Duration::from_secs(10));
    for &call in CALLS {
        let unknown = || new_keeper(&scene.pool, Duration::from_secs(10));
        drop_at_every_poll(
            &scene,
            call,
            unknown,
            None,
            CLEANED_UP_WITHIN,
            Result::is_ok,
        )
        .await;
        let known = || known.clone();
        drop_at_every_poll(&scene, call, known, None, CLEANED_UP_WITHIN, Result::is_ok).await;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_find_the_lock_busy_leave_nothing_wherever_they_are_dropped() {
    let scene = with_table(Scene::new(1).await).await;
    let holder = scene.holder(KEY).await;
    let wait = Duration::from_millis(15);
    let known = new_keeper(&scene.pool, wait);
    for &call in CALLS {
        let unknown = || new_keeper(&scene.pool, wait);
        drop_at_every_poll(
            &scene,
            call,
            unknown,
            Some(holder.pid),
            CLEANED_UP_WITHIN,
            is_busy,
        )
        .await;
        let known = || known.clone();
        drop_at_every_poll(
            &scene,
            call,
            known,
            Some(holder.pid),
            CLEANED_UP_WITHIN,
            is_busy,
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_waits_leave_the_queue_when_they_are_dropped() {
    let scenes = CALLS.iter().map(|&(name, call)| async move {
        let scene = with_table(Scene::new(1).await).await;
        let holder = scene.holder(KEY).await;
        let waits = !["try", "tries", "fails"]
            .iter()
            .any(|word| name.contains(word));
        let (mut took, mut calm) = (Vec::new(), Vec::new());
        for after in [0, 15, 100, 600, 1200] {
            let keeper = new_keeper(&scene.pool, ENDLESS);
            let call = tokio::spawn(call(keeper));
            if after > 0 {
                tokio::time::sleep(Duration::from_millis(after)).await;
            } else if waits {
                let waits = async || !scene.waiters(KEY).await.is_empty();
                eventually_within(CLEANED_UP_WITHIN, &format!("{name} does not wait"), waits).await;
            }
            call.abort();
            let dropped = Instant::now();
            let what = format!("{name}, aborted after {after} ms");
            assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
            took.push(dropped.elapsed());
            // What looking alone takes.
            let looked = Instant::now();
            assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
            calm.push(looked.elapsed());
        }
        (took, calm)
    });
    let (took, calm): (Vec<Vec<Duration>>, Vec<Vec<Duration>>) =
        few_at_a_time(scenes).await.into_iter().unzip();
    let median = |times: Vec<Vec<Duration>>| {
        let mut times = times.concat();
        times.sort();
        times[times.len() / 2]
    };
    let (took, calm) = (median(took), median(calm));
    assert!(
        took < Duration::from_secs(1) + 2 * calm,
        "half of the calls took longer than {took:?} to end, where {calm:?} is what looking takes"
    );
}

/// With the server's places taken by two waiters of the same keeper, the third stands in the line of the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_in_the_line_of_the_process_leave_nothing_wherever_they_are_dropped() {
    let scene = with_table(Scene::new(4).await).await;
    let holder = scene.holder(KEY).await;
    let keeper = new_keeper(&scene.pool, Duration::from_millis(15));
    let crowd: Vec<_> = (0..2)
        .map(|_| {
            let lock = keeper.advisory_lock(KEY).wait(ENDLESS);
            tokio::spawn(async move {
                let guard = lock.acquire().await.unwrap();
                guard.rollback().await;
            })
        })
        .collect();
    let two_wait = async || scene.waiters(KEY).await.len() == 2;
    eventually_within(CLEANED_UP_WITHIN, "the crowd does not wait", &two_wait).await;
    for &(name, call) in CALLS {
        for polls in 0..MOST_POLLS {
            let outcome = poll_times_and_drop(call(keeper.clone()), polls).await;
            let what = format!("{name}, dropped after {polls} polls");
            let complaint = format!("{what}: somebody else waits or holds");
            eventually_within(CLEANED_UP_WITHIN, &complaint, async || {
                // Between two slices a waiter is neither here nor there.
                let locks = locks(&scene).await;
                let held: Vec<_> = locks.iter().filter(|(_, granted)| *granted).collect();
                held == [&(holder.pid, true)] && locks.len() == 3
            })
            .await;
            let spare = async {
                let first = scene.pool.get().await.unwrap();
                let second = scene.pool.get().await.unwrap();
                first.batch_execute("SELECT 1").await.unwrap();
                second.batch_execute("SELECT 1").await.unwrap();
            };
            let spare = tokio::time::timeout(CLEANED_UP_WITHIN, spare).await;
            assert!(spare.is_ok(), "{what}: the next borrower is delayed");
            if let Some(outcome) = outcome {
                assert!(is_busy(&outcome), "{name}: {outcome:?}");
                break;
            }
        }
    }
    drop(holder);
    for waiter in crowd {
        let waiter = tokio::time::timeout(CLEANED_UP_WITHIN, waiter).await;
        waiter.expect("a waiter is stuck").unwrap();
    }
    scene.nothing_left().await;
}

/// Messages are in flight for 10 ms each way, so that drops meet them there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_over_a_slow_network_leave_nothing_wherever_they_are_dropped() {
    let latency = Duration::from_millis(10);
    let within = CLEANED_UP_WITHIN + 20 * latency;
    let scenes = CALLS.iter().map(|&call| async move {
        let mut scene = with_table(Scene::new(1).await).await;
        let proxy = Proxy::before(scene.database.server());
        proxy.delay(latency);
        scene.pool = proxy.pool(&scene.database.config(), 1);
        let keeper = || new_keeper(&scene.pool, Duration::from_secs(10));
        drop_at_every_poll(&scene, call, keeper, None, within, Result::is_ok).await;
        let holder = scene.holder(KEY).await;
        let keeper = || new_keeper(&scene.pool, Duration::from_millis(30));
        drop_at_every_poll(&scene, call, keeper, Some(holder.pid), within, is_busy).await;
    });
    few_at_a_time(scenes).await;
}

/// The same at moments between the polls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_over_a_slow_network_leave_nothing_whenever_they_are_dropped() {
    let latency = Duration::from_millis(10);
    let within = CLEANED_UP_WITHIN + 20 * latency;
    let scenes = CALLS
        .iter()
        .zip(1..)
        .map(|(&(name, call), seed)| async move {
            let mut scene = with_table(Scene::new(2).await).await;
            let proxy = Proxy::before(scene.database.server());
            proxy.delay(latency);
            scene.pool = proxy.pool(&scene.database.config(), 2);
            let keeper = new_keeper(&scene.pool, Duration::from_secs(10));
            let mut dice = Random::new(seed);
            for _ in 0..15 {
                let after = dice.duration(Duration::from_millis(200));
                drop(tokio::time::timeout(after, call(keeper.clone())).await);
                let what = format!("{name}, dropped after {after:?}");
                assert_no_trace(&scene, None, within, &what).await;
            }
        });
    few_at_a_time(scenes).await;
}

/// What is done with an open guard and dropped half-way, before the guard itself ends.
type OnXactGuard = for<'a> fn(&'a mut XactGuard) -> BoxFuture<'a, Result<(), Error>>;

const ON_XACT_GUARDS: &[(&str, OnXactGuard)] = &[
    ("all query methods", |guard| work(guard).boxed()),
    ("a slow statement", |guard| {
        async move { Ok(guard.batch_execute("SELECT pg_sleep(0.02)").await?) }.boxed()
    }),
    ("a slow statement that is prepared", |guard| {
        async move {
            guard.execute("SELECT pg_sleep(0.02)", &[]).await?;
            Ok(())
        }
        .boxed()
    }),
    ("a stream of rows", |guard| {
        async move {
            let sql = "SELECT repeat('x', 1000) FROM generate_series(1, 3000)";
            let rows = guard.query_raw(sql, Vec::<i32>::new()).await?;
            let mut rows = std::pin::pin!(rows);
            while let Some(row) = rows.next().await {
                row?;
                // At a poll of its own.
                tokio::task::yield_now().await;
                if rows.rows_affected().is_none() && rows.as_mut().next().await.is_some() {
                    return Ok(());
                }
            }
            Ok(())
        }
        .boxed()
    }),
    ("a savepoint", |guard| {
        guard
            .savepoint(async |tx| {
                tx.advisory_lock(AFTER).await?;
                tx.batch_execute("SELECT pg_sleep(0.001)").await?;
                Ok(())
            })
            .boxed()
    }),
    ("a savepoint in a failing savepoint", |guard| {
        async move {
            let outer = guard.savepoint(async |tx| {
                let inner = tx.savepoint(async |tx| {
                    tx.batch_execute("SELECT 1/0").await?;
                    Ok::<_, Error>(())
                });
                inner.await
            });
            assert!(outer.await.is_err());
            Ok(())
        }
        .boxed()
    }),
    ("one more lock", |guard| {
        async move { guard.advisory_lock(BEFORE).await }.boxed()
    }),
    ("more locks, one of them busy", |guard| {
        async move {
            let locks = guard.advisory_locks([BEFORE, KEY]);
            let outcome = locks.wait(Duration::from_millis(15)).await;
            assert!(is_busy(&outcome), "{outcome:?}");
            Ok(())
        }
        .boxed()
    }),
    ("a try of several free locks", |guard| {
        async move {
            assert!(guard.advisory_locks([AFTER, BEFORE]).try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
    ("a try of several locks, the last of them busy", |guard| {
        async move {
            let locks = guard.advisory_locks([KEY, BEFORE]);
            assert!(!locks.try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
    ("a try of a busy lock", |guard| {
        async move {
            assert!(!guard.advisory_lock(KEY).try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
];

async fn notes(scene: &Scene, id: i32) -> i64 {
    let sql = "SELECT count(*) FROM note WHERE id = $1";
    let row = scene.observer.query_one(sql, &[&id]).await.unwrap();
    row.get(0)
}

/// However much of it was dropped, a transaction is applied if commit says so and not if it says otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_outlives_what_is_dropped_in_it_and_ends_as_it_says() {
    let scene = with_table(Scene::new(1).await).await;
    let holder = scene.holder(KEY).await;
    let mut id = 1000;
    let mut committed = 0;
    for &(name, call) in ON_XACT_GUARDS {
        for end in ["drop", "rollback", "commit", "more locks, then commit"] {
            for polls in 0..MOST_POLLS {
                id += 1;
                let what = format!("{name}, dropped after {polls} polls, then {end}");
                let lock = scene.keeper.advisory_lock(("cancel safety", "own"));
                let mut guard = lock.acquire().await.unwrap();
                let insert = format!("INSERT INTO note VALUES ({id})");
                guard.batch_execute(&insert).await.unwrap();
                let outcome = poll_times_and_drop(call(&mut guard), polls).await;
                let mut applied = false;
                match end {
                    "drop" => drop(guard),
                    "rollback" => guard.rollback().await,
                    _ => {
                        if end.starts_with("more")
                            && guard.advisory_locks([BEFORE, AFTER]).await.is_ok()
                        {
                            let own = guard.backend_pid().unwrap();
                            for key in [BEFORE, AFTER] {
                                assert_eq!(
                                    scene.holders(key).await,
                                    [own],
                                    "{what}: {key} is not held"
                                );
                            }
                        }
                        let commit = tokio::time::timeout(CLEANED_UP_WITHIN, guard.commit()).await;
                        applied = match commit {
                            Ok(Ok(())) => true,
                            Ok(Err(error)) if error.kind() == ErrorKind::CommitUnknown => {
                                panic!("{what}: {error:?}")
                            }
                            Ok(Err(_)) => false,
                            Err(_) => panic!("{what}: commit hangs"),
                        };
                        committed += usize::from(applied);
                    }
                }
                assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
                assert_eq!(notes(&scene, id).await, i64::from(applied), "{what}");
                if let Some(outcome) = outcome {
                    assert!(outcome.is_ok(), "{what}: {outcome:?}");
                    assert!(applied || !end.ends_with("commit"), "{what}: not committed");
                    break;
                }
                assert!(polls + 1 < MOST_POLLS, "{what}: not done");
            }
        }
    }
    assert!(committed > ON_XACT_GUARDS.len());
}

type OnSessionGuard = for<'a> fn(&'a mut SessionGuard, i32) -> BoxFuture<'a, Result<(), Error>>;

const ON_SESSION_GUARDS: &[(&str, OnSessionGuard)] = &[
    ("a transaction", |guard, id| {
        guard
            .transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                Ok(())
            })
            .boxed()
    }),
    ("a transaction that returns an error", |guard, id| {
        async move {
            let failed = guard.transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                tx.batch_execute("SELECT 1/0").await?;
                Ok::<_, Error>(())
            });
            assert!(failed.await.is_err());
            Ok(())
        }
        .boxed()
    }),
    (
        "a transaction that takes a lock and has a savepoint",
        |guard, id| {
            guard
                .transaction(async move |tx| {
                    tx.advisory_lock(AFTER).await?;
                    let savepoint = tx.savepoint(async move |tx| {
                        tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                        Ok::<_, Error>(())
                    });
                    savepoint.await
                })
                .boxed()
        },
    ),
    ("a transaction that waits for a busy lock", |guard, id| {
        async move {
            let outcome = guard.transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                tx.advisory_lock(KEY).wait(Duration::from_millis(15)).await
            });
            let outcome: Result<(), Error> = outcome.await;
            assert!(is_busy(&outcome), "{outcome:?}");
            Ok(())
        }
        .boxed()
    }),
    ("statements", |guard, _| {
        async move {
            guard.query("SELECT 1", &[]).await?;
            guard.batch_execute("SELECT pg_sleep(0.01)").await?;
            Ok(())
        }
        .boxed()
    }),
    ("the wait for its loss", |guard, _| {
        async move {
            drop(tokio::time::timeout(Duration::from_millis(5), guard.lost()).await);
            Ok(())
        }
        .boxed()
    }),
];

/// Whatever is dropped on a session guard, the lock stays held until the guard ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_guard_outlives_what_is_dropped_on_it() {
    let scene = with_table(Scene::new(1).await).await;
    let holder = scene.holder(KEY).await;
    let own = ("cancel safety", "own session");
    let mut id = 2000;
    for &(name, call) in ON_SESSION_GUARDS {
        for end in ["drop", "release", "another transaction, then release"] {
            for polls in 0..MOST_POLLS {
                id += 1;
                let what = format!("{name}, dropped after {polls} polls, then {end}");
                let lock = scene.keeper.advisory_lock(own).session();
                let mut guard = lock.acquire().await.unwrap();
                let outcome = poll_times_and_drop(call(&mut guard, id), polls).await;
                assert_eq!(
                    scene.holders(own).await.len(),
                    1,
                    "{what}: not held any more"
                );
                assert!(!guard.is_lost(), "{what}: lost");
                let ending = async {
                    match end {
                        "drop" => drop(guard),
                        "release" => guard
                            .release()
                            .await
                            .unwrap_or_else(|e| panic!("{what}: {e:?}")),
                        _ => {
                            let again = guard.transaction(async move |tx| {
                                tx.execute("INSERT INTO note VALUES ($1)", &[&-id]).await?;
                                Ok::<_, Error>(())
                            });
                            again.await.unwrap_or_else(|e| panic!("{what}: {e:?}"));
                            guard
                                .release()
                                .await
                                .unwrap_or_else(|e| panic!("{what}: {e:?}"));
                        }
                    }
                };
                let ending = tokio::time::timeout(CLEANED_UP_WITHIN, ending).await;
                assert!(ending.is_ok(), "{what}: it hangs");
                assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
                let again = i64::from(end.starts_with("another"));
                assert_eq!(notes(&scene, -id).await, again, "{what}");
                if let Some(outcome) = outcome {
                    assert!(outcome.is_ok(), "{what}: {outcome:?}");
                    break;
                }
                assert!(polls + 1 < MOST_POLLS, "{what}: not done");
            }
        }
    }
}

async fn wait_for_the_busy_key(tx: &mut Tx) -> Result<(), Error> {
    tx.advisory_lock(KEY).await
}

/// Gives up a wait, whose cancel request arrives only after it was granted, and ends the guard it was on.
async fn give_up_and_end(end: &str) {
    let mut scene = Scene::new(1).await;
    let late = Duration::from_millis(400);
    let proxy = Proxy::before(scene.database.server());
    proxy.delay_cancels(late);
    scene.pool = proxy.pool(&scene.database.config(), 1);
    let keeper = new_keeper(&scene.pool, Duration::from_secs(30));
    let holder = scene.holder(KEY).await;
    let waits = async || {
        let waits = async || !scene.waiters(KEY).await.is_empty();
        eventually_within(CLEANED_UP_WITHIN, "nobody waits", waits).await;
    };
    let own = keeper.advisory_lock(AFTER);
    if end == "release" {
        let mut guard = own.session().acquire().await.unwrap();
        tokio::select! {
            biased;
            () = waits() => {}
            _ = guard.transaction(wait_for_the_busy_key) => panic!("granted"),
        }
        drop(holder);
        drop(guard.release().await);
    } else {
        let mut guard = own.acquire().await.unwrap();
        tokio::select! {
            biased;
            () = waits() => {}
            _ = guard.advisory_lock(KEY) => panic!("granted"),
        }
        drop(holder);
        match end {
            "drop" => drop(guard),
            "rollback" => guard.rollback().await,
            _ => drop(guard.commit().await),
        }
    }
    let borrower = scene.pool.get().await.unwrap();
    let sleep = borrower.batch_execute("SELECT pg_sleep(0.8)").await;
    assert!(
        sleep.is_ok(),
        "after {end} the next borrower gets {sleep:?}"
    );
    drop(borrower);
    scene.nothing_left().await;
}

/// A cancel request that is late must not hit whoever has the connection by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_cancel_never_hits_the_next_borrower() {
    join_all(["drop", "rollback", "commit", "release"].map(give_up_and_end)).await;
}

/// Any guard.
enum Held {
    Xact(XactGuard),
    Session(SessionGuard),
}

/// Takes a key in one of several ways, some of which take one more.
async fn take_somehow(keeper: &Keeper, key: i64, way: u64) -> Result<Held, Error> {
    let lock = keeper.advisory_lock(key);
    match way {
        0 | 1 => lock.acquire().await.map(Held::Xact),
        2 | 3 => lock.session().acquire().await.map(Held::Session),
        4 => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Held::Xact)
        }
        5 => {
            let locks = keeper.advisory_locks([key, AFTER]);
            locks.acquire().await.map(Held::Xact)
        }
        6 => {
            let locks = keeper.advisory_locks([key, AFTER]).session();
            locks.acquire().await.map(Held::Session)
        }
        _ => {
            let mut guard = keeper.advisory_lock(BEFORE).shared().acquire().await?;
            guard.advisory_lock(key).await?;
            Ok(Held::Xact(guard))
        }
    }
}

/// Thousands of requests given up at random moments, of both scopes and many kinds, over few keys and connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_given_up_at_random_leave_nothing() {
    const TASKS: u64 = 16;
    const REQUESTS: usize = 10_000;
    const KEYS: u64 = 4;
    // On a server of its own: where others log in as well, a login outlasts most requests.
    let mut scene = Scene::on(&Server::start(&[]).unwrap(), 8).await;
    scene.keeper = Keeper::new(scene.pool.clone());
    let inside: Arc<Vec<AtomicUsize>> = Arc::new((0..KEYS).map(|_| AtomicUsize::new(0)).collect());
    let (granted, given_up) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let started = Instant::now();
    let tasks = (0..TASKS).map(|seed| {
        let (keeper, inside) = (scene.keeper.clone(), inside.clone());
        let (granted, given_up) = (granted.clone(), given_up.clone());
        tokio::spawn(async move {
            let mut dice = Random::new(seed);
            loop {
                let (granted_yet, given_up_yet) = (
                    granted.load(Ordering::Relaxed),
                    given_up.load(Ordering::Relaxed),
                );
                let enough = granted_yet > 100 && given_up_yet > 1000;
                let all = enough && granted_yet + given_up_yet >= REQUESTS;
                // However slow the machine is, there are enough of both kinds.
                let most = Duration::from_secs(if enough { 20 } else { 120 });
                if all || started.elapsed() > most {
                    break;
                }
                let key = dice.below(KEYS);
                let inside = &inside[usize::try_from(key).unwrap()];
                // Short ones do not outlast a login; with nothing else the pool would never have a connection.
                let most = match dice.below(100) {
                    0 => 5_000,
                    n => [2, 10, 50, 200][usize::try_from(n % 4).unwrap()],
                };
                let patience = dice.duration(Duration::from_millis(most));
                let hold = dice.duration(Duration::from_millis(2));
                let end = dice.below(3);
                let way = dice.below(8);
                let take = take_somehow(&keeper, i64::try_from(key).unwrap(), way);
                let Ok(held) = tokio::time::timeout(patience, take).await else {
                    given_up.fetch_add(1, Ordering::Relaxed);
                    continue;
                };
                let held = held.unwrap();
                assert_eq!(
                    inside.fetch_add(1, Ordering::SeqCst),
                    0,
                    "two holders of one lock"
                );
                tokio::time::sleep(hold).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                match held {
                    Held::Xact(guard) if end == 0 => guard.commit().await.unwrap(),
                    Held::Session(guard) if end == 0 => guard.release().await.unwrap(),
                    Held::Xact(guard) if end == 1 => {
                        drop(tokio::time::timeout(hold, guard.commit()).await);
                    }
                    Held::Session(guard) if end == 1 => {
                        drop(tokio::time::timeout(hold, guard.release()).await);
                    }
                    held => drop(held),
                }
                granted.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let (granted, given_up) = (
        granted.load(Ordering::Relaxed),
        given_up.load(Ordering::Relaxed),
    );
    let what = format!("{granted} granted, {given_up} given up");
    assert!(
        granted > 100 && given_up > 1000,
        "{what}: too few to show anything"
    );
    assert_no_trace(&scene, None, CLEANED_UP_WITHIN, &what).await;
    // Nor is anything still under way.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_no_trace(
        &scene,
        None,
        CLEANED_UP_WITHIN,
        &format!("{what}, a moment later"),
    )
    .await;
}
