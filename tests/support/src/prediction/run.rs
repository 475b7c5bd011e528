//! Runs the statements of a script one by one, each with its prediction before it.

use std::collections::HashMap;

use deadpool_postgres::{Object, Pool};
use lockkeeper::{Keeper, LockMode, Preflight, TableWork};
use tokio_postgres::error::SqlState;

use super::figures::Figures;
use super::observe::State;

/// Whether new tables get a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Each new table gets a row, where its columns allow one.
    Rows,
    /// Tables have the rows that the script inserts.
    Nothing,
}

/// Runs the statements on the one connection of the pool, and compares each with its prediction.
///
/// The keeper has to be one over that pool, so that the prediction is made on the same connection, with its
/// `search_path` and its temporary tables. Statements that read and write rows are run, and not compared.
///
/// # Panics
///
/// When the server is gone.
pub async fn measure(keeper: &Keeper, pool: &Pool, statements: &[String], fill: Fill) -> Figures {
    let mut figures = Figures::default();
    let mut block = Block::None;
    for statement in statements {
        let words: Vec<String> = (without_comments(statement).split_whitespace().take(3))
            .map(str::to_lowercase)
            .collect();
        let word = words.first().map_or("", String::as_str);
        let control = Block::after(word, &words, block);
        let client = pool.get().await.expect("the server is there");
        if let Some(next) = control {
            let ran = client.batch_execute(statement).await.is_ok();
            block = if ran || block != Block::Open {
                next
            } else {
                Block::Failed
            };
            continue;
        }
        if !is_compared(word, statement) || block == Block::Failed {
            let failed = client.batch_execute(statement).await.is_err();
            if failed && block == Block::Open {
                block = Block::Failed;
            }
            continue;
        }
        if block == Block::None && client.batch_execute("BEGIN").await.is_err() {
            continue;
        }
        drop(client);
        let ok = compare(keeper, pool, statement, &mut figures).await;
        let client = pool.get().await.expect("the server is there");
        if block == Block::None {
            let end = if ok == Outcome::Succeeded {
                "COMMIT"
            } else {
                "ROLLBACK"
            };
            client.batch_execute(end).await.ok();
            if ok == Outcome::NotInTransaction {
                client.batch_execute(statement).await.ok();
            }
            if fill == Fill::Rows && ok == Outcome::Succeeded && word == "create" {
                fill_new_tables(&client).await;
            }
        } else if ok != Outcome::Succeeded {
            block = Block::Failed;
        }
    }
    figures
}

/// Compares each statement with its prediction, and rolls it back, so that each finds what was there before.
///
/// # Panics
///
/// When the server is gone.
pub async fn measure_alone(keeper: &Keeper, pool: &Pool, statements: &[String]) -> Figures {
    let mut figures = Figures::default();
    for statement in statements {
        let client = pool.get().await.expect("the server is there");
        client.batch_execute("BEGIN").await.expect("BEGIN succeeds");
        drop(client);
        compare(keeper, pool, statement, &mut figures).await;
        let client = pool.get().await.expect("the server is there");
        client
            .batch_execute("ROLLBACK")
            .await
            .expect("ROLLBACK succeeds");
    }
    figures
}

