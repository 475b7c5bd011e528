//! Who is left alone: pure, from what was seen and what the policy says.

use std::collections::HashSet;

use super::policy::ResolverPolicy;
use crate::connection::sql::server::SIDE_NAME;
use crate::graph::Backend;
use crate::key::LockKey;
#[cfg(feature = "compat")]
use crate::key::compat;
use crate::monitor::AdvisoryLockEntry;
use crate::postgres::statement::{self, StatementKind};
use crate::resolver::protection::{self, Protection};
use crate::resolver::sql::sessions::Surroundings;

/// The key under which goose changes schemas: one number for all databases.
const GOOSE: i64 = 4_097_083_626;

/// What the tables are called in which programs note the migrations that they have made (`schema_migrations`,
/// `_sqlx_migrations`, `flyway_schema_history`, …), or a part of it.
const BOOKS: [&str; 6] = [
    "migration",
    "schema_history",
    "schema_version",
    "databasechangelog",
    "alembic_version",
    "goose_db_version",
];

/// What is known besides who waits for whom.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) surroundings: Surroundings,
    /// Sessions that hold an advisory lock of a program that changes schemas.
    pub(super) migrating: HashSet<i32>,
    /// Sessions that a guard or a transaction of this process has.
    pub(super) own: HashSet<i32>,
}

impl Known {
    /// From the server's answers, and what this process has.
    pub(super) fn new(
        policy: &ResolverPolicy,
        surroundings: Surroundings,
        advisory: &[AdvisoryLockEntry],
    ) -> Self {
        let keys = migration_keys(policy, surroundings.here.as_deref());
        let held = advisory.iter().filter(|entry| entry.is_held());
        let migrating = held
            .filter(|entry| is_of_migration(entry.key(), &keys))
            .filter_map(|entry| entry.backend().pid())
            .collect();
        Self {
            surroundings,
            migrating,
            own: HashSet::new(),
        }
    }
}

/// Why a session must not be signalled, if so.
pub(super) fn of(policy: &ResolverPolicy, known: &Known, backend: &Backend) -> Option<Protection> {
    let pid = backend.pid()?;
    let name = backend.application_name().unwrap_or_default();
    let statement = backend.statement().unwrap_or_default();
    let around = &known.surroundings;
    if around.own == Some(pid) {
        return Some(Protection::Oneself);
    }
    if name == SIDE_NAME {
        return Some(Protection::SideConnection);
    }
    if let Some(kind) = backend.backend_type()
        && let Some(protection) = protection::of_kind(kind)
    {
        return Some(protection);
    }
    if backend.backend_type() == Some("autovacuum worker")
        && statement.contains("(to prevent wraparound)")
    {
        return Some(Protection::WraparoundVacuum);
    }
    if backend.wait_event() == Some("SyncRep") {
        return Some(Protection::Committing);
    }
    let named = |patterns: &[crate::resolver::pattern::Pattern]| {
        patterns.iter().any(|pattern| pattern.matches(name))
    };
    if around.backups.contains(&pid) || named(&policy.backups) || begins_backup(statement) {
        return Some(Protection::Backup);
    }
    if let Some(pattern) = policy.patterns.iter().find(|pattern| pattern.matches(name)) {
        return Some(Protection::Application(pattern.text().clone()));
    }
    if !policy.own_sessions && known.own.contains(&pid) {
        return Some(Protection::OwnSession);
    }
    if !policy.superusers && around.superusers.contains(&pid) {
        return Some(Protection::Superuser);
    }
    if !policy.migrations {
        if around.builds.contains(&pid) || builds_index(statement) {
            return Some(Protection::IndexBuild);
        }
        let migrates = known.migrating.contains(&pid)
            || named(&policy.migration_names)
            || changes_schema(statement);
        if migrates && backend.backend_type() != Some("autovacuum worker") {
            return Some(Protection::Migration);
        }
    }
    None
}

