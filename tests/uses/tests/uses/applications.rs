//! The crate as applications use it: what has to compile, and does what it looks like.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::{BankError, accounts, balance, withdraw};
use anyhow::Context as _;
use lockkeeper::tokio_postgres::{self, NoTls};
use lockkeeper::{
    AdvisoryLock, AdvisoryMode, Blocker, CallSite, Error, ErrorKind, Keeper, KeeperBuilder,
    LockKey, SessionAdvisoryLock, SessionGuard, TransactionOptions, Tx, TxAdvisoryLock, XactGuard,
};
use lockkeeper_testkit::Scene;

// What can be sent and shared.

/// In a function of its own, so that a type that loses a promise is a compile error with its name in it.
#[test]
fn public_types_keep_their_promises() {
    fn shared<T: Send + Sync + Unpin + 'static>() {}
    fn cloned<T: Clone + std::fmt::Debug>() {}
    shared::<Keeper>();
    shared::<KeeperBuilder>();
    shared::<AdvisoryLock>();
    shared::<SessionAdvisoryLock>();
    shared::<TxAdvisoryLock<'static>>();
    shared::<XactGuard>();
    shared::<SessionGuard>();
    shared::<Tx>();
    shared::<TransactionOptions>();
    shared::<LockKey>();
    shared::<AdvisoryMode>();
    shared::<CallSite>();
    shared::<Blocker>();
    shared::<Error>();
    shared::<ErrorKind>();

    cloned::<Keeper>();
    cloned::<AdvisoryLock>();
    cloned::<SessionAdvisoryLock>();
    cloned::<TransactionOptions>();
    cloned::<LockKey>();
    cloned::<Blocker>();
}

/// Every future of the public surface, with a body that borrows, is `Send`. Nothing is run.
#[tokio::test]
async fn every_future_is_send() {
    fn send<F: Future + Send>(future: F) {
        drop(future);
    }
    fn sent_anywhere<F: Future + Send + 'static>(future: F) {
        drop(future);
    }
    let scene = Scene::new(1).await;
    let keeper = &scene.keeper;
    let (local, counted) = (String::from("local"), AtomicU32::new(0));
    let (local, counted) = (local.as_str(), &counted);
    let body = async |tx: &mut Tx| {
        counted.fetch_add(1, Ordering::Relaxed);
        tx.query("SELECT $1::text", &[&local]).await?;
        tx.advisory_lock(local).await?;
        tx.savepoint(async |tx| {
            tx.execute("SELECT $1::text", &[&local]).await?;
            Ok::<_, BankError>(())
        })
        .await
    };
    send(keeper.transaction(body));
    send(keeper.transaction_with(TransactionOptions::new(), body));
    send(keeper.with_advisory_lock(local, body));
    send(keeper.try_with_advisory_lock(local, body));
    sent_anywhere(keeper.advisory_lock(local).acquire());
    sent_anywhere(keeper.advisory_lock(local).try_acquire());
    sent_anywhere(keeper.advisory_lock(local).session().acquire());
    sent_anywhere(keeper.advisory_lock(local).session().try_acquire());
    sent_anywhere(keeper.advisory_locks([local]).acquire());

    let mut guard = keeper.advisory_lock(local).acquire().await.unwrap();
    send(guard.execute("SELECT 1", &[&local]));
    send(guard.query("SELECT 1", &[&local]));
    send(guard.query_one("SELECT 1", &[&local]));
    send(guard.query_opt("SELECT 1", &[&local]));
    send(guard.query_raw("SELECT 1", [&local]));
    send(guard.batch_execute(local));
    send(guard.simple_query(local));
    send(guard.prepare(local));
    send(guard.prepare_cached(local));
    send(guard.copy_out("COPY acct TO STDOUT"));
    send(guard.copy_in::<_, bytes::Bytes>("COPY acct FROM STDIN"));
    send(guard.savepoint(body));
    send(guard.advisory_lock(local).try_acquire());
    send(guard.advisory_lock(local).into_future());
    sent_anywhere(guard.commit());
    let guard = keeper.advisory_lock(local).acquire().await.unwrap();
    sent_anywhere(guard.rollback());
    let mut guard = keeper
        .advisory_lock(local)
        .session()
        .acquire()
        .await
        .unwrap();
    sent_anywhere(guard.loss());
    send(guard.run(async {}));
    send(guard.transaction(body));
    sent_anywhere(guard.release());
    assert_eq!(counted.load(Ordering::Relaxed), 0);
    scene.nothing_left().await;
}

// Errors.

