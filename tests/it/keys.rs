//! Keys: which lock each form names, in this program, in `pg_locks` and in SQL, and what people read.

use std::time::Duration;

use deadpool_postgres::{Manager, Pool};
use lockkeeper::{Error, ErrorKind, Keeper, LockKey, compat};
use lockkeeper_testkit::{Scene, assert_error, lock_by_sql, pid_of};
use tokio_postgres::{Client, NoTls};

/// Keys that are easily taken for one another, or for something else.
fn odd_keys() -> Vec<LockKey> {
    let long = "é".repeat(512 * 1024);
    let mut long_too = long.clone();
    long_too.replace_range(long.len() - 2.., "e");
    let mut keys: Vec<LockKey> = [
        0,
        1,
        -1,
        2,
        4_294_967_296,
        4_294_967_298,
        -4_294_967_298,
        i64::from(i32::MIN),
        i64::from(i32::MAX),
        i64::MIN,
        i64::MAX,
    ]
    .map(LockKey::from)
    .into();
    keys.extend(
        [
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 2),
            (2, 1),
            (-1, -1),
            (-1, 0),
            (i32::MIN, i32::MAX),
            (i32::MAX, i32::MIN),
            (i32::MIN, i32::MIN),
        ]
        .map(LockKey::from),
    );
    keys.extend(odd_texts().into_iter().map(LockKey::from));
    keys.push(LockKey::from(long));
    keys.push(LockKey::from(long_too));
    keys.extend(
        [
            ("a", "b"),
            ("b", "a"),
            ("a", ""),
            ("ab", ""),
            ("it's", "\\"),
            ("\u{1f980}", "\0"),
        ]
        .map(LockKey::from),
    );
    keys
}

fn odd_texts() -> Vec<&'static str> {
    vec![
        "",
        " ",
        "a",
        "A",
        "ab",
        "it's",
        "it''s",
        "\"quoted\"",
        "back\\slash",
        "\\",
        "'",
        "$$",
        "$1",
        "%s",
        "a\0b",
        "\0",
        "a\nb",
        "a\r\nb",
        "\t",
        "*/",
        "/*",
        "-- no",
        "; ROLLBACK; --",
        "\u{1f980}",
        "\u{e9}",
        "e\u{301}",
        "\u{202e}",
        "\u{1f}",
    ]
}

/// The advisory locks of the scene's database as `pg_locks` has them.
async fn shown(scene: &Scene) -> Vec<(LockKey, i32, String)> {
    let rows = scene
        .observer
        .query(
            "SELECT classid, objid, objsubid, pid, mode FROM pg_locks WHERE locktype = 'advisory' AND granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            &[],
        )
        .await
        .unwrap();
    rows.iter()
        .map(|row| {
            let objsubid = u16::try_from(row.get::<_, i16>(2)).unwrap();
            let key = LockKey::from_pg_locks(row.get(0), row.get(1), objsubid).unwrap();
            (key, row.get(3), row.get(4))
        })
        .collect()
}

#[tokio::test]
async fn every_form_is_a_lock_of_its_own_and_found_again_in_pg_locks() {
    let scene = Scene::new(2).await;
    let keys = odd_keys();
    for scope in ["transaction", "session"] {
        for (n, key) in keys.iter().enumerate() {
            let lock = scene.keeper.advisory_lock(key);
            let (pid, xact, session) = if scope == "session" {
                let guard = lock.session().acquire().await.unwrap();
                (guard.backend_pid().unwrap(), None, Some(guard))
            } else {
                let guard = lock.acquire().await.unwrap();
                (guard.backend_pid().unwrap(), Some(guard), None)
            };
            let seen = shown(&scene).await;
            let [(found, holder, mode)] = &*seen else {
                panic!("{key}: {seen:?}");
            };
            assert!(found.same_lock(key), "{key} is shown as {found}");
            assert_eq!((*holder, &**mode), (pid, "ExclusiveLock"));
            // It keeps out only callers of the very same key.
            let mut others = keys.clone();
            others.remove(n);
            for (wanted, free) in [(vec![key.clone()], false), (others, true)] {
                let lock = scene.keeper.advisory_locks(wanted);
                let granted = if scope == "session" {
                    let guard = lock.try_acquire().await.unwrap();
                    guard.map(|guard| guard.backend_pid())
                } else {
                    let guard = lock.session().try_acquire().await.unwrap();
                    guard.map(|guard| guard.backend_pid())
                };
                assert_eq!(granted.is_some(), free, "{key}");
                assert_ne!(granted, Some(Some(pid)), "{key}: on another backend");
            }
            drop((xact, session));
            scene.nothing_left().await;
        }
    }
}

