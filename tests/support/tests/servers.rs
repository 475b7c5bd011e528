//! The servers do what their documentation says.

use lockkeeper_testkit::{PoolMode, Server, Skip, until_closed, until_connected, until_true};

#[tokio::test]
async fn a_database_of_its_own() {
    let server = Server::shared();
    let (one, two) = (server.database().await, server.database().await);
    assert_ne!(one.name(), two.name());
    let client = one.connect().await;
    let row = client
        .query_one(
            "SELECT current_database()::text, current_setting('server_version_num')::int / 10000",
            &[],
        )
        .await
        .expect("a new database can be asked");
    assert_eq!(row.get::<_, String>(0), one.name());
    assert_eq!(
        row.get::<_, i32>(1),
        i32::try_from(server.major()).expect("a small number")
    );

    let pool = two.pool(2);
    let object = pool.get().await.expect("the pool connects");
    let row = object
        .query_one("SELECT 1", &[])
        .await
        .expect("it can be asked");
    assert_eq!(row.get::<_, i32>(0), 1);

    let (client, _connection) = tokio_postgres::connect(&two.url(), tokio_postgres::NoTls)
        .await
        .expect("the url leads there");
    drop(client);
}

#[tokio::test]
async fn settings_log_and_restart() {
    let server = Server::start(&[("log_min_messages", "notice"), ("max_connections", "33")])
        .expect("a cluster of its own can be started");
    assert!(server.is_private());
    let database = server.database().await;
    let client = database.connect().await;
    let row = client
        .query_one("SHOW max_connections", &[])
        .await
        .expect("asked");
    assert_eq!(row.get::<_, String>(0), "33");

    let before = server.log_len();
    client
        .batch_execute("DO $$ BEGIN RAISE NOTICE 'a word for the log'; END $$")
        .await
        .expect("raised");
    assert!(server.log_since(before).contains("a word for the log"));
    assert!(server.log().contains("a word for the log"));

    server.kill();
    until_closed(&client).await;
    assert!(client.batch_execute("SELECT 1").await.is_err());
    server.restart();
    let client = database.connect().await;
    server.stop();
    until_closed(&client).await;
    assert!(client.batch_execute("SELECT 1").await.is_err());
    server.restart();
    database.connect().await;
    server.restart();
    database.connect().await;
}

#[tokio::test]
async fn a_hot_standby() {
    let primary = match Server::start(&[]) {
        Ok(primary) => primary,
        Err(error) => panic!("{error}"),
    };
    let database = primary.database().await;
    let standby = match primary.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("a_hot_standby"),
    };
    let client = database.connect().await;
    client
        .batch_execute("CREATE TABLE seen (); SELECT pg_switch_wal()")
        .await
        .expect("the primary writes");

    let mut config = standby.config();
    config.dbname(database.name());
    let client = until_connected(&config).await;
    let is_standby = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
    assert!(is_standby.expect("an answer").get::<_, bool>(0));
    let seen = "SELECT to_regclass('seen') IS NOT NULL";
    until_true(&client, "the table never came", seen, &[]).await;
}

#[tokio::test]
async fn a_bouncer_in_transaction_mode() {
    let database = Server::shared().database().await;
    let bouncer = match database.server().pgbouncer_with(
        PoolMode::Transaction,
        database.name(),
        &[("default_pool_size", "1")],
    ) {
        Ok(bouncer) => bouncer,
        Err(skip) => return skip.report("a_bouncer_in_transaction_mode"),
    };
    assert!(bouncer.version() > (1, 0), "{:?}", bouncer.version());
    let pool = bouncer.pool(2);
    let (one, two) = (
        pool.get().await.expect("first client"),
        pool.get().await.expect("second client"),
    );
    let pid = async |client: &tokio_postgres::Client| {
        let messages = client
            .simple_query("SELECT pg_backend_pid()")
            .await
            .expect("asked");
        messages
            .iter()
            .find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
            .expect("one row")
    };
    assert_eq!(
        pid(&one).await,
        pid(&two).await,
        "two clients share one backend"
    );
    for mode in [PoolMode::Session, PoolMode::Statement] {
        let bouncer = database
            .server()
            .pgbouncer(mode, database.name())
            .expect("installed");
        let object = bouncer.pool(1).get().await.expect("connects");
        assert_eq!(
            object
                .simple_query("SELECT 1")
                .await
                .map(|rows| rows.is_empty())
                .ok(),
            Some(false)
        );
    }
}

#[test]
fn a_skip_names_its_feature() {
    let skip = Skip::new("standby", "none here");
    assert_eq!(skip.feature(), "standby");
    assert_eq!(skip.to_string(), "no standby: none here");
}
