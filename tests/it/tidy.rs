//! The layers of `src/`, as `ARCHITECTURE.md` draws them: which module may import which, and what stands where.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The modules from the ground up. A module imports only from layers below its own; but on the ground all may import one
/// another, and `connection` may import `postgres`.
const LAYERS: [&str; 8] = [
    "error key mode blocker backoff deadline call_site meter",
    "connection postgres picture",
    "graph transaction server_log",
    "incident advisory",
    "monitor sampler",
    "schema resolver coordination",
    "backfill",
    "keeper",
];
/// What features add. The core never names it; `keeper` and `lib.rs` wire it.
const OPTIONAL: &str =
    "picture graph server_log incident monitor sampler schema resolver backfill coordination";
/// What only `connection` does.
const CUSTODY: &str = "spawn spawn_blocking cancel_token cancel_query cancel_query_raw";
const TYPES: &str = "struct enum trait type union";
/// What a statement begins with.
const STATEMENTS: &str = "SELECT BEGIN SAVEPOINT RELEASE SET SHOW LOCK INSERT UPDATE DELETE WITH VALUES PREPARE \
     EXECUTE DEALLOCATE DISCARD CREATE ALTER DROP";
const LONGEST: usize = 500;

struct Source {
    /// Below `src/`.
    path: String,
    /// Without tests at its end.
    text: String,
    /// What each token is, and its line. Groups begin and end with their delimiters; documentation is left out.
    tokens: Vec<(String, usize)>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let mut tokens = Vec::new();
        flatten(text.parse().unwrap(), &mut tokens);
        let (path, text) = (path.to_owned(), text.to_owned());
        Self { path, text, tokens }
    }

    /// `src/error.rs` and all of `src/error/` are the module `error`.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    fn token(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |(token, _)| token)
    }

    /// Where these tokens stand one behind the other.
    fn find(&self, sequence: &[&str]) -> Vec<usize> {
        let matches = |at: &usize| (0..).zip(sequence).all(|(n, t)| self.token(at + n) == *t);
        (0..self.tokens.len()).filter(matches).collect()
    }

    /// Where the names directly behind `crate::` are; of a group each.
    fn imports(&self) -> Vec<usize> {
        let mut imports = Vec::new();
        for at in self.find(&["crate", ":", ":"]) {
            let (mut at, mut depth) = (at + 3, 0);
            if self.token(at) != "{" {
                imports.push(at);
                continue;
            }
            loop {
                depth += i32::from(self.token(at) == "{") - i32::from(self.token(at) == "}");
                if depth == 0 {
                    break;
                }
                if depth == 1 && ["{", ","].contains(&self.token(at)) && self.token(at + 1) != "}" {
                    imports.push(at + 1);
                }
                at += 1;
            }
        }
        imports
    }

    fn wrong_imports(&self) -> Vec<String> {
        let layer = |module: &str| LAYERS.iter().position(|layer| has(layer, module));
        let (module, here) = (self.module(), layer(self.module()));
        let is_core = module != "keeper" && !has(OPTIONAL, module);
        let is_wrong = |at: &usize| {
            let name = self.token(*at);
            let is_below = layer(name).is_some_and(|there| Some(there) < here);
            let is_beside = layer(name) == here && here == Some(0)
                || (module, name) == ("connection", "postgres");
            name != module && !(is_below || is_beside) || is_core && has(OPTIONAL, name)
        };
        let mut wrong: Vec<_> = self.imports().into_iter().filter(is_wrong).collect();
        // `super` is no other way out of the module.
        let depth = self.path.matches('/').count() + usize::from(!self.path.ends_with("/mod.rs"));
        wrong.extend(self.find(&["super", ":", ":"].repeat(depth)));
        self.show(wrong)
    }

    fn show(&self, found: impl IntoIterator<Item = usize>) -> Vec<String> {
        let tokens = found.into_iter().map(|at| &self.tokens[at]);
        let shown = tokens.map(|(token, line)| format!("src/{}:{line}: {token}", self.path));
        shown.collect()
    }

    fn all(&self, is_so: impl Fn(&str) -> bool) -> Vec<String> {
        self.show((0..self.tokens.len()).filter(|at| is_so(self.token(*at))))
    }

    fn flaws(&self) -> Vec<String> {
        let (module, path) = (self.module(), &*self.path);
        let is_item = |token: &str| has(TYPES, token) || has("fn impl const static", token);
        let mut flaws = match module {
            // Docs, and nothing else.
            "lib" | "guide" => self.all(is_item),
            _ => self.wrong_imports(),
        };
        if module != "error" {
            let states = self.find(&["SqlState", ":", ":"]);
            let is_state = |at: &usize| !self.token(at + 3).contains(char::is_lowercase);
            flaws.extend(self.show(states.into_iter().filter(is_state)));
            flaws.extend(self.all(is_sqlstate));
        }
        if !path.ends_with("/sql.rs") && !path.contains("/sql/") {
            flaws.extend(self.all(is_sql));
        }
        if module != "connection" {
            flaws.extend(self.all(|token| has(CUSTODY, token)));
            if !has("keeper lib error", module) {
                flaws.extend(self.all(|token| token.starts_with("deadpool")));
            }
        }
        let is_code = |line: &&str| !matches!(line.trim().get(..2), None | Some("//"));
        if self.text.lines().filter(is_code).count() > LONGEST {
            flaws.push(format!("src/{path}: longer than {LONGEST} lines of code"));
        }
        flaws
    }
}

