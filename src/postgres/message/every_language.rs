//! The server's messages about deadlocks in each of its languages: all give the same facts.

#![allow(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

use std::fmt::Write as _;

use lockkeeper_testkit::{Database, Server, Skip, eventually};
use tokio_postgres::{Client, Error};

use super::{ContextKind, DetailWait, LineKind, LockTag, context, deadlock_detail};

/// The locale for each language of PostgreSQL 15. Georgian is partly English.
const LOCALES: [&str; 11] = [
    "de_DE.UTF-8",
    "es_ES.UTF-8",
    "fr_FR.UTF-8",
    "it_IT.UTF-8",
    "ja_JP.UTF-8",
    "ka_GE.UTF-8",
    "ko_KR.UTF-8",
    "ru_RU.UTF-8",
    "sv_SE.UTF-8",
    "uk_UA.UTF-8",
    "zh_CN.UTF-8",
];

/// A session of the cycle.
struct Session {
    client: Client,
    pid: i32,
}

impl Session {
    /// A session that never runs the deadlock check.
    async fn new(database: &Database) -> Self {
        let client = database.connect().await;
        client
            .batch_execute("SET deadlock_timeout = '1h'; BEGIN")
            .await
            .unwrap();
        let pid = number(&client, "SELECT pg_backend_pid()").await;
        Self { client, pid }
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// The id of its transaction, which must have one.
    async fn xid(&self) -> u32 {
        let sql = "SELECT (pg_current_xact_id_if_assigned()::text::bigint % 4294967296)::oid";
        number(&self.client, sql).await
    }
}

async fn number<T>(client: &Client, sql: &str) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// A statement that waits, sent but not awaited.
async fn begin_wait<'a>(
    session: &'a Session,
    observer: &Client,
    sql: &'a str,
) -> impl Future<Output = Result<(), Error>> + 'a {
    let mut waiting = Box::pin(session.client.batch_execute(sql));
    let early = futures::poll!(&mut waiting);
    assert!(early.is_pending(), "{early:?}");
    eventually("the backend waits for no lock", async || {
        let sql = format!(
            "SELECT count(*) FROM pg_locks WHERE pid = {} AND NOT granted",
            session.pid
        );
        number::<i64>(observer, &sql).await > 0
    })
    .await;
    waiting
}

/// The messages of a server with this `locale` about a deadlock, and the true facts.
struct Deadlock {
    detail: String,
    context: String,
    /// The server's own log of it with the statements, if it can be read.
    log: Option<String>,
    waits: Vec<DetailWait>,
    statements: Vec<String>,
    /// The page and offset of the row that the victim waited for.
    row: (u32, u16),
    relation: String,
}

/// Five sessions in a cycle, each waiting for a lock of another kind: a transaction (the victim), an advisory lock, a
/// relation, a tuple, and a transaction again.
async fn provoke(database: &Database, locale: &str, number_of_table: usize) -> Deadlock {
    let observer = database.connect().await;
    let relation = format!("acc\"ount ({number_of_table},1)");
    let table = format!("\"{}\"", relation.replace('"', "\"\""));
    observer
        .batch_execute(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, balance int NOT NULL, filler char(1900));
             ALTER TABLE {table} ALTER filler SET STORAGE PLAIN;
             INSERT INTO {table} SELECT id, 0, md5(id::text) FROM generate_series(1, 20) id;
             CREATE TABLE other_{number_of_table} ()"
        ))
        .await
        .unwrap();
    let position = async |id: i32| -> (u32, u16) {
        let sql = format!("SELECT ctid::text FROM {table} WHERE id = {id}");
        let ctid: String = number(&observer, &sql).await;
        let (page, offset) = ctid[1..ctid.len() - 1].split_once(',').unwrap();
        (page.parse().unwrap(), offset.parse().unwrap())
    };
    let (row_2, row_14) = (position(2).await, position(14).await);

    let [a, b, c, d, e] = [
        Session::new(database).await,
        Session::new(database).await,
        Session::new(database).await,
        Session::new(database).await,
        Session::new(database).await,
    ];
    let update_2 = format!("UPDATE {table} SET balance = 2 WHERE id = 2");
    let update_14 = format!("UPDATE {table} SET balance = 14 WHERE id = 14 -- 7: x");
    let key = "SELECT pg_advisory_xact_lock(-7000000001)";
    let lock = format!("LOCK TABLE\n  other_{number_of_table} IN SHARE MODE");
    a.run(&format!("SET lc_messages = '{locale}'; {update_14}"))
        .await;
    b.run(&update_2).await;
    c.run(key).await;
    d.run(&format!(
        "LOCK TABLE other_{number_of_table} IN EXCLUSIVE MODE"
    ))
    .await;
    let (xid_a, xid_b) = (a.xid().await, b.xid().await);

    // The first waiter for a row takes the tuple lock, and the next one waits for that.
    let waiting_e = begin_wait(&e, &observer, &update_14).await;
    let waiting_d = begin_wait(&d, &observer, &update_14).await;
    let waiting_c = begin_wait(&c, &observer, &lock).await;
    let waiting_b = begin_wait(&b, &observer, key).await;
    let log_before = database.server().log_len();
    a.run("SET LOCAL deadlock_timeout = '1ms'").await;
    let error = a.client.batch_execute(&update_2).await.unwrap_err();
    let log = database
        .server()
        .is_private()
        .then(|| database.server().log_since(log_before));

    a.run("ROLLBACK").await;
    waiting_e.await.unwrap();
    e.run("ROLLBACK").await;
    waiting_d.await.unwrap();
    d.run("ROLLBACK").await;
    waiting_c.await.unwrap();
    c.run("ROLLBACK").await;
    waiting_b.await.unwrap();

    let database_oid = number(
        &observer,
        "SELECT oid FROM pg_database WHERE datname = current_database()",
    )
    .await;
    let oid_of = async |name: &str| -> u32 {
        let sql = format!("SELECT '{name}'::regclass::oid");
        number(&observer, &sql).await
    };
    let objects = [
        ("ShareLock", LockTag::Transaction { xid: xid_b }),
        (
            "ExclusiveLock",
            LockTag::Advisory {
                database: database_oid,
                // -7000000001 as two unsigned halves.
                classid: 4_294_967_294,
                objid: 1_589_934_591,
                objsubid: 1,
            },
        ),
        (
            "ShareLock",
            LockTag::Relation {
                database: database_oid,
                relation: oid_of(&format!("other_{number_of_table}")).await,
            },
        ),
        (
            "ExclusiveLock",
            LockTag::Tuple {
                database: database_oid,
                relation: oid_of(&table).await,
                page: row_14.0,
                offset: row_14.1,
            },
        ),
        ("ShareLock", LockTag::Transaction { xid: xid_a }),
    ];
    assert_ne!(row_14.0, u32::from(row_14.1), "the two could be mixed up");
    let pids = [a.pid, b.pid, c.pid, d.pid, e.pid];
    let waits = objects.into_iter().enumerate();
    let waits = waits.map(|(at, (mode, object))| DetailWait {
        waiter: pids[at],
        blocker: pids[(at + 1) % 5],
        mode: mode.to_owned(),
        object,
    });
    let error = error.as_db_error().unwrap();
    Deadlock {
        detail: error.detail().unwrap().to_owned(),
        context: error.where_().unwrap().to_owned(),
        log,
        waits: waits.collect(),
        statements: vec![update_2, key.to_owned(), lock, update_14.clone(), update_14],
        row: row_2,
        relation,
    }
}

