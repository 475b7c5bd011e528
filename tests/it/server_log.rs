//! The logs that a real server writes about locks, in all its formats and in several languages.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lockkeeper::graph::LockObject;
use lockkeeper::server_log::{LogEvent, LogEventKind, Reader};
use lockkeeper::{LockKey, LockMode};
use lockkeeper_testkit::{Database, GIVE_UP_AFTER, Server, Skip, eventually};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

const PREFIX: &str = "%m [%p] %q%u@%d %a ";

/// A statement over several lines, with what ends a text in each of the formats.
const STATEMENT: &str =
    "UPDATE t\n\tSET v = 'secret, \"\"quoted\"\" é'\n WHERE id = 1 -- \\ LOG:  x";

struct Logs {
    folder: PathBuf,
    has_json: bool,
}

impl Logs {
    async fn of(server: &Server, observer: &Client) -> Self {
        let row = observer
            .query_one("SHOW data_directory", &[])
            .await
            .unwrap();
        Self {
            folder: PathBuf::from(row.get::<_, String>(0)).join("log"),
            has_json: server.major() >= 15,
        }
    }

    fn read(&self, name: &str, mut reader: Reader) -> Vec<LogEvent> {
        let bytes = std::fs::read(self.folder.join(name)).unwrap_or_default();
        let mut events: Vec<_> = reader.push(&String::from_utf8_lossy(&bytes)).collect();
        events.extend(reader.finish());
        events
    }

    /// By the format.
    fn all(&self) -> BTreeMap<&'static str, Vec<LogEvent>> {
        let mut all = BTreeMap::from([
            ("stderr", self.read("server.log", Reader::stderr(PREFIX))),
            (
                "guessed",
                self.read("server.log", Reader::stderr_of_any_prefix()),
            ),
            ("csv", self.read("server.csv", Reader::csv())),
        ]);
        if self.has_json {
            all.insert("json", self.read("server.json", Reader::json()));
        }
        all
    }

    /// Waits for a message in every format; the collector writes them one by one.
    async fn wait_for(
        &self,
        kind: LogEventKind,
        pid: i32,
        statement: &str,
    ) -> BTreeMap<&'static str, LogEvent> {
        let is_it = |event: &&LogEvent| {
            event.kind() == kind && event.pid() == Some(pid) && event.statement() == Some(statement)
        };
        let mut found = BTreeMap::new();
        eventually(kind.as_str(), async || {
            let all = self.all();
            found = all
                .iter()
                .filter_map(|(format, events)| Some((*format, events.iter().find(is_it)?.clone())))
                .collect();
            found.len() == all.len()
        })
        .await;
        found
    }
}

struct Session {
    client: Arc<Client>,
    pid: i32,
}

impl Session {
    async fn new(database: &Database, locale: &str, name: &str) -> Self {
        let mut config = database.config();
        config.application_name(name);
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
            .batch_execute(&format!("SET lc_messages = '{locale}'"))
            .await
            .unwrap();
        let pid = client
            .query_one("SELECT pg_backend_pid()", &[])
            .await
            .unwrap()
            .get(0);
        Self {
            client: Arc::new(client),
            pid,
        }
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    async fn waits(
        &self,
        observer: &Client,
        sql: &str,
    ) -> JoinHandle<Result<(), tokio_postgres::Error>> {
        let (client, sql) = (Arc::clone(&self.client), sql.to_owned());
        let wait = tokio::spawn(async move { client.batch_execute(&sql).await });
        eventually("it does not wait", async || {
            let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)";
            let row = observer.query_one(sql, &[&self.pid]).await.unwrap();
            row.get(0)
        })
        .await;
        wait
    }
}

