//! What the compiler does not see of the order in `src/`: who may import whom, and what is written where.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the ground up. A room imports only from floors below its own.
const FLOORS: [&[&str]; 9] = [
    &[
        "key",
        "mode",
        "backoff",
        "call_site",
        "deadline",
        "statement",
        "server_message",
        "picture",
        "timestamp",
    ],
    &["blocker", "graph"],
    &["incident"],
    &["sql", "error"],
    &["session"],
    &["transaction"],
    &["advisory", "watcher", "monitor", "server_log"],
    &["schema", "backfill"],
    &["keeper"],
];

/// Neighbours that do import one another: the room, what it imports, and why.
const NEIGHBOURS: [(&str, &str, &str); 0] = [];

/// Where pool types are named besides `session/`: the file, the names, and why.
const POOL_TYPES: [(&str, &[&str], &str); 3] = [
    ("keeper.rs", &["Pool"], "what a keeper is made from"),
    ("lib.rs", &["deadpool_postgres"], "the re-export"),
    (
        "error.rs",
        &["PoolError"],
        "`From`, so that `?` works on the pool's errors",
    ),
];

/// Files with SQL text besides `sql/`, and why.
const SQL_TEXTS: [(&str, &str); 11] = [
    (
        "key/mod.rs",
        "the expression for a name's key is part of what a key is, and public",
    ),
    ("mode/statements/alter_table.rs", NAMES_ONLY),
    ("mode/statements/definitions.rs", NAMES_ONLY),
    ("mode/statements/indexes.rs", NAMES_ONLY),
    ("mode/statements/outside.rs", NAMES_ONLY),
    ("mode/statements/queries.rs", NAMES_ONLY),
    ("schema/ddl/alter.rs", NAMES_ONLY),
    ("schema/ddl/other.rs", NAMES_ONLY),
    ("schema/plan.rs", NAMES_ONLY),
    ("schema/refusal.rs", NAMES_ONLY),
    (
        "schema/constraint.rs",
        "the words for what a foreign key does",
    ),
];

const NAMES_ONLY: &str = "what statements are called; nobody runs it";

const MOST_LINES: usize = 500;

/// A source file, taken apart.
struct Source {
    /// Below `src/`, with `/`.
    path: String,
    /// Without comments, the contents of literals, and tests; as many lines as the file.
    code: String,
    /// The contents of string literals outside tests, with their line.
    literals: Vec<(usize, String)>,
    /// The comments outside tests.
    comments: String,
}

