//! Measures how far `preflight` can be believed: runs every SQL script of the folders on a throw-away server, and compares
//! each prediction with what the server did.
//!
//! `cargo run -p lockkeeper-testkit --example preflight -- [--fill] [--differences] [--setup=<script>] <folder or script> …`
//!
//! `LOCKKEEPER_PG_MAJOR` chooses the server. With `--setup`, that script runs first in every database.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};

use lockkeeper::Keeper;
use lockkeeper_testkit::prediction::{Figures, Fill, measure, statements};
use lockkeeper_testkit::{Server, pool_of};

fn scripts(path: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sql") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let (mut fill, mut list, mut setup, mut all) = (Fill::Nothing, false, None, Vec::new());
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--fill" => fill = Fill::Rows,
            "--differences" => list = true,
            _ => match argument.strip_prefix("--setup=") {
                Some(script) => setup = Some(std::fs::read_to_string(script)?),
                None => all.extend(scripts(Path::new(&argument))?),
            },
        }
    }
    let server = Server::start(&[("max_prepared_transactions", "5")])?;
    let mut out = std::io::stdout();
    let mut total = Figures::default();
    for script in &all {
        let text = String::from_utf8_lossy(&std::fs::read(script)?).into_owned();
        let database = server.database().await;
        let pool = pool_of(database.config(), 1);
        let keeper = Keeper::builder(pool.clone()).build();
        if let Some(setup) = &setup {
            let client = pool.get().await?;
            for statement in statements(setup) {
                // What the server lacks is lacking in the scripts, too.
                client.batch_execute(&statement).await.ok();
            }
        }
        let figures = measure(&keeper, &pool, &statements(&text), fill).await;
        if list {
            let name = script.file_stem().unwrap_or_default().to_string_lossy();
            for difference in &figures.differences {
                writeln!(out, "{name}: {difference}")?;
            }
        }
        total += figures;
    }
    writeln!(out, "PostgreSQL {}, {} scripts", server.major(), all.len())?;
    writeln!(out, "{total}")?;
    Ok(())
}
