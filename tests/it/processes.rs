//! Locks between processes, and what is left of one that was killed.
//!
//! The other process is this test binary once more, told by its environment what to do.

use std::env;
use std::io::{Read as _, Write as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

use deadpool_postgres::{Manager, Pool};
use futures::future::pending;
use lockkeeper::{Error, Keeper, Leader};
use lockkeeper_testkit::{ENDLESS, GIVE_UP_AFTER, Scene, eventually, in_time};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio_postgres::{IsolationLevel, NoTls};

const KEY: i64 = 800;
const OWN: i64 = 801;

const TASK: &str = "LOCKKEEPER_TEST_CHILD";
const URL: &str = "LOCKKEEPER_TEST_CHILD_URL";

/// Another process at work. It is killed when this is dropped, and ends by itself when its standard input does.
struct Other {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    _stdin: ChildStdin,
}

impl Other {
    fn start(scene: &Scene, task: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "processes::the_other_process",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(TASK, task)
            .env(URL, scene.database.url())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let _stdin = child.stdin.take().unwrap();
        Self {
            child,
            lines,
            _stdin,
        }
    }

    /// Waits until the process says so.
    async fn says(&mut self, word: &str) {
        let wait = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                if line == word {
                    return;
                }
            }
            panic!("the other process ended without saying {word:?}");
        };
        let wait = tokio::time::timeout(Duration::from_secs(30), wait).await;
        wait.unwrap_or_else(|_| panic!("the other process does not say {word:?}"));
    }

    /// SIGKILL.
    async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// Not a test: what the other process runs. Does nothing where the environment does not say what.
