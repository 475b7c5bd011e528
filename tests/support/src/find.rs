//! Which PostgreSQL to start: what is installed, else one from npm.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::account::Account;
use crate::error::SetupError;
use crate::npm;

/// The majors that the suite runs on, oldest first.
pub(crate) const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// The programs of one PostgreSQL.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    pub(crate) bin: PathBuf,
    pub(crate) major: u32,
}

impl Installation {
    /// The PostgreSQL for private clusters of this process, found (or fetched) once.
    /// `report` gets a line of text for each step.
    pub(crate) fn find(report: &dyn Fn(&str)) -> Result<Installation, SetupError> {
        static FOUND: OnceLock<Result<Installation, SetupError>> = OnceLock::new();
        FOUND
            .get_or_init(|| {
                report("searching for an installed PostgreSQL …");
                let found = search(report)?;
                report(&format!(
                    "found PostgreSQL {} in {}",
                    found.major,
                    found.bin.display()
                ));
                Ok(found)
            })
            .clone()
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// The major that `LOCKKEEPER_PG_MAJOR` demands.
pub(crate) fn demanded_major() -> Result<Option<u32>, SetupError> {
    parse_major(env::var_os("LOCKKEEPER_PG_MAJOR"))
}

fn parse_major(value: Option<OsString>) -> Result<Option<u32>, SetupError> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .filter(|major| MAJORS.contains(major))
        .map(Some)
        .ok_or_else(|| {
            SetupError::new(format!(
                "LOCKKEEPER_PG_MAJOR={} is no major version of PostgreSQL that the tests know; right is one of 14, 15, 16, 17, 18",
                value.to_string_lossy()
            ))
        })
}

fn search(report: &dyn Fn(&str)) -> Result<Installation, SetupError> {
    let account = Account::for_servers()?;
    let demanded = demanded_major()?;

    if let Some(bin) = env::var_os("LOCKKEEPER_PG_BIN").filter(|bin| !bin.is_empty()) {
        let bin = PathBuf::from(bin);
        let major = major_of(&bin, account).map_err(|why| {
            SetupError::new(format!(
                "LOCKKEEPER_PG_BIN={} is no folder with a PostgreSQL server that can be started: {why}",
                bin.display()
            ))
        })?;
        return match demanded {
            Some(demanded) if demanded != major => Err(SetupError::new(format!(
                "LOCKKEEPER_PG_BIN={} holds PostgreSQL {major}, but LOCKKEEPER_PG_MAJOR={demanded}",
                bin.display()
            ))),
            _ => Ok(Installation { bin, major }),
        };
    }

    for bin in candidates() {
        if let Ok(major) = major_of(&bin, account)
            && demanded.map_or(MAJORS.contains(&major), |demanded| demanded == major)
        {
            return Ok(Installation { bin, major });
        }
    }

    let wanted = demanded.unwrap_or(*MAJORS.end());
    let fetched = npm::install(wanted, account, report).and_then(|bin| {
        major_of(&bin, account)
            .map(|major| Installation {
                bin: bin.clone(),
                major,
            })
            .map_err(|why| {
                SetupError::new(format!(
                    "the server in {} does not run: {why}",
                    bin.display()
                ))
            })
    });
    fetched.map_err(|why| {
        let missing = demanded.map_or("PostgreSQL".to_owned(), |major| {
            format!("PostgreSQL {major}")
        });
        SetupError::new(format!(
            "no {missing} server is installed here, and none could be had from npm ({why}).\n\
             To run the tests: {}\n\
             or set DATABASE_URL to a server that they may use.",
            advice(account, demanded.is_some() && !on_path("npm"))
        ))
    })
}

/// The major of the server in `bin`, if `account` can start it.
fn major_of(bin: &Path, account: Account) -> Result<u32, String> {
    if !bin.join("initdb").is_file() {
        return Err("it has no initdb".to_owned());
    }
    let mut command = Command::new(bin.join("postgres"));
    command
        .arg("--version")
        .current_dir("/")
        .stdin(Stdio::null());
    account.apply(&mut command);
    let output = command
        .output()
        .map_err(|error| format!("postgres: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| {
        format!(
            "postgres --version: {}{}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })
}

/// `postgres (PostgreSQL) 15.18 (Debian …)` and `postgres (PostgreSQL) 19devel` alike.
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits = version
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(version.len());
    version[..digits].parse().ok()
}

/// Folders that may hold a server, in the order of preference.
fn candidates() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(output) = Command::new("pg_config")
        .arg("--bindir")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
    {
        let bindir = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !bindir.is_empty() {
            found.push(PathBuf::from(bindir));
        }
    }
    for dir in env::split_paths(&env::var_os("PATH").unwrap_or_default()) {
        // Through a link to where the other programs are.
        if let Ok(postgres) = dir.join("postgres").canonicalize()
            && let Some(real) = postgres.parent()
        {
            found.push(real.to_owned());
        }
    }
    for (parent, prefix, rest) in [
        ("/usr/lib/postgresql", "", "bin"),          // Debian, Ubuntu
        ("/usr", "pgsql-", "bin"),                   // PGDG packages for Red Hat
        ("/usr/libexec", "postgresql", ""),          // Alpine
        ("/opt/homebrew/opt", "postgresql@", "bin"), // Homebrew on Apple silicon
        ("/usr/local/opt", "postgresql@", "bin"),    // Homebrew on Intel
        ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"), // Homebrew on Linux
        ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
        ("/Library/PostgreSQL", "", "bin"),      // EDB's installer
        ("/opt/local/lib", "postgresql", "bin"), // MacPorts
    ] {
        let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some((
                    name.strip_prefix(prefix)?.parse().ok()?,
                    entry.path().join(rest),
                ))
            })
            .collect();
        versions.sort_by(|a, b| b.cmp(a));
        found.extend(versions.into_iter().map(|(_, dir)| dir));
    }
    found.extend(["/usr/bin", "/usr/local/pgsql/bin", "/usr/local/bin"].map(PathBuf::from));
    found
}

