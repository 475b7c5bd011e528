//! The crate as applications use it: what has to compile, and does what it looks like.

use std::borrow::Cow;
use std::collections::HashMap;
use std::error::Error as StdError;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::{SinkExt as _, TryStreamExt as _};
use lockkeeper::tokio_postgres::{self, NoTls};
use lockkeeper::{
    AdvisoryLock, AdvisoryMode, Blocker, CallSite, Error, ErrorKind, Keeper, KeeperBuilder,
    LockKey, SessionAdvisoryLock, SessionGuard, TransactionOptions, Tx, TxAdvisoryLock, XactGuard,
    deadpool_postgres,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::common::{Scene, eventually};

const SOON: Duration = Duration::from_secs(5);

/// A scene with a table `acct (id text, n int8)` that has accounts `a` and `b` of 100 each.
async fn accounts(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE acct (id text PRIMARY KEY, n int8 NOT NULL CHECK (n >= 0)); \
             INSERT INTO acct VALUES ('a', 100), ('b', 100)",
        )
        .await
        .unwrap();
    scene
}

async fn balance(scene: &Scene, id: &str) -> i64 {
    let sql = "SELECT n FROM acct WHERE id = $1";
    scene.observer.query_one(sql, &[&id]).await.unwrap().get(0)
}