#[test]
fn the_other_process() {
    let (Ok(task), Ok(url)) = (env::var(TASK), env::var(URL)) else {
        return;
    };
    // Never without the process that started it.
    drop(std::thread::spawn(|| {
        std::io::stdin().read_to_end(&mut Vec::new()).ok();
        std::process::exit(1);
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let manager = Manager::new(url.parse().unwrap(), NoTls);
        let pool = Pool::builder(manager).max_size(2).build().unwrap();
        let keeper = Keeper::builder(pool).lock_wait(ENDLESS).build();
        work(&task, keeper).await.unwrap();
    });
}

fn say(word: &str) {
    // The harness may have left its line unfinished.
    let mut stdout = std::io::stdout();
    writeln!(stdout, "\n{word}").unwrap();
    stdout.flush().unwrap();
}

async fn work(task: &str, keeper: Keeper) -> Result<(), Error> {
    let lock = keeper.advisory_lock(KEY);
    match task {
        "hold" => {
            let _guard = lock.acquire().await?;
            say("ready");
            pending().await
        }
        "hold for the session" => {
            let _guard = lock.session().acquire().await?;
            say("ready");
            pending().await
        }
        "hold in a transaction of a session guard" => {
            let mut guard = lock.session().acquire().await?;
            let transaction = guard.transaction(async |tx| {
                tx.batch_execute("CREATE TABLE never (id int)").await?;
                say("ready");
                pending::<Result<(), Error>>().await
            });
            transaction.await
        }
        "lead" => {
            let _leadership = short_terms(&keeper).campaign().await?;
            say("ready");
            pending().await
        }
        "hold in a section" => {
            let section = keeper.with_advisory_lock(KEY, async |tx| {
                tx.batch_execute("CREATE TABLE never (id int)").await?;
                say("ready");
                pending::<Result<(), Error>>().await
            });
            section.await
        }
        "hold in a long statement" => {
            let guard = lock.acquire().await?;
            say("ready");
            Ok(guard.batch_execute("SELECT pg_sleep(60)").await?)
        }
        "wait" => lock.acquire().await.map(drop),
        "wait for the session" => lock.session().acquire().await.map(drop),
        "wait before a snapshot" => {
            let lock = lock.isolation(IsolationLevel::Serializable);
            lock.acquire().await.map(drop)
        }
        "wait in a transaction" => {
            let mut guard = keeper.advisory_lock(OWN).acquire().await?;
            guard.advisory_lock(KEY).await
        }
        "backfill" => {
            let backfill = keeper.backfill("counted", "id").set("n = n + 1");
            // Once a batch has been committed, and before the next one.
            let told = backfill.batch_rows(20..=20).on_progress(|_| say("batch"));
            told.run().await?;
            say("done");
            Ok(())
        }
        "count" => {
            for n in 0..40 {
                let section = async || {
                    if n % 2 == 0 {
                        let section = keeper.with_advisory_lock(KEY, async |tx| {
                            let row = tx.query_one("SELECT n FROM counter", &[]).await?;
                            let n: i32 = row.get(0);
                            // Room for another process to read the same number, were it let in.
                            tokio::time::sleep(Duration::from_millis(1)).await;
                            tx.execute("UPDATE counter SET n = $1", &[&(n + 1)]).await?;
                            Ok::<_, Error>(())
                        });
                        return section.await;
                    }
                    let guard = keeper.advisory_lock(KEY).session().acquire().await?;
                    let row = guard.query_one("SELECT n FROM counter", &[]).await?;
                    let n: i32 = row.get(0);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    guard
                        .execute("UPDATE counter SET n = $1", &[&(n + 1)])
                        .await?;
                    guard.release().await
                };
                section().await?;
            }
            say("done");
            Ok(())
        }
        "wait in turn" => {
            let guard = lock.acquire().await?;
            let insert = "INSERT INTO served (pid) VALUES (pg_backend_pid())";
            guard.execute(insert, &[]).await?;
            guard.commit().await
        }
        other => panic!("{other:?} is no task"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_a_killed_process_goes_to_the_next() {
    for task in [
        "hold",
        "hold for the session",
        "hold in a transaction of a session guard",
        "hold in a section",
    ] {
        for session in [false, true] {
            let scene = Scene::new(2).await;
            let mut other = Other::start(&scene, task);
            other.says("ready").await;
            assert_eq!(scene.holders(KEY).await.len(), 1, "{task}");
            assert!(
                scene
                    .keeper
                    .advisory_lock(KEY)
                    .try_acquire()
                    .await
                    .unwrap()
                    .is_none()
            );
            let lock = scene.keeper.advisory_lock(KEY).wait(ENDLESS);
            let waiter = tokio::spawn(async move {
                if session {
                    drop(lock.session().acquire().await.unwrap());
                } else {
                    drop(lock.acquire().await.unwrap());
                }
            });
            scene.until_awaited_by(1, KEY).await;
            assert!(!waiter.is_finished());
            other.kill().await;
            let waiter = tokio::time::timeout(GIVE_UP_AFTER, waiter).await;
            waiter
                .unwrap_or_else(|_| panic!("{task}: the key is not free"))
                .unwrap();
            scene.nothing_left().await;
            let sql = "SELECT to_regclass('never') IS NULL";
            let rolled_back: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
            assert!(rolled_back, "{task}");
        }
    }
}

const TAKES_OVER: Duration = Duration::from_millis(650);

fn short_terms(keeper: &Keeper) -> Leader {
    keeper
        .leader("l")
        .step_down_after(Duration::from_millis(600))
        .takeover_delay(TAKES_OVER)
        .poll_interval(Duration::from_millis(10))
}

/// It has not resigned: for all that its successor knows, it may have lost its connection only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_successor_of_a_killed_leader_waits_and_has_a_newer_token() {
    let scene = Scene::new(2).await;
    scene.keeper.fencing().set_up().await.unwrap();
    let mut other = Other::start(&scene, "lead");
    other.says("ready").await;
    let key = ("lockkeeper leader", "l");
    assert_eq!(scene.holders(key).await.len(), 1);
    let candidate = tokio::spawn(short_terms(&scene.keeper).campaign());
    let killed = Instant::now();
    other.kill().await;
    let leadership = in_time("the succession", candidate).await.unwrap().unwrap();
    assert!(killed.elapsed() >= TAKES_OVER);
    assert_eq!(leadership.token().counter(), 2);
    leadership.resign().await.unwrap();
    scene.nothing_left().await;
}

/// Kills a process that waits, and tells how long its waiter stays in the queue.
async fn kill_a_waiter(task: &str) -> Duration {
    let scene = Scene::new(1).await;
    let holder = scene.database.connect().await;
    let take = "SELECT pg_advisory_lock($1)";
    holder.execute(take, &[&KEY]).await.unwrap();
    let other = Other::start(&scene, task);
    let mut waiter = None;
    eventually("it does not wait", async || {
        waiter = scene.waiters(KEY).await.first().copied();
        waiter.is_some()
    })
    .await;
    let waiter = waiter.unwrap();
    other.kill().await;
    let killed = Instant::now();
    eventually(&format!("{task}: {waiter} still waits"), async || {
        scene.waiters(KEY).await.is_empty()
    })
    .await;
    let left = killed.elapsed();
    drop(holder);
    // The key goes to the living.
    let next = scene.keeper.advisory_lock(KEY).acquire().await.unwrap();
    next.commit().await.unwrap();
    scene.nothing_left().await;
    left
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_while_it_waits_leaves_the_queue() {
    for task in ["wait", "wait for the session", "wait before a snapshot"] {
        let mut left = Vec::new();
        for _ in 0..2 {
            left.push(kill_a_waiter(task).await);
        }
        let best = left.iter().min().unwrap();
        assert!(
            *best < Duration::from_secs(1),
            "{task}: left the queue after {left:?}"
        );
    }
}

/// It holds the locks of its transaction too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_while_it_waits_in_a_transaction_leaves_the_queue() {
    kill_a_waiter("wait in a transaction").await;
}

/// One waiter in each: the server's own queue orders them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_processes_are_served_in_the_order_in_which_they_asked() {
    let scene = Scene::new(1).await;
    let create = "CREATE TABLE served (n int GENERATED ALWAYS AS IDENTITY, pid int)";
    scene.run(create).await;
    let holder = scene.holder(KEY).await;
    let (mut others, mut asked) = (Vec::new(), Vec::new());
    for n in 1..=8 {
        others.push(Other::start(&scene, "wait in turn"));
        scene.until_awaited_by(n, KEY).await;
        let waiters = scene.waiters(KEY).await;
        asked.extend(
            waiters
                .into_iter()
                .filter(|pid| !asked.contains(pid))
                .collect::<Vec<_>>(),
        );
    }
    assert_eq!(asked.len(), 8);
    drop(holder);
    eventually("not all are served", async || {
        scene.count("served").await == 8
    })
    .await;
    assert_eq!(
        scene.column("SELECT pid FROM served ORDER BY n").await,
        asked
    );
    drop(others);
    scene.nothing_left().await;
}

/// A server checks a connection in the middle of a statement only where it is configured to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_in_a_long_statement_is_noticed_where_the_server_checks_connections() {
    let scene = Scene::new(1).await;
    let name = scene.database.name();
    let set = format!("ALTER DATABASE {name} SET client_connection_check_interval = '200ms'");
    scene.observer.batch_execute(&set).await.unwrap();
    let mut other = Other::start(&scene, "hold in a long statement");
    other.says("ready").await;
    let sleeps = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND wait_event = 'PgSleep'";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 1
    };
    eventually("it does not sleep", sleeps).await;
    other.kill().await;
    let next = scene.keeper.advisory_lock(KEY).acquire().await.unwrap();
    next.commit().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_exclude_one_another() {
    let scene = Scene::new(1).await;
    let create = "CREATE TABLE counter (n int); INSERT INTO counter VALUES (0)";
    scene.observer.batch_execute(create).await.unwrap();
    let mut others: Vec<_> = (0..3).map(|_| Other::start(&scene, "count")).collect();
    for other in &mut others {
        other.says("done").await;
    }
    let row = scene
        .observer
        .query_one("SELECT n FROM counter", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i32>(0), 3 * 40);
    drop(others);
    scene.nothing_left().await;
}

/// A backfill continues where a killed process has left it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backfill_of_a_killed_process_is_continued_by_the_next() {
    let scene = Scene::new(1).await;
    let create = "CREATE TABLE counted (id int PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                  INSERT INTO counted SELECT i FROM generate_series(1, 20000) AS i";
    scene.observer.batch_execute(create).await.unwrap();
    for killed in 0..6_u64 {
        let mut other = Other::start(&scene, "backfill");
        for _ in 0..=killed {
            other.says("batch").await;
        }
        // Anywhere in the next ones.
        tokio::time::sleep(Duration::from_micros(killed * 700)).await;
        other.kill().await;
        let sum =
            "SELECT (SELECT sum(n) FROM counted), (SELECT rows_done FROM lockkeeper_backfill)";
        let row = scene.observer.query_one(sum, &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1));
        assert!(row.get::<_, i64>(0) >= 20 * i64::try_from(killed).unwrap());
    }
    Other::start(&scene, "backfill").says("done").await;
    let wrong = "SELECT count(*) FROM counted WHERE n <> 1";
    let row = scene.observer.query_one(wrong, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 0);
    scene.nothing_left_within(Duration::from_secs(30)).await;
}
