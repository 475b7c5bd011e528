//! The rules for which sessions are left alone, given what was observed and the policy. Pure logic.

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
use crate::resolver::sql::sessions::ServerSessions;

/// The advisory lock that goose holds during a migration: one number for all databases.
const GOOSE_KEY: i64 = 4_097_083_626;

/// Names, or parts of the names, of the tables in which programs record the migrations they have run
/// (`schema_migrations`, `_sqlx_migrations`, `flyway_schema_history`, …).
const MIGRATION_TABLES: [&str; 6] = [
    "migration",
    "schema_history",
    "schema_version",
    "databasechangelog",
    "alembic_version",
    "goose_db_version",
];

/// What is known about sessions besides their waits.
#[derive(Clone, Debug, Default)]
pub(super) struct SessionFacts {
    pub(super) sessions: ServerSessions,
    /// Sessions that hold an advisory lock of a program that changes schemas.
    pub(super) migrating: HashSet<i32>,
    /// Sessions that a guard or transaction of this process owns.
    pub(super) own_sessions: HashSet<i32>,
}

impl SessionFacts {
    /// From the server's replies; `own_sessions` is added by the caller.
    pub(super) fn new(
        policy: &ResolverPolicy,
        sessions: ServerSessions,
        advisory: &[AdvisoryLockEntry],
    ) -> Self {
        let keys = migration_keys(policy, sessions.database.as_deref());
        let held = advisory.iter().filter(|entry| entry.is_held());
        let migrating = held
            .filter(|entry| is_migration_key(entry.key(), &keys))
            .filter_map(|entry| entry.backend().pid())
            .collect();
        Self {
            sessions,
            migrating,
            own_sessions: HashSet::new(),
        }
    }
}

/// Why a session must not be signalled, if so.
pub(super) fn protection_of(
    policy: &ResolverPolicy,
    facts: &SessionFacts,
    backend: &Backend,
) -> Option<Protection> {
    let pid = backend.pid()?;
    let name = backend.application_name().unwrap_or_default();
    let statement = backend.statement().unwrap_or_default();
    let sessions = &facts.sessions;
    if sessions.own_pid == Some(pid) {
        return Some(Protection::SignallingSession);
    }
    if name == SIDE_NAME {
        return Some(Protection::SideConnection);
    }
    if let Some(kind) = backend.backend_type()
        && let Some(protection) = protection::of_backend_type(kind)
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
    if sessions.backups.contains(&pid) || named(&policy.backup_programs) || starts_backup(statement)
    {
        return Some(Protection::Backup);
    }
    if let Some(pattern) = policy
        .protected_applications
        .iter()
        .find(|pattern| pattern.matches(name))
    {
        return Some(Protection::Application(pattern.text().clone()));
    }
    if !policy.allow_own_sessions && facts.own_sessions.contains(&pid) {
        return Some(Protection::OwnSession);
    }
    if !policy.allow_superusers && sessions.superusers.contains(&pid) {
        return Some(Protection::Superuser);
    }
    if !policy.allow_migrations {
        if sessions.builds.contains(&pid) || statement::kind(statement).builds_index() {
            return Some(Protection::IndexBuild);
        }
        let migrates = facts.migrating.contains(&pid)
            || named(&policy.migration_programs)
            || changes_schema(statement);
        if migrates && backend.backend_type() != Some("autovacuum worker") {
            return Some(Protection::Migration);
        }
    }
    None
}

/// Whether a statement changes the schema, or records that it was changed, which is often the last statement of a
/// migration's transaction. For a session that is idle in its transaction `sql` is its last statement, whose locks it
/// still holds.
///
/// Changes to temporary tables do not count, nor do statements that only empty or lock a table.
fn changes_schema(sql: &str) -> bool {
    match statement::kind(sql) {
        StatementKind::AlterTable
        | StatementKind::Drop
        | StatementKind::RefreshMaterializedView => return true,
        kind if kind.builds_index() => return true,
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
            // The table's name is among the first words: `INSERT INTO x.y`, `UPDATE ONLY x.y`.
            "insert" | "update" | "delete" => words
                .take(4)
                .any(|word| MIGRATION_TABLES.iter().any(|table| word.contains(table))),
            _ => false,
        }
    })
}

/// Whether it calls a function that begins a backup which the program then copies itself; version 14 has the older
/// name.
fn starts_backup(sql: &str) -> bool {
    let sql = sql.to_ascii_lowercase();
    sql.contains("pg_backup_start(") || sql.contains("pg_start_backup(")
}

fn is_migration_key(key: &LockKey, keys: &[LockKey]) -> bool {
    let named = [key.namespace(), key.name()];
    let mut named = named.into_iter().flatten().map(str::to_lowercase);
    named.any(|name| name.contains("migrat")) || keys.iter().any(|known| known.same_lock(key))
}

