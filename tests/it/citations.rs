//! ``(test `name`)`` in a comment is a promise that the test exists.

use std::fs;
use std::path::Path;

fn texts_below(folder: &Path) -> Vec<(String, String)> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            texts.extend(texts_below(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            texts.push((path.display().to_string(), text));
        }
    }
    texts
}

#[test]
fn tests_that_comments_cite_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = texts_below(&root.join("src"));
    let tests = texts_below(&root.join("tests"));
    let exists = |name: &str| {
        let declared = [format!("fn {name}("), format!("mod {name};")];
        let mut all = sources.iter().chain(&tests);
        all.any(|(_, text)| declared.iter().any(|test| text.contains(test)))
    };
    let mut cited = 0;
    for (path, text) in &sources {
        // A citation may continue on the next line.
        let text = text.replace("\n//! ", " ").replace("\n    /// ", " ");
        for citation in text.split("(test `").skip(1) {
            let name = citation.split('`').next().unwrap();
            let name = name.rsplit("::").next().unwrap();
            assert!(exists(name), "{path}: there is no test {name}");
            cited += 1;
        }
    }
    assert!(cited > 3, "{cited} comments cite a test");
}