#[tokio::test]
async fn errors_of_every_common_kind() {
    let scene = accounts(2).await;
    let keeper = &scene.keeper;
    let answer = keeper
        .transaction(async |tx| {
            let row = tx
                .query_one("SELECT n FROM acct WHERE id = 'a'", &[])
                .await?;
            tx.advisory_lock("k").await?;
            let n: i64 = row.try_get(0).context("no number")?;
            anyhow::ensure!(n > 1000, "only {n}");
            Ok(n)
        })
        .await;
    let error: anyhow::Error = answer.unwrap_err();
    assert_eq!(error.to_string(), "only 100");

    let answer = keeper
        .with_advisory_lock("k", async |tx| {
            tx.batch_execute("SELECT 1/0")
                .await
                .context("cannot divide")?;
            anyhow::Ok(())
        })
        .await;
    let error = answer.unwrap_err();
    assert_eq!(error.to_string(), "cannot divide");
    assert!(error.downcast_ref::<tokio_postgres::Error>().is_some());

    let answer: Result<(), Box<dyn StdError + Send + Sync>> = keeper
        .try_with_advisory_lock("k", async |_| Err("a text is an error".into()))
        .await
        .map(|ran| ran.expect("nobody holds it"));
    assert_eq!(answer.unwrap_err().to_string(), "a text is an error");

    // The crate's own errors arrive in any of them, with their kind.
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    let short = Keeper::builder(scene.pool.clone())
        .lock_wait(Duration::from_millis(20))
        .build();
    let anyhow = short
        .with_advisory_lock("k", async |_| anyhow::Ok(()))
        .await
        .unwrap_err();
    let kind = anyhow.downcast_ref::<Error>().map(Error::kind);
    assert_eq!(kind, Some(ErrorKind::LockTimeout));
    let boxed = short
        .with_advisory_lock("k", async |_| Ok::<_, Box<dyn StdError + Send + Sync>>(()))
        .await
        .unwrap_err();
    let kind = boxed.downcast_ref::<Error>().map(Error::kind);
    assert_eq!(kind, Some(ErrorKind::LockTimeout));
    let own = short
        .with_advisory_lock("k", async |_| Ok::<_, BankError>(()))
        .await
        .unwrap_err();
    assert!(matches!(own, BankError::Lock(error) if error.kind() == ErrorKind::LockTimeout));
    let plain = short
        .with_advisory_lock("k", async |_| Ok::<_, Error>(()))
        .await
        .unwrap_err();
    assert_eq!(plain.key(), Some(&LockKey::from("k")));
    drop(guard);
    scene.nothing_left().await;
}

/// A caller's function that is generic over its own error.
async fn touch<E>(keeper: &Keeper, id: &str) -> Result<u64, E>
where
    E: From<Error> + From<tokio_postgres::Error> + Send,
{
    keeper
        .transaction(async |tx| {
            let touched = tx
                .execute("UPDATE acct SET n = n WHERE id = $1", &[&id])
                .await?;
            Ok(touched)
        })
        .await
}

/// A caller's function that takes a section and puts something around it.
async fn audited<R, E, F>(keeper: &Keeper, key: &str, section: F) -> Result<R, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
        + lockkeeper::AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
        + Send
        + Clone,
    E: From<Error> + Send,
    R: Send,
{
    keeper.with_advisory_lock(("audit", key), section).await
}

#[tokio::test]
async fn generic_functions_of_the_caller() {
    let scene = accounts(2).await;
    assert_eq!(touch::<Error>(&scene.keeper, "a").await.unwrap(), 1);
    assert_eq!(touch::<anyhow::Error>(&scene.keeper, "a").await.unwrap(), 1);
    assert_eq!(touch::<BankError>(&scene.keeper, "no").await.unwrap(), 0);

    let name = String::from("a");
    let scene_ref = &scene;
    let found = audited(&scene.keeper, "x", async |tx| {
        assert!(scene_ref.is_held(("audit", "x")).await);
        withdraw(tx, &name, 1).await
    });
    assert_eq!(found.await.unwrap(), 99);
    scene.nothing_left().await;
}

// What is borrowed, moved and given back.

