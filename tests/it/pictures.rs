//! The tree and the incident as pictures, as the programs that show them see them.

#[path = "pictures/browser.rs"]
mod browser;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkeeper::graph::LockTree;
use lockkeeper::{Incident, IncidentKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Running, Scene, Server, Session, Skip, eventually, pid_of, until_waiting,
};
use tokio_postgres::NoTls;

use browser::Scheme;

/// Markup, quotes, an end of line, and what would be code in a script.
const ODD: &str = "<script>alert(\"x\")</script> & 'q' `b` #35; \\";

struct Stage {
    scene: Scene,
    waits: Vec<Running>,
    sessions: Vec<Session>,
}

impl Stage {
    async fn on(server: &Server) -> Self {
        let scene = Scene::on(server, 2).await;
        scene
            .observer
            .batch_execute(
                "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 9) n; \
                 CREATE TABLE \"Odd <b>Table</b> 請求書\"\"\" (id int); CREATE TABLE p (id int)",
            )
            .await
            .unwrap();
        Self {
            scene,
            waits: Vec::new(),
            sessions: Vec::new(),
        }
    }

    /// A session that has run something.
    async fn session(&mut self, name: &str, sql: &str) -> Session {
        let mut config = self.scene.database.config();
        config.application_name(name);
        let session = Session::connect(&config).await;
        session.run(sql).await;
        self.sessions.push(session.clone());
        session
    }

    /// Something that has to wait.
    async fn waits(&mut self, session: &Session, sql: &str) {
        let waiting = session.start_waiting(&self.scene.observer, sql).await;
        self.waits.push(waiting);
    }

    async fn tree(&self) -> LockTree {
        self.scene.monitor().lock_tree().await.unwrap()
    }
}

/// One of everything: a chain, a queue behind an ALTER, a deadlock, a prepared transaction, odd names.
async fn everything(server: &Server) -> (Stage, LockTree) {
    let mut stage = Stage::on(server).await;
    let begin = |id: i32| format!("BEGIN; UPDATE t SET v = 'secret' WHERE id = {id}");
    stage
        .session(
            "billing src/long/path/to/a/module/of/the/application/pay.rs:42",
            &begin(1),
        )
        .await;
    let b = stage.session(ODD, &begin(2)).await;
    stage
        .waits(
            &b,
            "UPDATE t SET v = '<i>secret</i>' WHERE id = 1 /* </svg> */",
        )
        .await;
    let c = stage.session("worker", "").await;
    stage.waits(&c, "DELETE FROM t WHERE id = 2").await;
    let odd = "\"Odd <b>Table</b> 請求書\"\"\"";
    stage
        .session("report", &format!("BEGIN; SELECT FROM {odd}"))
        .await;
    let e = stage.session("migration", "").await;
    stage
        .waits(&e, &format!("ALTER TABLE {odd} ADD COLUMN extra int"))
        .await;
    for number in 1..=3 {
        let f = stage.session(&format!("reader {number}"), "").await;
        stage
            .waits(&f, &format!("SELECT 'secret' FROM {odd} AS \"</text>\""))
            .await;
    }
    let key = |key: i32| format!("SELECT pg_advisory_xact_lock({key})");
    let h = stage.session("left", &format!("BEGIN; {}", key(1))).await;
    let i = stage.session("right", &format!("BEGIN; {}", key(2))).await;
    stage.waits(&h, &key(2)).await;
    stage.waits(&i, &key(1)).await;
    stage
        .session(
            "",
            "BEGIN; LOCK TABLE p; PREPARE TRANSACTION 'order <7> \"a\"'",
        )
        .await;
    let j = stage.session("", "").await;
    stage.waits(&j, "TABLE p").await;
    let tree = stage.tree().await;
    assert_eq!(tree.walk().count(), 12);
    (stage, tree)
}