/// What is the same in every format.
fn check_same(events: &BTreeMap<&'static str, LogEvent>, kind: LogEventKind) -> LogEvent {
    let first = events["csv"].clone();
    for (format, event) in events {
        assert_eq!(event.kind(), kind, "{format}");
        assert_eq!(event.statement(), first.statement(), "{format}");
        assert_eq!(event.mode(), first.mode(), "{format}");
        assert_eq!(event.object(), first.object(), "{format}: {event}\n{first}");
        assert_eq!(event.waited(), first.waited(), "{format}");
        assert_eq!(event.holders(), first.holders(), "{format}");
        assert_eq!(event.queue(), first.queue(), "{format}");
        assert_eq!(event.waits(), first.waits(), "{format}");
        assert_eq!(event.row(), first.row(), "{format}");
        assert_eq!(event.user(), first.user(), "{format}");
        assert_eq!(event.database(), first.database(), "{format}");
        // Each format asks the clock for itself.
        let times = (event.time().unwrap(), first.time().unwrap());
        let apart = times.0.duration_since(times.1);
        assert!(apart.unwrap_or_else(|error| error.duration()) < GIVE_UP_AFTER);
        if *format != "guessed" {
            assert_eq!(event.application_name(), first.application_name());
        }
        let shown = format!("{event} {event:?}");
        assert!(!shown.contains("secret"), "{shown}");
    }
    first
}