/// Whether a statement changes the schema, or notes that it was changed: often the last one of a migration's
/// transaction. Of a session that is idle in its transaction it is the last one, which has
/// its locks still.
///
/// What an application does to its own temporary tables is none; what only empties or locks a table is none.
fn changes_schema(sql: &str) -> bool {
    match statement::kind(sql) {
        StatementKind::AlterTable
        | StatementKind::CreateIndex
        | StatementKind::CreateIndexConcurrently
        | StatementKind::Reindex
        | StatementKind::Drop
        | StatementKind::RefreshMaterializedView => return true,
        _ => {}
    }
    let redacted = statement::redact(sql);
    let mut statements = redacted.split(';');
    statements.any(|statement| {
        let mut words = statement
            .split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .filter(|word| !word.is_empty())
            .map(str::to_ascii_lowercase);
        let first = words.next().unwrap_or_default();
        match first.as_str() {
            "alter" | "drop" | "reindex" | "cluster" | "comment" | "grant" | "revoke"
            | "reassign" | "import" | "security" | "refresh" => true,
            "create" => {
                let mut words = words.skip_while(|word| {
                    matches!(word.as_str(), "or" | "replace" | "global" | "local")
                });
                !matches!(words.next().as_deref(), Some("temp" | "temporary"))
            }
            // The table is named soon: `INSERT INTO x.y`, `UPDATE ONLY x.y`.
            "insert" | "update" | "delete" => words
                .take(4)
                .any(|word| BOOKS.iter().any(|book| word.contains(book))),
            _ => false,
        }
    })
}

fn builds_index(sql: &str) -> bool {
    matches!(
        statement::kind(sql),
        StatementKind::CreateIndex
            | StatementKind::CreateIndexConcurrently
            | StatementKind::Reindex
    )
}

/// The functions with which programs begin a backup that they then copy themselves; 14 has the older name.
fn begins_backup(sql: &str) -> bool {
    let sql = sql.to_ascii_lowercase();
    sql.contains("pg_backup_start(") || sql.contains("pg_start_backup(")
}

fn is_of_migration(key: &LockKey, keys: &[LockKey]) -> bool {
    let named = [key.namespace(), key.name()];
    let mut named = named.into_iter().flatten().map(str::to_lowercase);
    named.any(|name| name.contains("migrat")) || keys.iter().any(|known| known.same_lock(key))
}