/// Text without leading comments.
fn without_comments(statement: &str) -> &str {
    let mut rest = statement.trim_start();
    loop {
        rest = if let Some(comment) = rest.strip_prefix("--") {
            comment.split_once('\n').map_or("", |(_, rest)| rest)
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.split_once("*/").map_or("", |(_, rest)| rest)
        } else {
            return rest;
        }
        .trim_start();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    None,
    Open,
    Failed,
}

impl Block {
    /// The state after a statement that begins or ends a transaction; `None` after any other.
    fn after(word: &str, words: &[String], now: Block) -> Option<Block> {
        let second = words.get(1).map_or("", String::as_str);
        match word {
            "begin" | "start" => Some(Block::Open),
            "commit" | "end" | "abort" => Some(Block::None),
            "prepare" if second == "transaction" => Some(Block::None),
            "rollback" if second == "to" || words.get(2).is_some_and(|word| word == "to") => {
                Some(if now == Block::None { now } else { Block::Open })
            }
            "rollback" => Some(Block::None),
            "savepoint" | "release" => Some(now),
            _ => None,
        }
    }
}

/// Whether it is a statement that defines something, or a lock.
fn is_compared(word: &str, statement: &str) -> bool {
    let rows = [
        "select",
        "with",
        "values",
        "insert",
        "update",
        "delete",
        "merge",
        "copy",
        "explain",
        "set",
        "reset",
        "show",
        "fetch",
        "declare",
        "close",
        "move",
        "prepare",
        "execute",
        "deallocate",
        "listen",
        "notify",
        "unlisten",
        "discard",
        "checkpoint",
        "load",
        "table",
        "(",
    ];
    // A variable of psql that is not set.
    let has_variable = [" :", "':", "(:"]
        .iter()
        .any(|mark| statement.contains(mark))
        && !statement.contains("::");
    !rows.contains(&word) && !word.starts_with('(') && !has_variable
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Succeeded,
    Failed,
    NotInTransaction,
}

async fn compare(keeper: &Keeper, pool: &Pool, statement: &str, figures: &mut Figures) -> Outcome {
    let preflight = match keeper.schema().preflight(statement).await {
        Ok(preflight) => preflight,
        Err(error) => {
            let mut causes = String::new();
            let mut cause = std::error::Error::source(&error);
            while let Some(one) = cause {
                causes = format!("{causes}: {one}");
                cause = one.source();
            }
            let text = format!("NO ANSWER {error}{causes} | {}", line(statement));
            figures.differences.push(text);
            return Outcome::Failed;
        }
    };
    let client = pool.get().await.expect("the server is there");
    let Ok(before) = State::of(&client).await else {
        return Outcome::Failed;
    };
    if let Err(error) = client.batch_execute(statement).await {
        figures.not_compared += 1;
        return if error.code() == Some(&SqlState::ACTIVE_SQL_TRANSACTION) {
            Outcome::NotInTransaction
        } else {
            Outcome::Failed
        };
    }
    match State::of(&client).await {
        Ok(after) => {
            differences(statement, &preflight, &before, &after, figures);
            Outcome::Succeeded
        }
        Err(_) => Outcome::Failed,
    }
}

fn line(statement: &str) -> String {
    let text = without_comments(statement).split_whitespace();
    let text: Vec<_> = text.collect();
    text.join(" ").chars().take(200).collect()
}

fn differences(
    statement: &str,
    preflight: &Preflight,
    before: &State,
    after: &State,
    figures: &mut Figures,
) {
    let understood = preflight.unrecognized().is_empty();
    figures.statements += 1;
    figures.not_understood += usize::from(!understood);
    let said: HashMap<(String, String), (LockMode, TableWork)> = preflight
        .locks()
        .iter()
        .map(|lock| {
            let name = lock.relation();
            let key = (
                name.schema().unwrap_or_default().to_owned(),
                name.name().to_owned(),
            );
            (key, (lock.mode(), lock.work()))
        })
        .collect();
    let predicted = |oid: u32| {
        let relation = before.relations.get(&oid)?;
        said.get(&(relation.schema.clone(), relation.name.clone()))
            .copied()
    };
    let mut is_wrong = false;
    let note = |figures: &mut Figures, what: String| {
        let text = format!("{what} | {}", line(statement));
        figures.differences.push(text);
    };
    for (oid, relation) in &before.relations {
        let taken = after.locks.get(oid).copied();
        let held = before.locks.get(oid).copied();
        // A lock that the transaction held before is not one of this statement.
        let taken = taken.filter(|taken| held.is_none_or(|held| held < *taken));
        let name = format!("{} ({})", relation.name, relation.kind);
        if let Some(mode) = taken.filter(|mode| *mode >= LockMode::ShareUpdateExclusive) {
            figures.strong += 1;
            // An index of a table that nobody can use is not waited for on its own.
            let with_table = relation.table_of_index.and_then(predicted);
            let with_table = with_table.is_some_and(|(mode, _)| mode == LockMode::AccessExclusive);
            let said = predicted(*oid).map(|(mode, _)| mode);
            if said.is_some_and(|said| said >= mode) || with_table {
                figures.predicted += 1;
            } else if !understood {
                figures.unknown += 1;
                note(figures, format!("UNKNOWN {} on {name}", mode.as_sql()));
            } else if let Some(said) = said {
                figures.weak += 1;
                is_wrong = true;
                note(
                    figures,
                    format!(
                        "WEAK {} instead of {} on {name}",
                        said.as_sql(),
                        mode.as_sql()
                    ),
                );
            } else {
                figures.missing += 1;
                is_wrong = true;
                note(figures, format!("MISSING {} on {name}", mode.as_sql()));
            }
        }
        let said = predicted(*oid);
        if let Some((mode, _)) = said
            && understood
            && mode >= LockMode::ShareUpdateExclusive
            && held.is_none_or(|held| held < mode)
        {
            figures.said += 1;
            if taken.is_some_and(|taken| taken >= mode) {
                figures.said_rightly += 1;
            } else {
                let taken = taken.map_or("nothing", LockMode::as_sql);
                note(
                    figures,
                    format!("STRONG {} instead of {taken} on {name}", mode.as_sql()),
                );
            }
        }
        if !matches!(relation.kind, 'r' | 'm') {
            continue;
        }
        let now = after.relations.get(oid);
        let truncates = without_comments(statement)
            .to_lowercase()
            .starts_with("truncate");
        let rewritten = !truncates && now.is_some_and(|now| now.file != relation.file);
        let read = now.is_some_and(|now| now.scans > relation.scans && now.rows > relation.rows);
        let lock = after.locks.get(oid).copied();
        let blocks = lock.is_some_and(|lock| lock.conflicts_with(LockMode::RowExclusive));
        let work = said.map(|(_, work)| work);
        let was = if rewritten {
            TableWork::Rewrite
        } else {
            TableWork::Scan
        };
        if (rewritten || read) && blocks {
            figures.work += 1;
            if understood && work.is_none_or(|work| work < was) {
                figures.work_missed += 1;
                note(figures, format!("BRIEF? {was:?}, said {work:?}, on {name}"));
            }
        } else if let Some((mode, work @ (TableWork::Scan | TableWork::Rewrite))) = said
            && understood
            && mode.conflicts_with(LockMode::RowExclusive)
            && now.is_some()
        {
            figures.work_said_wrongly += 1;
            note(figures, format!("NO WORK, said {work:?}, on {name}"));
        }
    }
    figures.wrong_statements += usize::from(is_wrong);
    if !understood {
        note(figures, "NOT UNDERSTOOD".to_owned());
    }
}

/// Gives each empty table of the search path a row, where that succeeds.
async fn fill_new_tables(client: &Object) {
    let sql = "DO $$ DECLARE t regclass; BEGIN FOR t IN SELECT c.oid FROM pg_class c WHERE relkind = 'r' \
               AND relpersistence <> 't' AND c.oid >= 16384 AND relpages = 0 AND pg_relation_size(c.oid) = 0 \
               AND pg_table_is_visible(c.oid) \
               LOOP BEGIN EXECUTE format('INSERT INTO %s DEFAULT VALUES', t); EXCEPTION WHEN OTHERS THEN NULL; END; \
               END LOOP; END $$";
    client.batch_execute(sql).await.ok();
}