fn flatten(stream: TokenStream, tokens: &mut Vec<(String, usize)>) {
    for token in stream {
        let line = token.span().start().line;
        let TokenTree::Group(group) = token else {
            let is_doc = tokens.len() > 1 && tokens[tokens.len() - 2].0 == "doc";
            tokens.push((
                if is_doc {
                    String::new()
                } else {
                    token.to_string()
                },
                line,
            ));
            continue;
        };
        let (open, close) = match group.delimiter() {
            Delimiter::Brace => ("{", "}"),
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

/// Whether it is a text that a server runs, not the name of a statement.
fn is_sql(token: &str) -> bool {
    let text = token.trim_start_matches(['r', '#', '"', ' ']);
    let first = text.split([' ', ';', '"']).next().unwrap();
    let is_whole = has("BEGIN COMMIT ROLLBACK", first) || text.starts_with("SET LOCAL ");
    let is_part = has(STATEMENTS, first) && text.contains('{');
    token.contains('"') && (is_whole || is_part || text.contains("pg_catalog."))
}

fn is_sqlstate(token: &str) -> bool {
    let code = token.trim_matches('"');
    let is_code = !code.contains(|c: char| !c.is_ascii_digit() && !c.is_ascii_uppercase());
    token.len() == 7 && code.len() == 5 && is_code && code.contains(|c: char| c.is_ascii_digit())
}

/// Every file below a folder, by its path there.
fn texts(folder: &Path, below: &str) -> Vec<(String, String)> {
    let entries = fs::read_dir(folder.join(below)).unwrap();
    let read = |entry: fs::DirEntry| {
        let path = format!("{below}{}", entry.file_name().to_string_lossy());
        match entry.file_type().unwrap().is_dir() {
            true => texts(folder, &format!("{path}/")),
            false => Vec::from_iter(fs::read_to_string(entry.path()).map(|text| (path, text))),
        }
    };
    entries.flat_map(|entry| read(entry.unwrap())).collect()
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files: BTreeMap<String, String> = texts(&src, "").into_iter().collect();
    // Declared by a line `mod name;` behind a `#[cfg(…test…)]`.
    let is_for_tests = |path: &str| {
        let (folder, file) = path.rsplit_once('/').unwrap_or_default();
        let declared = format!("mod {}", file.replace(".rs", ";"));
        let text = files
            .get(&format!("{folder}/mod.rs"))
            .map_or("", |text| text);
        let mut lines = text.lines().zip(text.lines().skip(1));
        lines.any(|(before, line)| line == declared && before.contains("test"))
    };
    let sources = files.iter().filter(|(path, _)| !is_for_tests(path));
    let sources = sources.filter(|(path, _)| path.ends_with(".rs"));
    sources
        .map(|(path, text)| Source::new(path, text))
        .collect()
}

#[test]
fn each_thing_stands_in_its_module() {
    let flaws: Vec<_> = sources().iter().flat_map(Source::flaws).collect();
    assert!(flaws.is_empty(), "\n{}", flaws.join("\n"));
    let bad = "use crate::{error, keeper::{Keeper, key}}; use crate::incident; const A: &str = \"40P01\"; \
               fn f() { super::super::g(\"SELECT {a}\"); tokio::spawn(x) } type T = deadpool_postgres::Pool;";
    assert_eq!(Source::new("advisory/bad.rs", bad).flaws().len(), 7);
}

#[test]
fn no_two_types_have_one_name() {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for at in (1..source.tokens.len()).filter(|at| has(TYPES, source.token(*at))) {
            let before = |n: usize| at.checked_sub(n).map_or("", |at| source.token(at));
            if before(1) == "pub" || (before(4), before(2)) == ("pub", "crate") {
                let places = types.entry(source.token(at + 1).to_owned()).or_default();
                places.extend(source.show([at + 1]));
            }
        }
    }
    let places: Vec<_> = types
        .into_values()
        .filter(|places| places.len() > 1)
        .flatten()
        .collect();
    assert!(places.is_empty(), "\n{}", places.join("\n"));
}