#[tokio::test]
async fn all_forms_can_be_held_at_once() {
    let scene = Scene::new(1).await;
    let keys = odd_keys();
    for scope in ["transaction", "session", "shared"] {
        let lock = scene.keeper.advisory_locks(&keys);
        let (xact, session) = match scope {
            "transaction" => (Some(lock.acquire().await.unwrap()), None),
            "session" => (None, Some(lock.session().acquire().await.unwrap())),
            _ => (None, Some(lock.session().shared().acquire().await.unwrap())),
        };
        let mut seen: Vec<LockKey> = shown(&scene)
            .await
            .into_iter()
            .map(|(key, ..)| key)
            .collect();
        seen.sort();
        let mut wanted = keys.clone();
        wanted.sort();
        assert_eq!(seen.len(), wanted.len(), "{scope}");
        for (seen, wanted) in seen.iter().zip(&wanted) {
            assert!(
                seen.same_lock(wanted),
                "{scope}: {seen:?} is not {wanted:?}"
            );
        }
        if let Some(guard) = &session {
            assert_eq!(guard.held_keys(), wanted, "with their names");
        }
        if let Some(guard) = &xact {
            assert_eq!(guard.held_keys().cloned().collect::<Vec<_>>(), wanted);
        }
        drop((xact, session));
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn errors_name_the_key_as_people_know_it() {
    let scene = Scene::new(2).await;
    // A login may take longer than a short wait has for it.
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    for key in odd_keys() {
        let holder = scene.keeper.advisory_lock(&key).acquire().await.unwrap();
        let pid = holder.backend_pid().unwrap();
        let lock = scene.keeper.advisory_lock(&key).wait(Duration::ZERO);
        for error in [
            lock.clone().acquire().await.unwrap_err(),
            lock.session().acquire().await.unwrap_err(),
        ] {
            assert_error(&error, ErrorKind::LockTimeout, "holds ExclusiveLock");
            assert_eq!(error.key(), Some(&key));
            let text = error.to_string();
            assert!(text.contains(&key.to_string()), "{text}");
            assert!(text.contains(&format!("pid {pid}")), "{text}");
            assert!(
                text.len() < 2000 && !text.contains(['\n', '\r', '\0']),
                "{text:?}"
            );
            assert_eq!(error.blockers().len(), 1, "{text}");
            assert_eq!(error.blockers()[0].pid(), Some(pid));
        }
        holder.rollback().await;
    }
    for (key, text) in [
        (LockKey::from((1, 2)), "(1, 2)"),
        (LockKey::from(i64::MIN), "-9223372036854775808"),
        (LockKey::from("a\0\nb"), r#""a\0\nb""#),
        (LockKey::from("it's */"), r#""it's */""#),
        (
            LockKey::from(("bill", "\u{1f980}")),
            "\"bill\"/\"\u{1f980}\"",
        ),
        (LockKey::from(""), r#""""#),
    ] {
        let holder = scene.database.connect().await;
        lock_by_sql(&holder, &key).await;
        let lock = scene.keeper.advisory_lock(key).wait(Duration::ZERO);
        let error = lock.acquire().await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        drop(holder);
    }
    scene.nothing_left().await;
}

async fn computed(client: &Client, expression: &str) -> i64 {
    let row = client
        .query_one(&format!("SELECT {expression}"), &[])
        .await
        .unwrap();
    row.get(0)
}

/// Texts of all kinds of characters, the same ones in each run.
fn random_texts(count: usize) -> Vec<String> {
    const ALPHABET: [char; 24] = [
        'a',
        'B',
        '7',
        ' ',
        '\'',
        '"',
        '\\',
        '%',
        '$',
        ';',
        '-',
        '/',
        '*',
        '\n',
        '\r',
        '\t',
        '\u{1}',
        '\u{1f}',
        'é',
        'ß',
        '漢',
        '\u{1f980}',
        '\u{10ffff}',
        '\u{feff}',
    ];
    let mut state = 42_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    (0..count)
        .map(|_| {
            let length = next() % 12;
            (0..length)
                .map(|_| ALPHABET[next() % ALPHABET.len()])
                .collect()
        })
        .collect()
}

#[tokio::test]
async fn the_server_computes_the_same_key_from_a_name() {
    let scene = Scene::new(1).await;
    let client = &scene.observer;
    let (spaces, names) = (random_texts(400), random_texts(800).split_off(400));
    let by_parameters = LockKey::SQL_EXPRESSION
        .replace("$1", "t.a")
        .replace("$2", "t.b");
    let rows = client
        .query(
            &format!("SELECT {by_parameters} FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (a, b, n) ORDER BY n"),
            &[&spaces, &names],
        )
        .await
        .unwrap();
    assert_eq!(rows.len(), names.len());
    for (row, (space, name)) in rows.iter().zip(spaces.iter().zip(&names)) {
        assert_eq!(
            Some(row.get::<_, i64>(0)),
            LockKey::from((space, name)).as_i64(),
            "{space:?} {name:?}"
        );
    }

    let texts = odd_texts();
    let pairs = texts
        .iter()
        .map(|name| ("", *name))
        .chain(texts.iter().map(|space| (*space, "it's \\ \u{1f980}")))
        .chain(
            spaces
                .iter()
                .map(String::as_str)
                .zip(names.iter().map(String::as_str))
                .take(50),
        );
    for conforming in ["on", "off"] {
        // As an application with other habits has it.
        client
            .batch_execute(&format!(
                "SET standard_conforming_strings = {conforming}; SET escape_string_warning = off; SET backslash_quote = off"
            ))
            .await
            .unwrap();
        for (space, name) in pairs.clone() {
            let key = LockKey::from((space, name)).as_i64().unwrap();
            match LockKey::sql_expression(space, name) {
                Some(sql) => assert_eq!(
                    computed(client, &sql).await,
                    key,
                    "{space:?} {name:?} {sql}"
                ),
                None => assert!(space.contains('\0') || name.contains('\0')),
            }
        }
    }
    let row = client
        .query_one(
            &format!("SELECT {}", LockKey::SQL_EXPRESSION),
            &[&"", &"é".repeat(512 * 1024)],
        )
        .await
        .unwrap();
    let long = LockKey::from("é".repeat(512 * 1024));
    assert_eq!(long.as_i64(), Some(row.get(0)));
}

#[tokio::test]
async fn another_program_shares_a_lock_by_the_sql_expression() {
    let scene = Scene::new(2).await;
    let other = scene.database.connect().await;
    let sql = LockKey::sql_expression("billing", "it's \\ 42").unwrap();
    let tries = format!("SELECT pg_try_advisory_lock({sql})");
    let key = ("billing", "it's \\ 42");

    let guard = scene.keeper.advisory_lock(key).acquire().await.unwrap();
    assert_ne!(guard.backend_pid(), Some(pid_of(&other).await));
    let row = other.query_one(&tries, &[]).await.unwrap();
    assert!(!row.get::<_, bool>(0), "the other program is kept out");
    guard.rollback().await;
    let row = other.query_one(&tries, &[]).await.unwrap();
    assert!(row.get::<_, bool>(0));
    assert!(
        scene
            .keeper
            .advisory_lock(key)
            .try_acquire()
            .await
            .unwrap()
            .is_none()
    );
    drop(other);
    scene.nothing_left().await;
}

/// A keeper whose pool cannot connect: whatever it answers, nothing was sent.
fn keeper_without_a_server() -> Keeper {
    let mut config = tokio_postgres::Config::new();
    // The discard port of the local host: nothing listens there.
    config
        .host("127.0.0.1")
        .port(9)
        .user("nobody")
        .dbname("none");
    let pool = Pool::builder(Manager::new(config, NoTls))
        .max_size(1)
        .build()
        .unwrap();
    Keeper::new(pool)
}

fn assert_collision(error: &Error, refused: &LockKey, known: &LockKey) {
    assert_error(error, ErrorKind::KeyCollision, &refused.to_string());
    assert_error(error, ErrorKind::KeyCollision, &known.to_string());
    assert_eq!(error.key(), Some(refused));
    assert!(!error.is_retryable());
}

/// All the ways to ask for a lock, each of which must refuse `refused`.
async fn assert_refused_everywhere(keeper: &Keeper, refused: &LockKey, known: &LockKey) {
    let lock = || keeper.advisory_lock(refused);
    let collides = |error: Option<Error>| {
        assert_collision(&error.expect("it is refused"), refused, known);
    };
    collides(lock().acquire().await.err());
    collides(lock().shared().acquire().await.err());
    collides(lock().try_acquire().await.err());
    collides(lock().session().acquire().await.err());
    collides(lock().session().try_acquire().await.err());
    let set = keeper.advisory_locks([&LockKey::from("innocent"), refused]);
    collides(set.acquire().await.err());
    let ran =
        keeper.with_advisory_lock(refused, async |_| -> Result<(), Error> { panic!("it ran") });
    collides(ran.await.err());
    let ran =
        keeper.try_with_advisory_lock(refused, async |_| -> Result<(), Error> { panic!("it ran") });
    collides(ran.await.err());
}

#[tokio::test]
async fn two_names_with_one_number_are_refused_while_one_is_held_and_after() {
    let scene = Scene::new(3).await;
    let keeper = &scene.keeper;
    let known = LockKey::from(("keys\u{1f}b", "c"));
    let refused = LockKey::from(("keys", "b\u{1f}c"));
    assert!(known.same_lock(&refused));

    let guard = keeper.advisory_lock(&known).acquire().await.unwrap();
    let pid = guard.backend_pid().unwrap();
    assert_refused_everywhere(keeper, &refused, &known).await;
    assert_eq!(scene.holders(&known).await, [pid]);
    assert_eq!(scene.advisory_locks().await, 1, "nothing else is held");
    guard.rollback().await;
    assert_refused_everywhere(keeper, &refused, &known).await;

    let guard = keeper
        .advisory_lock(&known)
        .session()
        .acquire()
        .await
        .unwrap();
    assert_refused_everywhere(keeper, &refused, &known).await;
    guard.release().await.unwrap();

    // Inside a transaction, which stays usable.
    keeper
        .transaction(async |tx| {
            let error = tx.advisory_lock(&refused).await.unwrap_err();
            assert_collision(&error, &refused, &known);
            let error = tx.advisory_lock(&refused).try_acquire().await.unwrap_err();
            assert_collision(&error, &refused, &known);
            assert!(tx.held_keys().next().is_none());
            tx.advisory_lock(&known).await?;
            tx.query_one("SELECT 1", &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();

    // The names are known to the whole process, not to one keeper.
    assert_refused_everywhere(&keeper_without_a_server(), &refused, &known).await;
    // The first name still works, and the number itself is no name.
    drop(keeper.advisory_lock(&known).acquire().await.unwrap());
    let number = LockKey::from(known.as_i64().unwrap());
    drop(keeper.advisory_lock(number).acquire().await.unwrap());
    scene.nothing_left().await;
}

#[tokio::test]
async fn two_names_with_one_number_in_one_set_are_refused_before_anything_is_sent() {
    let keeper = keeper_without_a_server();
    let (a, b) = (
        LockKey::from(("keys set\u{1f}b", "c")),
        LockKey::from(("keys set", "b\u{1f}c")),
    );
    for keys in [[&a, &b], [&b, &a]] {
        let error = keeper.advisory_locks(keys).acquire().await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::KeyCollision,
            r#"its number is "keys set"/"b\u{1f}c" already"#,
        );
        let error = keeper.advisory_locks(keys).session().try_acquire().await;
        assert_error(
            &error.unwrap_err(),
            ErrorKind::KeyCollision,
            r#"its number is "keys set"/"b\u{1f}c" already"#,
        );
    }
    // The control: what is sent fails otherwise.
    let error = keeper
        .advisory_lock("keys set")
        .acquire()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Pool, r#""keys set""#);
}

#[tokio::test]
async fn foreign_names_with_one_number_are_refused_too() {
    let scene = Scene::new(2).await;
    let known = compat::with_advisory_lock("plumless", 0);
    let refused = compat::with_advisory_lock("buckeroo", 0);
    assert!(known.same_lock(&refused));
    let guard = scene.keeper.advisory_lock(&known).acquire().await.unwrap();
    assert_refused_everywhere(&scene.keeper, &refused, &known).await;
    drop(guard);
    assert_refused_everywhere(&scene.keeper, &refused, &known).await;
    scene.nothing_left().await;
    assert!(known.to_string().contains("plumless"));
}

/// A number and a name that has it are one lock; the name is what people read.
#[tokio::test]
async fn a_name_and_its_number_in_one_set_are_one_lock_with_the_name() {
    let scene = Scene::new(2).await;
    let name = LockKey::from("keys: once");
    let number = LockKey::from(name.as_i64().unwrap());
    let guard = scene
        .keeper
        .advisory_locks([&name, &number])
        .acquire()
        .await
        .unwrap();
    assert_eq!(shown(&scene).await.len(), 1);
    assert!(
        scene
            .keeper
            .advisory_lock(&number)
            .try_acquire()
            .await
            .unwrap()
            .is_none()
    );
    assert_eq!(guard.held_keys().collect::<Vec<_>>(), [&name]);
    drop(guard);
    scene.nothing_left().await;
}