fn folder() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let folder = std::env::temp_dir().join(format!(
        "lockkeeper-pictures-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    ));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// What has to be true of every page, in light and dark. Gives back what the light one shows.
fn check(page: &str) -> Result<serde_json::Value, Skip> {
    let folder = folder();
    let mut backgrounds = Vec::new();
    let mut facts = serde_json::Value::Null;
    for scheme in [Scheme::Dark, Scheme::Light] {
        let seen = browser::open(page, scheme, &folder)?;
        facts = seen.facts;
        for nothing in ["overlapping", "spilling", "pale", "requests"] {
            assert_eq!(
                facts[nothing],
                serde_json::json!([]),
                "{nothing} {scheme:?}"
            );
        }
        for none in ["dead_ends", "tips", "scripts"] {
            assert_eq!(facts[none], 0, "{none}");
        }
        assert_eq!(facts["scrolls_sideways"], false);
        assert!(!seen.log.contains("CONSOLE"), "{}", seen.log);
        backgrounds.push(facts["background"].to_string());
    }
    assert_ne!(backgrounds[0], backgrounds[1], "dark as light");
    std::fs::remove_dir_all(&folder).ok();
    Ok(facts)
}

fn strings(value: &serde_json::Value) -> Vec<&str> {
    let values = value.as_array().unwrap().iter();
    values.map(|value| value.as_str().unwrap()).collect()
}

#[tokio::test]
async fn the_page_of_a_tree_in_chromium() {
    let test = "pictures::the_page_of_a_tree_in_chromium";
    let server = Server::start(&[("deadlock_timeout", "10min")]).unwrap();
    let (_stage, tree) = everything(&server).await;
    let page = tree.to_html();
    assert!(
        !page.contains("secret<") && !page.contains("'secret"),
        "{page}"
    );
    let facts = match check(&page) {
        Ok(facts) => facts,
        Err(skip) => return skip.report(test),
    };
    let cards = strings(&facts["cards"]);
    assert_eq!(cards.len(), 12, "{cards:?}");
    assert_eq!(facts["rows"], 12);
    // Of each waiter one, the other half of the deadlock among them; readers are behind the ALTER, not behind who reads.
    assert_eq!((&facts["links"], &facts["dashed"]), (&9.into(), &3.into()));
    let (text, drawing) = (
        facts["text"].as_str().unwrap(),
        facts["drawing"].as_str().unwrap(),
    );
    for (_, node) in tree.walk() {
        let name = node.backend().id().to_string();
        let is_there = cards.iter().any(|card| name.starts_with(card));
        assert!(is_there, "{name}: {cards:?}");
        assert!(text.contains(&name));
    }
    for expected in [
        ODD,
        "public.\"Odd <b>Table</b> 請求書\"\"\"",
        "prepared transaction \"order <7> \\\"a\\\"\"",
        "AccessExclusiveLock",
        "idle in transaction",
        "SELECT ? FROM \"Odd <b>Table</b> 請求書\"\"\" AS \"</text>\"",
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    for expected in [ODD, "…", "請求書", "row (0,1) of public.t", "blocks 4"] {
        assert!(drawing.contains(expected), "{expected} is not in {drawing}");
    }
    let title = facts["title"].as_str().unwrap();
    assert!(
        title.starts_with("9 sessions waiting for a lock"),
        "{title}"
    );
    assert!(text.contains("Deadlock: pid "), "{text}");
}

#[tokio::test]
async fn a_pile_up_of_five_hundred_in_chromium() {
    let test = "pictures::a_pile_up_of_five_hundred_in_chromium";
    let settings = [("max_connections", "600"), ("deadlock_timeout", "10min")];
    let server = Server::start(&settings).unwrap();
    let mut stage = Stage::on(&server).await;
    stage
        .session("holder", "BEGIN; SELECT pg_advisory_xact_lock(7)")
        .await;
    for number in 0..500 {
        let session = stage.session(&format!("waiter {number}"), "").await;
        let waiting = session.start("SELECT pg_advisory_xact_lock(7)");
        stage.waits.push(waiting);
    }
    stage.scene.until_awaited_by(500, 7).await;
    let tree = stage.tree().await;
    let page = tree.to_html();
    assert!(page.len() < 1_000_000, "{}", page.len());
    let facts = match check(&page) {
        Ok(facts) => facts,
        Err(skip) => return skip.report(test),
    };
    assert_eq!(facts["rows"], 501);
    let cards = strings(&facts["cards"]);
    assert_eq!(cards.len(), 10, "{cards:?}");
    assert_eq!(cards[9], "492 more sessions");
    let text = facts["text"].as_str().unwrap();
    assert!(text.contains("waiter 499") && text.contains("492 more sessions are not drawn"));
}

/// A deadlock and a lock timeout, each by the transaction that reports it.
async fn incidents() -> Vec<Incident> {
    let scene = Scene::new(2).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE \"a <b>ccount\" (id int PRIMARY KEY, v text);
             INSERT INTO \"a <b>ccount\" SELECT n, 'x' FROM generate_series(1, 9) n",
        )
        .await
        .unwrap();
    let found = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&found);
    let keeper = Keeper::builder(scene.pool.clone())
        .application("<i>app")
        .on_incident(move |incident| kept.lock().unwrap().push(incident.clone()))
        .side_connection(scene.database.config(), NoTls)
        .build();
    let other = Arc::new(scene.database.connect().await);
    let update = |id: i32| format!("UPDATE \"a <b>ccount\" SET v = 'secret' WHERE id = {id}");
    other
        .batch_execute(&format!(
            "SET application_name = '</svg> other'; SET deadlock_timeout = '10min'; BEGIN; {}",
            update(2)
        ))
        .await
        .unwrap();
    let pid = pid_of(&other).await;
    let once = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_secs(3));
    keeper
        .transaction_with(once, async |tx| {
            tx.batch_execute(&update(2)).await?;
            Ok::<_, lockkeeper::Error>(())
        })
        .await
        .unwrap_err();
    let reported = async |count| {
        eventually("no report", async || found.lock().unwrap().len() >= count).await;
    };
    reported(1).await;
    let once = TransactionOptions::new().attempts(1);
    let second = Arc::clone(&other);
    keeper
        .transaction_with(once, async |tx| {
            // Room for a sample on a slow machine.
            tx.batch_execute("SET LOCAL deadlock_timeout = '3s'")
                .await?;
            tx.batch_execute(&update(1)).await?;
            let (second, sql) = (Arc::clone(&second), update(1));
            tokio::spawn(async move { second.batch_execute(&sql).await });
            until_waiting(tx.client(), pid).await;
            tx.batch_execute(&update(2)).await?;
            Ok::<_, lockkeeper::Error>(())
        })
        .await
        .unwrap_err();
    reported(2).await;
    other.batch_execute("ROLLBACK").await.unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
    found.lock().unwrap().clone()
}

