//! What a timeout says of the blocker.

use lockkeeper::{AdvisoryMode, Keeper, LockKey};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, ENDLESS, Scene, eventually_within};

use super::{SCOPES, Scope, ms, take, time, timed_out, warm};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_names_the_key_the_wait_and_the_holder() {
    let scene = warm(4).await;
    let key = LockKey::from(("timeouts", "invoice:42"));
    let asked = ms(120);
    for (held, state) in [
        (Scope::Xact, "idle in transaction"),
        (Scope::Session, "idle"),
        (Scope::Snapshot, "idle in transaction"),
        (Scope::Later, "idle in transaction"),
    ] {
        let guard = take(&scene.keeper, held, key.clone(), ENDLESS)
            .await
            .unwrap();
        let pid = guard.pid().unwrap();
        assert_eq!(scene.holders(key.clone()).await, [pid]);
        for scope in SCOPES {
            let what = format!("{scope:?} against {held:?}");
            time(asked, &what, async |asked| {
                let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
                assert_eq!(error.key(), Some(&key));
                let waited = error.waited().unwrap();
                assert!(waited >= asked, "{what}: {waited:?}");
                let [blocker] = error.blockers() else {
                    panic!("{what}: {:?}", error.blockers());
                };
                assert_eq!(blocker.pid(), Some(pid), "{what}");
                assert!(blocker.is_holder(), "{what}");
                assert_eq!(blocker.mode(), AdvisoryMode::Exclusive, "{what}");
                assert_eq!(blocker.state(), Some(state), "{what}");
                assert!(blocker.state_age().is_some(), "{what}");
                assert!(blocker.user().is_some(), "{what}");
                assert_eq!(blocker.prepared_transaction(), None, "{what}");
                let name = blocker.application_name().unwrap();
                assert!(name.starts_with("test "), "{what}: {name}");
                assert!(name.contains("tests/it/timeouts/mod.rs:"), "{what}: {name}");
                let text = error.to_string();
                for part in [
                    "invoice:42",
                    "this process",
                    "tests/it/timeouts/mod.rs:",
                    &pid.to_string(),
                    state,
                ] {
                    assert!(text.contains(part), "{what}: {part} is not in {text}");
                }
                assert!(!text.contains('\n'), "{text}");
                assert!(error.is_retryable());
            })
            .await;
        }
        drop(guard);
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holders_call_site_is_the_line_that_asked_for_the_lock() {
    let scene = warm(3).await;
    let (lock, line) = (scene.keeper.advisory_lock("timeouts: line"), line!());
    let guard = lock.acquire().await.unwrap();
    let error = scene
        .keeper
        .advisory_lock("timeouts: line")
        .wait(ms(5))
        .acquire()
        .await
        .unwrap_err();
    let name = error.blockers()[0].application_name().unwrap();
    assert_eq!(name, format!("test tests/it/timeouts/blockers.rs:{line}"));
    drop(guard);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_no_keeper_is_not_of_this_process() {
    let scene = warm(2).await;
    let client = scene.database.connect().await;
    client
        .execute("SELECT pg_advisory_lock(515)", &[])
        .await
        .unwrap();
    for scope in SCOPES {
        let error = timed_out(take(&scene.keeper, scope, LockKey::from(515), ms(20)).await);
        assert!(!error.blockers()[0].is_this_process(), "{error}");
        assert!(!error.to_string().contains("this process"), "{error}");
    }
    client
        .execute("SELECT pg_advisory_unlock(515)", &[])
        .await
        .unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_that_blocks_is_named_without_a_pid() {
    let scene = warm(2).await;
    let key = LockKey::from(514);
    let client = scene.database.connect().await;
    let gid = format!("timeouts-{}", scene.database.name());
    client
        .batch_execute(&format!(
            "BEGIN; SELECT pg_advisory_xact_lock(514); PREPARE TRANSACTION '{gid}'"
        ))
        .await
        .unwrap();
    drop(client);
    for scope in SCOPES {
        let error = timed_out(take(&scene.keeper, scope, key.clone(), ms(20)).await);
        let [blocker] = error.blockers() else {
            panic!("{:?}", error.blockers());
        };
        assert_eq!(blocker.pid(), None);
        assert_eq!(blocker.prepared_transaction(), Some(gid.as_str()));
        assert_eq!((blocker.state(), blocker.application_name()), (None, None));
        assert!(blocker.is_holder());
        assert!(error.to_string().contains(&gid), "{error}");
    }
    let end = format!("ROLLBACK PREPARED '{gid}'");
    scene.observer.batch_execute(&end).await.unwrap();
    scene.nothing_left().await;
}

/// What a role may not see is unknown, not something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_is_told_what_it_may_see_and_nothing_wrong() {
    let scene = Scene::new(2).await;
    let key = LockKey::from(515);
    let role = format!("nobody_{}", scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'");
    scene.observer.batch_execute(&create).await.unwrap();
    let mut config = scene.database.config();
    config.user(&role).password("secret");
    let manager = deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
    let pool = deadpool_postgres::Pool::builder(manager)
        .max_size(2)
        .build()
        .unwrap();
    let keeper = Keeper::new(pool.clone());
    // A login may take longer than a short wait has for it.
    drop((pool.get().await.unwrap(), pool.get().await.unwrap()));

    let guard = scene.keeper.advisory_lock(&key).acquire().await.unwrap();
    let pid = guard.backend_pid();
    for scope in SCOPES {
        let error = timed_out(take(&keeper, scope, key.clone(), ms(20)).await);
        let [blocker] = error.blockers() else {
            panic!("{:?}", error.blockers());
        };
        assert_eq!(blocker.pid(), pid);
        let name = blocker.application_name().unwrap();
        assert!(name.contains("tests/it/timeouts/blockers.rs:"), "{name}");
        assert_eq!(blocker.state(), None);
        assert_eq!(blocker.state_age(), None);
        assert_eq!(blocker.transaction_age(), None);
        if let Some(user) = blocker.user() {
            let own = scene.database.config();
            assert_eq!(Some(user), own.get_user());
        }
        let text = error.to_string();
        assert!(
            text.contains("state hidden") && !text.contains("idle"),
            "{text}"
        );
    }
    // Its own backends it sees whole.
    let own = keeper.advisory_lock(516).acquire().await.unwrap();
    let error = timed_out(take(&keeper, Scope::Xact, LockKey::from(516), ms(20)).await);
    assert_eq!(error.blockers()[0].state(), Some("idle in transaction"));
    drop((own, guard));
    scene.nothing_left().await;
    pool.close();
    let gone = format!("DROP ROLE {role}");
    let dropped = async || scene.observer.batch_execute(&gone).await.is_ok();
    eventually_within(CLEANED_UP_WITHIN, "the role cannot be dropped", dropped).await;
}