impl Deadlock {
    /// All messages are parsed correctly.
    fn check(&self) {
        let detail = deadlock_detail(&self.detail);
        assert_eq!(
            detail.waits().cloned().collect::<Vec<_>>(),
            self.waits,
            "{}",
            self.detail
        );
        assert!(detail.is_cycle());
        assert_eq!(detail.lines.len(), 5);

        let lines = context(&self.context);
        let ContextKind::Row(row) = &lines[0].kind else {
            panic!("{}", self.context);
        };
        assert_eq!((row.page, row.offset), self.row, "{}", self.context);
        assert_eq!(row.relation, self.relation, "{}", self.context);
        assert!(!row.index_entry);
        assert_eq!(lines.len(), 1, "{}", self.context);

        let Some(log) = &self.log else { return };
        let first = self.detail.lines().next().unwrap();
        let start = log.find(first).unwrap_or_else(|| panic!("{log}"));
        let lines = log[start..].lines().enumerate();
        let of_detail = lines.take_while(|(at, line)| *at == 0 || line.starts_with('\t'));
        let text = of_detail
            .map(|(_, line)| line)
            .collect::<Vec<_>>()
            .join("\n");
        let logged = deadlock_detail(&text);
        assert!(logged.waits().eq(detail.waits()), "{text}");
        let statements: Vec<_> = logged.lines[5..]
            .iter()
            .map(|line| match &line.kind {
                LineKind::Statement { pid, statement } => (*pid, statement),
                other => panic!("{other:?} in {text}"),
            })
            .collect();
        let pids = self.waits.iter().map(|wait| wait.waiter);
        let expected: Vec<_> = pids.zip(&self.statements).collect();
        assert_eq!(statements, expected, "{text}");
    }
}

#[tokio::test]
async fn a_deadlock_is_parsed_in_english() {
    let database = Server::shared().database().await;
    let deadlock = provoke(&database, "C", 0).await;
    assert!(
        deadlock.detail.contains(" waits for "),
        "{}",
        deadlock.detail
    );
    deadlock.check();
}

#[tokio::test]
async fn a_deadlock_is_parsed_in_every_language_of_the_server() {
    let test = "languages::a_deadlock_is_parsed_in_every_language_of_the_server";
    let database = Server::shared().database().await;
    let observer = database.connect().await;
    let configured: String = number(
        &observer,
        "SELECT coalesce(max(setting), '') FROM pg_config WHERE name = 'CONFIGURE'",
    )
    .await;
    if !configured.contains("--enable-nls") {
        // A server built without translations has none in any locale, so English is its only language.
        return;
    }
    let mut missing = String::new();
    for locale in LOCALES {
        let set = format!("SET lc_messages = '{locale}'");
        if observer.batch_execute(&set).await.is_err() {
            write!(missing, " {locale}").unwrap();
        }
    }
    if !missing.is_empty() {
        // `localedef -i de_DE -f UTF-8 de_DE.UTF-8` creates one, if the package `locales` is installed.
        Skip::new("locales", format!("the system has no{missing}")).report(test);
        return;
    }
    for (at, locale) in LOCALES.into_iter().enumerate() {
        let deadlock = provoke(&database, locale, at + 1).await;
        let is_english = deadlock.detail.contains(" waits for ");
        assert!(
            !is_english || locale.starts_with("ka"),
            "no translation: {}",
            deadlock.detail
        );
        deadlock.check();
    }
}
