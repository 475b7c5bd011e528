//! The doctor: findings about the server's settings, and that what they propose mends them.

use std::collections::BTreeSet;
use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool};
use lockkeeper::{
    Effect, Keeper, SettingsFinding, SettingsFindingKind, SettingsReport, Severity, tcp_timeouts,
};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, PoolMode, Scene, Server, eventually, poll_times_and_drop, pool_of,
    until_connected,
};
use tokio_postgres::{Config, NoTls};

const WELL: [(&str, &str); 6] = [
    ("lock_timeout", "10s"),
    ("log_lock_waits", "on"),
    ("log_line_prefix", "%m [%p] %q%a "),
    ("idle_in_transaction_session_timeout", "5min"),
    ("client_connection_check_interval", "10s"),
    ("max_locks_per_transaction", "64"),
];

/// As bad as can be.
const BADLY: [(&str, &str); 8] = [
    ("deadlock_timeout", "10s"),
    ("lock_timeout", "0"),
    ("log_lock_waits", "off"),
    ("log_line_prefix", "it's 100%%a [%p]  "),
    ("idle_in_transaction_session_timeout", "0"),
    ("client_connection_check_interval", "0"),
    ("max_locks_per_transaction", "10"),
    ("max_connections", "40"),
];

fn start(settings: &[(&str, &str)]) -> Server {
    tokio::task::block_in_place(|| Server::start(settings).unwrap())
}

/// What is found over a new pool.
async fn examine(config: &Config) -> SettingsReport {
    let keeper = Keeper::new(pool_of(config.clone(), 2));
    keeper.monitor().settings().await.unwrap()
}

fn kinds(settings: &SettingsReport) -> BTreeSet<SettingsFindingKind> {
    settings
        .findings()
        .iter()
        .map(SettingsFinding::kind)
        .collect()
}

fn names(settings: &SettingsReport) -> Vec<&str> {
    settings
        .findings()
        .iter()
        .map(SettingsFinding::name)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_found_on_a_server_that_is_set_up_well() {
    let server = start(&WELL);
    let scene = Scene::on(&server, 2).await;
    let settings = scene.keeper.monitor().settings().await.unwrap();
    assert_eq!(settings.findings(), [], "{settings}");
    assert_eq!(settings.to_string(), "nothing to mend\n");
    assert_eq!(settings.value("lock_timeout"), Some("10s"));
    assert_eq!(settings.value("deadlock_timeout"), Some("1s"));
    assert_eq!(settings.database(), scene.database.name());

    // Nor for a plain role that was given what it needs.
    let sql = "CREATE ROLE app LOGIN; GRANT pg_monitor, pg_signal_backend TO app";
    scene.observer.batch_execute(sql).await.unwrap();
    let mut config = scene.database.config();
    config.user("app");
    let settings = examine(&config).await;
    assert_eq!(settings.findings(), [], "{settings}");
    assert_eq!(settings.role(), "app");

    // With a side connection, whose own bounds are none of the application's.
    tcp_timeouts(&mut config, Duration::from_secs(15));
    let keeper = Keeper::builder(pool_of(config.clone(), 1))
        .side_connection(config.clone(), NoTls)
        .build();
    let settings = keeper.monitor().settings().await.unwrap();
    assert_eq!(settings.findings(), [], "{settings}");

    // A connection that died in the pool is none of the server's faults.
    let pool = pool_of(config, 2);
    let mut side = scene.database.config();
    tcp_timeouts(&mut side, Duration::from_secs(15));
    let keeper = Keeper::builder(pool.clone())
        .side_connection(side, NoTls)
        .build();
    drop((pool.get().await.unwrap(), pool.get().await.unwrap()));
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                WHERE datname = current_database() AND usename = 'app'";
    scene.observer.batch_execute(kill).await.unwrap();
    let settings = keeper.monitor().settings().await.unwrap();
    assert_eq!(settings.findings(), [], "{settings}");
}

/// Over TCP a side connection needs what finds a dead server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_without_tcp_timeouts_is_found() {
    let scene = Scene::new(1).await;
    let found = async |side: &Config| {
        let keeper = scene.builder().side_connection(side.clone(), NoTls);
        let settings = keeper.build().monitor().settings().await.unwrap();
        let found = settings.finding(SettingsFindingKind::TcpTimeouts);
        found.map(ToString::to_string)
    };
    let mut side = scene.database.config();
    let finding = found(&side).await.unwrap();
    assert!(
        finding
            .starts_with("advice: side connection = keepalives_idle 7200s, no tcp_user_timeout: ")
            && finding.contains("lockkeeper::tcp_timeouts"),
        "{finding}"
    );
    tcp_timeouts(&mut side, Duration::from_secs(15));
    assert_eq!(found(&side).await, None);
}

