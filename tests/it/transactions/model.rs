//! Random bodies against a model of what a transaction comes to.

use std::future::pending;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use lockkeeper::{Error, Tx};
use lockkeeper_testkit::{AppError, Random, Scene};
use tokio::sync::oneshot;

use super::ids;

/// What a body may do.
#[derive(Clone, Debug)]
enum Step {
    /// An insert by one of the ways that statements can go.
    Insert(i32, Way),
    /// A statement that fails, its error swallowed.
    Fail(Way),
    /// An error that the server never sees.
    Mistake,
    Savepoint(Vec<Step>, End),
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Watched,
    Batch,
    /// Through the bare client.
    Bare,
    /// Sent, and dropped before it is answered.
    Dropped,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Ok,
    Err,
    /// The savepoint's future is dropped when all steps are done.
    Dropped,
}

fn random_way(random: &mut Random) -> Way {
    random.one_of(&[Way::Watched, Way::Batch, Way::Bare, Way::Dropped])
}

fn random_steps(random: &mut Random, depth: u32, next_id: &mut i32) -> Vec<Step> {
    let count = 1 + random.below(4);
    let mut steps = Vec::new();
    for _ in 0..count {
        steps.push(match random.below(10) {
            0..5 => {
                *next_id += 1;
                Step::Insert(*next_id, random_way(random))
            }
            5 => Step::Fail(random_way(random)),
            6 => Step::Mistake,
            _ if depth < 3 => {
                let inner = random_steps(random, depth + 1, next_id);
                Step::Savepoint(inner, random.one_of(&[End::Ok, End::Err, End::Dropped]))
            }
            _ => Step::Mistake,
        });
    }
    steps
}

/// What a transaction comes to: its rows, and whether it has failed.
#[derive(Clone, Default)]
struct Model {
    rows: Vec<i32>,
    failed: bool,
}

impl Model {
    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                _ if self.failed => {}
                Step::Insert(id, _) => self.rows.push(*id),
                Step::Fail(_) => self.failed = true,
                Step::Mistake => {}
                Step::Savepoint(inner, end) => {
                    let before = self.clone();
                    self.run(inner);
                    if self.failed || !matches!(end, End::Ok) {
                        *self = before;
                    }
                }
            }
        }
    }
}

async fn send(tx: &Tx, sql: &str, way: Way) {
    match way {
        Way::Watched => drop(tx.execute(sql, &[]).await),
        Way::Batch => drop(tx.batch_execute(sql).await),
        Way::Bare => drop(tx.client().execute(sql, &[]).await),
        Way::Dropped => drop(tx.batch_execute(sql).now_or_never()),
    }
}

/// Does what the steps say, and swallows all errors.
fn act<'a>(tx: &'a mut Tx, steps: &'a [Step]) -> BoxFuture<'a, ()> {
    Box::pin(async move {
        for step in steps {
            match step {
                Step::Insert(id, way) => {
                    let sql = format!("INSERT INTO t VALUES ({id}, 0)");
                    send(tx, &sql, *way).await;
                }
                Step::Fail(way) => send(tx, "SELECT 1/0", *way).await,
                Step::Mistake => drop(tx.query("SELECT $1::int", &[&"text"]).await),
                Step::Savepoint(inner, end) => {
                    let (done, reached) = oneshot::channel();
                    let savepoint = tx.savepoint(async move |tx| {
                        act(tx, inner).await;
                        match end {
                            End::Ok => Ok(()),
                            End::Err => Err(AppError::Own(0)),
                            End::Dropped => {
                                assert!(done.send(()).is_ok());
                                pending().await
                            }
                        }
                    });
                    tokio::select! {
                        result = savepoint => assert!(result.is_err() || matches!(end, End::Ok)),
                        Ok(()) = reached => {}
                    }
                }
            }
        }
    })
}

/// Whatever a body does and however it hides it: `Ok` means that all of it is there, an error that none of it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_is_what_the_table_says_whatever_the_body_does() {
    let scene = Scene::with_two_rows(2).await;
    let mut failures = 0;
    for seed in 1..=150_u64 {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        let steps = random_steps(&mut Random::new(seed), 0, &mut 10);
        let mut model = Model::default();
        model.run(&steps);
        let body = async |tx: &mut Tx| {
            act(tx, &steps).await;
            Ok::<_, Error>(())
        };
        let answer = match seed % 3 {
            0 => scene.keeper.transaction(body).await,
            1 => scene.keeper.with_advisory_lock("model", body).await,
            _ => {
                let lock = scene.keeper.advisory_lock("model").session();
                let mut guard = lock.acquire().await.unwrap();
                let answer = guard.transaction(body).await;
                assert!(scene.is_held("model").await, "seed {seed}");
                guard.release().await.unwrap();
                answer
            }
        };
        let mut expected = vec![1, 2];
        if !model.failed {
            expected.extend(&model.rows);
        }
        assert_eq!(
            answer.is_err(),
            model.failed,
            "seed {seed}: {answer:?} {steps:#?}"
        );
        assert_eq!(ids(&scene).await, expected, "seed {seed}: {steps:#?}");
        failures += u32::from(model.failed);
    }
    assert!(
        (20..130).contains(&failures),
        "{failures} failures are no mixture"
    );
    scene.nothing_left().await;
}
