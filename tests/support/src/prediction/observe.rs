//! What a transaction has locked, rewritten and read so far.

use std::collections::HashMap;

use lockkeeper::LockMode;
use tokio_postgres::{Client, SimpleQueryMessage};

/// Relations of users, their files, scans and locks, as the session's own transaction sees them.
const STATE: &str = "SELECT c.oid, n.nspname, c.relname, c.relkind, c.relfilenode, \
     CASE WHEN c.relkind IN ('r', 'm', 'i', 't') THEN pg_catalog.pg_stat_get_xact_numscans(c.oid) END AS scans, \
     CASE WHEN c.relkind IN ('r', 'm', 't') THEN pg_catalog.pg_stat_get_xact_tuples_returned(c.oid) END AS rows, \
     i.indrelid, NULL AS mode \
     FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid \
     WHERE c.oid >= 16384 AND n.nspname !~ '^pg_toast' \
     UNION ALL SELECT l.relation, NULL, NULL, NULL, NULL, NULL, NULL, NULL, l.mode FROM pg_catalog.pg_locks l \
     WHERE l.locktype = 'relation' AND l.pid = pg_catalog.pg_backend_pid() AND l.granted AND l.relation >= 16384";

#[derive(Clone, Debug)]
pub(super) struct Relation {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) kind: char,
    pub(super) file: u32,
    pub(super) scans: i64,
    pub(super) rows: i64,
    pub(super) table_of_index: Option<u32>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) relations: HashMap<u32, Relation>,
    pub(super) locks: HashMap<u32, LockMode>,
}

impl State {
    pub(super) async fn of(client: &Client) -> Result<State, tokio_postgres::Error> {
        let mut state = State::default();
        for message in client.simple_query(STATE).await? {
            let SimpleQueryMessage::Row(row) = message else {
                continue;
            };
            let number = |column| row.get(column).and_then(|text: &str| text.parse().ok());
            let Some(oid) = number("oid") else { continue };
            if let Some(mode) = row.get("mode") {
                let mode = LockMode::from_pg_locks(mode);
                if let Some(mode) = mode {
                    let strongest = state.locks.entry(oid).or_insert(mode);
                    *strongest = (*strongest).max(mode);
                }
                continue;
            }
            let wide = |column| row.get(column).and_then(|text: &str| text.parse().ok());
            let relation = Relation {
                schema: row.get("nspname").unwrap_or_default().to_owned(),
                name: row.get("relname").unwrap_or_default().to_owned(),
                kind: row
                    .get("relkind")
                    .and_then(|kind| kind.chars().next())
                    .unwrap_or(' '),
                file: number("relfilenode").unwrap_or(0),
                scans: wide("scans").unwrap_or(0),
                rows: wide("rows").unwrap_or(0),
                table_of_index: number("indrelid"),
            };
            state.relations.insert(oid, relation);
        }
        Ok(state)
    }
}
