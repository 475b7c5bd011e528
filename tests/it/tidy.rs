//! The layers of `src/`, as `ARCHITECTURE.md` draws them: which module may import which, and what stands where.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The modules from the ground up. A module imports only from layers below its own, but on the ground all may import one
/// another, and `connection` may import `postgres`.
const LAYERS: [&str; 8] = [
    "error key mode blocker backoff deadline call_site",
    "connection postgres picture",
    "graph transaction server_log",
    "incident advisory",
    "monitor sampler",
    "schema resolver",
    "backfill",
    "keeper",
];
/// What features add. The core never names it; `keeper` and `lib.rs` wire it.
const OPTIONAL: &str = "picture graph server_log incident monitor sampler schema resolver backfill";
/// What only `connection` does.
const CUSTODY: &str = "spawn spawn_blocking cancel_token cancel_query cancel_query_raw take_object";
/// What a type is declared with.
const TYPES: &str = "struct enum trait type union";
/// What a statement begins with.
const STATEMENTS: &str = "SELECT BEGIN SAVEPOINT RELEASE SET SHOW LOCK INSERT UPDATE DELETE WITH VALUES PREPARE \
     EXECUTE DEALLOCATE DISCARD CREATE ALTER DROP";
const LONGEST: usize = 500;

struct Source {
    /// Below `src/`.
    path: String,
    text: String,
    /// Without tests: what a token is, and its line. Groups begin and end with their delimiters.
    tokens: Vec<(String, usize)>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let text = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .unwrap_or_default();
        let mut tokens = Vec::new();
        flatten(text.parse().unwrap(), &mut tokens);
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            tokens,
        }
    }

    /// `src/error.rs` and all of `src/error/` are the module `error`.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    fn token(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |(token, _)| token)
    }

    /// Where these tokens stand one behind the other.
    fn find<'a>(&'a self, sequence: &'a [&str]) -> impl Iterator<Item = usize> + 'a {
        let is_here = |at: &usize| {
            let mut tokens = sequence.iter().enumerate();
            tokens.all(|(n, token)| self.token(at + n) == *token)
        };
        (0..self.tokens.len()).filter(is_here)
    }

    /// The names directly behind `crate::`; of a group each.
    fn imports(&self) -> Vec<usize> {
        let mut imports = Vec::new();
        for at in self.find(&["crate", ":", ":"]) {
            // `$crate` is in macros, which are expanded in other modules.
            let (mut at, mut depth) = (at + 3, 0);
            if self.token(at) != "{" {
                imports.push(at);
                continue;
            }
            loop {
                match self.token(at) {
                    "{" => depth += 1,
                    "}" => depth -= 1,
                    _ => {}
                }
                let starts = matches!(self.token(at), "{" | ",") && depth == 1;
                if starts && self.token(at + 1) != "}" {
                    imports.push(at + 1);
                }
                if depth == 0 {
                    break;
                }
                at += 1;
            }
        }
        imports
    }

    fn wrong_imports(&self) -> Vec<String> {
        let layer = |module: &str| LAYERS.iter().position(|layer| has(layer, module));
        let (module, here) = (self.module(), layer(self.module()));
        if module == "lib" {
            return Vec::new();
        }
        let is_wrong = |at: &usize| {
            let name = self.token(*at);
            let is_below = layer(name).is_some_and(|there| Some(there) < here);
            let is_beside = layer(name) == here && here == Some(0)
                || (module, name) == ("connection", "postgres");
            let is_core = module != "keeper" && !has(OPTIONAL, module);
            name != module && !(is_below || is_beside) || is_core && has(OPTIONAL, name)
        };
        let mut wrong: Vec<_> = self.imports().into_iter().filter(is_wrong).collect();
        // `super` is no other way out of the module.
        let depth = self.path.matches('/').count() + usize::from(!self.path.ends_with("/mod.rs"));
        wrong.extend(self.find(&["super", ":", ":"].repeat(depth)));
        self.show(wrong)
    }

    fn show(&self, found: impl IntoIterator<Item = usize>) -> Vec<String> {
        let show = |at: usize| {
            let (token, line) = &self.tokens[at];
            format!("src/{}:{line}: {token}", self.path)
        };
        found.into_iter().map(show).collect()
    }

    /// Tokens that are so, as `show` shows them.
    fn all(&self, is_so: impl Fn(&str) -> bool) -> Vec<String> {
        self.show((0..self.tokens.len()).filter(|at| is_so(self.token(*at))))
    }
}