#[tokio::test]
async fn bodies_borrow_from_around_them() {
    let scene = accounts(2).await;
    let names = [String::from("a"), String::from("b")];
    let mut totals = HashMap::new();
    let seen = Mutex::new(Vec::new());
    let counted = AtomicU32::new(0);
    let sum: i64 = scene
        .keeper
        .transaction(async |tx| {
            let mut sum = 0;
            for name in &names {
                let row = tx
                    .query_one("SELECT n FROM acct WHERE id = $1", &[name])
                    .await?;
                seen.lock().unwrap().push(name.as_str());
                counted.fetch_add(1, Ordering::Relaxed);
                sum += row.get::<_, i64>(0);
            }
            Ok::<_, Error>(sum)
        })
        .await
        .unwrap();
    totals.insert("all", sum);
    assert_eq!((sum, counted.into_inner()), (200, 2));
    assert_eq!(seen.into_inner().unwrap(), ["a", "b"]);

    // The value may borrow from what the body borrows.
    let longest: &str = scene
        .keeper
        .with_advisory_lock("k", async |_| {
            let longest = names.iter().max_by_key(|name| name.len());
            Ok::<_, Error>(longest.map_or("", String::as_str))
        })
        .await
        .unwrap();
    assert_eq!(longest, "b");
    scene.nothing_left().await;
}

/// Each attempt has a clone of its own of what was moved in.
#[tokio::test]
async fn what_is_moved_in_is_there_at_each_attempt() {
    let scene = accounts(1).await;
    let mut ids = vec![String::from("x"), String::from("y")];
    ids.reserve(10);
    let runs = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&runs);
    let moved = scene
        .keeper
        .transaction(async move |tx| {
            // Used up, so that a second attempt with the same vector would insert nothing.
            while let Some(id) = ids.pop() {
                tx.execute("INSERT INTO acct VALUES ($1, 0)", &[&id])
                    .await?;
            }
            if counted.fetch_add(1, Ordering::Relaxed) < 2 {
                tx.batch_execute(
                    "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$",
                )
                .await?;
            }
            Ok::<_, Error>(ids)
        })
        .await
        .unwrap();
    assert!(moved.is_empty());
    assert_eq!(runs.load(Ordering::Relaxed), 3);
    assert_eq!(balance(&scene, "x").await + balance(&scene, "y").await, 0);
    scene.nothing_left().await;
}

/// Where a body is run once, it may consume and change what is around it.
#[tokio::test]
async fn savepoints_and_session_transactions_take_bodies_that_run_once() {
    let scene = accounts(2).await;
    let mut changed = Vec::new();
    let mut guard = scene
        .keeper
        .advisory_lock("k")
        .session()
        .acquire()
        .await
        .unwrap();
    let owned = String::from("owned");
    let (sender, receiver) = tokio::sync::oneshot::channel();
    guard
        .transaction(async |tx| {
            changed.push(1);
            let inner = tx.savepoint(async |tx| {
                changed.push(2);
                tx.execute("INSERT INTO acct VALUES ($1, 0)", &[&owned])
                    .await?;
                // Neither is `Clone`.
                drop(sender.send(owned));
                Ok::<_, BankError>(())
            });
            inner.await
        })
        .await
        .unwrap();
    assert_eq!(receiver.await.unwrap(), "owned");
    assert_eq!(changed, [1, 2]);
    assert_eq!(balance(&scene, "owned").await, 0);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spawned_tasks_of_every_call() {
    let scene = accounts(8).await;
    let keeper = Arc::new(scene.keeper.clone());
    let mut tasks: Vec<tokio::task::JoinHandle<Result<i64, BankError>>> = Vec::new();
    for n in 0..6 {
        let keeper = Arc::clone(&keeper);
        tasks.push(tokio::spawn(async move {
            let local = format!("spawned-{n}");
            let id = if n % 2 == 0 { "a" } else { "b" };
            match n {
                0 => {
                    keeper
                        .transaction(async |tx| withdraw(tx, id, 1).await)
                        .await
                }
                1 => {
                    let options = TransactionOptions::new().attempts(2);
                    let body = async |tx: &mut Tx| withdraw(tx, id, 1).await;
                    keeper.transaction_with(options, body).await
                }
                2 => {
                    let body = async |tx: &mut Tx| withdraw(tx, id, 1).await;
                    keeper.with_advisory_lock(&local, body).await
                }
                3 => {
                    let body = async |tx: &mut Tx| withdraw(tx, id, 1).await;
                    let ran = keeper.try_with_advisory_lock(local.as_str(), body).await?;
                    Ok(ran.expect("nobody else has this key"))
                }
                4 => {
                    let mut guard = keeper.advisory_lock(local).acquire().await?;
                    let left = guard
                        .savepoint(async |tx| withdraw(tx, id, 1).await)
                        .await?;
                    guard.commit().await?;
                    Ok(left)
                }
                _ => {
                    let mut guard = keeper.advisory_lock(local).session().acquire().await?;
                    let body = async |tx: &mut Tx| withdraw(tx, id, 1).await;
                    let left = guard.transaction(body).await?;
                    guard.release().await?;
                    Ok(left)
                }
            }
        }));
    }
    for task in tasks {
        assert!(task.await.unwrap().unwrap() >= 97);
    }
    assert_eq!(balance(&scene, "a").await, 97);
    assert_eq!(balance(&scene, "b").await, 97);
    scene.nothing_left().await;
}

/// A guard goes where its owner goes: into another task, into a struct, out of a function.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_are_values() {
    struct Leader {
        term: u32,
        guard: SessionGuard,
    }
    async fn elect(keeper: &Keeper, name: &str) -> Result<Option<Leader>, Error> {
        let guard = keeper.advisory_lock(name).session().try_acquire().await?;
        Ok(guard.map(|guard| Leader { term: 1, guard }))
    }
    static KEEPER: OnceLock<Keeper> = OnceLock::new();
    let scene = Scene::new(4).await;
    let keeper = KEEPER.get_or_init(|| scene.keeper.clone());
    let leader = elect(keeper, "leader").await.unwrap().unwrap();
    assert!(elect(keeper, "leader").await.unwrap().is_none());
    let pid = leader.guard.backend_pid();
    let leader = tokio::spawn(async move {
        let rows = leader.guard.query("SELECT pg_backend_pid()", &[]).await?;
        assert_eq!(leader.term, 1);
        Ok::<_, tokio_postgres::Error>((leader, rows[0].get::<_, i32>(0)))
    });
    let (leader, answered) = leader.await.unwrap().unwrap();
    assert_eq!(Some(answered), pid);
    let guards = futures::future::try_join_all(
        (0..2).map(|n| keeper.advisory_lock(("guards", n.to_string())).acquire()),
    );
    let guards = guards.await.unwrap();
    assert_eq!(scene.advisory_locks().await, 3);
    drop((leader, guards));
    scene.nothing_left().await;
}

