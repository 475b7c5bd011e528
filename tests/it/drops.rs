//! Guards and calls that end without being told to: by panic, early return, abort, timeout, the end of a
//! runtime, on any thread.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, pending};
use futures::{SinkExt, StreamExt};
use lockkeeper::{Error, ErrorKind, Keeper, LockKey, SessionGuard, XactGuard};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Scene, assert_error, eventually_within, is_pending,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

/// Free in every scene, and held by another session in every scene.
const KEY: i64 = 600;
const BUSY: i64 = 601;

/// A statement that outlasts every test.
const SLEEP: &str = "SELECT pg_sleep(60)";
/// More rows than are ever read.
const STREAM: &str = "SELECT repeat('x', 1000), generate_series(1, 100000000)";

/// What a task is in the middle of when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Middle {
    Section,
    SectionWithSavepoint,
    SectionInStatement,
    Transaction,
    Xact,
    XactInStatement,
    XactInClientStatement,
    XactInStream,
    XactInCopy,
    Session,
    SessionInStatement,
    SessionInClientStatement,
    SessionInTransaction,
    SessionInTransactionInStatement,
    Waiting,
    WaitingForSession,
    WaitingBeforeSnapshot,
    WaitingInTransaction,
    WaitingInLine,
}

use Middle::*;

/// Those in which the server is idle, waits for its client, or waits for a lock.
const QUIET: [Middle; 12] = [
    Section,
    SectionWithSavepoint,
    Transaction,
    Xact,
    XactInStream,
    XactInCopy,
    Session,
    SessionInTransaction,
    Waiting,
    WaitingForSession,
    WaitingBeforeSnapshot,
    WaitingInLine,
];

/// Those in which the server is busy for a long time.
const BUSY_FOR_LONG: [Middle; 7] = [
    SectionInStatement,
    XactInStatement,
    XactInClientStatement,
    SessionInStatement,
    SessionInClientStatement,
    SessionInTransactionInStatement,
    WaitingInTransaction,
];

impl Middle {
    fn all() -> impl Iterator<Item = Self> {
        QUIET.into_iter().chain(BUSY_FOR_LONG)
    }
}

/// A call that goes into the middle, and is ended there.
#[derive(Clone)]
struct Visit {
    middle: Middle,
    /// The call has got there, for where the server shows it before the call has its answer, or does not show it.
    arrived: Arc<AtomicBool>,
}

impl Visit {
    fn to(middle: Middle) -> Self {
        Self {
            middle,
            arrived: Arc::default(),
        }
    }