fn flatten(stream: TokenStream, tokens: &mut Vec<(String, usize)>) {
    for token in stream {
        let line = token.span().start().line;
        let TokenTree::Group(group) = token else {
            let is_doc = tokens.len() > 1 && tokens[tokens.len() - 2].0 == "doc";
            let text = if is_doc {
                String::new()
            } else {
                token.to_string()
            };
            tokens.push((text, line));
            continue;
        };
        let (open, close) = match group.delimiter() {
            Delimiter::Brace => ("{", "}"),
            Delimiter::Bracket => ("[", "]"),
            _ => ("(", ")"),
        };
        tokens.push((open.to_owned(), line));
        flatten(group.stream(), tokens);
        tokens.push((close.to_owned(), group.span_close().start().line));
    }
}

fn has(list: &str, word: &str) -> bool {
    list.split(' ').any(|listed| listed == word)
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let is_rust = path.extension().is_some_and(|extension| extension == "rs");
            if path.is_dir() {
                &mut folders
            } else if is_rust {
                &mut files
            } else {
                continue;
            }
            .push(path);
        }
    }
    files.sort();
    let read = |file: &PathBuf| fs::read_to_string(file).unwrap();
    // Files that their module declares for tests only.
    files.retain(|file| {
        let module = fs::read_to_string(file.with_file_name("mod.rs")).unwrap_or_default();
        let name = file.file_stem().unwrap().to_str().unwrap();
        !module.split("#[cfg(").any(|part| {
            part.contains("test")
                && part
                    .split("mod ")
                    .nth(1)
                    .is_some_and(|rest| rest.starts_with(&format!("{name};")))
        })
    });
    let source = |file: &PathBuf| {
        Source::new(
            file.strip_prefix(&src).unwrap().to_str().unwrap(),
            &read(file),
        )
    };
    files.iter().map(source).collect()
}

/// Whether it is a text that a server runs, not the name of a statement.
fn is_sql(literal: &str) -> bool {
    let text = literal.trim_start_matches(['r', '#', '"', ' ']);
    let first = text.split([' ', ';', '"']).next().unwrap_or_default();
    let is_whole = has("BEGIN COMMIT ROLLBACK", first) || text.starts_with("SET LOCAL ");
    let is_literal = literal.contains('"');
    is_literal
        && (text.contains("pg_catalog.")
            || is_whole
            || has(STATEMENTS, first) && text.contains('{'))
}

fn is_sqlstate(literal: &str) -> bool {
    let code = literal.trim_matches('"');
    let is_code = code
        .bytes()
        .all(|b| b.is_ascii_digit() || b.is_ascii_uppercase());
    literal.starts_with('"')
        && code.len() == 5
        && is_code
        && code.contains(|c: char| c.is_ascii_digit())
}

/// What is wrong in this file.
fn flaws(source: &Source) -> Vec<String> {
    let mut flaws = source.wrong_imports();
    let (module, path) = (source.module(), &*source.path);
    if module != "error" {
        let of_state = |at: &usize| {
            source
                .token(at + 3)
                .chars()
                .all(|c| !c.is_ascii_lowercase())
        };
        flaws.extend(source.show(source.find(&["SqlState", ":", ":"]).filter(of_state)));
        flaws.extend(source.all(is_sqlstate));
    }
    if !path.ends_with("/sql.rs") && !path.contains("/sql/") {
        flaws.extend(source.all(is_sql));
    }
    if module != "connection" {
        flaws.extend(source.all(|token| has(CUSTODY, token)));
        if !["keeper", "lib", "error"].contains(&module) {
            flaws.extend(source.all(|token| token.starts_with("deadpool")));
        }
    }
    if module == "lib" {
        flaws.extend(source.all(|token| has(TYPES, token) || has("fn impl const static", token)));
    }
    let is_code = |line: &&str| !matches!(line.trim().get(..2), None | Some("//"));
    let lines = source.text.lines().filter(is_code).count();
    if lines > LONGEST {
        flaws.push(format!("src/{path}: {lines} lines of code"));
    }
    flaws
}

#[test]
fn each_thing_stands_in_its_module() {
    let flaws: Vec<_> = sources().iter().flat_map(flaws).collect();
    assert!(flaws.is_empty(), "\n{}", flaws.join("\n"));
}

#[test]
fn no_two_types_have_one_name() {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for at in 1..source.tokens.len() {
            let is_type = has(TYPES, source.token(at));
            let is_seen = source.token(at - 1) == "pub"
                || at > 3 && source.token(at - 2) == "crate" && source.token(at - 4) == "pub";
            if is_type && is_seen {
                let name = source.token(at + 1).to_owned();
                types.entry(name).or_default().extend(source.show([at + 1]));
            }
        }
    }
    types.retain(|_, places| places.len() > 1);
    let places: Vec<_> = types.into_values().flatten().collect();
    assert!(places.is_empty(), "\n{}", places.join("\n"));
}