/// A user's error, as one writes it with thiserror.
#[derive(Debug, thiserror::Error)]
enum BankError {
    #[error("database")]
    Database(#[from] tokio_postgres::Error),
    #[error("lock")]
    Lock(#[from] Error),
    #[error("no account {0}")]
    NoAccount(String),
    #[error("{0} is short of {1}")]
    Short(String, i64),
}

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
    send(guard.lost());
    send(guard.transaction(body));
    sent_anywhere(guard.release());
    assert_eq!(counted.load(Ordering::Relaxed), 0);
    scene.nothing_left().await;
}

// Services.

/// Borrowed arguments, a borrowed service, and a result that borrows from neither.
#[async_trait]
trait Bank: Send + Sync {
    async fn transfer(&self, from: &str, to: &str, amount: i64) -> Result<i64, BankError>;
}

struct PgBank {
    keeper: Keeper,
    transfers: AtomicU32,
}

async fn withdraw(tx: &Tx, id: &str, amount: i64) -> Result<i64, BankError> {
    let row = tx
        .query_opt("SELECT n FROM acct WHERE id = $1 FOR UPDATE", &[&id])
        .await?;
    let have: i64 = row
        .ok_or_else(|| BankError::NoAccount(id.to_owned()))?
        .get(0);
    if have < amount {
        return Err(BankError::Short(id.to_owned(), amount - have));
    }
    tx.execute("UPDATE acct SET n = n - $2 WHERE id = $1", &[&id, &amount])
        .await?;
    Ok(have - amount)
}

#[async_trait]
impl Bank for PgBank {
    async fn transfer(&self, from: &str, to: &str, amount: i64) -> Result<i64, BankError> {
        let mut keys = [from, to];
        keys.sort_unstable();
        self.keeper
            .transaction(async |tx| {
                tx.advisory_locks(keys.map(|id| ("acct", id))).await?;
                let left = withdraw(tx, from, amount).await?;
                let put = "UPDATE acct SET n = n + $2 WHERE id = $1";
                if tx.execute(put, &[&to, &amount]).await? == 0 {
                    return Err(BankError::NoAccount(to.to_owned()));
                }
                self.transfers.fetch_add(1, Ordering::Relaxed);
                Ok(left)
            })
            .await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_behind_a_trait_object() {
    let scene = accounts(4).await;
    let bank: Arc<dyn Bank> = Arc::new(PgBank {
        keeper: scene.keeper.clone(),
        transfers: AtomicU32::new(0),
    });
    let tasks: Vec<_> = (0..20)
        .map(|n| {
            let bank = Arc::clone(&bank);
            tokio::spawn(async move {
                // Names that live in the task alone.
                let (a, b) = (String::from("a"), String::from("b"));
                let (from, to) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
                bank.transfer(from, to, 5).await
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(balance(&scene, "a").await, 100);
    let error = bank.transfer("a", "b", 1000).await.unwrap_err();
    assert!(matches!(error, BankError::Short(id, 900) if id == "a"));
    let error = bank.transfer("a", "nobody", 1).await.unwrap_err();
    assert!(matches!(error, BankError::NoAccount(id) if id == "nobody"));
    assert_eq!(balance(&scene, "a").await, 100);
    scene.nothing_left().await;
}

/// A handler's state.
struct App {
    keeper: Keeper,
    inside: AtomicU32,
    worst: AtomicU32,
}

/// A handler's error.
struct Refused(BankError);

impl<E: Into<BankError>> From<E> for Refused {
    fn from(error: E) -> Self {
        Refused(error.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            BankError::Short(..) => StatusCode::PAYMENT_REQUIRED,
            BankError::NoAccount(_) => StatusCode::NOT_FOUND,
            BankError::Lock(error) if error.kind() == ErrorKind::LockTimeout => StatusCode::LOCKED,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, self.0.to_string()).into_response()
    }
}

async fn pay(
    State(app): State<Arc<App>>,
    Path((id, amount)): Path<(String, i64)>,
) -> Result<String, Refused> {
    let left = app
        .keeper
        .with_advisory_lock(("acct", &id), async |tx| {
            let now = app.inside.fetch_add(1, Ordering::SeqCst) + 1;
            app.worst.fetch_max(now, Ordering::SeqCst);
            let left = withdraw(tx, &id, amount).await;
            app.inside.fetch_sub(1, Ordering::SeqCst);
            left
        })
        .await?;
    Ok(left.to_string())
}

async fn slow(State(app): State<Arc<App>>) -> Result<String, Refused> {
    let guard = app.keeper.advisory_lock("slow").acquire().await?;
    guard.batch_execute("SELECT pg_sleep(60)").await?;
    guard.commit().await?;
    Ok(String::new())
}

/// The status and body of one request on a connection of its own.
async fn request(port: u16, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http_server() {
    let scene = accounts(4).await;
    let app = Arc::new(App {
        keeper: scene.keeper.clone(),
        inside: AtomicU32::new(0),
        worst: AtomicU32::new(0),
    });
    let router = axum::Router::new()
        .route("/pay/{id}/{amount}", post(pay))
        .route("/slow", get(slow))
        .with_state(Arc::clone(&app));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move { axum::serve(listener, router).await });

    let paid = (0..12).map(|_| request(port, "POST", "/pay/a/10"));
    let mut paid = futures::future::join_all(paid).await;
    paid.sort();
    let mut expected: Vec<(u16, String)> = (0..10).map(|n| (200, (n * 10).to_string())).collect();
    expected.extend([
        (402, "a is short of 10".to_owned()),
        (402, "a is short of 10".to_owned()),
    ]);
    expected.sort();
    assert_eq!(paid, expected);
    assert_eq!(app.worst.load(Ordering::SeqCst), 1);
    assert_eq!(balance(&scene, "a").await, 0);
    let nobody = request(port, "POST", "/pay/nobody/1").await;
    assert_eq!(nobody, (404, "no account nobody".to_owned()));

    // A client that goes away takes its lock and its statement with it.
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream
        .write_all(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let held = async || scene.is_held("slow").await;
    eventually(SOON, "the slow request does not begin", held).await;
    drop(stream);
    scene.nothing_left_within(SOON).await;
    server.abort();
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

// Keys.

#[tokio::test]
async fn keys_of_every_kind() {
    let scene = Scene::new(2).await;
    let keeper = &scene.keeper;
    let (owned, id) = (String::from("acct"), 42);
    let borrowed: &String = &owned;
    let cow: Cow<'_, str> = Cow::Borrowed("acct");
    let key = LockKey::from("acct");
    let named = [
        keeper.advisory_lock("acct"),
        keeper.advisory_lock(owned.clone()),
        keeper.advisory_lock(borrowed),
        keeper.advisory_lock(cow),
        keeper.advisory_lock(&key),
        keeper.advisory_lock(key.clone()),
        keeper.advisory_lock(owned.to_string()),
        keeper.advisory_lock(owned.as_str()),
    ];
    for lock in named {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held("acct").await);
        guard.rollback().await;
    }
    let spaced = [
        keeper.advisory_lock(("acct", "42")),
        keeper.advisory_lock(("acct", id.to_string())),
        keeper.advisory_lock((owned.clone(), id.to_string())),
        keeper.advisory_lock((borrowed, "42")),
        keeper.advisory_lock(("acct", &id.to_string())),
    ];
    for lock in spaced {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held(("acct", "42")).await);
        guard.rollback().await;
    }
    for (lock, key) in [
        (keeper.advisory_lock(0), LockKey::from(0)),
        (keeper.advisory_lock(-1_i64), LockKey::from(-1)),
        (keeper.advisory_lock(i64::from(id)), LockKey::from(42)),
        (keeper.advisory_lock((1, -2)), LockKey::from((1, -2))),
    ] {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held(key).await);
        guard.rollback().await;
    }

    // Sets, from what callers have at hand.
    let list = vec![String::from("x"), String::from("y")];
    let sets = [
        keeper.advisory_locks(&list),
        keeper.advisory_locks(list.clone()),
        keeper.advisory_locks(["x", "y"]),
        keeper.advisory_locks(list.iter().map(String::as_str)),
        keeper.advisory_locks(list.iter().rev().chain(&list)),
        keeper.advisory_locks([LockKey::from("x"), LockKey::from("y")]),
    ];
    for set in sets {
        let guard = set.acquire().await.unwrap();
        assert_eq!(scene.advisory_locks().await, 2);
        assert!(scene.is_held("x").await && scene.is_held("y").await);
        guard.rollback().await;
    }
    let numbers = keeper.advisory_locks(1..=3_i64).acquire().await.unwrap();
    assert_eq!(scene.advisory_locks().await, 3);
    numbers.rollback().await;
    scene.nothing_left().await;
}

// Code that knows only the driver.

/// Code generic over the driver's trait.
async fn driver_total<C: tokio_postgres::GenericClient>(
    client: &C,
) -> Result<i64, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT sum(n)::int8 FROM acct WHERE id = ANY($1)",
            &[&vec!["a", "b"]],
        )
        .await?;
    Ok(row.get(0))
}

/// Code generic over the pool's trait.
async fn pool_total<C: deadpool_postgres::GenericClient>(
    client: &C,
) -> Result<i64, tokio_postgres::Error> {
    let statement = client
        .prepare_cached("SELECT sum(n)::int8 FROM acct")
        .await?;
    let row = client.query_one(&statement, &[]).await?;
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn code_that_is_generic_over_either_client() {
    let scene = accounts(2).await;
    let keeper = scene.keeper.clone();
    let task = tokio::spawn(async move {
        keeper
            .transaction(async |tx| {
                withdraw(tx, "a", 10).await?;
                let totals = (
                    driver_total(&***tx.client()).await?,
                    pool_total(tx.client()).await?,
                );
                Ok::<_, BankError>(totals)
            })
            .await
    });
    // Both see what the transaction did, so they ran in it.
    assert_eq!(task.await.unwrap().unwrap(), (190, 190));

    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    assert_eq!(driver_total(&***guard.client()).await.unwrap(), 190);
    guard.commit().await.unwrap();
    let guard = scene.keeper.advisory_lock("k").session().acquire().await;
    let guard = guard.unwrap();
    assert_eq!(pool_total(guard.client()).await.unwrap(), 190);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// Every query method, once, with the driver's own types.
#[tokio::test]
async fn the_drivers_methods() {
    let scene = accounts(1).await;
    scene
        .keeper
        .transaction(async |tx| {
            let statement = tx.prepare("SELECT n FROM acct WHERE id = $1").await?;
            assert_eq!(tx.query(&statement, &[&"a"]).await?.len(), 1);
            assert_eq!(
                tx.query_one(&statement, &[&"a"]).await?.get::<_, i64>(0),
                100
            );
            assert!(tx.query_opt(&statement, &[&"no"]).await?.is_none());
            let typed = tokio_postgres::types::Type::TEXT;
            let rows = tx
                .query_typed("SELECT n FROM acct WHERE id = $1", &[(&"a", typed.clone())])
                .await?;
            assert_eq!(rows.len(), 1);
            let prepared = tx
                .prepare_typed("SELECT $1", std::slice::from_ref(&typed))
                .await?;
            assert_eq!(prepared.params(), [typed]);
            let rows = tx.query_raw(&statement, [&"a"]).await?;
            let rows: Vec<_> = pin!(rows).try_collect().await?;
            assert_eq!(rows[0].get::<_, i64>(0), 100);

            let sink = tx.copy_in("COPY acct FROM STDIN").await?;
            let mut sink = pin!(sink);
            sink.send(bytes::Bytes::from_static(b"c\t1\nd\t2\n"))
                .await?;
            assert_eq!(sink.finish().await?, 2);
            let out = tx
                .copy_out("COPY (SELECT id FROM acct ORDER BY id) TO STDOUT")
                .await?;
            let out: Vec<bytes::Bytes> = pin!(out).try_collect().await?;
            assert_eq!(out.concat(), b"a\nb\nc\nd\n");

            assert_eq!(
                tx.execute("DELETE FROM acct WHERE id = ANY($1)", &[&vec!["c", "d"]])
                    .await?,
                2
            );
            assert_eq!(tx.simple_query("SELECT 1; SELECT 2").await?.len(), 6);
            tx.batch_execute("SELECT 1; SELECT 2").await?;
            Ok::<_, BankError>(())
        })
        .await
        .unwrap();
    assert_eq!(balance(&scene, "a").await, 100);
    scene.nothing_left().await;
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