impl Source {
    fn parse(path: &str, text: &str) -> Self {
        let mut source = Self {
            path: path.to_owned(),
            code: String::new(),
            literals: Vec::new(),
            comments: String::new(),
        };
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let skipped = if rest.starts_with("//") {
                let length = rest.find('\n').unwrap_or(rest.len());
                source.comments.push_str(&rest[..length]);
                source.comments.push('\n');
                length
            } else if rest.starts_with("/*") {
                rest.find("*/").map_or(rest.len(), |end| end + 2)
            } else if let Some(hashes) = raw_string(rest) {
                let start = rest.find('"').unwrap_or(0) + 1;
                let end = format!("\"{}", "#".repeat(hashes));
                let inside = rest[start..].find(&end).unwrap_or(rest.len() - start);
                source.literal(&rest[start..start + inside]);
                start + inside + end.len()
            } else if c == '"' {
                let inside = string_length(&rest[1..]);
                source.literal(&rest[1..=inside]);
                inside + 2
            } else if let Some(length) = character(rest) {
                length
            } else {
                source.code.push(c);
                rest = &rest[c.len_utf8()..];
                continue;
            };
            // Whatever was left out, its lines count.
            let skipped = &rest[..skipped.min(rest.len())];
            source
                .code
                .push_str(&"\n".repeat(skipped.matches('\n').count()));
            rest = &rest[skipped.len()..];
        }
        source.without_tests()
    }

    fn literal(&mut self, text: &str) {
        let line = self.code.matches('\n').count() + 1;
        self.literals.push((line, text.to_owned()));
        self.code.push_str("\"\"");
    }

    /// Cuts everything behind `#[cfg(test)]`: tests are at the end of their file.
    fn without_tests(mut self) -> Self {
        if let Some(start) = self.code.find("#[cfg(test)]\nmod ") {
            let line = self.code[..start].matches('\n').count() + 1;
            let end = self.code[start..].find("\n}\n").map(|end| start + end + 3);
            let after = end.map_or("", |end| &self.code[end..]);
            assert!(
                after.trim().is_empty(),
                "{}: code behind its tests",
                self.path
            );
            self.code.truncate(start);
            self.literals.retain(|(at, _)| *at < line);
        }
        self
    }

    /// `src/error.rs` and all of `src/error/` are the room `error`.
    fn room(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// The names directly behind `crate::`, a group's names one by one, with their lines.
    fn imports(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (at, start) in self.code.match_indices("crate::") {
            let line = self.code[..at].matches('\n').count() + 1;
            // `$crate::`, `lockkeeper_crate::` and the like are no roots of ours.
            if self.code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let rest = &self.code[at + start.len()..];
            let Some(group) = rest.strip_prefix('{') else {
                found.push((line, identifier(rest)));
                continue;
            };
            let mut depth = 0;
            let mut first = true;
            for (at, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => first = true,
                    c if depth == 0 && first && (c.is_alphanumeric() || c == '_') => {
                        found.push((line, identifier(&group[at..])));
                        first = false;
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn lines_of_code(&self) -> usize {
        self.code
            .lines()
            .filter(|line| !line.trim().is_empty())
            .count()
    }
}

fn identifier(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// How many `#` a raw string that begins here has.
fn raw_string(text: &str) -> Option<usize> {
    let text = text.strip_prefix('b').unwrap_or(text).strip_prefix('r')?;
    let hashes = text.len() - text.trim_start_matches('#').len();
    text[hashes..].starts_with('"').then_some(hashes)
}

/// Bytes up to the quote that ends a string.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' if !escaped => return at,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    text.len()
}

/// Bytes of the character literal that begins here; `None` for a lifetime.
fn character(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    if inside.starts_with('\\') {
        let end = inside[2..].find('\'')?;
        return Some(end + 4);
    }
    let c = inside.chars().next()?;
    inside[c.len_utf8()..]
        .starts_with('\'')
        .then_some(c.len_utf8() + 2)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let files = files_below(&src);
    assert!(files.len() > 20, "{files:?}");
    files
        .iter()
        .filter(|file| !is_for_tests(file))
        .map(|file| {
            let path = file
                .strip_prefix(&src)
                .unwrap()
                .to_string_lossy()
                .replace('\\', "/");
            Source::parse(&path, &fs::read_to_string(file).unwrap())
        })
        .collect()
}

/// Whether the room declares the file for tests only.
fn is_for_tests(file: &Path) -> bool {
    let name = file.file_stem().unwrap().to_string_lossy();
    let room = fs::read_to_string(file.with_file_name("mod.rs")).unwrap_or_default();
    room.contains(&format!("#[cfg(test)]\nmod {name};\n"))
}

/// Panics with all that was found, a line each.
fn assert_none(what: &str, found: &[String]) {
    let mut report = String::new();
    for line in found {
        write!(report, "\n  src/{line}").unwrap();
    }
    assert!(found.is_empty(), "{what}:{report}");
}

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&room))
}

fn wrong_imports(source: &Source) -> Vec<String> {
    let room = source.room();
    if room == "lib" {
        return Vec::new();
    }
    let Some(floor) = floor_of(room) else {
        return vec![format!("{}: the room {room} is on no floor", source.path)];
    };
    let mut found = Vec::new();
    for (line, name) in source.imports() {
        let allowed = name == room
            || floor_of(&name).is_some_and(|below| below < floor)
            || NEIGHBOURS
                .iter()
                .any(|(from, to, _)| *from == room && *to == name);
        if !allowed {
            found.push(format!("{}:{line}: crate::{name}", source.path));
        }
    }
    // `super` must not be another way out of the room.
    let depth = source.path.matches('/').count() + usize::from(!source.path.ends_with("/mod.rs"));
    let way_out = "super::".repeat(depth);
    for (at, _) in source.code.match_indices(&way_out) {
        let line = source.code[..at].matches('\n').count() + 1;
        found.push(format!("{}:{line}: {way_out}", source.path));
    }
    found
}

#[test]
fn imports_go_downwards() {
    let found: Vec<_> = sources().iter().flat_map(wrong_imports).collect();
    assert_none("imported from the same floor or from above", &found);
}

#[test]
fn the_exceptions_are_needed() {
    let sources = sources();
    for (from, to, why) in NEIGHBOURS {
        let mut of_room = sources.iter().filter(|source| source.room() == from);
        assert!(
            of_room.any(|source| source.imports().iter().any(|(_, name)| name == to)),
            "{from} does not import {to} any more ({why})"
        );
    }
    for (file, names, why) in POOL_TYPES {
        let source = sources.iter().find(|source| source.path == file).unwrap();
        for name in names {
            assert!(
                source.code.contains(name),
                "{file} does not name {name} any more ({why})"
            );
        }
    }
    for (file, why) in SQL_TEXTS {
        let source = sources.iter().find(|source| source.path == file).unwrap();
        assert!(
            source.literals.iter().any(|(_, text)| is_sql(text)),
            "{file} ({why})"
        );
    }
}

/// Whether a literal is (part of) a statement, or an expression that a server runs. Prose names SQL too, but does not
/// begin with it.
fn is_sql(text: &str) -> bool {
    const VERBS: [&str; 24] = [
        "SELECT",
        "BEGIN",
        "START",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT",
        "RELEASE",
        "SET",
        "RESET",
        "SHOW",
        "LOCK",
        "INSERT",
        "UPDATE",
        "DELETE",
        "WITH",
        "VALUES",
        "PREPARE",
        "EXECUTE",
        "DEALLOCATE",
        "DISCARD",
        "CREATE",
        "ALTER",
        "DROP",
        "UNLISTEN",
    ];
    text.contains("pg_catalog.")
        || text.split("; ").any(|part| {
            let word = identifier(part.trim_start());
            VERBS.contains(&word.as_str())
        })
}

#[test]
fn sql_text_is_written_in_its_room_only() {
    let mut found = Vec::new();
    for source in sources() {
        if source.room() == "sql" || SQL_TEXTS.iter().any(|(file, _)| *file == source.path) {
            continue;
        }
        for (line, text) in &source.literals {
            if is_sql(text) {
                found.push(format!("{}:{line}: {text:?}", source.path));
            }
        }
    }
    assert_none("SQL outside sql/", &found);
}

fn is_sqlstate(text: &str) -> bool {
    text.len() == 5
        && text
            .chars()
            .all(|c| c.is_ascii_digit() || c.is_ascii_uppercase())
        && text.contains(|c: char| c.is_ascii_digit())
}

#[test]
fn sqlstates_are_told_apart_in_one_place() {
    let mut found = Vec::new();
    for source in sources() {
        if source.room() == "error" {
            continue;
        }
        for (at, start) in source.code.match_indices("SqlState::") {
            // A constant, not the method that gives the code as text.
            if source.code[at + start.len()..].starts_with(|c: char| c.is_ascii_uppercase()) {
                let line = source.code[..at].matches('\n').count() + 1;
                let name = identifier(&source.code[at + start.len()..]);
                found.push(format!("{}:{line}: SqlState::{name}", source.path));
            }
        }
        for (line, text) in &source.literals {
            if is_sqlstate(text) {
                found.push(format!("{}:{line}: {text:?}", source.path));
            }
        }
    }
    assert_none("SQLSTATEs compared outside error.rs", &found);
}

#[test]
fn the_pool_is_known_in_its_room_only() {
    let mut found = Vec::new();
    for source in sources() {
        if source.room() == "session" {
            continue;
        }
        let allowed = POOL_TYPES
            .iter()
            .find(|(file, ..)| *file == source.path)
            .map_or(&[][..], |(_, names, _)| names);
        for (at, start) in source.code.match_indices("deadpool") {
            let line = source.code[..at].matches('\n').count() + 1;
            let rest = &source.code[at..];
            let path = rest.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
            let name = match path.strip_prefix("::") {
                Some(behind) => identifier(behind),
                None => identifier(rest),
            };
            assert!(rest.starts_with(start));
            if !allowed.contains(&name.as_str()) {
                found.push(format!("{}:{line}: {name}", source.path));
            }
        }
    }
    assert_none("pool types outside session/", &found);
}

#[test]
fn only_the_session_room_spawns_and_cancels() {
    let mut found = Vec::new();
    for source in sources() {
        // The watcher is a task, and hands reports out on threads where blocking does no harm.
        if source.room() == "session" || source.room() == "watcher" {
            continue;
        }
        // So is the watchdog, and so are a resolver's hooks: in one file.
        if source.path == "monitor/background.rs" {
            continue;
        }
        for call in [
            "spawn(",
            "cancel_token(",
            "cancel_query",
            "Object::take",
            "spawn_blocking(",
        ] {
            for (at, _) in source.code.match_indices(call) {
                let line = source.code[..at].matches('\n').count() + 1;
                found.push(format!("{}:{line}: {call}", source.path));
            }
        }
    }
    assert_none("spawned, cancelled or discarded outside session/", &found);
}

#[test]
fn the_crate_root_has_no_items() {
    let sources = sources();
    let lib = sources
        .iter()
        .find(|source| source.path == "lib.rs")
        .unwrap();
    for item in [
        "fn ",
        "struct ",
        "enum ",
        "trait ",
        "impl ",
        "impl<",
        "const ",
        "static ",
        "type ",
        "macro_rules",
    ] {
        assert!(!lib.code.contains(item), "lib.rs has an item: {item}");
    }
}

#[test]
fn no_file_has_grown_too_long() {
    let found: Vec<_> = sources()
        .iter()
        .filter(|source| source.lines_of_code() > MOST_LINES)
        .map(|source| format!("{}: {} lines of code", source.path, source.lines_of_code()))
        .collect();
    assert_none("look for the second subject", &found);
}

/// ``(test `name`)`` in a comment is a promise that the test exists.
#[test]
fn tests_that_comments_cite_exist() {
    let mut tests = String::new();
    for folder in ["src", "tests/it"] {
        for file in files_below(&root().join(folder)) {
            tests.push_str(&fs::read_to_string(file).unwrap());
        }
    }
    let mut found = Vec::new();
    let mut cited = 0;
    for source in sources() {
        // A citation may go over the end of a line.
        let comments = source
            .comments
            .lines()
            .map(|line| line.trim_start_matches(['/', '!', ' ']))
            .collect::<Vec<_>>()
            .join(" ");
        for (at, start) in comments.match_indices("test `") {
            cited += 1;
            let name: String = comments[at + start.len()..]
                .chars()
                .take_while(|c| *c != '`')
                .collect();
            let function = name.rsplit("::").next().unwrap_or_default();
            if !tests.contains(&format!("fn {function}(")) {
                found.push(format!("{}: {name}", source.path));
            }
        }
    }
    assert!(cited > 0, "no comment cites a test");
    assert_none("cited, but there is no such test", &found);
}

/// The checks above can fail.
#[test]
fn the_checks_find_what_they_look_for() {
    let bad = r##"
        //! use crate::keeper::Commented;
        use crate::advisory::Lock;
        use crate::{error::{Error, keeper}, keeper::Keeper, sql};
        /* use crate::keeper::Commented; */
        const QUOTE: char = '"'; const ESCAPED: char = '\''; fn f<'a>(x: &'a str) {}
        const TEXT: &str = "use crate::keeper::Quoted; \" // no comment";
        const RAW: &str = r#"SELECT "1""#;
        const CODE: &str = "40P01";
        const PROSE: &str = "under READ COMMITTED a COMMIT can fail";
        type Root = super::super::keeper::Keeper;
        #[cfg(test)]
mod tests {
            use crate::keeper::InTests;
}
"##
    .replace("        #[cfg(test)]", "#[cfg(test)]");
    let source = Source::parse("session/bad.rs", &bad);
    let imports: Vec<_> = source.imports().into_iter().map(|(_, name)| name).collect();
    assert_eq!(imports, ["advisory", "error", "keeper", "sql"]);
    assert_eq!(source.imports()[0].0, 3, "lines are counted");
    let wrong = wrong_imports(&source);
    assert_eq!(
        wrong,
        [
            "session/bad.rs:3: crate::advisory",
            "session/bad.rs:4: crate::keeper",
            "session/bad.rs:11: super::super::"
        ]
    );
    let sql: Vec<_> = source
        .literals
        .iter()
        .filter(|(_, text)| is_sql(text))
        .collect();
    assert_eq!(sql, [&(8, r#"SELECT "1""#.to_owned())]);
    let states: Vec<_> = source
        .literals
        .iter()
        .filter(|(_, text)| is_sqlstate(text))
        .collect();
    assert_eq!(states, [&(9, "40P01".to_owned())]);
    assert_eq!(source.lines_of_code(), 8);
    assert!(is_sql("ROLLBACK; SELECT 1") && is_sql("SAVEPOINT x") && is_sql("; COMMIT"));
    assert!(!is_sql("Settings") && !is_sql("WITHOUT"));
}
