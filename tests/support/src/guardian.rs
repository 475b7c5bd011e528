//! The end of everything that was started, however the test process ends.
//!
//! A [`Guardian`] owns a temporary folder and a small shell process, which reads from a pipe whose only other end is
//! held by this process. That end closes when this process is gone: after a normal exit, a panic, Ctrl-C, SIGKILL. The
//! shell then ends the registered processes and removes the folder.
//!
//! Invariant: no server process can escape. A process registers itself by making `pids/<pid>` *before* it becomes the
//! server; the shell first renames `pids`, so that a process that comes later cannot register and gives up.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::account::Account;
use crate::error::SetupError;

/// Arguments: the folder. SIGQUIT is PostgreSQL's immediate shutdown, after which it does not mind SIGTERM; PgBouncer
/// has no handler for the former before 1.23, and a shell may have left it ignored. Signals go to a group, because
/// `initdb` has children.
const WATCH: &str = r#"
PATH=$PATH:/usr/bin:/bin
dir=$1
while read -r _; do :; done
mv "$dir/pids" "$dir/ending"

# A dead process that has not been reaped yet still answers `kill -0`; where there is a /proc, it says so.
alive() {
    kill -0 "$1" || return 1
    [ -r "/proc/$1/stat" ] || return 0
    read -r _ _ state _ <"/proc/$1/stat" || return 1
    [ "$state" != Z ]
}

for file in "$dir"/ending/*; do
    kill -s QUIT -- "-${file##*/}"
    kill -s TERM -- "-${file##*/}"
done
for file in "$dir"/ending/*; do
    pid=${file##*/}
    round=0
    while [ "$pid" != '*' ] && alive "$pid"; do
        round=$((round + 1))
        [ "$round" -eq 100 ] && kill -s KILL -- "-$pid"
        [ "$round" -gt 120 ] && break
        sleep 0.05
    done
done
# Twice: the last child of a server may still have been writing.
rm -rf "$dir" || { sleep 0.5; rm -rf "$dir"; }
"#;

/// Arguments: the folder, then the command to become.
const REGISTER: &str = r#"dir=$1; shift; : >"$dir/pids/$$" && exec "$@""#;

/// A temporary folder and the processes that live from it; all of it ends with this value or with this process.
#[derive(Debug)]
pub(crate) struct Guardian {
    dir: PathBuf,
    account: Account,
    watch: Child,
}

impl Guardian {
    /// A new folder that belongs to `account`, under guard from now on.
    pub(crate) fn new(account: Account) -> Result<Guardian, SetupError> {
        let dir = temporary_folder(account)?;
        let guarded = (|| {
            account.own(&dir)?;
            let pids = dir.join("pids");
            fs::create_dir(&pids)?;
            account.own(&pids)?;
            Command::new("/bin/sh")
                .args(["-c", WATCH, "sh"])
                .arg(&dir)
                .current_dir("/")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                // Ctrl-C in a terminal goes to the foreground group: the guardian has to outlive it.
                .process_group(0)
                .spawn()
        })();
        match guarded {
            Ok(watch) => Ok(Guardian {
                dir,
                account,
                watch,
            }),
            Err(error) => {
                fs::remove_dir_all(&dir).ok();
                Err(SetupError::new(format!(
                    "cannot use the temporary folder {}: {error}",
                    dir.display()
                )))
            }
        }
    }

    /// The temporary folder, with all links resolved.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who owns the folder and runs the processes.
    pub(crate) fn account(&self) -> Account {
        self.account
    }

    /// Starts `program` as the account, in the folder, in a process group of its own, with its output appended to `log`.
    pub(crate) fn spawn<A: AsRef<std::ffi::OsStr>>(
        &self,
        program: &Path,
        args: impl IntoIterator<Item = A>,
        log: &Path,
    ) -> io::Result<Child> {
        let output = File::options().append(true).create(true).open(log)?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", REGISTER, "sh"])
            .arg(&self.dir)
            .arg(program)
            .args(args)
            .current_dir(&self.dir)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        // PGDATA, PGPORT, PGOPTIONS … of the user's shell are meant for other servers.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        self.account.apply(&mut command);
        command.spawn()
    }

    /// Runs `program` as [`spawn`](Self::spawn) does and waits for its end; a failure has what it wrote.
    pub(crate) fn run<A: AsRef<std::ffi::OsStr>>(
        &self,
        program: &Path,
        args: impl IntoIterator<Item = A>,
        log: &Path,
    ) -> Result<(), SetupError> {
        let failed = |why: String| SetupError::new(format!("{} failed: {why}", program.display()));
        let mut child = self
            .spawn(program, args, log)
            .map_err(|error| failed(error.to_string()))?;
        let status = child.wait().map_err(|error| failed(error.to_string()))?;
        self.forget(&child);
        if status.success() {
            Ok(())
        } else {
            Err(failed(format!("{status}\n{}", tail(log))))
        }
    }

    /// Takes a process that was seen to end off the list, so that its pid, once used again, is not signalled.
    pub(crate) fn forget(&self, child: &Child) {
        fs::remove_file(self.dir.join("pids").join(child.id().to_string())).ok();
    }

    /// Ends the registered processes, of which `child` may be one, and removes the folder.
    pub(crate) fn end(&mut self, mut child: Option<&mut Child>) {
        drop(self.watch.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            // The guardian may be waiting for our child to be reaped.
            let child_ended = child
                .as_mut()
                .is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if child_ended && !matches!(self.watch.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.end(None);
    }
}

/// Sends `signal` (`QUIT`, `INT`, …) to a process.
pub(crate) fn signal(child: &Child, signal: &str) -> io::Result<()> {
    signal_pid(child.id(), signal)
}

/// The same to a process that need not be a child of this one.
pub(crate) fn signal_pid(pid: u32, signal: &str) -> io::Result<()> {
    // The shell's own `kill`: the program of that name is missing on small machines.
    let status = Command::new("/bin/sh")
        .args(["-c", "kill -s \"$1\" \"$2\"", "sh", signal])
        .arg(pid.to_string())
        .stderr(Stdio::null())
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("kill -s {signal}: {status}")))
    }
}

/// The last lines of a log file.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A new empty folder for this user only, in a place that `account` can reach.
fn temporary_folder(account: Account) -> Result<PathBuf, SetupError> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let nanos = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |elapsed| elapsed.subsec_nanos());
    let name = format!(
        "lockkeeper-{}-{}-{nanos:x}",
        process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let mut refused = String::new();
    for base in [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()] {
        // A Unix socket's path has a limit of about 100 bytes.
        let Ok(base) = base.canonicalize() else {
            continue;
        };
        if base.as_os_str().len() > 60 || !account.reaches(&base) {
            continue;
        }
        let dir = base.join(&name);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) => refused = format!(": {}: {error}", dir.display()),
        }
    }
    Err(SetupError::new(format!(
        "no temporary folder that the server can use (tried $TMPDIR, /tmp, /var/tmp){refused}"
    )))
}