// Nesting.

#[tokio::test]
async fn calls_nest() {
    let scene = accounts(4).await;
    let keeper = &scene.keeper;
    let pids = keeper
        .transaction(async |tx| {
            let outer = tx.backend_pid();
            withdraw(tx, "a", 1).await?;
            // A transaction of its own, on a connection of its own: it does not see the outer one's change.
            let inner = keeper
                .with_advisory_lock("inner", async |inner| {
                    let sql = "SELECT n FROM acct WHERE id = 'a'";
                    let row = inner.query_one(sql, &[]).await?;
                    assert_eq!(row.get::<_, i64>(0), 100);
                    let deeper = inner.savepoint(async |inner| {
                        let third = keeper.advisory_lock("third").acquire().await?;
                        withdraw(inner, "b", 1).await?;
                        let pid = third.backend_pid();
                        third.commit().await?;
                        Ok::<_, BankError>(pid)
                    });
                    let deeper = deeper.await?;
                    Ok::<_, BankError>([inner.backend_pid(), deeper])
                })
                .await?;
            Ok::<_, BankError>([outer, inner[0], inner[1]])
        })
        .await
        .unwrap();
    assert!(pids[0] != pids[1] && pids[1] != pids[2] && pids[0] != pids[2]);
    assert_eq!(balance(&scene, "a").await, 99);
    assert_eq!(balance(&scene, "b").await, 99);
    scene.nothing_left().await;
}

/// A function of the caller's that has sections inside.
async fn take_carefully(tx: &mut Tx, id: &str, amount: i64) -> Result<i64, BankError> {
    let left = tx.savepoint(async |tx| {
        tx.advisory_lock(("acct", id)).await?;
        withdraw(tx, id, amount).await
    });
    match left.await {
        Err(BankError::Short(..)) => Ok(0),
        left => left,
    }
}

/// The same in a task of its own, over several layers, each of which borrows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sections_inside_functions_inside_sections() {
    let scene = accounts(4).await;
    let keeper = scene.keeper.clone();
    let task = tokio::spawn(async move {
        let ids = [String::from("a"), String::from("b")];
        keeper
            .with_advisory_lock("outer", async |tx| {
                let mut left = 0;
                for id in &ids {
                    left += take_carefully(tx, id, 60).await?;
                    left += take_carefully(tx, id, 60).await?;
                }
                // In a transaction of its own.
                touch::<BankError>(&keeper, "nobody").await?;
                Ok::<_, BankError>(left)
            })
            .await
    });
    assert_eq!(task.await.unwrap().unwrap(), 80);
    assert_eq!(balance(&scene, "a").await + balance(&scene, "b").await, 80);
    scene.nothing_left().await;
}

