//! The account that servers run under when the tests run as root, which PostgreSQL and PgBouncer refuse.

use std::io;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::error::SetupError;

/// The account that the server processes run under.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Account {
    /// The user who runs the tests.
    Own,
    /// Another account, because the tests run as root.
    Other { uid: u32, gid: u32 },
}

impl Account {
    /// The account for server processes: the user's own, or `postgres`, else `nobody`, for root.
    pub(crate) fn for_servers() -> Result<Account, SetupError> {
        static FOUND: OnceLock<Result<Account, SetupError>> = OnceLock::new();
        FOUND
            .get_or_init(|| {
                if id(&["-u"]) != Some(0) {
                    return Ok(Account::Own);
                }
                ["postgres", "nobody"]
                    .iter()
                    .find_map(|name| {
                        Some(Account::Other {
                            uid: id(&["-u", name])?,
                            gid: id(&["-g", name])?,
                        })
                    })
                    .ok_or_else(|| {
                        SetupError::new(
                            "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` for it; \
                             run the tests as another user",
                        )
                    })
            })
            .clone()
    }

    pub(crate) fn is_root(self) -> bool {
        matches!(self, Account::Other { .. })
    }

    /// Lets `command` run as this account.
    pub(crate) fn apply(self, command: &mut Command) {
        if let Account::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
    }

    /// Gives `path` to this account.
    pub(crate) fn own(self, path: &Path) -> io::Result<()> {
        match self {
            Account::Own => Ok(()),
            Account::Other { uid, gid } => chown(path, Some(uid), Some(gid)),
        }
    }

    /// Whether this account can go into `dir` (no folder on the way is closed to it).
    pub(crate) fn reaches(self, dir: &Path) -> bool {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "cd -- \"$1\"", "sh"])
            .arg(dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.apply(&mut command);
        command.status().is_ok_and(|status| status.success())
    }
}

/// What `id` answers: the one portable way to ask without `unsafe`.
fn id(args: &[&str]) -> Option<u32> {
    let output = ["id", "/usr/bin/id"].iter().find_map(|id| {
        Command::new(id)
            .args(args)
            .stderr(Stdio::null())
            .output()
            .ok()
    })?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.trim().parse().ok()
}
