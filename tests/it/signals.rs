//! Signals go to the session that was seen, or to nobody.

use std::sync::Arc;
use std::time::Duration;

use lockkeeper::graph::{Backend, BackendId};
use lockkeeper::{Keeper, Monitor, Protection, ResolverPolicy, SignalOutcome};
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};

use crate::common::{eventually, poll_times_and_drop, until_it_waits};
use crate::guards::pid_of;

/// Generous: other tests keep the machine busy.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A plain session.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) client: Arc<Client>,
    pub(crate) pid: i32,
}

impl Session {
    pub(crate) async fn new(config: &Config) -> Self {
        let (client, connection) = config.connect(NoTls).await.unwrap();
        drop(tokio::spawn(connection));
        let pid = pid_of(&client).await;
        // The statement that asked is closed by a message of its own, which is to be over by the time this is.
        client.batch_execute("").await.unwrap();
        Self {
            client: Arc::new(client),
            pid,
        }
    }

    pub(crate) async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// Begins something that takes a while.
    pub(crate) fn start(&self, sql: &str) -> JoinHandle<Result<(), tokio_postgres::Error>> {
        let (client, sql) = (Arc::clone(&self.client), sql.to_owned());
        tokio::spawn(async move { client.batch_execute(&sql).await })
    }

    pub(crate) async fn is_alive(&self) -> bool {
        self.client.batch_execute("").await.is_ok()
    }
}

/// A database, somebody who looks at it over a side connection of a role, and somebody who checks.
pub(crate) struct Ground {
    pub(crate) database: Database,
    pub(crate) keeper: Keeper,
    pub(crate) monitor: Monitor,
    pub(crate) observer: Client,
}

impl Ground {
    pub(crate) async fn new() -> Self {
        Self::on(Server::shared()).await
    }

    pub(crate) async fn on(server: &Server) -> Self {
        let database = server.database().await;
        let observer = database.connect().await;
        let sql = "CREATE TABLE t (id int PRIMARY KEY, v text); \
                   INSERT INTO t SELECT n, 'x' FROM generate_series(1, 9) n";
        observer.batch_execute(sql).await.unwrap();
        let keeper = keeper(&database, database.config());
        Self {
            monitor: keeper.monitor(),
            keeper,
            observer,
            database,
        }
    }

    pub(crate) async fn session(&self) -> Session {
        Session::new(&self.database.config()).await
    }

    /// How to connect as a role, which is made.
    pub(crate) async fn role(&self, name: &str, with: &str) -> Config {
        let name = format!("{name} {}", self.database.name());
        let quoted = quoted(&name);
        let sql = format!("CREATE ROLE {quoted} LOGIN PASSWORD 'secret' {with}");
        self.observer.batch_execute(&sql).await.unwrap();
        let grant = format!("GRANT ALL ON t TO {quoted}");
        self.observer.batch_execute(&grant).await.unwrap();
        let mut config = self.database.config();
        config.user(&name).password("secret");
        config
    }

    /// Roles are of the whole server, and outlive the database.
    pub(crate) async fn drop_roles(&self) {
        let like = format!("% {}", self.database.name());
        let sql = "SELECT rolname FROM pg_roles WHERE rolname LIKE $1";
        for row in self.observer.query(sql, &[&like]).await.unwrap() {
            let role = quoted(row.get(0));
            let sql = format!("DROP OWNED BY {role}; DROP ROLE {role}");
            self.observer.batch_execute(&sql).await.unwrap();
        }
    }

    /// The session as the monitor sees it now.
    pub(crate) async fn seen(&self, pid: i32) -> Backend {
        seen_by(&self.monitor, pid).await
    }

    pub(crate) async fn eventually_in(&self, pid: i32, state: &str) {
        eventually(SOON, &format!("{pid} is not {state}"), async || {
            let sql = "SELECT state FROM pg_stat_activity WHERE pid = $1";
            let row = self.observer.query_opt(sql, &[&pid]).await.unwrap();
            row.and_then(|row| row.get::<_, Option<String>>(0))
                .as_deref()
                == Some(state)
        })
        .await;
    }

    pub(crate) async fn eventually_waits(&self, pid: i32) {
        until_it_waits(&self.observer, pid, SOON).await;
    }

    pub(crate) async fn eventually_gone(&self, pid: i32) {
        eventually(SOON, "it is still there", async || {
            let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";
            let row = self.observer.query_one(sql, &[&pid]).await.unwrap();
            !row.get::<_, bool>(0)
        })
        .await;
    }
}

pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Of one role: a look that the side connection does not answer in time is taken on the pool's.
pub(crate) fn keeper(database: &Database, config: Config) -> Keeper {
    let role = config.get_user().expect("a role is named");
    Keeper::builder(database.pool_as(role, 2))
        .application("test")
        .side_connection(config, NoTls)
        .build()
}

