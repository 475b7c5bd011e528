//! A PostgreSQL server from npm, for machines without one and for other majors.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use crate::account::Account;
use crate::error::SetupError;

/// One version a major; every version of these packages is marked as a prerelease, so that no range finds them.
const VERSIONS: [(u32, &str); 5] = [
    (14, "14.23.0-beta.17"),
    (15, "15.18.0-beta.17"),
    (16, "16.14.0-beta.17"),
    (17, "17.10.0-beta.17"),
    (18, "18.4.0-beta.17"),
];

/// The `bin` folder of a server of this major, fetched unless a former run has done so. `report` gets a line of text
/// before it is.
pub(crate) fn install(
    major: u32,
    account: Account,
    report: &dyn Fn(&str),
) -> Result<PathBuf, SetupError> {
    let (_, version) = VERSIONS
        .iter()
        .find(|(of, _)| *of == major)
        .ok_or_else(|| SetupError::new(format!("no package is known for major {major}")))?;
    let platform = match (env::consts::OS, env::consts::ARCH) {
        ("linux", "x86_64") => "linux-x64",
        ("linux", "aarch64") => "linux-arm64",
        ("macos", "x86_64") => "darwin-x64",
        ("macos", "aarch64") => "darwin-arm64",
        (os, arch) => {
            return Err(SetupError::new(format!(
                "there is no package for {os} on {arch}"
            )));
        }
    };
    let package = format!("@embedded-postgres/{platform}");

    // One download at a time in this process; other processes meet at the rename below.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);

    let cache = cache_folder(account)?;
    let folder = cache.join(format!("postgres-{platform}-{version}"));
    let native = folder.join("node_modules").join(&package).join("native");
    let bin = native.join("bin");
    if bin.is_dir() {
        return Ok(bin);
    }

    report(&format!(
        "PostgreSQL {major} is not installed: fetching it with npm into {}, once …",
        cache.display()
    ));
    sweep(&cache);
    let nanos = UNIX_EPOCH
        .elapsed()
        .map_or(0, |elapsed| elapsed.subsec_nanos());
    let unfinished = Unfinished(cache.join(format!("unfinished-{}-{nanos:x}", process::id())));
    fetch(&unfinished.0, &package, version)?;
    let fetched = unfinished.0.join("node_modules").join(&package);
    restore_links(&fetched).map_err(SetupError::because(format!(
        "{package}: the links of its libraries"
    )))?;
    match fs::rename(&unfinished.0, &folder) {
        Ok(()) => Ok(bin),
        // Another process was faster.
        Err(_) if bin.is_dir() => Ok(bin),
        Err(error) => Err(SetupError::new(format!("{}: {error}", folder.display()))),
    }
}

/// Runs npm.
fn fetch(prefix: &Path, package: &str, version: &str) -> Result<(), SetupError> {
    fs::create_dir(prefix).map_err(SetupError::because(prefix.display()))?;
    let output = Command::new("/bin/sh")
        // The server's account has to read what root installs.
        .args(["-c", "umask 022; exec \"$@\"", "sh"])
        .args([
            "npm",
            "install",
            "--no-save",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
        ])
        .args([
            "--no-update-notifier",
            "--ignore-scripts",
            "--loglevel=error",
            "--fetch-retries=2",
            "--prefix",
        ])
        .arg(prefix)
        .arg(format!("{package}@{version}"))
        .current_dir(prefix)
        .stdin(Stdio::null())
        .output()
        .map_err(SetupError::because("npm"))?;
    if output.status.success() {
        return Ok(());
    }
    if output.status.code() == Some(127) {
        return Err(SetupError::new("npm is not installed"));
    }
    Err(SetupError::new(format!(
        "npm install {package}@{version}: {}: {}",
        output.status,
        // The code of the error; a stack trace follows.
        String::from_utf8_lossy(&output.stderr)
            .lines()
            .next()
            .unwrap_or_default()
    )))
}

/// Makes the links between library names that npm cannot pack.
///
/// The package lists them in `pg-symlinks.json` and has a script for it, which newer versions of npm no longer run
/// unasked.
fn restore_links(package: &Path) -> io::Result<()> {
    let list = match fs::read_to_string(package.join("native/pg-symlinks.json")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        list => list?,
    };
    for (source, target) in parse_links(&list) {
        let (source, target) = (Path::new(source), Path::new(target));
        let inside = |path: &Path| {
            path.components()
                .all(|part| matches!(part, Component::Normal(_)))
        };
        let Some(name) = source.file_name() else {
            continue;
        };
        if !inside(source) || !inside(target) || source.parent() != target.parent() {
            return Err(io::Error::other(format!(
                "{} as a link to {} is not expected",
                target.display(),
                source.display()
            )));
        }
        match symlink(name, package.join(target)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The pairs of `[{"source":"native/lib/liba.so.1.2","target":"native/lib/liba.so.1"}, …]`; the names need no escapes.
fn parse_links(json: &str) -> Vec<(&str, &str)> {
    let strings: Vec<&str> = json.split('"').skip(1).step_by(2).collect();
    strings
        .chunks_exact(4)
        .filter_map(|entry| match entry {
            ["source", source, "target", target] | ["target", target, "source", source] => {
                Some((*source, *target))
            }
            _ => None,
        })
        .collect()
}

/// Where servers are kept from run to run.
fn cache_folder(account: Account) -> Result<PathBuf, SetupError> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let places = if account.is_root() {
        // Root's own folders are closed to the server's account, and a known name in /tmp is open to every account.
        vec![
            PathBuf::from("/var/cache/lockkeeper"),
            PathBuf::from("/opt/lockkeeper"),
        ]
    } else {
        let cache =
            absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        let cache = cache.map(|cache| cache.join("lockkeeper"));
        cache
            .into_iter()
            .chain([env::temp_dir().join("lockkeeper-cache")])
            .collect()
    };
    for place in &places {
        if fs::create_dir_all(place).is_ok()
            && (!account.is_root()
                || fs::set_permissions(place, fs::Permissions::from_mode(0o755)).is_ok())
            && account.reaches(place)
            && writable(place)
        {
            return Ok(place.clone());
        }
    }
    Err(SetupError::new(format!(
        "none of the cache folders {places:?} can be used"
    )))
}

fn writable(dir: &Path) -> bool {
    let probe = dir.join(format!("probe-{}", process::id()));
    fs::create_dir(&probe).is_ok() && fs::remove_dir(&probe).is_ok()
}

/// Removes what processes that were killed in the middle of an installation left behind.
fn sweep(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| {
                time.elapsed()
                    .is_ok_and(|age| age > Duration::from_secs(3600))
            });
        if old
            && entry
                .file_name()
                .to_string_lossy()
                .starts_with("unfinished-")
        {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// A folder that is removed unless it was renamed.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::parse_links;

    #[test]
    fn links_are_read() {
        let json = r#"[{"source":"native/lib/liba.so.1.2","target":"native/lib/liba.so"},
                       {"target": "native/lib/libb.so", "source": "native/lib/libb.so.3"}]"#;
        assert_eq!(
            parse_links(json),
            [
                ("native/lib/liba.so.1.2", "native/lib/liba.so"),
                ("native/lib/libb.so.3", "native/lib/libb.so")
            ]
        );
        assert!(parse_links("[]").is_empty());
    }
}