/// Whether `PATH` has a program of this name.
pub(crate) fn on_path(program: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join(program).is_file())
}

/// The one command that helps on this machine.
fn advice(account: Account, want_npm: bool) -> String {
    let package = |postgres: &'static str, npm: &'static str| if want_npm { npm } else { postgres };
    if env::consts::OS == "macos" {
        return format!("brew install {}", package("postgresql@18", "node"));
    }
    let sudo = if account.is_root() { "" } else { "sudo " };
    let command = if on_path("apt-get") {
        format!("apt-get install {}", package("postgresql", "npm"))
    } else if on_path("dnf") {
        format!("dnf install {}", package("postgresql-server", "npm"))
    } else if on_path("zypper") {
        format!("zypper install {}", package("postgresql-server", "npm"))
    } else if on_path("pacman") {
        format!("pacman -S {}", package("postgresql", "npm"))
    } else if on_path("apk") {
        "apk add postgresql".to_owned()
    } else {
        return "install PostgreSQL and put its bin folder on PATH".to_owned();
    };
    format!("{sudo}{command}")
}

#[cfg(test)]
mod tests {
    use super::{parse_major, parse_version};

    #[test]
    fn versions_are_read() {
        assert_eq!(
            parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0)\n"),
            Some(15)
        );
        assert_eq!(parse_version("postgres (PostgreSQL) 19devel"), Some(19));
        assert_eq!(parse_version("postgres (PostgreSQL) 18"), Some(18));
        assert_eq!(parse_version("initdb: command not found"), None);
    }

    #[test]
    fn a_bad_major_is_named() {
        assert!(matches!(parse_major(None), Ok(None)));
        assert!(matches!(parse_major(Some("".into())), Ok(None)));
        assert!(matches!(parse_major(Some("17".into())), Ok(Some(17))));
        for bad in ["13", "19", "15.2", "newest"] {
            let text = parse_major(Some(bad.into()))
                .map_or_else(|error| error.to_string(), |_| String::new());
            assert!(
                text.contains(&format!("LOCKKEEPER_PG_MAJOR={bad} ")),
                "{text}"
            );
            assert!(text.contains("14, 15, 16, 17, 18"), "{text}");
        }
    }
}