#[tokio::test]
async fn the_pages_of_incidents_in_chromium() {
    let test = "pictures::the_pages_of_incidents_in_chromium";
    let found = incidents().await;
    let kinds: Vec<_> = found.iter().map(Incident::kind).collect();
    assert_eq!(kinds, [IncidentKind::LockTimeout, IncidentKind::Deadlock]);
    for incident in found {
        let page = incident.to_html();
        assert!(!page.contains("secret"), "{page}");
        let facts = match check(&page) {
            Ok(facts) => facts,
            Err(skip) => return skip.report(test),
        };
        assert_eq!(facts["title"], incident.headline().as_str());
        assert_eq!(
            strings(&facts["cards"]).len(),
            incident.participants().len()
        );
        assert_eq!(facts["links"], incident.edges().len());
        assert_ne!(facts["labels"], 0);
        let text = facts["text"].as_str().unwrap();
        for expected in [
            incident.diagnosis().text(),
            "a <b>ccount",
            "</svg> other",
            "How sure this is",
            "UPDATE \"a <b>ccount\" SET v = ? WHERE id = ?",
            incident.sqlstate().unwrap(),
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
    }
}

/// What Graphviz draws of a text; it fails on one that it cannot read.
fn drawn(dot: &str) -> Result<String, Skip> {
    let Some(program) = browser::program(&["dot"]) else {
        return Err(Skip::new("graphviz", "no Graphviz is installed"));
    };
    let mut child = Command::new(program)
        .arg("-Tsvg")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(dot.as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !complaints.contains("syntax"),
        "{complaints}\n{dot}"
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
async fn dot_and_mermaid_of_a_tree_and_of_incidents() {
    let test = "pictures::dot_and_mermaid_of_a_tree_and_of_incidents";
    let server = Server::start(&[("deadlock_timeout", "10min")]).unwrap();
    let (_stage, tree) = everything(&server).await;
    let mut pictures = vec![(tree.to_dot(), tree.to_mermaid(), 12, 9)];
    for incident in incidents().await {
        let (nodes, edges) = (incident.participants().len(), incident.edges().len());
        pictures.push((incident.to_dot(), incident.to_mermaid(), nodes, edges));
    }
    for (dot, mermaid, nodes, edges) in pictures {
        assert!(!dot.contains("secret") && !mermaid.contains("secret"));
        // Each line of Mermaid is one of these, whatever is in the labels.
        let lines: Vec<_> = mermaid.lines().collect();
        assert_eq!(lines[0], "flowchart RL");
        let starts = |what: &str| lines.iter().filter(|line| line.contains(what)).count();
        assert_eq!((starts("[\""), starts("->")), (nodes, edges), "{mermaid}");
        for line in &lines[1..] {
            let quotes = line.matches('"').count();
            let is_class = line.starts_with("    class");
            assert!(is_class && quotes == 0 || quotes == 2, "{line}");
            assert!(!line.contains("<b>") && !line.contains("<script"), "{line}");
        }
        let svg = match drawn(&dot) {
            Ok(svg) => svg,
            Err(skip) => return skip.report(test),
        };
        assert_eq!(svg.matches("class=\"node\"").count(), nodes, "{dot}");
        assert_eq!(svg.matches("class=\"edge\"").count(), edges, "{dot}");
        assert!(!svg.contains("<script"));
        if nodes == 12 {
            let text = svg.replace("&#45;", "-").replace("&#160;", " ");
            assert!(text.contains("&lt;script&gt;alert("), "{text}");
            assert!(text.contains("請求書"), "{text}");
        }
    }
}