fn migration_keys(policy: &ResolverPolicy, database: Option<&str>) -> Vec<LockKey> {
    let mut keys = policy.migration_keys.clone();
    keys.push(LockKey::from(GOOSE));
    #[cfg(feature = "compat")]
    if let Some(database) = database {
        keys.extend([
            compat::rails_migrations(database),
            compat::sqlx_migrate(database),
            compat::golang_migrate(database, &[]),
            compat::flyway("public", "flyway_schema_history"),
        ]);
    }
    #[cfg(not(feature = "compat"))]
    let _ = database;
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::RawStatement;
    use crate::monitor::testing::backend;

    fn said(sql: &str) -> Backend {
        let mut backend = backend(7);
        backend.statement = Some(RawStatement(sql.into()));
        backend
    }

    fn default_of(backend: &Backend) -> Option<Protection> {
        of(&ResolverPolicy::new(), &Known::default(), backend)
    }

    #[test]
    fn an_ordinary_session_is_not_protected() {
        assert_eq!(default_of(&backend(7)), None);
        for sql in [
            "UPDATE t SET a = 'alter table x'",
            "SELECT 1 -- drop table t",
            "CREATE TEMP TABLE x AS SELECT 1",
            "create local temporary table x (a int)",
            "LOCK TABLE t",
            "TRUNCATE t",
            "VACUUM t",
            "BEGIN; UPDATE t SET a = 1",
            "SELECT \"create\" FROM t; SELECT 2",
            "DO $$ BEGIN PERFORM 1; END $$",
            "SELECT count(*) FROM schema_migrations",
            "INSERT INTO t VALUES ('migration')",
        ] {
            assert_eq!(default_of(&said(sql)), None, "{sql}");
        }
    }

    #[test]
    fn migrations_are_known_by_what_they_say_hold_and_are_called() {
        for sql in [
            "ALTER TABLE t ADD x int",
            "/* v17 */ alter table t add x int",
            "BEGIN; ALTER TABLE t ADD x int",
            "CREATE TABLE x (a int)",
            "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "UPDATE t SET a = 1; DROP TABLE x",
            "GRANT SELECT ON t TO x",
            "CREATE UNLOGGED TABLE x (a int)",
            "REFRESH MATERIALIZED VIEW v",
            "CLUSTER t",
            "INSERT INTO \"schema_migrations\" (version) VALUES ('17')",
            "insert into public._sqlx_migrations (version) values ($1)",
            "UPDATE alembic_version SET version_num='ae1027a6acf'",
            "DELETE FROM ONLY public.\"__EFMigrationsHistory\"",
        ] {
            assert_eq!(default_of(&said(sql)), Some(Protection::Migration), "{sql}");
        }
        for sql in [
            "CREATE INDEX CONCURRENTLY ON t (a)",
            "CREATE UNIQUE INDEX i ON t (a)",
            "REINDEX TABLE t",
        ] {
            assert_eq!(
                default_of(&said(sql)),
                Some(Protection::IndexBuild),
                "{sql}"
            );
        }
        let mut named = backend(7);
        named.application_name = Some("orders db-Migrate".into());
        assert_eq!(default_of(&named), Some(Protection::Migration));
        let known = Known {
            migrating: [7].into(),
            ..Known::default()
        };
        let policy = ResolverPolicy::new();
        assert_eq!(
            of(&policy, &known, &backend(7)),
            Some(Protection::Migration)
        );
        let policy = policy.touch_migrations(true);
        assert_eq!(of(&policy, &known, &named), None);
    }

    #[test]
    fn keys_of_migrations() {
        let policy = ResolverPolicy::new().migration_key((1, 2));
        let keys = migration_keys(&policy, Some("app"));
        let is = |key: LockKey| is_of_migration(&key, &keys);
        assert!(is("schema-migrations".into()) && is(("Migrations", "v1").into()));
        assert!(is((1, 2).into()) && is(GOOSE.into()));
        assert!(!is("invoice:42".into()) && !is(7.into()));
        #[cfg(feature = "compat")]
        {
            let own = compat::rails_migrations("app").as_i64();
            assert!(is(own.expect("one number").into()));
            let other = compat::rails_migrations("other").as_i64();
            assert!(!is(other.expect("one number").into()));
            assert!(compat::goose().same_lock(&GOOSE.into()));
        }
    }

    /// What the server's own autovacuum says of itself (PostgreSQL's source, `autovac_report_activity`).
    #[test]
    fn wraparound_and_other_vacuums() {
        let mut worker = said("autovacuum: VACUUM public.t (to prevent wraparound)");
        worker.backend_type = Some("autovacuum worker".into());
        assert_eq!(default_of(&worker), Some(Protection::WraparoundVacuum));
        let all = ResolverPolicy::new()
            .touch_migrations(true)
            .touch_superusers(true)
            .touch_own_sessions(true);
        assert_eq!(
            of(&all, &Known::default(), &worker),
            Some(Protection::WraparoundVacuum)
        );
        let mut worker = said("autovacuum: VACUUM public.t");
        worker.backend_type = Some("autovacuum worker".into());
        assert_eq!(default_of(&worker), None);
        // A client that says so is one all the same.
        let said = said("SELECT '(to prevent wraparound)'");
        assert_eq!(default_of(&said), None);
    }

    #[test]
    fn backups_replication_superusers_and_oneself() {
        let known = Known {
            surroundings: Surroundings {
                own: Some(7),
                superusers: [8].into(),
                backups: [9].into(),
                builds: [10].into(),
                ..Surroundings::default()
            },
            migrating: HashSet::new(),
            own: [11].into(),
        };
        let policy = ResolverPolicy::new().protect("payroll *");
        for (pid, expected) in [
            (7, Protection::Oneself),
            (8, Protection::Superuser),
            (9, Protection::Backup),
            (10, Protection::IndexBuild),
            (11, Protection::OwnSession),
        ] {
            assert_eq!(of(&policy, &known, &backend(pid)), Some(expected));
        }
        for (name, expected) in [
            ("pg_dump", Protection::Backup),
            ("pgBackRest [backup]", Protection::Backup),
            ("Payroll run", Protection::Application("payroll *".into())),
            (SIDE_NAME, Protection::SideConnection),
        ] {
            let mut named = backend(20);
            named.application_name = Some(name.into());
            assert_eq!(of(&policy, &known, &named), Some(expected), "{name}");
        }
        let mut committing = backend(20);
        committing.wait_event = Some("SyncRep".into());
        assert_eq!(default_of(&committing), Some(Protection::Committing));
        let mut sender = backend(20);
        sender.backend_type = Some("walsender".into());
        assert_eq!(of(&policy, &known, &sender), Some(Protection::Replication));
        let backup = said("SELECT pg_catalog.pg_backup_start('nightly')");
        assert_eq!(default_of(&backup), Some(Protection::Backup));
    }
}