/// Every finding about settings and privileges is provoked, and every statement run as it is given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_found_is_mended_by_its_statement() {
    let server = start(&BADLY);
    let scene = Scene::on(&server, 2).await;
    let role = r#"Odd "Role's"#;
    let sql = r#"CREATE ROLE "Odd ""Role's" LOGIN"#;
    scene.observer.batch_execute(sql).await.unwrap();
    let mut config = scene.database.config();
    config.user(role);
    let settings = examine(&config).await;
    let expected = [
        SettingsFindingKind::DeadlockTimeout,
        SettingsFindingKind::LockTimeout,
        SettingsFindingKind::LogLockWaits,
        SettingsFindingKind::LogLinePrefix,
        SettingsFindingKind::IdleInTransactionSessionTimeout,
        SettingsFindingKind::ClientConnectionCheckInterval,
        SettingsFindingKind::MaxLocksPerTransaction,
        SettingsFindingKind::ReadAllStats,
        SettingsFindingKind::SignalBackend,
    ];
    assert_eq!(kinds(&settings), expected.into(), "{settings}");
    // Worst first.
    assert!(
        settings
            .findings()
            .is_sorted_by_key(|finding| std::cmp::Reverse(finding.severity()))
    );
    assert_eq!(settings.findings()[0].severity(), Severity::Warning);
    assert_eq!(settings.role(), role);
    let find = |kind| settings.finding(kind).unwrap();
    let grant = find(SettingsFindingKind::SignalBackend);
    assert_eq!(
        (grant.statement(), grant.effect()),
        (
            Some(r#"GRANT pg_signal_backend TO "Odd ""Role's""#),
            Some(Effect::Immediate)
        )
    );
    assert_eq!(grant.value(), r#"not granted to "Odd ""Role's""#);
    let prefix = find(SettingsFindingKind::LogLinePrefix);
    assert_eq!(
        prefix.statement(),
        Some("ALTER SYSTEM SET log_line_prefix = 'it''s 100%%a [%p] %a '")
    );
    let timeout = find(SettingsFindingKind::LockTimeout);
    assert_eq!(timeout.value(), "0");
    assert_eq!(timeout.effect(), Some(Effect::NewConnections));
    let text = timeout.to_string();
    assert!(
        text.starts_with("warning: lock_timeout = 0: statements ")
            && text.ends_with(
                r#" (mend with: ALTER ROLE "Odd ""Role's" SET lock_timeout = '20000ms'; for new connections)"#
            ),
        "{text}"
    );
    assert_eq!(settings.to_string().lines().count(), expected.len());

    for finding in settings.findings() {
        // On its own, as its documentation says.
        let statement = finding.statement().unwrap();
        scene
            .observer
            .batch_execute(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        match finding.effect().unwrap() {
            // These are there now.
            Effect::Immediate | Effect::NewConnections => {
                let settings = examine(&config).await;
                assert_eq!(settings.finding(finding.kind()), None, "{statement}");
            }
            Effect::Reload => {
                let reload = "SELECT pg_reload_conf()";
                scene.observer.batch_execute(reload).await.unwrap();
                eventually(statement, async || {
                    let settings = examine(&config).await;
                    settings.finding(finding.kind()).is_none()
                })
                .await;
            }
            // And these not before a restart.
            Effect::Restart => {
                let settings = examine(&config).await;
                assert!(settings.finding(finding.kind()).is_some(), "{statement}");
            }
            effect => panic!("{effect:?}"),
        }
    }
    let settings = examine(&config).await;
    assert_eq!(
        kinds(&settings),
        [SettingsFindingKind::MaxLocksPerTransaction].into()
    );
    tokio::task::block_in_place(|| server.restart());
    let settings = examine(&config).await;
    assert_eq!(settings.findings(), [], "{settings}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_table_that_fills_up_is_found() {
    let mut settings = WELL;
    settings[5].1 = "70";
    let server = start(&[&settings[..], &[("max_connections", "20")]].concat());
    let scene = Scene::on(&server, 2).await;
    let monitor = scene.keeper.monitor();
    assert_eq!(monitor.settings().await.unwrap().findings(), []);
    let capacity = monitor.health().await.unwrap().lock_table().capacity();
    let fill = format!("SELECT pg_advisory_lock(n) FROM generate_series(1, {capacity} / 2 + 1) n");
    let hog = scene.database.connect().await;
    hog.batch_execute(&fill).await.unwrap();
    let settings = monitor.settings().await.unwrap();
    let [finding] = settings.findings() else {
        panic!("{settings}");
    };
    assert_eq!(finding.kind(), SettingsFindingKind::MaxLocksPerTransaction);
    assert_eq!(
        finding.statement(),
        Some("ALTER SYSTEM SET max_locks_per_transaction = '140'")
    );
    assert!(
        finding
            .why()
            .contains(&format!("of {capacity} entries in use")),
        "{finding}"
    );
    hog.batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();
    assert_eq!(monitor.settings().await.unwrap().findings(), []);
}

/// The value in force for the application's connections, wherever it was set; the statement has to win over that place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_values_are_those_of_the_applications_connections() {
    let server = start(&WELL);
    let scene = Scene::on(&server, 2).await;
    let observer = &scene.observer;
    let database = scene.database.name();
    observer
        .batch_execute("CREATE ROLE app LOGIN; CREATE ROLE ops LOGIN; GRANT pg_monitor, pg_signal_backend TO app, ops")
        .await
        .unwrap();
    let mut config = scene.database.config();
    config.user("app");
    // What concerns others only.
    observer
        .batch_execute("ALTER ROLE ops SET lock_timeout = 0")
        .await
        .unwrap();
    assert_eq!(examine(&config).await.findings(), []);
    for (place, set) in [
        (
            "database",
            format!("ALTER DATABASE {database} SET lock_timeout = '300ms'"),
        ),
        ("role", "ALTER ROLE app SET lock_timeout = '0'".to_owned()),
        (
            "role in database",
            format!("ALTER ROLE app IN DATABASE {database} SET lock_timeout = '1s'"),
        ),
    ] {
        observer.batch_execute(&set).await.unwrap();
        let settings = examine(&config).await;
        let [finding] = settings.findings() else {
            panic!("{place}: {settings}");
        };
        assert_eq!(finding.kind(), SettingsFindingKind::LockTimeout, "{place}");
        let statement = finding.statement().unwrap();
        observer.batch_execute(statement).await.unwrap();
        assert_eq!(
            examine(&config).await.findings(),
            [],
            "{place}: {statement}"
        );
        // The next place is stronger.
    }
    // Both on the pool's side, though the side connection would see a good one.
    let mut by_itself = config.clone();
    by_itself.options("-c lock_timeout=0");
    let mut side = config.clone();
    tcp_timeouts(&mut side, Duration::from_secs(15));
    let keeper = Keeper::builder(pool_of(by_itself, 2))
        .side_connection(side, NoTls)
        .build();
    let settings = keeper.monitor().settings().await.unwrap();
    let [finding] = settings.findings() else {
        panic!("{settings}");
    };
    assert_eq!((finding.value(), finding.statement()), ("0", None));
    assert!(
        finding.why().contains("the connection itself sets it"),
        "{finding}"
    );
    let manager = Manager::from_config(config.clone(), NoTls, ManagerConfig::default());
    let hook = Hook::async_fn(|client, _| {
        Box::pin(async move {
            let set = client
                .batch_execute("SET idle_in_transaction_session_timeout = 0")
                .await;
            set.map_err(HookError::Backend)
        })
    });
    let hooked = Pool::builder(manager)
        .max_size(1)
        .post_create(hook)
        .build()
        .unwrap();
    let settings = Keeper::new(hooked).monitor().settings().await.unwrap();
    assert_eq!(names(&settings), ["idle_in_transaction_session_timeout"]);
    assert_eq!(settings.findings()[0].statement(), None);
    // And the privileges are those of the role that asks.
    observer
        .batch_execute("REVOKE pg_monitor FROM ops")
        .await
        .unwrap();
    let mut ops = config.clone();
    ops.user("ops");
    tcp_timeouts(&mut ops, Duration::from_secs(15));
    let keeper = Keeper::builder(pool_of(config, 2))
        .side_connection(ops, NoTls)
        .build();
    let settings = keeper.monitor().settings().await.unwrap();
    assert_eq!(names(&settings), ["pg_read_all_stats"]);
    assert_eq!(
        settings.findings()[0].statement(),
        Some("GRANT pg_read_all_stats TO \"ops\"")
    );
    assert_eq!(settings.role(), "app");
}

/// A member has the privileges only if it inherits them; what mends that differs between versions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn privileges_that_are_not_inherited_are_found_and_mended() {
    let server = start(&WELL);
    let scene = Scene::on(&server, 2).await;
    let observer = &scene.observer;
    let sql = "CREATE ROLE aloof LOGIN NOINHERIT; GRANT pg_read_all_stats TO aloof; \
               CREATE ROLE staff; GRANT pg_monitor, pg_signal_backend TO staff; CREATE ROLE app LOGIN; GRANT staff TO app";
    observer.batch_execute(sql).await.unwrap();
    let mut config = scene.database.config();
    config.user("app");
    assert_eq!(examine(&config).await.findings(), []);
    config.user("aloof");
    let settings = examine(&config).await;
    assert_eq!(names(&settings), ["pg_read_all_stats", "pg_signal_backend"]);
    assert_eq!(settings.findings()[0].value(), "not inherited by \"aloof\"");
    // Before version 16 a grant comes first, and inheriting it next.
    for _ in 0..2 {
        for finding in examine(&config).await.findings() {
            let statement = finding.statement().unwrap();
            observer.batch_execute(statement).await.unwrap();
        }
    }
    assert_eq!(examine(&config).await.findings(), []);
}

/// Functions of the same names earlier on the search path are not run.
#[tokio::test]
async fn planted_functions_are_not_run() {
    let scene = Scene::new(2).await;
    let sql = format!(
        "CREATE SCHEMA evil; CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE sql AS 'SELECT ''planted'''; \
         CREATE FUNCTION evil.count(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 1/0::bigint'; \
         CREATE FUNCTION evil.eq(name, text) RETURNS boolean LANGUAGE sql AS 'SELECT 1/0 = 1'; \
         CREATE OPERATOR evil.= (FUNCTION = evil.eq, LEFTARG = name, RIGHTARG = text); \
         CREATE VIEW evil.pg_locks AS SELECT 1/0; CREATE VIEW evil.pg_settings AS SELECT 1/0; \
         ALTER DATABASE {} SET search_path = evil, pg_catalog",
        scene.database.name()
    );
    scene.observer.batch_execute(&sql).await.unwrap();
    let monitor = Keeper::new(pool_of(scene.database.config(), 2)).monitor();
    let settings = monitor.settings().await.unwrap();
    assert_eq!(settings.value("deadlock_timeout"), Some("1s"));
    monitor.health().await.unwrap();
}

fn pooler(settings: &SettingsReport) -> Option<(Severity, &str)> {
    let finding = settings.finding(SettingsFindingKind::Pooler)?;
    assert_eq!((finding.statement(), finding.effect()), (None, None));
    Some((finding.severity(), finding.value()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_in_between_is_found() {
    let scene = Scene::new(2).await;
    assert_eq!(
        pooler(&scene.keeper.monitor().settings().await.unwrap()),
        None
    );
    let shares = (Severity::Warning, "shares server sessions");
    let unknown = (Severity::Note, "one stands between");
    for (mode, connections, expected) in [
        (PoolMode::Transaction, 2, shares),
        // Without a second one there is nothing to compare with.
        (PoolMode::Transaction, 1, unknown),
        (PoolMode::Session, 2, unknown),
    ] {
        let server = scene.database.server();
        let bouncer = match server.pgbouncer(mode, scene.database.name()) {
            Ok(bouncer) => bouncer,
            Err(skip) => return skip.report("doctor::a_pooler_in_between_is_found"),
        };
        let pool = bouncer.pool(connections);
        let keeper = Keeper::new(pool.clone());
        let found = keeper.monitor().settings().await.unwrap();
        assert_eq!(pooler(&found), Some(expected), "{mode:?} {connections}");
        // What was found out when a session lock was wanted is known from then on.
        if mode == PoolMode::Session {
            let guard = keeper
                .advisory_lock("leader")
                .session()
                .acquire()
                .await
                .unwrap();
            guard.release().await.unwrap();
            let found = keeper.monitor().settings().await.unwrap();
            let keeps = (Severity::Note, "keeps a server session for each client");
            assert_eq!(pooler(&found), Some(keeps));
        }
        // A side connection that goes around it does not hide it.
        let keeper = Keeper::builder(pool)
            .side_connection(scene.database.config(), NoTls)
            .build();
        let found = keeper.monitor().settings().await.unwrap();
        assert_eq!(pooler(&found), Some(expected), "{mode:?} {connections}");
    }
    // Wherever it is dropped, the next one is answered.
    let server = scene.database.server();
    let bouncer = server
        .pgbouncer(PoolMode::Transaction, scene.database.name())
        .unwrap();
    let keeper = Keeper::new(bouncer.pool(2));
    for polls in 0.. {
        assert!(polls < 100, "it has no end");
        let found = poll_times_and_drop(keeper.monitor().settings(), polls).await;
        let next = keeper.monitor().settings().await.unwrap();
        assert_eq!(pooler(&next), Some(shares), "after {polls} polls");
        if let Some(found) = found {
            assert_eq!(pooler(&found.unwrap()), Some(shares));
            break;
        }
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_named_as_one() {
    let server = start(&WELL);
    let database = server.database().await;
    let standby = match tokio::task::block_in_place(|| server.standby()) {
        Ok(standby) => standby,
        Err(skip) => return skip.report("doctor::a_standby_is_named_as_one"),
    };
    let mut config = standby.config();
    config.dbname(database.name());
    // The database has to arrive first.
    until_connected(&config).await;
    let keeper = Keeper::new(pool_of(config, 2));
    let settings = keeper.monitor().settings().await.unwrap();
    let [finding] = settings.findings() else {
        panic!("{settings}");
    };
    assert_eq!(
        (finding.kind(), finding.severity(), finding.value()),
        (SettingsFindingKind::Standby, Severity::Note, "in recovery")
    );
    // Health works there too; whether an INVALID index is being built on the primary cannot be known.
    let health = keeper.monitor().health().await.unwrap();
    assert!(health.invalid_indexes().is_known());
    let primary = database.connect().await;
    primary
        .batch_execute("CREATE TABLE t (v int); INSERT INTO t VALUES (1), (1)")
        .await
        .unwrap();
    let build = "CREATE UNIQUE INDEX CONCURRENTLY i ON t (v)";
    primary.batch_execute(build).await.unwrap_err();
    eventually("the index does not arrive", async || {
        let health = keeper.monitor().health().await.unwrap();
        health.invalid_indexes() == &lockkeeper::ObservedValue::Hidden
    })
    .await;
}
