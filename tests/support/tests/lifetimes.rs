//! No server outlives the process that started it, and neither does its folder.
//!
//! Each test runs this test binary again, as a process that starts a server, and ends that process in its own way.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lockkeeper_testkit::{PoolMode, Server};

const END: &str = "LOCKKEEPER_TESTKIT_VICTIM";

/// The process of the other tests. Does nothing when it runs as a test of its own.
#[test]
fn victim() {
    let Ok(end) = env::var(END) else { return };
    let server = Server::start(&[]).expect("a server can be started");
    // More to clean up, where it can be had.
    let _bouncer = server.pgbouncer(PoolMode::Session, "postgres");
    let _standby = (end == "kill").then(|| server.standby());
    writeln!(std::io::stdout(), "READY {}", server.port()).expect("somebody reads");
    match end.as_str() {
        "return" => {}
        "exit" => std::process::exit(0),
        "panic" => panic!("as intended"),
        "abort" => std::process::abort(),
        // Not dropped: what a `static` is.
        "static" => drop(Box::leak(Box::new(server))),
        _ => thread::sleep(Duration::from_secs(20)),
    }
}

#[test]
fn a_test_that_returns() {
    ends_by_itself("return");
}

#[test]
fn a_static_server() {
    ends_by_itself("static");
}

#[test]
fn an_exit() {
    ends_by_itself("exit");
}

#[test]
fn a_panic() {
    ends_by_itself("panic");
}

#[test]
fn an_abort() {
    ends_by_itself("abort");
}

#[test]
fn sigkill() {
    let mut victim = Victim::start("kill");
    let port = victim.wait_until_ready();
    victim.process.kill().expect("it can be killed");
    victim.leaves_nothing(Some(port));
}

/// A terminal sends the signal to the whole foreground group.
#[test]
fn control_c() {
    let mut victim = Victim::start("interrupt");
    let port = victim.wait_until_ready();
    let status = Command::new("/bin/sh")
        .args(["-c", "kill -s INT -- \"-$1\"", "sh"])
        .arg(victim.process.id().to_string())
        .status()
        .expect("a shell");
    assert!(status.success());
    victim.leaves_nothing(Some(port));
}

#[test]
fn sigkill_while_the_cluster_is_made() {
    let mut victim = Victim::start("early");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !victim
        .folders()
        .iter()
        .any(|folder| folder.join("data").exists())
    {
        assert!(Instant::now() < deadline, "no cluster was begun");
        thread::sleep(Duration::from_millis(2));
    }
    victim.process.kill().expect("it can be killed");
    victim.leaves_nothing(None);
}

fn ends_by_itself(how: &str) {
    let mut victim = Victim::start(how);
    let port = victim.wait_until_ready();
    victim.leaves_nothing(Some(port));
}

struct Victim {
    process: Child,
}

impl Victim {
    fn start(end: &str) -> Victim {
        let this = env::current_exe().expect("the path of this test");
        let process = Command::new(this)
            .args(["--exact", "victim", "--nocapture", "--test-threads=1"])
            .env(END, end)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("this test can run again");
        Victim { process }
    }

    fn wait_until_ready(&mut self) -> u16 {
        let output = self.process.stdout.take().expect("it is piped");
        for line in BufReader::new(output).lines() {
            let line = line.expect("text");
            // Behind the words of the test harness on the same line.
            if let Some((_, port)) = line.split_once("READY ") {
                return port.parse().expect("a port");
            }
        }
        panic!("the process ended before its server was ready");
    }

    /// The folders of this process.
    fn folders(&self) -> Vec<PathBuf> {
        let prefix = format!("lockkeeper-{}-", self.process.id());
        [env::temp_dir(), "/tmp".into(), "/var/tmp".into()]
            .iter()
            .flat_map(|base| fs::read_dir(base).into_iter().flatten().flatten())
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect()
    }

    fn leaves_nothing(&mut self, port: Option<u16>) {
        let folders = self.folders();
        self.process.wait().expect("it ends");
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut left: Vec<String> = self
                .folders()
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            left.extend(folders.iter().flat_map(|folder| processes_in(folder)));
            if port.is_some_and(|port| TcpStream::connect(("127.0.0.1", port)).is_ok()) {
                left.push("the port".to_owned());
            }
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Processes that work in `folder` or name it in their command line, where there is a /proc that tells.
fn processes_in(folder: &Path) -> Vec<String> {
    let name = folder.to_string_lossy();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let works_there =
                fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
            (works_there || command.contains(&*name))
                .then(|| format!("{}: {command}", entry.file_name().display()))
        })
        .collect()
}