fn migration_keys(policy: &ResolverPolicy, database: Option<&str>) -> Vec<LockKey> {
    let mut keys = policy.migration_keys.clone();
    keys.push(LockKey::from(GOOSE_KEY));
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

    fn with_statement(sql: &str) -> Backend {
        let mut backend = backend(7);
        backend.statement = Some(RawStatement(sql.into()));
        backend
    }

    fn default_protection(backend: &Backend) -> Option<Protection> {
        protection_of(&ResolverPolicy::new(), &SessionFacts::default(), backend)
    }

    #[test]
    fn an_ordinary_session_is_not_protected() {
        assert_eq!(default_protection(&backend(7)), None);
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
            assert_eq!(default_protection(&with_statement(sql)), None, "{sql}");
        }
    }

    #[test]
    fn migrations_are_known_by_statement_lock_and_name() {
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
            assert_eq!(
                default_protection(&with_statement(sql)),
                Some(Protection::Migration),
                "{sql}"
            );
        }
        for sql in [
            "CREATE INDEX CONCURRENTLY ON t (a)",
            "CREATE UNIQUE INDEX i ON t (a)",
            "REINDEX TABLE t",
        ] {
            assert_eq!(
                default_protection(&with_statement(sql)),
                Some(Protection::IndexBuild),
                "{sql}"
            );
        }
        let mut named = backend(7);
        named.application_name = Some("orders db-Migrate".into());
        assert_eq!(default_protection(&named), Some(Protection::Migration));
        let facts = SessionFacts {
            migrating: [7].into(),
            ..SessionFacts::default()
        };
        let policy = ResolverPolicy::new();
        assert_eq!(
            protection_of(&policy, &facts, &backend(7)),
            Some(Protection::Migration)
        );
        let policy = policy.allow_migrations(true);
        assert_eq!(protection_of(&policy, &facts, &named), None);
    }

    #[test]
    fn keys_of_migrations() {
        let policy = ResolverPolicy::new().migration_key((1, 2));
        let keys = migration_keys(&policy, Some("app"));
        let is = |key: LockKey| is_migration_key(&key, &keys);
        assert!(is("schema-migrations".into()) && is(("Migrations", "v1").into()));
        assert!(is((1, 2).into()) && is(GOOSE_KEY.into()));
        assert!(!is("invoice:42".into()) && !is(7.into()));
        #[cfg(feature = "compat")]
        {
            let own = compat::rails_migrations("app").as_i64();
            assert!(is(own.expect("one number").into()));
            let other = compat::rails_migrations("other").as_i64();
            assert!(!is(other.expect("one number").into()));
            assert!(compat::goose().same_lock(&GOOSE_KEY.into()));
        }
    }

    /// The statement that the server's autovacuum reports (PostgreSQL's source, `autovac_report_activity`).
    #[test]
    fn wraparound_and_other_vacuums() {
        let mut worker = with_statement("autovacuum: VACUUM public.t (to prevent wraparound)");
        worker.backend_type = Some("autovacuum worker".into());
        assert_eq!(
            default_protection(&worker),
            Some(Protection::WraparoundVacuum)
        );
        let all = ResolverPolicy::new()
            .allow_migrations(true)
            .allow_superusers(true)
            .allow_own_sessions(true);
        assert_eq!(
            protection_of(&all, &SessionFacts::default(), &worker),
            Some(Protection::WraparoundVacuum)
        );
        let mut worker = with_statement("autovacuum: VACUUM public.t");
        worker.backend_type = Some("autovacuum worker".into());
        assert_eq!(default_protection(&worker), None);
        // A client with that text in its statement is an ordinary client.
        let client = with_statement("SELECT '(to prevent wraparound)'");
        assert_eq!(default_protection(&client), None);
    }

    #[test]
    fn backups_replication_superusers_and_the_signalling_session() {
        let facts = SessionFacts {
            sessions: ServerSessions {
                own_pid: Some(7),
                superusers: [8].into(),
                backups: [9].into(),
                builds: [10].into(),
                ..ServerSessions::default()
            },
            migrating: HashSet::new(),
            own_sessions: [11].into(),
        };
        let policy = ResolverPolicy::new().protect("payroll *");
        for (pid, expected) in [
            (7, Protection::SignallingSession),
            (8, Protection::Superuser),
            (9, Protection::Backup),
            (10, Protection::IndexBuild),
            (11, Protection::OwnSession),
        ] {
            assert_eq!(
                protection_of(&policy, &facts, &backend(pid)),
                Some(expected)
            );
        }
        for (name, expected) in [
            ("pg_dump", Protection::Backup),
            ("pgBackRest [backup]", Protection::Backup),
            ("Payroll run", Protection::Application("payroll *".into())),
            (SIDE_NAME, Protection::SideConnection),
        ] {
            let mut named = backend(20);
            named.application_name = Some(name.into());
            assert_eq!(
                protection_of(&policy, &facts, &named),
                Some(expected),
                "{name}"
            );
        }
        let mut committing = backend(20);
        committing.wait_event = Some("SyncRep".into());
        assert_eq!(
            default_protection(&committing),
            Some(Protection::Committing)
        );
        let mut sender = backend(20);
        sender.backend_type = Some("walsender".into());
        assert_eq!(
            protection_of(&policy, &facts, &sender),
            Some(Protection::Replication)
        );
        let backup = with_statement("SELECT pg_catalog.pg_backup_start('nightly')");
        assert_eq!(default_protection(&backup), Some(Protection::Backup));
    }
}