/// Each kind of message once, in the language of a locale.
async fn check(database: &Database, observer: &Client, logs: &Logs, locale: &str, at: i32) {
    let session = async |name: &str| Session::new(database, locale, name).await;
    let a = session("billing src/pay.rs:42").await;
    let b = session("billing: of [x] src/refund.rs:17").await;
    let c = session("").await;
    let oid_of = async |name: &str| -> u32 {
        let sql = format!("SELECT '{name}'::regclass::oid");
        observer.query_one(&sql, &[]).await.unwrap().get(0)
    };
    use LogEventKind as Kind;

    // A row that another transaction has locked.
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1").await;
    let wait = b.waits(observer, STATEMENT).await;
    let event = check_same(
        &logs.wait_for(Kind::StillWaiting, b.pid, STATEMENT).await,
        Kind::StillWaiting,
    );
    assert_eq!(event.statement(), Some(STATEMENT), "{locale}");
    assert_eq!(event.mode(), Some(LockMode::Share));
    assert!(
        matches!(event.object(), Some(LockObject::Transaction(_))),
        "{event}"
    );
    assert_eq!(
        (event.holders(), event.queue()),
        (&[a.pid][..], &[b.pid][..])
    );
    assert!(event.waited().unwrap() >= Duration::from_millis(100));
    assert_eq!(event.row().unwrap().relation(), "t");
    assert_eq!(event.database(), Some(database.name()));
    assert_eq!(event.call_site(), Some("src/refund.rs:17"));
    a.run("ROLLBACK").await;
    wait.await.unwrap().unwrap();
    let event = check_same(
        &logs.wait_for(Kind::Acquired, b.pid, STATEMENT).await,
        Kind::Acquired,
    );
    assert_eq!(event.statement(), Some(STATEMENT));

    // An advisory lock, by its name; and a relation held by a prepared transaction.
    let key = LockKey::from("invoice:42");
    let number = key.as_i64().unwrap();
    a.run(&format!("SELECT pg_advisory_lock({number})")).await;
    let lock = format!("SELECT pg_advisory_lock({number})");
    let wait = b.waits(observer, &lock).await;
    let event = logs.wait_for(Kind::StillWaiting, b.pid, &lock).await;
    let event = check_same(&event, Kind::StillWaiting);
    assert!(
        event
            .object()
            .unwrap()
            .advisory_key()
            .unwrap()
            .same_lock(&key),
        "{event}"
    );
    a.run("SELECT pg_advisory_unlock_all()").await;
    wait.await.unwrap().unwrap();
    b.run("SELECT pg_advisory_unlock_all()").await;
    a.run(&format!("BEGIN; LOCK TABLE u; PREPARE TRANSACTION 'p{at}'"))
        .await;
    let wait = c.waits(observer, "TABLE u").await;
    let event = check_same(
        &logs.wait_for(Kind::StillWaiting, c.pid, "TABLE u").await,
        Kind::StillWaiting,
    );
    assert_eq!(event.holders(), [0]);
    assert_eq!(event.application_name(), None);
    let relation = event.object().unwrap().relation().unwrap().oid();
    assert_eq!(relation, oid_of("u").await);
    observer
        .batch_execute(&format!("ROLLBACK PREPARED 'p{at}'"))
        .await
        .unwrap();
    wait.await.unwrap().unwrap();

    // Timeouts, and statements that do not wait.
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1; LOCK TABLE u")
        .await;
    b.run("SET lock_timeout = '250ms'").await;
    b.client.batch_execute(STATEMENT).await.unwrap_err();
    let event = check_same(
        &logs.wait_for(Kind::LockTimeout, b.pid, STATEMENT).await,
        Kind::LockTimeout,
    );
    assert_eq!(event.statement(), Some(STATEMENT));
    assert_eq!(event.row().unwrap().relation(), "t");
    b.run("RESET lock_timeout").await;
    let nowait = "SELECT FROM t WHERE id = 1 FOR UPDATE NOWAIT";
    b.client.batch_execute(nowait).await.unwrap_err();
    eventually("no message of NOWAIT", async || {
        let mut all = logs.all();
        all.retain(|format, _| *format == "csv" || *format == "json");
        all.values().all(|events| {
            let of_it =
                |event: &LogEvent| event.kind() == Kind::NotAvailable && event.pid() == Some(b.pid);
            events
                .iter()
                .any(|event| of_it(event) && event.statement() == Some(nowait))
        })
    })
    .await;
    a.run("ROLLBACK").await;

    // A deadlock: B's check comes first.
    a.run("SET deadlock_timeout = '10min'; BEGIN; UPDATE t SET v = 'secret a' WHERE id = 1")
        .await;
    b.run("BEGIN; UPDATE t SET v = 'b' WHERE id = 2").await;
    let wait = a
        .waits(observer, "UPDATE t\nSET v = 'secret a' WHERE id = 2")
        .await;
    b.client.batch_execute(STATEMENT).await.unwrap_err();
    wait.await.unwrap().unwrap();
    let event = check_same(
        &logs.wait_for(Kind::DeadlockFound, b.pid, STATEMENT).await,
        Kind::DeadlockFound,
    );
    assert_eq!(event.holders(), [a.pid], "{event}");
    let event = check_same(
        &logs.wait_for(Kind::Deadlock, b.pid, STATEMENT).await,
        Kind::Deadlock,
    );
    let waits: Vec<_> = event
        .waits()
        .iter()
        .map(|wait| (wait.waiter(), wait.blocker(), wait.mode(), wait.statement()))
        .collect();
    let share = Some(LockMode::Share);
    assert_eq!(
        waits,
        [
            (b.pid, a.pid, share, Some(STATEMENT)),
            (
                a.pid,
                b.pid,
                share,
                Some("UPDATE t\nSET v = 'secret a' WHERE id = 2")
            ),
        ],
        "{locale}"
    );
    a.run("ROLLBACK; RESET deadlock_timeout").await;
    b.run("ROLLBACK").await;

    // A cycle over a queue, which the server opens: C is let through before B.
    a.run("SET deadlock_timeout = '10min'; BEGIN; LOCK TABLE t IN ACCESS SHARE MODE")
        .await;
    b.run("SET deadlock_timeout = '10min'; BEGIN").await;
    c.run("BEGIN; LOCK TABLE u").await;
    let wait_b = b.waits(observer, "LOCK TABLE t").await;
    let wait_a = a.waits(observer, "LOCK TABLE u").await;
    let read = "LOCK TABLE t IN ACCESS SHARE MODE";
    c.run(read).await;
    let event = check_same(
        &logs.wait_for(Kind::DeadlockAvoided, c.pid, read).await,
        Kind::DeadlockAvoided,
    );
    assert_eq!(event.mode(), Some(LockMode::AccessShare));
    c.run("ROLLBACK").await;
    wait_a.await.unwrap().unwrap();
    a.run("ROLLBACK").await;
    wait_b.await.unwrap().unwrap();
}

