//! What can be seen of a statement from outside: its locks, the files it wrote, the pages it went through.

use std::collections::HashMap;

use lockkeeper::{LockMode, RowLock, TableWork};
use lockkeeper_testkit::Database;
use tokio_postgres::Client;

use super::locked_at_once;

/// Makes what the statements are executed on.
pub(super) async fn scene(database: &Database) {
    let client = database.connect().await;
    let sql = include_str!("scene.sql");
    if let Err(error) = client.batch_execute(sql).await {
        panic!("scene.sql: {:?}", error.as_db_error());
    }
}

/// What was seen of one statement.
#[derive(Debug, Default)]
pub(super) struct Seen {
    modes: HashMap<String, LockMode>,
    rewritten: Vec<String>,
    scanned: Vec<String>,
}

impl Seen {
    /// The strongest mode in which it has locked the relation.
    pub(super) fn mode(&self, relation: &str) -> Option<LockMode> {
        self.modes.get(relation).copied()
    }

    /// Adds a lock that it was seen to ask for.
    pub(super) fn see(&mut self, relation: &str, mode: LockMode) {
        let entry = self.modes.entry(relation.to_owned()).or_insert(mode);
        *entry = mode.max(*entry);
    }

    pub(super) fn relations(&self) -> impl Iterator<Item = &str> {
        self.modes.keys().map(String::as_str)
    }
}

/// A relation as it was before.
struct Relation {
    name: String,
    kind: String,
    pages: i64,
}

/// Watches, from a connection of its own.
pub(super) struct Watcher {
    pub(super) observer: Client,
    relations: Vec<Relation>,
}

impl Watcher {
    pub(super) async fn new(database: &Database) -> Self {
        let observer = database.connect().await;
        let sql = "SELECT name, kind, pages FROM watch.relation";
        let rows = observer.query(sql, &[]).await.unwrap();
        let relations = rows.iter().map(|row| Relation {
            name: row.get(0),
            kind: row.get(1),
            pages: row.get(2),
        });
        let relations = relations.collect();
        Self {
            observer,
            relations,
        }
    }

    /// After the scene was changed and put back: other files, other oids.
    pub(super) async fn anew(database: &Database) -> Self {
        let client = database.connect().await;
        let sql = "UPDATE watch.relation SET oid = to_regclass(name), file = pg_relation_filenode(to_regclass(name)), \
                   pages = coalesce(pg_relation_size(to_regclass(name)) / current_setting('block_size')::int, 0)";
        client.batch_execute(sql).await.unwrap();
        Self::new(database).await
    }

    fn relation(&self, name: &str) -> &Relation {
        let mut all = self.relations.iter();
        all.find(|relation| relation.name == name)
            .unwrap_or_else(|| panic!("no {name} in the scene"))
    }

    /// Its `pg_class.relkind`.
    pub(super) fn kind(&self, name: &str) -> &str {
        &self.relation(name).kind
    }

    /// Adds the locks that the backend holds on relations of the scene just now.
    pub(super) async fn see_locks(&self, pid: i32, seen: &mut Seen) {
        let sql = "SELECT r.name, l.mode FROM pg_locks l JOIN watch.relation r ON r.oid = l.relation \
                   WHERE l.pid = $1 AND l.locktype = 'relation' AND l.granted \
                   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        for row in self.observer.query(sql, &[&pid]).await.unwrap() {
            let mode = LockMode::from_pg_locks(row.get(1)).unwrap();
            seen.see(row.get(0), mode);
        }
    }

    /// Which relations have other files now, with something in them, as the client sees it.
    pub(super) async fn see_files(&self, client: &Client, seen: &mut Seen) {
        let sql = "SELECT name FROM watch.relation WHERE kind IN ('r', 'm', 'i') \
                   AND pg_relation_filenode(to_regclass(name)) <> file AND pg_relation_size(to_regclass(name)) > 0";
        let rows = client.query(sql, &[]).await.unwrap();
        seen.rewritten
            .extend(rows.iter().map(|row| row.get::<_, String>(0)));
    }

    /// Pages asked for in the client's transaction, by relation: the difference of two answers counts, since what former
    /// transactions asked for is in it until it is reported.
    pub(super) async fn fetched_in_transaction(&self, client: &Client) -> HashMap<String, i64> {
        pages(client, "pg_stat_get_xact_blocks_fetched").await
    }

    /// Pages asked for by backends that have reported it.
    pub(super) async fn fetched(&self) -> HashMap<String, i64> {
        pages(&self.observer, "pg_stat_get_blocks_fetched").await
    }

    /// Which relations were gone through from their first to their last page.
    pub(super) fn see_work(
        &self,
        before: &HashMap<String, i64>,
        after: &HashMap<String, i64>,
        seen: &mut Seen,
    ) {
        for relation in &self.relations {
            let fetched = after[&relation.name] - before[&relation.name];
            if relation.pages > 0 && fetched >= relation.pages {
                seen.scanned.push(relation.name.clone());
            }
        }
    }

    /// How much of a table it went through; `None` for relations where that cannot be told.
    pub(super) fn work(&self, name: &str, seen: &Seen) -> Option<TableWork> {
        let is_in = |list: &[String]| list.iter().any(|one| one == name);
        let relation = self.relation(name);
        match &*relation.kind {
            _ if is_in(&seen.rewritten) => Some(TableWork::Rewrite),
            "r" | "m" => {
                assert!(relation.pages >= 50, "{name} is too small to tell");
                let scanned = is_in(&seen.scanned);
                Some(if scanned {
                    TableWork::Scan
                } else {
                    TableWork::Brief
                })
            }
            "i" => Some(TableWork::Brief),
            _ => None,
        }
    }
}

async fn pages(client: &Client, function: &str) -> HashMap<String, i64> {
    let sql = format!("SELECT name, {function}(oid) FROM watch.relation");
    let rows = client.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// How others have locked the row 1 of a table, found out by trying: each lock refuses others.
pub(super) async fn row_lock_on(prober: &Client, table: &str) -> Option<RowLock> {
    let mut refused = Vec::new();
    for wanted in RowLock::ALL {
        let sql = format!("SELECT FROM {table} WHERE id = 1 {wanted} NOWAIT");
        if !locked_at_once(prober, &sql).await {
            refused.push(wanted);
        }
    }
    let held = RowLock::ALL.into_iter().find(|held| {
        let refuses = RowLock::ALL
            .into_iter()
            .filter(|wanted| wanted.conflicts_with(*held));
        refuses.eq(refused.iter().copied())
    });
    assert_eq!(
        held.is_none(),
        refused.is_empty(),
        "{table}: {refused:?} refused"
    );
    held
}
