//! Replication, backups and what else the server runs by itself.

use std::time::Duration;

use lockkeeper::resolver::RunEnd;
use lockkeeper::{Protection, SignalOutcome};
use lockkeeper_testkit::{GIVE_UP_AFTER, MonitorScene, Server, eventually, eventually_within};

use super::{PileUp, TICK, left_alone, policy, resolver};

/// A standby that streams, a base backup that runs, and a walsender that blocks other sessions.
#[tokio::test]
async fn replication_and_a_running_backup_are_left_alone() {
    let name = "replication_and_a_running_backup_are_left_alone";
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report(name),
    };
    let backup = BaseBackup::start(&scene).await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .allow_migrations(true)
        .allow_superusers(true)
        .settle(TICK)
        .execute(true);

    // A walsender with a database runs statements like any session, and holds their locks.
    let mut sender = WalSender::connect(&server, scene.database.name());
    sender.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1");
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(waiter.pid).await;
    let snapshot = scene.monitor.snapshot().await.unwrap();
    let root = snapshot.roots()[0].clone();
    assert_eq!(root.backend_type(), Some("walsender"));
    let log = resolver(&scene, eager).run().await.unwrap();
    assert!(
        left_alone(&log, root.pid().unwrap()).contains("replication"),
        "{log}"
    );
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );

    // The standby may have been at its beginning still, or lost its connection and have another one now.
    eventually("the standby does not stream", async || {
        let sql = "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'";
        scene.observer.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    let mut senders = Vec::new();
    for backend in scene.monitor.activity().await.unwrap() {
        let backup = backup
            .as_ref()
            .is_some_and(|backup| backend.pid() == Some(backup.pid));
        if !backup && backend.backend_type() != Some("walsender") {
            continue;
        }
        for outcome in [
            scene.monitor.cancel(&backend).await.unwrap(),
            scene.monitor.terminate(&backend).await.unwrap(),
        ] {
            let expected = match backup {
                true => Protection::Backup,
                false => Protection::Replication,
            };
            assert_eq!(outcome, SignalOutcome::Protected(expected));
        }
        senders.push((backend.pid(), backend.backend_start()));
    }
    assert_eq!(senders.len(), 2 + usize::from(backup.is_some()));
    // All of them are still there, and work.
    sender.run("COMMIT");
    waiting.await.unwrap().unwrap();
    let after = scene.monitor.activity().await.unwrap();
    for (pid, start) in senders {
        let mut same = after
            .iter()
            .filter(|b| (b.pid(), b.backend_start()) == (pid, start));
        assert!(same.next().is_some(), "{pid:?} is gone");
    }
    if let Some(mut backup) = backup {
        assert!(
            backup.child.try_wait().unwrap().is_none(),
            "the backup has ended"
        );
    }
    drop(standby);
}

/// What it holds it holds until the standby has its commit, which it has made already.
#[tokio::test]
async fn a_commit_that_waits_for_a_standby_is_left_alone() {
    let server = Server::start(&[
        ("synchronous_standby_names", "nobody"),
        ("synchronous_commit", "local"),
    ])
    .unwrap();
    let scene = MonitorScene::on(&server).await;
    let pile = PileUp::new(&scene).await;
    let committing = pile
        .holder
        .start("SET LOCAL synchronous_commit = on; COMMIT");
    eventually("it does not wait for the standby", async || {
        scene.seen(pile.holder.pid).await.wait_event() == Some("SyncRep")
    })
    .await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&scene, eager).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("synchronous standby"),
        "{log}"
    );
    let seen = scene.seen(pile.holder.pid).await;
    for outcome in [
        scene.monitor.cancel(&seen).await.unwrap(),
        scene.monitor.terminate(&seen).await.unwrap(),
    ] {
        assert_eq!(outcome, SignalOutcome::Protected(Protection::Committing));
    }
    assert!(!committing.is_finished());
    // It is told when there is none to wait for any more.
    let release = "ALTER SYSTEM SET synchronous_standby_names = ''";
    scene.observer.batch_execute(release).await.unwrap();
    scene
        .observer
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    committing.await.unwrap().unwrap();
    pile.all_finish().await;
}

