//! Where in the program a lock or transaction was requested, and how the server learns it.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::Location;
use std::sync::{Arc, Mutex, PoisonError};

/// PostgreSQL truncates `application_name` to this many bytes (`NAMEDATALEN - 1`), with a NOTICE.
const MAX_BYTES: usize = 63;
/// A prefix keeps at least this many bytes if it has to share the space with a path.
const PREFIX_BYTES: usize = 24;
/// Marks a path that lost its beginning.
const CUT: &str = "...";

/// The place in the source that requested a lock or a transaction, such as `src/billing.rs:42`.
///
/// It is in every error and report, and in the server's `application_name` while the lock or transaction is held.
///
/// # Examples
///
/// ```
/// use std::panic::Location;
/// use lockkeeper::CallSite;
///
/// let site = CallSite::from(Location::caller());
/// assert_eq!(site.to_string(), format!("{}:{}", site.file(), site.line()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallSite {
    file: &'static str,
    line: u32,
}

impl CallSite {
    /// The path of the source file as given to the compiler, usually relative to the workspace.
    #[must_use]
    pub const fn file(&self) -> &'static str {
        self.file
    }

    /// The line in that file, counted from 1.
    #[must_use]
    pub const fn line(&self) -> u32 {
        self.line
    }

    /// The caller of the function that calls this, if that is `#[track_caller]`.
    #[track_caller]
    pub(crate) fn caller() -> Self {
        Self::from(Location::caller())
    }

    /// Any place, for tests.
    #[cfg(test)]
    pub(crate) const fn at(file: &'static str, line: u32) -> Self {
        Self { file, line }
    }
}

impl From<&'static Location<'static>> for CallSite {
    fn from(location: &'static Location<'static>) -> Self {
        Self {
            file: location.file(),
            line: location.line(),
        }
    }
}

impl fmt::Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// The application names of one keeper: each is built once for its call site.
///
/// A program has no more of them than lines that call this crate.
#[derive(Debug)]
pub(crate) struct ApplicationNames {
    prefix: String,
    without_site: Arc<str>,
    // By what a call site is: where its file's name is, and its line.
    by_site: Mutex<BTreeMap<(usize, usize, u32), Arc<str>>>,
}

impl ApplicationNames {
    pub(crate) fn new(prefix: String) -> Self {
        Self {
            without_site: application_name(&prefix, None).into(),
            prefix,
            by_site: Mutex::default(),
        }
    }

    /// See [`application_name`].
    pub(crate) fn of(&self, site: Option<&CallSite>) -> Arc<str> {
        let Some(site) = site else {
            return Arc::clone(&self.without_site);
        };
        let mut by_site = self.by_site.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (site.file.as_ptr().addr(), site.file.len(), site.line);
        let name = by_site
            .entry(key)
            .or_insert_with(|| application_name(&self.prefix, Some(site)).into());
        Arc::clone(name)
    }
}

/// The server's `application_name`: `<prefix> <path>:<line>`, or the prefix alone.
///
/// At most 63 bytes of printable ASCII without `'` and `\`: no server version changes or truncates it, no NOTICE is
/// sent, and it needs no escaping in an SQL literal. What does not fit is cut from the beginning of the path, at a `/`
/// if possible, and from the end of a prefix longer than 24 bytes; the line number is always kept.
fn application_name(prefix: &str, site: Option<&CallSite>) -> String {
    let mut name: String = prefix.chars().map(printable).collect();
    let Some(site) = site else {
        name.truncate(MAX_BYTES);
        return name;
    };
    let path: String = site
        .file
        .chars()
        .map(|c| printable(if c == '\\' { '/' } else { c }))
        .collect();
    let line = format!(":{}", site.line);

    // From here on all characters are ASCII, so bytes are characters.
    if !name.is_empty() {
        let room = MAX_BYTES.saturating_sub(1 + path.len() + line.len());
        name.truncate(room.max(PREFIX_BYTES));
        name.push(' ');
    }
    // Invariant: a line has at most ten digits, so at least 63 - 25 - 11 bytes are left for the path.
    let room = MAX_BYTES - name.len() - line.len();
    push_path(&mut name, &path, room);
    name.push_str(&line);
    name
}

/// Appends the path, or as much of its end as fits after [`CUT`].
fn push_path(name: &mut String, path: &str, room: usize) {
    if path.len() <= room {
        name.push_str(path);
        return;
    }
    let tail = &path[path.len() - (room - CUT.len())..];
    name.push_str(CUT);
    name.push_str(&tail[tail.find('/').unwrap_or(0)..]);
}

/// The character, if no server changes it and an SQL literal needs no escape for it; else `?`.
fn printable(c: char) -> char {
    match c {
        '\'' | '\\' => '?',
        ' '..='~' => c,
        _ => '?',
    }
}

