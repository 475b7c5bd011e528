//! Services: behind a trait object, and behind HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::eventually_within as eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::{BankError, SOON, accounts, balance, withdraw};

/// Borrowed arguments, a borrowed service, and a result that borrows from neither.
#[async_trait]
trait Bank: Send + Sync {
    async fn transfer(&self, from: &str, to: &str, amount: i64) -> Result<i64, BankError>;
}

struct PgBank {
    keeper: Keeper,
    transfers: AtomicU32,
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