    /// A call that goes there and stays.
    fn stay(&self, keeper: Keeper) -> BoxFuture<'static, ()> {
        let visit = self.clone();
        async move {
            visit.goes_there(keeper).await.unwrap();
            panic!("{:?} is over", visit.middle);
        }
        .boxed()
    }

    /// Is there, and stays.
    async fn arrive(&self) -> Result<(), Error> {
        self.arrived.store(true, Ordering::SeqCst);
        pending().await
    }

    async fn goes_there(&self, keeper: Keeper) -> Result<(), Error> {
        let middle = self.middle;
        match middle {
            Section | SectionWithSavepoint | SectionInStatement => {
                let section = keeper.with_advisory_lock(KEY, async move |tx| {
                    if middle == SectionInStatement {
                        tx.execute(SLEEP, &[]).await?;
                    } else if middle == SectionWithSavepoint {
                        let savepoint = tx.savepoint(async |tx| {
                            tx.advisory_lock(KEY + 10).await?;
                            self.arrive().await
                        });
                        savepoint.await?;
                    }
                    self.arrive().await
                });
                section.await
            }
            Transaction => {
                let transaction = keeper.transaction(async |tx| {
                    tx.advisory_lock(KEY).await?;
                    self.arrive().await
                });
                transaction.await
            }
            Xact => {
                let _guard = xact(&keeper, KEY).await;
                self.arrive().await
            }
            XactInStatement => {
                let guard = xact(&keeper, KEY).await;
                guard.execute(SLEEP, &[]).await?;
                Ok(())
            }
            XactInClientStatement => {
                let guard = xact(&keeper, KEY).await;
                guard.client().execute(SLEEP, &[]).await?;
                Ok(())
            }
            XactInStream => {
                let guard = xact(&keeper, KEY).await;
                let mut rows = pin!(guard.query_raw(STREAM, Vec::<i32>::new()).await?);
                rows.next().await.unwrap()?;
                self.arrive().await
            }
            XactInCopy => {
                let guard = xact(&keeper, KEY).await;
                guard
                    .batch_execute("CREATE TEMP TABLE t (a int4) ON COMMIT DROP")
                    .await?;
                let mut sink = pin!(guard.copy_in("COPY t FROM STDIN").await?);
                sink.send(bytes::Bytes::from_static(b"1\n2")).await?;
                sink.flush().await?;
                self.arrive().await
            }
            Session => {
                let _guard = session(&keeper, KEY).await;
                self.arrive().await
            }
            SessionInStatement => {
                let guard = session(&keeper, KEY).await;
                guard.execute(SLEEP, &[]).await?;
                Ok(())
            }
            SessionInClientStatement => {
                let guard = session(&keeper, KEY).await;
                guard.client().execute(SLEEP, &[]).await?;
                Ok(())
            }
            SessionInTransaction | SessionInTransactionInStatement => {
                let mut guard = session(&keeper, KEY).await;
                let transaction = guard.transaction(async move |tx| {
                    if middle == SessionInTransactionInStatement {
                        tx.execute(SLEEP, &[]).await?;
                    }
                    self.arrive().await
                });
                transaction.await
            }
            Waiting => keeper.advisory_lock(BUSY).acquire().await.map(drop),
            WaitingInLine => {
                // Its first poll is what takes a place in the line.
                let mut waiting = Box::pin(keeper.advisory_lock(BUSY).acquire());
                assert!(is_pending(&mut waiting).await);
                self.arrived.store(true, Ordering::SeqCst);
                waiting.await.map(drop)
            }
            WaitingForSession => {
                let lock = keeper.advisory_lock(BUSY).session();
                lock.acquire().await.map(drop)
            }
            WaitingBeforeSnapshot => {
                let lock = keeper.advisory_lock(BUSY);
                let lock = lock.isolation(tokio_postgres::IsolationLevel::RepeatableRead);
                lock.acquire().await.map(drop)
            }
            WaitingInTransaction => {
                let mut guard = xact(&keeper, KEY).await;
                guard.advisory_lock(BUSY).await
            }
        }
    }

    /// Returns when the call has got there.
    async fn reached(&self, scene: &Scene) {
        let middle = self.middle;
        let there = async || match middle {
            XactInStream => self.has_arrived() && blocked_by_its_client(scene).await == 1,
            XactInCopy => self.has_arrived() && active(scene, "COPY t %").await == 1,
            Waiting | WaitingForSession | WaitingBeforeSnapshot | WaitingInTransaction => {
                scene.waiters(BUSY).await.len() == 1
            }
            _ if BUSY_FOR_LONG.contains(&middle) => active(scene, SLEEP).await == 1,
            _ => self.has_arrived(),
        };
        let what = format!("{middle:?} is not reached");
        eventually_within(CLEANED_UP_WITHIN, &what, there).await;
    }

    fn has_arrived(&self) -> bool {
        self.arrived.load(Ordering::SeqCst)
    }
}

async fn xact(keeper: &Keeper, key: impl Into<LockKey>) -> XactGuard {
    keeper.advisory_lock(key).acquire().await.unwrap()
}

async fn session(keeper: &Keeper, key: impl Into<LockKey>) -> SessionGuard {
    keeper.advisory_lock(key).session().acquire().await.unwrap()
}

/// How many backends but the observer's are busy with a statement like this.
async fn active(scene: &Scene, like: &str) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
               AND pid <> pg_backend_pid() AND state = 'active' AND query LIKE $1";
    let row = scene.observer.query_one(sql, &[&like]).await.unwrap();
    row.get(0)
}

