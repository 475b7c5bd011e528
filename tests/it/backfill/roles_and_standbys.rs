//! Roles without privileges, and standbys that lag behind.

use futures::StreamExt as _;
use lockkeeper::{BackfillPause, ErrorKind, Keeper, ReplicationLag};
use lockkeeper_testkit::{Server, assert_error, eventually};

use super::{all_are, counted, number, scene, table};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_is_told_what_it_needs() {
    let scene = scene(2, 100).await;
    let role = format!("plain_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM public; GRANT SELECT, UPDATE (n) ON t TO {role}"
        ))
        .await
        .unwrap();
    let pool = scene.database.pool_as(&role, 3);
    let keeper = Keeper::builder(pool).application("test").build();
    let error = counted(&keeper).run().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Database,
        r#"CREATE TABLE "public".lockkeeper_backfill"#,
    );
    let text = error.to_string();
    let (_, create) = text
        .split_once("who may: ")
        .unwrap_or_else(|| panic!("{text}"));
    let (create, _) = create.rsplit_once(" (SQLSTATE").unwrap();
    scene.observer.batch_execute(create).await.unwrap();
    let grant = format!("GRANT SELECT, INSERT, UPDATE, DELETE ON lockkeeper_backfill TO {role}");
    scene.observer.batch_execute(&grant).await.unwrap();
    let done = counted(&keeper).batch_rows(10..=10).run().await.unwrap();
    assert_eq!(done.rows_changed(), 100);
    all_are(&scene, 1).await;
    counted(&keeper).restart().run().await.unwrap();
    drop(keeper);
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    scene.observer.batch_execute(&drop_role).await.unwrap();
}

/// Triggers of a table run as the role that writes to it: a table that any role may have made is none for checkpoints.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoints_table_of_another_role_is_not_written_to() {
    let scene = scene(2, 100).await;
    let role = format!("mallory_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role}; \
             CREATE TABLE lockkeeper_backfill (name text PRIMARY KEY, definition text, key_types text[], \
             key_order text[], last_key text[], rows_passed int8 DEFAULT 0, rows_done int8 DEFAULT 0, \
             done bool DEFAULT false, updated_at timestamptz); \
             CREATE TABLE ran_as AS SELECT current_user AS who WHERE false; GRANT ALL ON ran_as TO public; \
             CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO ran_as VALUES (current_user); RETURN NEW; END'; \
             CREATE TRIGGER planted BEFORE INSERT ON lockkeeper_backfill FOR EACH ROW EXECUTE FUNCTION planted(); \
             GRANT ALL ON lockkeeper_backfill TO public; RESET ROLE"
        ))
        .await
        .unwrap();
    let error = counted(&scene.keeper).run().await.unwrap_err();
    let ran = number(&scene.observer, "SELECT count(*) FROM ran_as").await;
    assert_eq!(ran, 0, "{error}");
    assert_error(
        &error,
        ErrorKind::Config,
        "whose triggers on it would run as this role",
    );
    assert!(error.to_string().contains(&role), "{error}");
    all_are(&scene, 0).await;

    // It is trusted with the table itself.
    let give =
        format!("DROP TRIGGER planted ON lockkeeper_backfill; ALTER TABLE t OWNER TO {role}");
    scene.observer.batch_execute(&give).await.unwrap();
    counted(&scene.keeper).run().await.unwrap();
    all_are(&scene, 1).await;
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    scene.observer.batch_execute(&drop_role).await.unwrap();

    let view =
        "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE VIEW lockkeeper_backfill AS SELECT";
    scene.observer.batch_execute(view).await.unwrap();
    let error = counted(&scene.keeper).run().await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "is not a table");
    assert!(error.to_string().contains("is not a table"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_pauses_while_a_standby_is_behind() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let client = database.connect().await;
    table(&client, 2000).await;
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("it_pauses_while_a_standby_is_behind"),
    };
    let mut config = standby.config();
    config.dbname("postgres");
    let (follower, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    drop(tokio::spawn(connection));
    let follows = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND replay_lsn IS NOT NULL";
    eventually("no standby", async || number(&client, follows).await == 1).await;
    follower
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();

    let keeper = Keeper::new(database.pool(2));
    let backfill = counted(&keeper)
        .batch_rows(50..=50)
        .max_replication_lag_bytes(30_000);
    let mut stream = backfill.clone().max_replication_lag(None).stream();
    let paused = loop {
        let progress = stream.next().await.unwrap().unwrap();
        assert!(!progress.is_done(), "it never paused: {progress:?}");
        if progress.pause().is_some() {
            break progress;
        }
    };
    assert_eq!(paused.pause(), Some(BackfillPause::ReplicationLag));
    let ReplicationLag::Behind { bytes, .. } = paused.replication_lag() else {
        panic!("{paused:?}");
    };
    assert!(bytes > 30_000, "{bytes}");
    for _ in 0..3 {
        let progress = stream.next().await.unwrap().unwrap();
        assert_eq!(progress.batches(), paused.batches(), "{progress}");
    }
    follower
        .batch_execute("SELECT pg_wal_replay_resume()")
        .await
        .unwrap();
    let mut last = None;
    while let Some(progress) = stream.next().await {
        last = Some(progress.unwrap());
    }
    assert!(last.unwrap().is_done());

    // A role that may not see it reports that, and continues.
    follower
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();
    client
        .batch_execute(
            "CREATE ROLE plain LOGIN; GRANT SELECT, UPDATE ON t TO plain; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON lockkeeper_backfill TO plain",
        )
        .await
        .unwrap();
    let pool = database.pool_as("plain", 2);
    let done = counted(&Keeper::new(pool))
        .restart()
        .max_replication_lag_bytes(1)
        .run();
    let done = done.await.unwrap();
    assert_eq!(done.replication_lag(), ReplicationLag::Unknown);
    assert_eq!(
        number(&client, "SELECT count(*) FROM t WHERE n <> 2").await,
        0
    );
}