fn settings(major_has_json: bool) -> Vec<(&'static str, &'static str)> {
    vec![
        ("logging_collector", "on"),
        (
            "log_destination",
            if major_has_json {
                "stderr,csvlog,jsonlog"
            } else {
                "stderr,csvlog"
            },
        ),
        ("log_directory", "log"),
        ("log_filename", "server.log"),
        ("log_file_mode", "0644"),
        ("log_timezone", "UTC"),
        ("log_line_prefix", PREFIX),
        ("log_lock_waits", "on"),
        ("deadlock_timeout", "100ms"),
    ]
}

#[tokio::test]
async fn what_a_server_logs_about_locks_is_read_in_every_format_and_language() {
    let test = "server_log::what_a_server_logs_about_locks_is_read_in_every_format_and_language";
    let has_json = Server::shared().major() >= 15;
    let server = Server::start(&settings(has_json)).unwrap();
    let database = server.database().await;
    let observer = database.connect().await;
    observer
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 9) n; \
             CREATE TABLE u (id int)",
        )
        .await
        .unwrap();
    let logs = Logs::of(&server, &observer).await;
    check(&database, &observer, &logs, "C", 0).await;
    let sql = "SELECT coalesce(max(setting), '') FROM pg_config WHERE name = 'CONFIGURE'";
    let configured: String = observer.query_one(sql, &[]).await.unwrap().get(0);
    if !configured.contains("--enable-nls") {
        // A server that was built without translations has none in any locale: English is all of its languages.
        return;
    }
    for (at, locale) in ["de_DE.UTF-8", "ja_JP.UTF-8"].into_iter().enumerate() {
        let set = format!("SET lc_messages = '{locale}'");
        if observer.batch_execute(&set).await.is_err() {
            // `localedef -i de_DE -f UTF-8 de_DE.UTF-8` makes one, where the package `locales` is installed.
            Skip::new("locales", format!("the system has no {locale}")).report(test);
            return;
        }
        observer.batch_execute("RESET lc_messages").await.unwrap();
        let at = i32::try_from(at).unwrap() + 1;
        check(&database, &observer, &logs, locale, at).await;
        let log = std::fs::read_to_string(logs.folder.join("server.log")).unwrap();
        let word = ["Prozess", "プロセス"][usize::try_from(at).unwrap() - 1];
        assert!(log.contains(word), "no translation to {locale}");
    }
}

/// 18 and later log what was not waited for, too.
#[tokio::test]
async fn a_lock_that_was_not_waited_for_is_read_where_it_is_logged() {
    let major = Server::shared().major();
    if major < 18 {
        return;
    }
    let server = Server::start(&settings(true)).unwrap();
    let database = server.database().await;
    let observer = database.connect().await;
    observer
        .batch_execute("CREATE TABLE u (id int)")
        .await
        .unwrap();
    let logs = Logs::of(&server, &observer).await;
    let a = Session::new(&database, "C", "a").await;
    let b = Session::new(&database, "C", "b").await;
    a.run("BEGIN; INSERT INTO u VALUES (1); SELECT FROM u FOR UPDATE")
        .await;
    b.run("SET log_lock_failures = on").await;
    let sql = "SELECT FROM u FOR UPDATE NOWAIT; LOCK TABLE u IN SHARE MODE NOWAIT";
    b.client.batch_execute(sql).await.unwrap_err();
    a.run("COMMIT; BEGIN; SELECT FROM u FOR UPDATE").await;
    b.client
        .batch_execute("SELECT FROM u FOR UPDATE NOWAIT")
        .await
        .unwrap_err();
    let mut found = Vec::new();
    eventually("no message of it", async || {
        found = logs
            .read("server.log", Reader::stderr(PREFIX))
            .into_iter()
            // The errors themselves are read, too. They do not name the mode.
            .filter(|event| event.kind() == LogEventKind::NotAvailable && event.mode().is_some())
            .collect();
        !found.is_empty()
    })
    .await;
    let event = &found[0];
    assert_eq!(
        (event.pid(), event.holders()),
        (Some(b.pid), &[a.pid][..]),
        "{event}"
    );
    assert_eq!(
        (event.waited(), event.mode()),
        (None, Some(LockMode::Share)),
        "{event}"
    );
}