pub(crate) async fn seen_by(monitor: &Monitor, pid: i32) -> Backend {
    let activity = monitor.activity().await.unwrap();
    let found = activity.iter().find(|backend| backend.pid() == Some(pid));
    found.unwrap().clone()
}

#[tokio::test]
async fn a_statement_is_cancelled_and_a_session_terminated() {
    let ground = Ground::new().await;
    let session = ground.session().await;
    session
        .run("BEGIN; UPDATE t SET v = 'y' WHERE id = 1")
        .await;
    let idle = ground.seen(session.pid).await;
    assert_eq!(
        ground.monitor.cancel(&idle).await.unwrap(),
        SignalOutcome::NothingRuns
    );
    let sleeping = session.start("SELECT pg_sleep(600)");
    ground.eventually_in(session.pid, "active").await;
    // It was idle when it was seen, and works now: a cancel is for the transaction, a termination for what was idle.
    let outcome = ground.monitor.terminate(&idle).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    assert_eq!(
        ground.monitor.cancel(&idle).await.unwrap(),
        SignalOutcome::Signalled
    );
    let error = sleeping.await.unwrap().unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");

    ground
        .eventually_in(session.pid, "idle in transaction (aborted)")
        .await;
    let aborted = ground.seen(session.pid).await;
    assert_eq!(
        ground.monitor.terminate(&aborted).await.unwrap(),
        SignalOutcome::Signalled
    );
    ground.eventually_gone(session.pid).await;
    for outcome in [
        ground.monitor.terminate(&aborted).await.unwrap(),
        ground.monitor.cancel(&aborted).await.unwrap(),
    ] {
        assert_eq!(outcome, SignalOutcome::Gone);
    }
}

#[tokio::test]
async fn a_transaction_that_has_ended_is_not_avenged() {
    let ground = Ground::new().await;
    let session = ground.session().await;
    session
        .run("BEGIN; UPDATE t SET v = 'y' WHERE id = 1")
        .await;
    let seen = ground.seen(session.pid).await;
    session.run("COMMIT; BEGIN; SELECT FROM t").await;
    for outcome in [
        ground.monitor.terminate(&seen).await.unwrap(),
        ground.monitor.cancel(&seen).await.unwrap(),
    ] {
        assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    }
    session.run("COMMIT").await;
    // Idle, and without a transaction, which it was not.
    let outcome = ground.monitor.terminate(&seen).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    // Seen idle, used since, idle again.
    let seen = ground.seen(session.pid).await;
    session.run("SELECT").await;
    ground.eventually_in(session.pid, "idle").await;
    let outcome = ground.monitor.terminate(&seen).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    assert!(session.is_alive().await);
}

#[tokio::test]
async fn oneself_and_the_servers_own_are_left_alone() {
    let ground = Ground::new().await;
    let activity = ground.monitor.activity().await.unwrap();
    let mut own = 0;
    for backend in &activity {
        let side = backend.application_name() == Some("lockkeeper side connection");
        if backend.backend_type() == Some("client backend") && !side {
            continue;
        }
        for outcome in [
            ground.monitor.cancel(backend).await.unwrap(),
            ground.monitor.terminate(backend).await.unwrap(),
        ] {
            match outcome {
                SignalOutcome::Protected(Protection::Oneself) => own += 1,
                SignalOutcome::Protected(_) | SignalOutcome::Gone => {}
                // An autovacuum worker may be cancelled, and other keepers' connections come and go.
                other => assert_eq!(backend.backend_type(), Some("autovacuum worker"), "{other}"),
            }
        }
    }
    assert_eq!(own, 2);
}

/// It would end with the session, and what was copied be worth nothing.
#[tokio::test]
async fn who_has_begun_a_backup_is_left_alone() {
    let server = Server::start(&[]).unwrap();
    let ground = Ground::on(&server).await;
    let session = ground.session().await;
    let begin = match server.major() {
        14 => "SELECT pg_start_backup('nightly', true, false)",
        _ => "SELECT pg_backup_start('nightly', true)",
    };
    session.run(begin).await;
    let seen = ground.seen(session.pid).await;
    let outcome = ground.monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Protected(Protection::Backup));
    assert!(session.is_alive().await);
}