/// The call site in an `application_name` that this crate has set.
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) fn site_in(name: &str) -> Option<&str> {
    let site = name.rsplit(' ').next()?;
    let (path, line) = site.rsplit_once(':')?;
    let is_line = line.parse::<u32>().is_ok() && !line.starts_with('+');
    (is_line && path.ends_with(".rs")).then_some(site)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A place in a file of any name. It leaks the name, because tests are short-lived.
    fn site(file: &str, line: u32) -> CallSite {
        let file = Box::leak(file.to_owned().into_boxed_str());
        CallSite { file, line }
    }

    fn named(prefix: &str, file: &str, line: u32) -> String {
        application_name(prefix, Some(&site(file, line)))
    }

    #[test]
    fn a_caller_is_the_calling_line() {
        let (here, line) = (CallSite::caller(), line!());
        assert_eq!((here.file(), here.line()), (file!(), line));
        assert_eq!(here.to_string(), format!("{}:{line}", file!()));
    }

    #[test]
    fn a_name_is_built_once() {
        let names = ApplicationNames::new("billing".to_owned());
        let (one, other) = (site("src/pay.rs", 1), site("src/pay.rs", 2));
        let name = names.of(Some(&one));
        assert_eq!(&*name, "billing src/pay.rs:1");
        assert!(Arc::ptr_eq(&name, &names.of(Some(&one))));
        assert_eq!(&*names.of(Some(&other)), "billing src/pay.rs:2");
        assert_eq!(&*names.of(None), "billing");
    }

    #[test]
    fn a_short_path_is_kept() {
        assert_eq!(named("billing", "src/pay.rs", 42), "billing src/pay.rs:42");
        assert_eq!(named("", "src/pay.rs", 42), "src/pay.rs:42");
        assert_eq!(application_name("billing", None), "billing");
        assert_eq!(application_name("", None), "");
        let long = "a-prefix-of-many-bytes-is-no-trouble-if-all-fits";
        assert_eq!(named(long, "src/a.rs", 1), format!("{long} src/a.rs:1"));
    }

    #[test]
    fn a_long_path_is_cut_at_a_slash() {
        let path = format!(
            "/home/{}/crates/ledger/src/posting/batch.rs",
            "x".repeat(200)
        );
        assert_eq!(
            named("billing", &path, 1234),
            "billing .../crates/ledger/src/posting/batch.rs:1234"
        );
        let flat = format!("{}.rs", "x".repeat(200));
        let cut = named("billing", &flat, 1234);
        assert_eq!(cut.len(), 63);
        assert!(
            cut.starts_with("billing ...xxx") && cut.ends_with("xxx.rs:1234"),
            "{cut}"
        );
    }

    #[test]
    fn a_long_prefix_is_cut_for_the_path() {
        let prefix = "p".repeat(100);
        let path = "crates/ledger/src/posting.rs";
        assert_eq!(
            named(&prefix, path, 7),
            format!("{} {path}:7", "p".repeat(32))
        );
        let deep = format!("{path}/{path}");
        let shown = named(&prefix, &deep, u32::MAX);
        assert_eq!(
            shown,
            format!("{} .../ledger/src/posting.rs:4294967295", "p".repeat(24))
        );
        assert_eq!(application_name(&prefix, None), "p".repeat(63));
    }

    #[test]
    fn only_printable_ascii_is_kept() {
        assert_eq!(
            named("zoë's\n", r"src\büro\a.rs", 1),
            "zo??s? src/b?ro/a.rs:1"
        );
        assert_eq!(application_name("a\\b\u{7f}\0é😀", None), "a?b????");
    }

    fn any_path() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            r"[a-z./\\'é ]{0,250}",
            r"([a-z]{1,30}/){0,9}[a-z]{1,90}\.rs"
        ]
    }

    proptest! {
        #[test]
        fn every_name_is_safe_and_keeps_its_line(prefix in any_path(), path in any_path(), line: u32) {
            let name = named(&prefix, &path, line);
            prop_assert!(name.len() <= 63);
            prop_assert!(name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\'' && b != b'\\'));
            let end = format!(":{line}");
            prop_assert!(name.ends_with(&end));
            let alone = application_name(&prefix, None);
            prop_assert!(alone.len() <= 63 && alone.is_ascii());
        }

        #[test]
        fn nothing_is_cut_unnecessarily(prefix in "[a-z]{1,40}", path in "[a-z/]{1,40}", line: u32) {
            let whole = format!("{prefix} {path}:{line}");
            let name = named(&prefix, &path, line);
            prop_assert_eq!(name == whole, whole.len() <= 63);
            let kept: String = prefix.chars().take(24).collect();
            prop_assert!(name.starts_with(&kept));
        }
    }

    #[cfg(any(feature = "incidents", feature = "server-log"))]
    #[test]
    fn call_sites_are_parsed_from_application_names() {
        for (name, site) in [
            ("billing src/pay.rs:42", Some("src/pay.rs:42")),
            ("src/pay.rs:42", Some("src/pay.rs:42")),
            (
                "my app .../pay.rs:4294967295",
                Some(".../pay.rs:4294967295"),
            ),
            ("app 10.0.0.1:5432", None),
            ("src/pay.rs", None),
            ("pay.rs:+1", None),
            ("pay.rs:", None),
            ("", None),
        ] {
            assert_eq!(site_in(name), site, "{name}");
        }
        let own = application_name("billing", None);
        assert_eq!(site_in(&own), None);
    }
}
