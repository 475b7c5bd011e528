//! Headless Chromium: what it makes of a page.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockkeeper_testkit::Skip;

/// What a reader's system asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Light,
    Dark,
}

/// Reads the page from outside and writes down what it finds, as JSON.
const READ: &str = include_str!("look.js");

/// What the page shows, and what the browser had to say about it.
pub(crate) struct Seen {
    pub(crate) facts: serde_json::Value,
    /// What Chromium wrote to its log.
    pub(crate) log: String,
}

/// The program, wherever the package manager put it.
pub(crate) fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    let mut places = folders
        .iter()
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    places.find(|place| place.is_file())
}

/// Opens a page in a window of 1500 by 1000, in a frame, so that the page itself is as it is.
pub(crate) fn open(page: &str, scheme: Scheme, folder: &Path) -> Result<Seen, Skip> {
    let Some(chromium) = program(&["chromium", "chromium-browser", "google-chrome"]) else {
        return Err(Skip::new("chromium", "no Chromium is installed"));
    };
    let attribute = page.replace('&', "&amp;").replace('"', "&quot;");
    let wrapper = format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><style>:root {{ color-scheme: light dark }} \
         iframe {{ width: 1400px; height: 900px; border: 0 }}</style>\
         <pre id=\"facts\"></pre><iframe srcdoc=\"{attribute}\"></iframe><script>{READ}</script>"
    );
    let name = format!("{scheme:?}");
    let file = folder.join(format!("{name}.html"));
    fs::write(&file, wrapper).unwrap();
    let preferred = match scheme {
        Scheme::Dark => 0,
        Scheme::Light => 1,
    };
    // A browser that hangs fails its test, not the whole run.
    let output = Command::new("timeout")
        .arg("180")
        .arg(chromium)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            "--window-size=1500,1000",
            "--virtual-time-budget=60000",
        ])
        .arg(format!("--blink-settings=preferredColorScheme={preferred}"))
        .arg(format!(
            "--user-data-dir={}",
            folder.join(format!("{name}-profile")).display()
        ))
        .arg("--dump-dom")
        .arg(format!("file://{}", file.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let facts = dom
        .split_once("<pre id=\"facts\">")
        .and_then(|(_, rest)| rest.split_once("</pre>"))
        .map(|(facts, _)| {
            facts
                .replace("&lt;", "<")
                .replace("&gt;", ">")
                .replace("&nbsp;", "\u{a0}")
                .replace("&amp;", "&")
        })
        .unwrap_or_default();
    let facts = serde_json::from_str(&facts)
        .unwrap_or_else(|error| panic!("{error}: {facts:?}\n{}\n{log}", output.status));
    Ok(Seen { facts, log })
}
