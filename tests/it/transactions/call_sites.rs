//! The call site in `application_name`, and what is there afterwards.

use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::{Error, Keeper, Tx};
use lockkeeper_testkit::{AppError, GIVE_UP_AFTER, Scene, pool_of, raise};

/// What the server shows during the body of a transaction, and the line that asked for it.
async fn shown(scene: &Scene, keeper: &Keeper) -> (String, Option<u32>) {
    let body = async |tx: &mut Tx| {
        let name = scene.application_name(tx.backend_pid().unwrap()).await;
        if let Some(site) = tx.call_site() {
            assert_eq!(site.file(), file!());
        }
        Ok::<_, Error>((name, tx.call_site().map(|site| site.line())))
    };
    let asked = line!() + 1;
    let (name, site) = keeper.transaction(body).await.unwrap();
    assert!(site.is_none_or(|site| site == asked));

    // A lock shows the same.
    let line = line!() + 1;
    let (locked, site) = keeper.with_advisory_lock("name", body).await.unwrap();
    if let Some(site) = site {
        assert_eq!(site, line);
        assert!(locked.ends_with(&format!(":{line}")), "{locked}");
    } else {
        assert_eq!(locked, name);
    }
    (name, site.map(|_| asked))
}

#[tokio::test]
async fn application_name_is_the_prefix_and_the_call_site_during_the_body() {
    let scene = Scene::new(1).await;
    let before = scene.show("application_name").await;
    let log = scene.database.server().log_len();
    scene
        .observer
        .batch_execute(&format!(
            "ALTER DATABASE {} SET log_min_messages = 'notice'",
            scene.database.name()
        ))
        .await
        .unwrap();
    drop(scene.pool.retain(|_, _| false));
    let here = file!();
    for (prefix, starts) in [
        ("billing".to_owned(), "billing ".to_owned()),
        (String::new(), here.to_owned()),
        ("p".repeat(200), "p".repeat(24)),
        ("zoë's \\ größe\n\0😀".to_owned(), "zo?? ".to_owned()),
        (
            "'; DROP TABLE t; --".to_owned(),
            "?; DROP TABLE t; -- ".to_owned(),
        ),
        ("%s %n $1 $$".to_owned(), "%s %n $1 $$ ".to_owned()),
    ] {
        let keeper = Keeper::builder(scene.pool.clone())
            .application(prefix.clone())
            .build();
        let (name, line) = shown(&scene, &keeper).await;
        assert!(name.is_ascii() && name.len() <= 63, "{name}");
        assert!(name.ends_with(&format!(":{}", line.unwrap())), "{name}");
        if !prefix.starts_with("zo") {
            assert!(name.starts_with(&starts), "{prefix:?}: {name}");
        }
        assert!(name.contains("call_sites.rs"), "{name}");
        assert_eq!(scene.show("application_name").await, before);

        let keeper = Keeper::builder(scene.pool.clone())
            .application(prefix.clone())
            .call_sites(false)
            .build();
        let (name, line) = shown(&scene, &keeper).await;
        assert_eq!(line, None);
        assert!(name.len() <= 63 && !name.contains(".rs"), "{name}");
        assert_eq!(name.is_empty(), prefix.is_empty());
        assert_eq!(scene.show("application_name").await, before);
    }
    let log = scene.database.server().log_since(log);
    let notices: Vec<_> = log
        .lines()
        .filter(|line| line.contains("identifier") && line.contains("application_name"))
        .chain(
            log.lines()
                .filter(|line| line.contains("will be truncated")),
        )
        .collect();
    assert!(notices.is_empty(), "{notices:#?}");
    scene.nothing_left().await;
}

/// The connection's own name is back after each way a transaction can end.
#[tokio::test]
async fn application_name_is_restored_after_every_end() {
    let scene = Scene::with_two_rows(1).await;
    let mut config = scene.database.config();
    config.application_name("mine");
    let own = pool_of(config, 1);
    let keeper = Keeper::builder(own.clone()).application("keeper").build();
    let shown = async || {
        let object = own.get().await.unwrap();
        let row = object.query_one(
            "SELECT pg_backend_pid(), current_setting('application_name')",
            &[],
        );
        let row = row.await.unwrap();
        (row.get::<_, i32>(0), row.get::<_, String>(1))
    };
    let (pid, name) = shown().await;
    assert_eq!(name, "mine");
    for end in ["commit", "error", "failure", "retry", "drop", "savepoint"] {
        let runs = AtomicU32::new(0);
        let body = async |tx: &mut Tx| {
            let name = scene.application_name(tx.backend_pid().unwrap()).await;
            assert!(name.starts_with("keeper tests/"), "{name}");
            match end {
                "error" => return Err(AppError::Own(1)),
                "failure" => tx.batch_execute("SELECT 1/0").await?,
                "retry" if runs.fetch_add(1, Ordering::Relaxed) == 0 => {
                    tx.batch_execute(&raise("40001")).await?;
                }
                "drop" => pending().await,
                "savepoint" => {
                    let inner = tx.savepoint(async |tx| {
                        tx.batch_execute("SELECT 1/0").await?;
                        Ok::<_, AppError>(())
                    });
                    assert!(inner.await.is_err());
                    assert_eq!(
                        scene.application_name(tx.backend_pid().unwrap()).await,
                        name
                    );
                }
                _ => {}
            }
            Ok(())
        };
        let transaction = keeper.transaction(body);
        let within = if end == "drop" {
            Duration::from_millis(200)
        } else {
            GIVE_UP_AFTER
        };
        drop(tokio::time::timeout(within, transaction).await);
        assert_eq!(shown().await, (pid, "mine".to_owned()), "{end}");
    }
}

#[tokio::test]
async fn a_keeper_without_call_sites_tells_none() {
    let scene = Scene::with(1, |builder| builder.call_sites(false)).await;
    let site = scene
        .keeper
        .transaction(async |tx| Ok::<_, Error>(tx.call_site().copied()));
    assert_eq!(site.await.unwrap(), None);
    let keeper = Keeper::new(scene.pool.clone());
    let line = line!() + 1;
    let site = keeper.transaction(async |tx| Ok::<_, Error>(tx.call_site().copied()));
    let site = site.await.unwrap().unwrap();
    assert_eq!((site.file(), site.line()), (file!(), line));
}