#[tokio::test]
async fn a_prepared_transaction_is_for_somebody_to_end_by_hand() {
    let ground = Ground::new().await;
    let gid = format!("it's {}", ground.database.name());
    let session = ground.session().await;
    let sql = format!(
        "BEGIN; UPDATE t SET v = 'y' WHERE id = 1; PREPARE TRANSACTION '{}'",
        gid.replace('\'', "''")
    );
    session.run(&sql).await;
    let waiter = ground.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'z' WHERE id = 1");
    ground.eventually_waits(waiter.pid).await;
    let snapshot = ground.monitor.snapshot().await.unwrap();
    let id = BackendId::Prepared(Some(gid.as_str().into()));
    let prepared = snapshot.backend(&id).unwrap();
    let outcome = ground.monitor.terminate(prepared).await.unwrap();
    let SignalOutcome::Prepared {
        by_hand: Some(by_hand),
        ..
    } = outcome
    else {
        panic!("{outcome}");
    };
    ground.observer.batch_execute(&by_hand).await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_a_role_lacks_is_said() {
    let ground = Ground::new().await;
    let victim = ground.role("victim", "").await;
    let victim = Session::new(&victim).await;
    let root = ground.session().await;
    for session in [&victim, &root] {
        session.run("BEGIN; UPDATE t SET v = v WHERE id = -1").await;
    }
    let plain = ground.role("plain \"ops", "").await;
    let plain_name = plain.get_user().unwrap().to_owned();
    let monitor = keeper(&ground.database, plain.clone()).monitor();
    let quoted = quoted(&plain_name);

    let needs = async |pid: i32| {
        let seen = seen_by(&monitor, pid).await;
        match monitor.terminate(&seen).await.unwrap() {
            SignalOutcome::NotPermitted { needs, .. } => needs,
            other => panic!("{other}"),
        }
    };
    // It does what it says, statement by statement, as somebody would who reads it.
    assert_eq!(
        *needs(victim.pid).await,
        *format!("GRANT pg_read_all_stats, pg_signal_backend TO {quoted}")
    );
    let run = async |sql: &str| ground.observer.batch_execute(sql).await.unwrap();
    run(&format!("GRANT pg_signal_backend TO {quoted}")).await;
    let needed = needs(victim.pid).await;
    assert_eq!(*needed, *format!("GRANT pg_read_all_stats TO {quoted}"));
    run(&format!(
        "REVOKE pg_signal_backend FROM {quoted}; GRANT pg_read_all_stats TO {quoted}"
    ))
    .await;
    let needed = needs(victim.pid).await;
    assert_eq!(*needed, *format!("GRANT pg_signal_backend TO {quoted}"));
    // A member that does not inherit has no privilege by it, and another GRANT would give it none.
    run(&format!(
        "GRANT pg_signal_backend TO {quoted}; ALTER ROLE {quoted} NOINHERIT"
    ))
    .await;
    if ground.database.server().major() < 16 {
        let needed = needs(victim.pid).await;
        assert_eq!(*needed, *format!("ALTER ROLE {quoted} INHERIT"));
        run(&needed).await;
    }
    assert!(needs(root.pid).await.contains("only a superuser"));
    let seen = seen_by(&monitor, victim.pid).await;
    let outcome = monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    ground.eventually_gone(victim.pid).await;
    assert!(root.is_alive().await);
    // Its own sessions it may always end.
    let own = Session::new(&plain).await;
    let seen = seen_by(&monitor, own.pid).await;
    let outcome = monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    ground.eventually_gone(own.pid).await;
    ground.drop_roles().await;
}

#[tokio::test]
async fn functions_planted_on_the_search_path_are_not_run() {
    let ground = Ground::new().await;
    let plant = "CREATE SCHEMA evil; \
        CREATE FUNCTION evil.no(anyelement, anyelement) RETURNS bool LANGUAGE sql AS 'SELECT 1/0 = 0'; \
        CREATE OPERATOR evil.= (LEFTARG = anyelement, RIGHTARG = anyelement, FUNCTION = evil.no); \
        CREATE FUNCTION evil.strpos(text, text) RETURNS int LANGUAGE sql AS 'SELECT 1/0'; \
        CREATE FUNCTION evil.pg_cancel_backend(int) RETURNS bool LANGUAGE sql AS 'SELECT (1/0)::bool'; \
        CREATE VIEW evil.pg_stat_activity AS SELECT 1/0 AS pid";
    ground.observer.batch_execute(plant).await.unwrap();
    let mut config = ground.database.config();
    config.options("-c search_path=evil,pg_catalog");
    let monitor = keeper(&ground.database, config).monitor();
    let session = ground.session().await;
    let sleeping = session.start("SELECT pg_sleep(600)");
    ground.eventually_in(session.pid, "active").await;
    let seen = seen_by(&monitor, session.pid).await;
    let outcome = monitor.cancel(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    assert!(sleeping.await.unwrap().is_err());
    let dry = monitor.resolver(ResolverPolicy::new());
    let log = dry.run().await.unwrap();
    assert!(!log.baseline().settings().is_empty());
}

#[tokio::test]
async fn dropped_at_any_point_no_transaction_is_left() {
    let ground = Ground::new().await;
    let session = ground.session().await;
    session.run("BEGIN").await;
    let seen = ground.seen(session.pid).await;
    let mut polls = 0;
    while poll_times_and_drop(ground.monitor.cancel(&seen), polls)
        .await
        .is_none()
    {
        polls += 1;
    }
    assert!(polls > 1);
    eventually(SOON, "a transaction is left open", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND xact_start IS NOT NULL AND pid NOT IN (pg_backend_pid(), $1)";
        let row = ground
            .observer
            .query_one(sql, &[&session.pid])
            .await
            .unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    assert!(session.is_alive().await);
}