/// How many backends wait until their client reads what they send.
async fn blocked_by_its_client(scene: &Scene) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
               AND wait_event = 'ClientWrite'";
    let row = scene.observer.query_one(sql, &[]).await.unwrap();
    row.get(0)
}

/// Goes into the middle of each call and ends it there; then no statement runs, nothing is locked but what another
/// session holds, and the pool is whole.
async fn ends_by(
    how: &str,
    middles: impl IntoIterator<Item = Middle>,
    end: impl AsyncFn(&Scene, Visit),
) {
    let scene = Scene::with(3, |builder| builder.lock_wait(ENDLESS)).await;
    let holder = scene.database.connect().await;
    let hold = async || {
        holder
            .execute("SELECT pg_advisory_lock($1)", &[&BUSY])
            .await
            .unwrap();
    };
    hold().await;
    for middle in middles {
        let what = format!("{middle:?} ended by {how}");
        // For a call that is to stand in line in the process, another of the keeper has the only place at the server.
        let crowd = usize::from(middle == WaitingInLine);
        let crowd: Vec<_> = (0..crowd)
            .map(|_| {
                let lock = scene.keeper.advisory_lock(BUSY);
                tokio::spawn(async move {
                    lock.acquire().await.unwrap().commit().await.unwrap();
                })
            })
            .collect();
        if middle == WaitingInLine {
            scene.until_awaited_by(1, BUSY).await;
        }
        end(&scene, Visit::to(middle)).await;
        let others = i64::try_from(crowd.len()).unwrap();
        let left = format!("{what}: a lock is left");
        eventually_within(CLEANED_UP_WITHIN, &left, async || {
            scene.advisory_locks().await == 1 + others
        })
        .await;
        let runs = format!("{what}: a statement still runs");
        eventually_within(CLEANED_UP_WITHIN, &runs, async || {
            active(&scene, "%").await == others
        })
        .await;
        holder
            .execute("SELECT pg_advisory_unlock($1)", &[&BUSY])
            .await
            .unwrap();
        for waiter in crowd {
            let waiter = tokio::time::timeout(CLEANED_UP_WITHIN, waiter).await;
            waiter
                .unwrap_or_else(|_| panic!("{what}: another waiter is stuck"))
                .unwrap();
        }
        let whole = AssertUnwindSafe(scene.nothing_left()).catch_unwind();
        assert!(whole.await.is_ok(), "{what}: something is left");
        hold().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_task_leaves_nothing() {
    ends_by("abort", Middle::all(), async |scene, visit| {
        let task = tokio::spawn(visit.stay(scene.keeper.clone()));
        visit.reached(scene).await;
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_around_a_call_leaves_nothing() {
    ends_by("select!", Middle::all(), async |scene, visit| {
        tokio::select! {
            () = visit.stay(scene.keeper.clone()) => unreachable!(),
            () = visit.reached(scene) => {}
        }
    })
    .await;
}

/// With one thread, everything that is left to do is done between the test's own steps.
#[tokio::test]
async fn a_timeout_on_a_current_thread_runtime_leaves_nothing() {
    ends_by(
        "select! on one thread",
        Middle::all(),
        async |scene, visit| {
            tokio::select! {
                () = visit.stay(scene.keeper.clone()) => unreachable!(),
                () = visit.reached(scene) => {}
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwinding_through_a_call_leaves_nothing() {
    ends_by("unwinding", Middle::all(), async |scene, visit| {
        let (stop, stopped) = oneshot::channel();
        let call = visit.stay(scene.keeper.clone());
        let task = tokio::spawn(async move {
            let mut call = call;
            tokio::select! {
                () = &mut call => unreachable!(),
                stopped = stopped => stopped.unwrap(),
            }
            // With the call alive in this frame.
            std::panic::resume_unwind(Box::new("stop"));
        });
        visit.reached(scene).await;
        stop.send(()).unwrap();
        assert!(task.await.unwrap_err().is_panic());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_dropped_on_a_thread_without_a_runtime_leaves_nothing() {
    ends_by("a plain thread", Middle::all(), async |scene, visit| {
        let mut call = visit.stay(scene.keeper.clone());
        tokio::select! {
            () = &mut call => unreachable!(),
            () = visit.reached(scene) => {}
        }
        let dropper = thread::spawn(move || {
            assert!(Handle::try_current().is_err());
            drop(call);
        });
        dropper.join().unwrap();
    })
    .await;
}

/// How a runtime ends.
#[derive(Clone, Copy, Debug)]
enum Shutdown {
    Dropped,
    Background,
    CurrentThread,
}

/// Runs a call on a runtime of its own, and ends that.
async fn end_with_its_runtime(scene: &Scene, visit: Visit, shutdown: Shutdown) {
    let call = visit.stay(scene.keeper.clone());
    let (stop, stopped) = oneshot::channel::<()>();
    let (over, is_over) = oneshot::channel();
    let runner = thread::spawn(move || {
        let runtime = match shutdown {
            Shutdown::CurrentThread => Builder::new_current_thread().enable_all().build(),
            _ => Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build(),
        };
        let runtime = runtime.unwrap();
        let task = runtime.spawn(call);
        runtime.block_on(stopped).unwrap();
        assert!(!task.is_finished());
        match shutdown {
            Shutdown::Background => runtime.shutdown_background(),
            _ => drop(runtime),
        }
        over.send(()).unwrap();
    });
    visit.reached(scene).await;
    stop.send(()).unwrap();
    is_over.await.unwrap();
    runner.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_that_shuts_down_leaves_nothing() {
    for shutdown in [
        Shutdown::Dropped,
        Shutdown::Background,
        Shutdown::CurrentThread,
    ] {
        // On connections of the runtime that ends.
        let what = format!("{shutdown:?}");
        ends_by(&what, QUIET, async |scene, visit| {
            end_with_its_runtime(scene, visit, shutdown).await;
        })
        .await;
        // On connections of this one.
        let what = format!("{shutdown:?}, with a connection of another runtime");
        ends_by(&what, QUIET, async |scene, visit| {
            if visit.middle != WaitingInLine {
                scene.pool_is_whole().await;
            }
            end_with_its_runtime(scene, visit, shutdown).await;
        })
        .await;
    }
}

/// The server does not read a connection while a statement runs on it: it has to be told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_that_shuts_down_in_a_long_statement_leaves_nothing() {
    for shutdown in [
        Shutdown::Dropped,
        Shutdown::Background,
        Shutdown::CurrentThread,
    ] {
        let what = format!("{shutdown:?}");
        ends_by(&what, BUSY_FOR_LONG, async |scene, visit| {
            end_with_its_runtime(scene, visit, shutdown).await;
        })
        .await;
    }
}

fn own_runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_that_outlive_their_runtime_release_at_the_latest_when_they_are_dropped() {
    for warm in [false, true] {
        let scene = Scene::new(4).await;
        if warm {
            scene.pool_is_whole().await;
        }
        let keeper = scene.keeper.clone();
        let holds = thread::spawn(move || {
            let runtime = own_runtime();
            let guards = runtime.block_on(async {
                let mut lent = session(&keeper, 612).await;
                lent.transaction(async |_| Ok::<_, Error>(()))
                    .await
                    .unwrap();
                (xact(&keeper, 610).await, session(&keeper, 611).await, lent)
            });
            drop(runtime);
            drop(guards);
        });
        tokio::task::spawn_blocking(|| holds.join().unwrap())
            .await
            .unwrap();
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_dropped_on_a_plain_thread_release_and_return_their_connections() {
    let scene = Scene::new(2).await;
    for _ in 0..10 {
        let guards = (
            xact(&scene.keeper, 613).await,
            session(&scene.keeper, 614).await,
        );
        let mut before = [
            guards.0.backend_pid().unwrap(),
            guards.1.backend_pid().unwrap(),
        ];
        assert_ne!(before[0], before[1]);
        thread::spawn(move || drop(guards)).join().unwrap();
        let mut after = [0; 2];
        let both = (
            scene.pool.get().await.unwrap(),
            scene.pool.get().await.unwrap(),
        );
        for (pid, object) in after.iter_mut().zip([&both.0, &both.1]) {
            let row = object
                .query_one("SELECT pg_backend_pid()", &[])
                .await
                .unwrap();
            *pid = row.get(0);
        }
        before.sort_unstable();
        after.sort_unstable();
        assert_eq!(before, after, "not the same connections");
        drop(both);
        scene.nothing_left().await;
    }
}

/// Outside of `block_on` a current-thread runtime does nothing, but what was queued goes out with its next step.
#[test]
fn guards_dropped_beside_an_idle_current_thread_runtime_release_when_it_continues() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let scene = runtime.block_on(Scene::new(2));
    let guards = runtime.block_on(async {
        (
            xact(&scene.keeper, 615).await,
            session(&scene.keeper, 616).await,
        )
    });
    drop(guards);
    runtime.block_on(scene.nothing_left());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_section_is_the_callers_and_frees_the_lock() {
    let scene = Scene::new(2).await;
    let (keeper, other) = (scene.keeper.clone(), scene.keeper.clone());
    let section = tokio::spawn(async move {
        let section = keeper.with_advisory_lock(617, async |tx| {
            tx.batch_execute("CREATE TABLE never (id int)").await?;
            if tx.backend_pid() != Some(0) {
                std::panic::resume_unwind(Box::new("in the section"));
            }
            Ok::<(), Error>(())
        });
        section.await
    });
    let lent = tokio::spawn(async move {
        let mut guard = session(&other, 618).await;
        let transaction = guard.transaction(async |tx| {
            let savepoint = tx.savepoint(async |tx| {
                tx.batch_execute("CREATE TABLE never (id int)").await?;
                if tx.backend_pid() != Some(0) {
                    std::panic::resume_unwind(Box::new("in the savepoint"));
                }
                Ok::<(), Error>(())
            });
            savepoint.await
        });
        transaction.await
    });
    for (task, text) in [(section, "in the section"), (lent, "in the savepoint")] {
        let panic = task.await.unwrap_err().into_panic();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&text));
    }
    scene.nothing_left().await;
    let sql = "SELECT to_regclass('never') IS NULL";
    let never: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert!(never, "committed all the same");
}

/// A panic that is caught above the guard leaves the guard usable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_guard_survives_a_panic_in_its_transaction() {
    let scene = Scene::new(1).await;
    let mut guard = session(&scene.keeper, 619).await;
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)").await?;
        if tx.backend_pid() != Some(0) {
            std::panic::resume_unwind(Box::new("caught"));
        }
        Ok::<(), Error>(())
    });
    assert!(AssertUnwindSafe(transaction).catch_unwind().await.is_err());
    assert!(scene.is_held(619).await);
    let sql = "SELECT to_regclass('note') IS NULL";
    let rolled_back: bool = guard.query_one(sql, &[]).await.unwrap().get(0);
    assert!(rolled_back);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_return_releases_and_passes_the_error_on() {
    async fn fails(keeper: &Keeper) -> Result<(), Error> {
        let first = keeper.advisory_lock(620).acquire().await?;
        let second = keeper.advisory_lock(621).session().acquire().await?;
        second.batch_execute("SELECT 1").await?;
        first.batch_execute("SELECT 1/0").await?;
        second.release().await?;
        first.commit().await
    }
    let scene = Scene::new(2).await;
    let error = fails(&scene.keeper).await.unwrap_err();
    assert_error(&error, ErrorKind::Database, "SQLSTATE 22012");
    assert_eq!(error.sqlstate().unwrap().code(), "22012");
    scene.nothing_left().await;
    let section = scene.keeper.with_advisory_lock(620, async |tx| {
        tx.batch_execute("SELECT 1/0").await?;
        Ok::<_, Error>(())
    });
    let error = section.await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "22012");
    scene.nothing_left().await;
}

/// Two guards are dropped in a panic in the middle of another one's statement, on the thread that unwinds.
#[test]
fn guards_dropped_while_a_plain_thread_unwinds_release() {
    let runtime = own_runtime();
    let scene = runtime.block_on(Scene::new(3));
    let guards = runtime.block_on(async {
        let abandoned = xact(&scene.keeper, 624).await;
        let sleep = abandoned.batch_execute(SLEEP);
        assert!(
            tokio::time::timeout(Duration::from_millis(20), sleep)
                .await
                .is_err()
        );
        (
            xact(&scene.keeper, 622).await,
            session(&scene.keeper, 623).await,
            abandoned,
        )
    });
    let (sender, receiver) = mpsc::channel();
    let unwinds = thread::spawn(move || {
        let _guards = guards;
        sender.send(()).unwrap();
        std::panic::resume_unwind(Box::new("unwinds"));
    });
    receiver.recv().unwrap();
    assert!(unwinds.join().is_err());
    runtime.block_on(scene.nothing_left());
}

/// The caller keeps a stream of rows that is not read, and with it the connection busy, after the guard has gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_rows_that_outlives_its_guard_does_not_keep_the_lock() {
    let scene = Scene::new(2).await;
    let guard = xact(&scene.keeper, 625).await;
    let mut first = Box::pin(guard.query_raw(STREAM, Vec::<i32>::new()).await.unwrap());
    first.next().await.unwrap().unwrap();
    eventually_within(CLEANED_UP_WITHIN, "the stream is not stuck", async || {
        blocked_by_its_client(&scene).await > 0
    })
    .await;
    drop(guard);
    let guard = session(&scene.keeper, 626).await;
    let mut second = Box::pin(guard.query_raw(STREAM, Vec::<i32>::new()).await.unwrap());
    second.next().await.unwrap().unwrap();
    eventually_within(CLEANED_UP_WITHIN, "the stream is not stuck", async || {
        blocked_by_its_client(&scene).await > 0
    })
    .await;
    drop(guard);
    scene.nothing_left().await;
    drop((first, second));
}

/// A statement that was given up is not waited for, neither by a rollback nor by a release.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ending_a_guard_does_not_wait_for_a_statement_that_was_given_up() {
    let scene = Scene::new(1).await;
    let a_moment = Duration::from_millis(30);
    for through_client in [false, true] {
        for end in ["rollback", "release", "drop xact", "drop session"] {
            let what = format!("{end}, client: {through_client}");
            let ending: BoxFuture<'_, ()> = if end == "rollback" || end == "drop xact" {
                let guard = xact(&scene.keeper, 627).await;
                let sleep = async {
                    if through_client {
                        guard.client().execute(SLEEP, &[]).await.map(drop)
                    } else {
                        guard.execute(SLEEP, &[]).await.map(drop)
                    }
                };
                assert!(tokio::time::timeout(a_moment, sleep).await.is_err());
                if end == "rollback" {
                    guard.rollback().boxed()
                } else {
                    async { drop(guard) }.boxed()
                }
            } else {
                let guard = session(&scene.keeper, 627).await;
                let sleep = async {
                    if through_client {
                        guard.client().execute(SLEEP, &[]).await.map(drop)
                    } else {
                        guard.execute(SLEEP, &[]).await.map(drop)
                    }
                };
                assert!(tokio::time::timeout(a_moment, sleep).await.is_err());
                if end == "release" {
                    async { guard.release().await.unwrap() }.boxed()
                } else {
                    async { drop(guard) }.boxed()
                }
            };
            let ending = tokio::time::timeout(CLEANED_UP_WITHIN, ending).await;
            assert!(ending.is_ok(), "{what}: waits for the statement");
            eventually_within(
                CLEANED_UP_WITHIN,
                &format!("{what}: still runs"),
                async || active(&scene, "%").await == 0,
            )
            .await;
            scene.nothing_left().await;
        }
    }
}
