//! Every call, dropped at every poll and at other moments.

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Proxy, Random, Scene, eventually_within, in_time_of,
    poll_times_and_drop,
};
use tokio_postgres::IsolationLevel;

use super::{
    AFTER, BEFORE, KEY, MOST_POLLS, assert_no_trace, is_busy, locks, new_keeper, with_table, work,
};

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
                () = guard.loss() => panic!("lost"),
                // A call that takes a while, to be dropped in.
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            guard.release().await
        }
        .boxed()
    }),
];

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
                // A moment of the wait.
                tokio::time::sleep(Duration::from_millis(after)).await;
            } else if waits {
                scene.until_awaited(KEY).await;
            }
            call.abort();
            let dropped = Instant::now();
            let what = format!("{name}, aborted after {after} ms");
            assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
            took.push(dropped.elapsed());
            // How long the checks alone take.
            let checked = Instant::now();
            assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
            calm.push(checked.elapsed());
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
        "half of the calls took longer than {took:?} to end, where the checks alone take {calm:?}"
    );
}

/// With the server's places taken by two waiters of the same keeper, the third stands in the line of the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_in_the_line_of_the_process_leave_nothing_wherever_they_are_dropped() {
    let scene = with_table(Scene::new(8).await).await;
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
    scene.until_awaited_by(2, KEY).await;
    for &(name, call) in CALLS {
        for polls in 0..MOST_POLLS {
            let outcome = poll_times_and_drop(call(keeper.clone()), polls).await;
            let what = format!("{name}, dropped after {polls} polls");
            let complaint = format!("{what}: another session waits or holds");
            eventually_within(CLEANED_UP_WITHIN, &complaint, async || {
                // Who gives its place to another is neither here nor there for a moment.
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
        in_time_of(CLEANED_UP_WITHIN, "a waiter is stuck", waiter)
            .await
            .unwrap();
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