/// A real one: the server ends other autovacuums itself when a session waits for them, and never this.
#[tokio::test]
async fn an_autovacuum_to_prevent_wraparound_is_left_alone() {
    let server = Server::start(&[
        ("autovacuum_freeze_max_age", "100000"),
        ("autovacuum_naptime", "1s"),
    ])
    .unwrap();
    let scene = MonitorScene::on(&server).await;
    // One to prevent wraparound comes all the same where others are switched off, which would be in its place.
    let slowly = "INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(10, 5000) n; \
        ALTER TABLE t SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, \
        autovacuum_freeze_max_age = 100000, autovacuum_enabled = false)";
    scene.observer.batch_execute(slowly).await.unwrap();
    let age = "DO $$ BEGIN FOR n IN 1..110000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";
    scene.observer.batch_execute(age).await.unwrap();
    let mut worker = 0;
    eventually_within(4 * GIVE_UP_AFTER, "no autovacuum comes", async || {
        let sql = "SELECT a.pid FROM pg_stat_activity a JOIN pg_locks l USING (pid) \
                   WHERE a.backend_type = 'autovacuum worker' AND l.relation = 't'::regclass \
                   AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted \
                   AND a.query LIKE '%(to prevent wraparound)'";
        let row = scene.observer.query_opt(sql, &[]).await.unwrap();
        worker = row.map_or(0, |row| row.get(0));
        worker != 0
    })
    .await;
    let waiter = scene.session().await;
    let waiting = waiter.start("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE");
    scene.until_waiting(waiter.pid).await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .allow_migrations(true)
        .allow_superusers(true)
        .settle(TICK)
        .execute(true);
    let log = resolver(&scene, eager).run().await.unwrap();
    assert!(left_alone(&log, worker).contains("wraparound"), "{log}");
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );
    let seen = scene.seen(worker).await;
    for outcome in [
        scene.monitor.cancel(&seen).await.unwrap(),
        scene.monitor.terminate(&seen).await.unwrap(),
    ] {
        assert_eq!(
            outcome,
            SignalOutcome::Protected(Protection::WraparoundVacuum)
        );
    }
    waiting.abort();
}

/// The program itself, slowed down; `None` where it is not installed.
struct BaseBackup {
    child: std::process::Child,
    pid: i32,
    folder: std::path::PathBuf,
}

impl BaseBackup {
    async fn start(scene: &MonitorScene) -> Option<Self> {
        let sql = "SELECT setting FROM pg_config WHERE name = 'BINDIR'";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        let program = std::path::Path::new(&row.get::<_, String>(0)).join("pg_basebackup");
        if !program.is_file() {
            return None;
        }
        let folder = std::env::temp_dir().join(format!("{}-backup", scene.database.name()));
        let server = scene.database.server();
        let child = std::process::Command::new(program)
            .args([
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-X",
                "none",
                "--no-sync",
            ])
            .args(["--max-rate=32k", "--checkpoint=fast"])
            .args(["-p", &server.port().to_string(), "-D"])
            .arg(&folder)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut pid = None;
        eventually("no backup runs", async || {
            let sql = "SELECT pid FROM pg_stat_progress_basebackup WHERE backup_streamed > 0";
            let row = scene.observer.query_opt(sql, &[]).await.unwrap();
            pid = row.map(|row| row.get(0));
            pid.is_some()
        })
        .await;
        Some(Self {
            child,
            pid: pid.unwrap(),
            folder,
        })
    }
}

impl Drop for BaseBackup {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

/// A connection with `replication=database`, which the driver does not offer: the first messages by hand.
struct WalSender(std::net::TcpStream);

impl WalSender {
    fn connect(server: &Server, database: &str) -> Self {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        let mut body = 196_608_i32.to_be_bytes().to_vec();
        for text in [
            "user",
            "postgres",
            "database",
            database,
            "replication",
            "database",
            "",
        ] {
            body.extend(text.as_bytes());
            body.push(0);
        }
        Self::send(&mut stream, &body);
        let mut sender = Self(stream);
        sender.until_ready();
        sender
    }

    fn run(&mut self, sql: &str) {
        use std::io::Write as _;
        self.0.write_all(b"Q").unwrap();
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        Self::send(&mut self.0, &body);
        self.until_ready();
    }

    fn send(stream: &mut std::net::TcpStream, body: &[u8]) {
        use std::io::Write as _;
        let length = i32::try_from(body.len() + 4).unwrap();
        stream.write_all(&length.to_be_bytes()).unwrap();
        stream.write_all(body).unwrap();
    }

    fn until_ready(&mut self) {
        use std::io::Read as _;
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head).unwrap();
            let length = i32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.0.read_exact(&mut body).unwrap();
            assert_ne!(head[0], b'E', "{}", String::from_utf8_lossy(&body));
            if head[0] == b'Z' {
                return;
            }
        }
    }
}