/// Where the pool has no connection left for the inner call, that is an error after the wait, not a hang.
#[tokio::test]
async fn nesting_beyond_the_pool_is_an_error_in_time() {
    let scene = accounts(1).await;
    let keeper = Keeper::builder(scene.pool.clone())
        .lock_wait(Duration::from_millis(100))
        .build();
    let keeper = &keeper;
    for way in ["transaction", "lock", "try", "session"] {
        let answer = keeper
            .with_advisory_lock("outer", async |tx| {
                withdraw(tx, "a", 1).await?;
                match way {
                    "transaction" => {
                        keeper.transaction(async |_| Ok::<_, BankError>(())).await?;
                    }
                    "lock" => drop(keeper.advisory_lock("inner").acquire().await?),
                    "try" => drop(keeper.advisory_lock("inner").try_acquire().await?),
                    _ => drop(keeper.advisory_lock("inner").session().acquire().await?),
                }
                Ok::<_, BankError>(())
            })
            .await;
        let Err(BankError::Lock(error)) = answer else {
            panic!("{way}: {answer:?}")
        };
        assert_eq!(error.kind(), ErrorKind::Pool, "{way}: {error}");
        assert_eq!(balance(&scene, "a").await, 100);
        scene.nothing_left().await;
    }
}

// Where the caller stands.

/// A function of the caller's that is `#[track_caller]` passes its own caller on.
#[tokio::test]
async fn a_wrapper_can_pass_its_call_site_on() {
    #[track_caller]
    fn billed<'a>(keeper: &'a Keeper) -> impl Future<Output = Result<u32, Error>> + Send + 'a {
        keeper.transaction(async |tx| Ok::<_, Error>(tx.call_site().map_or(0, CallSite::line)))
    }
    let scene = Scene::new(1).await;
    let line = line!() + 1;
    let found = billed(&scene.keeper).await.unwrap();
    assert_eq!(found, line);
}

/// Outside a runtime of its own thread: from a blocking one, and from a runtime with one thread and local tasks.
#[test]
fn runtimes_of_every_kind() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let scene = runtime.block_on(accounts(2));
    let handle = runtime.handle().clone();
    let keeper = scene.keeper.clone();
    // A thread that is no worker.
    std::thread::spawn(move || {
        let guard = handle
            .block_on(keeper.advisory_lock("thread").acquire())
            .unwrap();
        // Dropped outside of any runtime.
        drop(guard);
    })
    .join()
    .unwrap();
    runtime.block_on(scene.nothing_left());

    let ran = runtime.block_on(async {
        let keeper = scene.keeper.clone();
        tokio::task::LocalSet::new()
            .run_until(async move {
                let keeper = std::rc::Rc::new(keeper);
                tokio::task::spawn_local(async move {
                    let body = async |tx: &mut Tx| withdraw(tx, "a", 1).await;
                    keeper.with_advisory_lock("local", body).await
                })
                .await
            })
            .await
    });
    assert_eq!(ran.unwrap().unwrap(), 99);
    runtime.block_on(scene.nothing_left());

    // Without one: an error, or a panic of tokio's, but no lock.
    let keeper = scene.keeper.clone();
    let outside = std::thread::spawn(move || {
        futures::executor::block_on(keeper.advisory_lock("outside").acquire()).map(drop)
    });
    assert!(!matches!(outside.join(), Ok(Ok(()))));
    runtime.block_on(scene.nothing_left());
}

/// A keeper with all that can be configured.
#[tokio::test]
async fn a_keeper_with_everything() {
    let scene = Scene::new(1).await;
    let keeper = Keeper::builder(scene.pool.clone())
        .application("everything")
        .call_sites(true)
        .lock_wait(Duration::from_secs(1))
        .side_connection(scene.database.config(), NoTls)
        .build();
    let lock = keeper
        .advisory_lock("k")
        .shared()
        .wait(Duration::from_secs(1));
    let again = lock.clone();
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.mode(), AdvisoryMode::Shared);
    guard.commit().await.unwrap();
    let guard = again.session().shared().acquire().await.unwrap();
    assert_eq!(guard.mode(), AdvisoryMode::Shared);
    assert_eq!(guard.held_keys(), [LockKey::from("k")]);
    guard.release().await.unwrap();
    assert!(format!("{keeper:?}").contains("everything"));
    scene.nothing_left().await;
}
