//! The processes and files of one private cluster.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio_postgres::Config;

use crate::account::Account;
use crate::error::SetupError;
use crate::find::Installation;
use crate::guardian::{self, Guardian};
use crate::probe;

/// Nothing of a cluster is worth keeping, so nothing waits for the disk; tests want many connections.
const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("shared_buffers", "64MB"),
    ("jit", "off"),
    ("max_connections", "500"),
    ("max_prepared_transactions", "20"),
    ("deadlock_timeout", "1s"),
    ("wal_level", "replica"),
    ("max_wal_senders", "5"),
    ("wal_keep_size", "128MB"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("log_min_messages", "warning"),
    ("log_statement", "none"),
    ("log_line_prefix", "%m [%p] "),
];

const STARTS_WITHIN: Duration = Duration::from_secs(60);

/// A private cluster: its folder, its postmaster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) installation: Installation,
    pub(crate) port: u16,
    guardian: Guardian,
    /// What comes over the network has to be encrypted, so the tests themselves use the socket in the folder.
    encrypted: bool,
    /// `None` while stopped.
    postmaster: Mutex<Option<Child>>,
}

impl Cluster {
    /// Makes and starts a cluster with `settings` besides the usual ones. `report` gets a line of text for each step.
    pub(crate) fn start(
        settings: &[(&str, &str)],
        report: &dyn Fn(&str),
    ) -> Result<Cluster, SetupError> {
        let cluster = Cluster::make(settings, report)?;
        report("starting its server …");
        let cluster = cluster.launch_first()?;
        report(&format!(
            "PostgreSQL {} is ready on port {}",
            cluster.installation.major, cluster.port
        ));
        Ok(cluster)
    }

    /// The same, but whatever comes over the network has to be encrypted.
    pub(crate) fn start_encrypted(certificate: &str, key: &str) -> Result<Cluster, SetupError> {
        let mut cluster = Cluster::make(&[("ssl", "on")], &|_| {})?;
        cluster.encrypted = true;
        for (name, text) in [
            ("server.crt", certificate),
            ("server.key", key),
            (
                "pg_hba.conf",
                "local all all trust\nhostssl all all 127.0.0.1/32 trust\n",
            ),
        ] {
            let path = cluster.data().join(name);
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))
                .and_then(|()| cluster.guardian.account().own(&path))
                .map_err(SetupError::because(path.display()))?;
        }
        cluster.launch_first()
    }

    /// A cluster with settings, that was never started.
    fn make(settings: &[(&str, &str)], report: &dyn Fn(&str)) -> Result<Cluster, SetupError> {
        let cluster = Cluster::empty(Installation::find(report)?)?;
        report("creating a throw-away cluster …");
        let mut args: Vec<OsString> = vec!["-D".into(), cluster.data().into()];
        for arg in [
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--no-instructions",
        ] {
            args.push(arg.into());
        }
        cluster.guardian.run(
            &cluster.installation.program("initdb"),
            args,
            &cluster.dir().join("initdb.log"),
        )?;
        cluster.configure(SETTINGS)?;
        cluster.configure(settings)?;
        Ok(cluster)
    }

    /// A folder for a cluster, with nothing in it.
    pub(crate) fn empty(installation: Installation) -> Result<Cluster, SetupError> {
        Ok(Cluster {
            installation,
            port: 0,
            guardian: Guardian::new(Account::for_servers()?)?,
            encrypted: false,
            postmaster: Mutex::new(None),
        })
    }

    pub(crate) fn guardian(&self) -> &Guardian {
        &self.guardian
    }

    fn dir(&self) -> &std::path::Path {
        self.guardian.dir()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// Adds lines to `postgresql.conf`; a later line wins.
    pub(crate) fn configure(&self, settings: &[(&str, &str)]) -> Result<(), SetupError> {
        let mut lines = String::new();
        for (name, value) in settings {
            writeln!(lines, "{name} = '{}'", value.replace('\'', "''"))
                .expect("writing to a string cannot fail");
        }
        fs::File::options()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(SetupError::because("postgresql.conf"))
    }

    /// Starts the postmaster on a free port.
    pub(crate) fn launch_first(mut self) -> Result<Cluster, SetupError> {
        let mut tries = 0;
        loop {
            tries += 1;
            self.port = free_port()?;
            match self.launch() {
                // Another process took the port since.
                Err(_) if tries < 5 && self.log().contains("could not bind") => {
                    fs::remove_file(self.log_file()).ok();
                }
                launched => return launched.map(|()| self),
            }
        }
    }

    /// Starts the postmaster and waits until this very cluster answers.
    fn launch(&self) -> Result<(), SetupError> {
        let mut args: Vec<OsString> = vec![
            "-D".into(),
            self.data().into(),
            "-k".into(),
            self.dir().into(),
        ];
        args.extend(["-h", "127.0.0.1", "-p"].map(OsString::from));
        args.push(self.port.to_string().into());
        let program = self.installation.program("postgres");
        let mut child = self
            .guardian
            .spawn(&program, args, &self.log_file())
            .map_err(SetupError::because(program.display()))?;
        match self.wait_until_ready(&mut child) {
            Ok(()) => {
                *self.postmaster() = Some(child);
                Ok(())
            }
            Err(why) => {
                child.kill().ok();
                child.wait().ok();
                self.guardian.forget(&child);
                Err(SetupError::new(format!(
                    "{} on port {}: {why}\n{}",
                    program.display(),
                    self.port,
                    guardian::tail(&self.log_file())
                )))
            }
        }
    }

    fn wait_until_ready(&self, child: &mut Child) -> Result<(), String> {
        let config = self.config();
        let data = self.data();
        probe::blocking(|| async move {
            let deadline = Instant::now() + STARTS_WITHIN;
            loop {
                if let Ok(Some(status)) = child.try_wait() {
                    return Err(format!("it ended with {status}"));
                }
                // On a port that another cluster has taken meanwhile, the other one answers.
                let why = match probe::ask(&config, "SHOW data_directory").await {
                    Ok(answer) if data.as_os_str() == answer.as_str() => return Ok(()),
                    Ok(answer) => format!("the server of {answer} answers on this port"),
                    Err(error) => error,
                };
                if Instant::now() > deadline {
                    return Err(format!("not ready within {STARTS_WITHIN:?}: {why}"));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    }

    /// The superuser, in the database `postgres`.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        if self.encrypted {
            config.host_path(self.dir());
        } else {
            config.host("127.0.0.1");
        }
        config.port(self.port).user("postgres").dbname("postgres");
        config
    }

    /// Sends `signal` to the postmaster and waits for its end.
    pub(crate) fn stop(&self, signal: &str) {
        let Some(mut child) = self.postmaster().take() else {
            return;
        };
        // An error says that it has ended already.
        guardian::signal(&child, signal).ok();
        let deadline = Instant::now() + Duration::from_secs(20);
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                child.kill().ok();
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.guardian.forget(&child);
    }

    /// Stops the postmaster (the fast way) if it runs, and starts it on the same port.
    pub(crate) fn restart(&self) -> Result<(), SetupError> {
        self.stop("INT");
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.launch() {
                // After SIGKILL the last backends need a moment to notice; a port may be in use for as long.
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
                launched => return launched,
            }
        }
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.dir().join("server.log")
    }

    pub(crate) fn log(&self) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn postmaster(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.postmaster
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut child = self.postmaster().take();
        self.guardian.end(child.as_mut());
    }
}

/// A port of 127.0.0.1 that is free just now.
pub(crate) fn free_port() -> Result<u16, SetupError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(SetupError::because("no free port on 127.0.0.1"))
}
