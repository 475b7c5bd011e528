//! What `LockMode`, `RowLock` and `StatementLock` say of the server, asked of the server.

mod cases;
mod observe;
mod outside;

use std::collections::HashSet;

use lockkeeper::{LockMode, LockedRelation, RowLock, StatementLock, TableWork};
use lockkeeper_testkit::{Database, GIVE_UP_AFTER, Server, eventually, pid_of};
use tokio_postgres::Client;

use cases::Case;
use observe::{Seen, Watcher, row_lock_on, scene};

/// Statements with a test of their own instead of a line in the cases.
const ALONE: [(&str, &str); 1] = [(
    "VACUUM (cutting off empty pages)",
    "vacuum_cuts_off_empty_pages_only_where_no_lock_is",
)];

/// Whether it was not locked already; any other failure than that panics.
async fn locked_at_once(client: &Client, sql: &str) -> bool {
    match client.batch_execute(sql).await {
        Ok(()) => true,
        Err(error) if error.code().map(|code| code.code()) == Some("55P03") => false,
        Err(error) => panic!("{sql}: {error:?}"),
    }
}

#[tokio::test]
async fn every_pair_of_table_modes() {
    let database = Server::shared().database().await;
    let (holder, other) = (database.connect().await, database.connect().await);
    holder.batch_execute("CREATE TABLE t ()").await.unwrap();
    for held in LockMode::ALL {
        let lock = |mode: LockMode| format!("LOCK TABLE t IN {} MODE", mode.as_sql());
        let sql = format!("BEGIN; {}", lock(held));
        holder.batch_execute(&sql).await.unwrap();
        let row = holder
            .query_one(
                "SELECT mode FROM pg_locks WHERE relation = 't'::regclass",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(LockMode::from_pg_locks(row.get(0)), Some(held));
        for wanted in LockMode::ALL {
            let sql = format!("BEGIN; {} NOWAIT", lock(wanted));
            let refused = !locked_at_once(&other, &sql).await;
            other.batch_execute("ROLLBACK").await.unwrap();
            let says = wanted.conflicts_with(held);
            assert_eq!(refused, says, "{wanted} wanted, {held} held");
        }
        holder.batch_execute("ROLLBACK").await.unwrap();
    }
}

#[tokio::test]
async fn every_pair_of_row_modes() {
    let database = Server::shared().database().await;
    let (holder, other) = (database.connect().await, database.connect().await);
    let sql = "CREATE TABLE t AS SELECT 1 AS id";
    holder.batch_execute(sql).await.unwrap();
    for held in RowLock::ALL {
        let sql = format!("BEGIN; SELECT FROM t {held}");
        holder.batch_execute(&sql).await.unwrap();
        for wanted in RowLock::ALL {
            let sql = format!("SELECT FROM t {wanted} NOWAIT");
            let refused = !locked_at_once(&other, &sql).await;
            let says = wanted.conflicts_with(held);
            assert_eq!(refused, says, "{wanted} wanted, {held} held");
        }
        let reads = other.query("SELECT FROM t", &[]).await;
        assert_eq!(reads.unwrap().len(), 1, "{held} stops no reader");
        holder.batch_execute("ROLLBACK").await.unwrap();
    }
}

/// The lock of type `tuple` that the first in the queue holds has the mode of its wish.
#[tokio::test]
async fn a_waiter_for_a_row_says_which_lock_it_wants() {
    let database = Server::shared().database().await;
    let (holder, observer) = (database.connect().await, database.connect().await);
    let sql = "CREATE TABLE t AS SELECT 1 AS id";
    holder.batch_execute(sql).await.unwrap();
    let sql = "BEGIN; SELECT FROM t FOR UPDATE";
    holder.batch_execute(sql).await.unwrap();
    let quiet =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'tuple' AND relation = 't'::regclass";
    let row = observer.query_one(quiet, &[]).await.unwrap();
    assert_eq!(
        row.get::<_, i64>(0),
        0,
        "a row lock without a waiter is not in pg_locks"
    );
    for wanted in RowLock::ALL {
        let waiter = database.connect().await;
        let pid = pid_of(&waiter).await;
        let waiting = tokio::spawn(async move {
            waiter
                .batch_execute(&format!("SELECT FROM t {wanted}"))
                .await
        });
        eventually("the waiter waits", async || {
            let rows = observer
                .query(
                    "SELECT locktype, mode FROM pg_locks WHERE pid = $1 AND NOT granted",
                    &[&pid],
                )
                .await
                .unwrap();
            let row = rows.first().map(|row| (row.get(0), row.get(1)));
            row == Some(("transactionid", "ShareLock"))
        })
        .await;
        let rows = observer
            .query(
                "SELECT mode FROM pg_locks WHERE pid = $1 AND locktype = 'tuple' AND granted",
                &[&pid],
            )
            .await
            .unwrap();
        let modes: Vec<_> = rows
            .iter()
            .map(|row| RowLock::from_pg_locks(row.get(0)))
            .collect();
        assert_eq!(modes, [Some(wanted)]);
        observer
            .execute("SELECT pg_cancel_backend($1)", &[&pid])
            .await
            .unwrap();
        waiting.await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn what_a_serializable_transaction_has_read_is_no_lock() {
    let database = Server::shared().database().await;
    let (reader, writer) = (database.connect().await, database.connect().await);
    let sql = "CREATE TABLE t AS SELECT 1 AS id";
    writer.batch_execute(sql).await.unwrap();
    let sql = "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM t";
    reader.batch_execute(sql).await.unwrap();
    let rows = reader
        .query(
            "SELECT mode FROM pg_locks WHERE locktype = 'relation' AND relation = 't'::regclass ORDER BY mode",
            &[],
        )
        .await
        .unwrap();
    let modes: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(modes, ["AccessShareLock", "SIReadLock"]);
    assert_eq!(LockMode::from_pg_locks("SIReadLock"), None);
    assert_eq!(RowLock::from_pg_locks("SIReadLock"), None);
    let sql = "BEGIN; LOCK TABLE t IN EXCLUSIVE MODE NOWAIT; UPDATE t SET id = 2; COMMIT";
    assert!(locked_at_once(&writer, sql).await);
}

/// What `LockMode::blocks` says of locks that are only waited for.
#[tokio::test]
async fn a_lock_that_is_waited_for_blocks_too() {
    let database = Server::shared().database().await;
    let (holder, reader) = (database.connect().await, database.connect().await);
    let waiter = database.connect().await;
    holder.batch_execute("CREATE TABLE t ()").await.unwrap();
    holder
        .batch_execute("BEGIN; LOCK TABLE t IN ACCESS SHARE MODE")
        .await
        .unwrap();
    let wants_to_read = "BEGIN; LOCK TABLE t IN ACCESS SHARE MODE NOWAIT";
    assert!(locked_at_once(&reader, wants_to_read).await);
    reader.batch_execute("ROLLBACK").await.unwrap();
    let waiting = tokio::spawn(async move { waiter.batch_execute("DROP TABLE t").await });
    eventually("the reader queues behind the DROP", async || {
        let at_once = locked_at_once(&reader, wants_to_read).await;
        reader.batch_execute("ROLLBACK").await.unwrap();
        !at_once
    })
    .await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    waiting.await.unwrap().unwrap();
}

/// Needs no server: nothing in the table goes unexecuted on any major version.
#[test]
fn every_row_has_its_check() {
    let cases = Case::all();
    let statements: HashSet<_> = StatementLock::all().map(StatementLock::statement).collect();
    for case in &cases {
        assert!(statements.contains(&*case.statement), "no row for {case:?}");
        let rows: HashSet<_> = StatementLock::all()
            .filter(|lock| lock.statement() == case.statement)
            .map(StatementLock::on)
            .collect();
        let roles: HashSet<_> = case.roles.iter().map(|(on, _)| *on).collect();
        assert_eq!(rows, roles, "{case:?}");
    }
    for major in 14..=18 {
        let checked: HashSet<_> = cases
            .iter()
            .filter(|case| case.since <= major)
            .map(|case| &*case.statement)
            .chain(ALONE.map(|(statement, _)| statement))
            .collect();
        let unchecked: Vec<_> = statements.difference(&checked).collect();
        assert!(unchecked.is_empty(), "no case on {major}: {unchecked:?}");
    }
    for lock in StatementLock::all() {
        let case = cases.iter().find(|case| case.statement == lock.statement());
        assert!(
            case.is_none_or(|case| case.in_block == lock.in_transaction_block()),
            "{lock}: the case is in the wrong file"
        );
    }
}

/// Every statement that may stand in a transaction block: its locks on tables, the rows it locked, what it read and
/// wrote, and that it locked nothing that the table does not know.
#[tokio::test]
async fn statements_take_what_the_table_says() {
    let database = Server::shared().database().await;
    scene(&database).await;
    outside::leave_half_way(&database).await;
    let found = check_in_block(&database, |case| !case.needs_server_of_its_own()).await;
    assert!(found > 200, "{found} statements executed");
}

/// The same for those that want another tablespace, which is made inside of the data directory of a server of our own.
#[tokio::test]
async fn statements_about_tablespaces_take_what_the_table_says() {
    let server = Server::start(&[("allow_in_place_tablespaces", "on")]).unwrap();
    let database = server.database().await;
    let client = database.connect().await;
    let sql = "CREATE TABLESPACE aside LOCATION ''";
    client.batch_execute(sql).await.unwrap();
    scene(&database).await;
    let sql = "CREATE TABLE moved (LIKE filled INCLUDING DEFAULTS) TABLESPACE aside; SELECT fill('{moved}'); \
               INSERT INTO watch.relation SELECT oid, 'moved', 'r', relfilenode, 60 FROM pg_class WHERE relname = 'moved'";
    client.batch_execute(sql).await.unwrap();
    let found = check_in_block(&database, Case::needs_server_of_its_own).await;
    assert_eq!(found, 3);
}

/// Executes each of these statements in a transaction that is rolled back, beside the strongest locks that it is documented to
/// go together with: nothing stronger is taken, not for a moment. Answers how many this major version knows.
async fn check_in_block(database: &Database, which: impl Fn(&Case) -> bool) -> usize {
    let major = database.server().major();
    let (client, other) = (database.connect().await, database.connect().await);
    let sql = format!("SET lock_timeout = {}", GIVE_UP_AFTER.as_millis());
    client.batch_execute(&sql).await.unwrap();
    let watcher = Watcher::new(database).await;
    let mut wrong = Vec::new();
    let mut executed = 0;
    let cases = Case::all();
    for case in cases
        .iter()
        .filter(|case| case.in_block && case.since <= major && which(case))
    {
        client.batch_execute("BEGIN").await.unwrap();
        let before = watcher.fetched_in_transaction(&client).await;
        other.batch_execute("BEGIN").await.unwrap();
        for (relation, mode) in beside(case, major, &watcher) {
            let sql = format!("LOCK TABLE ONLY {relation} IN {} MODE", mode.as_sql());
            other.batch_execute(&sql).await.unwrap();
        }
        let answer = client.batch_execute(&case.sql).await;
        other.batch_execute("ROLLBACK").await.unwrap();
        match answer {
            Ok(()) => {
                executed += 1;
                let mut seen = Seen::default();
                watcher.see_locks(pid_of(&client).await, &mut seen).await;
                watcher.see_files(&client, &mut seen).await;
                let after = watcher.fetched_in_transaction(&client).await;
                watcher.see_work(&before, &after, &mut seen);
                compare(case, major, &seen, &watcher, &mut wrong);
                compare_rows(case, major, &other, &watcher, &mut wrong).await;
            }
            // What this major version does not know has no rows for it.
            Err(_) if case.locks(major).next().is_none() => {}
            Err(error) => {
                let error = error.as_db_error().map(ToString::to_string);
                wrong.push(format!("{}: {error:?}", case.sql));
            }
        }
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    assert!(wrong.is_empty(), "on {major}:\n{}", wrong.join("\n"));
    executed
}

/// For each table of the case the mode that goes together with what the statement is documented to take there, and with nothing
/// stronger.
fn beside<'a>(case: &'a Case, major: u32, watcher: &Watcher) -> Vec<(&'a str, LockMode)> {
    let goes_with = |says: Option<LockMode>, held: LockMode| {
        let conflicts = |mode: LockMode| mode.conflicts_with(held);
        let mut stronger = LockMode::ALL.into_iter().filter(|mode| Some(*mode) > says);
        !says.is_some_and(conflicts) && stronger.all(conflicts)
    };
    case.roles
        .iter()
        .filter(|(_, relation)| matches!(watcher.kind(relation), "r" | "p"))
        .filter_map(|(on, relation)| {
            let says = case.lock(*on, major).map(StatementLock::mode);
            let held = LockMode::ALL
                .into_iter()
                .find(|held| goes_with(says, *held));
            assert_eq!(held.is_none(), says == Some(LockMode::AccessExclusive));
            held.map(|held| (&**relation, held))
        })
        .collect()
}

/// Holds what was seen of a statement against the rows of the table; what differs goes to `wrong`.
fn compare(case: &Case, major: u32, seen: &Seen, watcher: &Watcher, wrong: &mut Vec<String>) {
    for (on, relation) in &case.roles {
        let says = case.lock(*on, major);
        let is = seen.mode(relation);
        if is != says.map(StatementLock::mode) {
            let says = says.map(StatementLock::mode);
            wrong.push(format!(
                "{}: {relation} ({on}) locked {is:?}, not {says:?}",
                case.sql
            ));
        }
        let is = watcher.work(relation, seen);
        let says = says.map(StatementLock::work);
        let fits = match (says, is) {
            (None, _) | (_, None) => true,
            (Some(TableWork::Rows), is) => is != Some(TableWork::Rewrite),
            (says, is) => says == is,
        };
        if !fits {
            wrong.push(format!(
                "{}: {relation} ({on}) {is:?}, not {says:?}",
                case.sql
            ));
        }
    }
    for relation in seen.relations() {
        let known = case.roles.iter().any(|(_, name)| name == relation);
        // Indexes are locked by nearly everything that plans a query; the rows name those that matter.
        if !known && !matches!(watcher.kind(relation), "i" | "I") {
            wrong.push(format!(
                "{}: {relation} is locked {:?}, no row says so",
                case.sql,
                seen.mode(relation)
            ));
        }
    }
}

/// The same for the lock on the row 1, where the statement works on rows.
async fn compare_rows(
    case: &Case,
    major: u32,
    prober: &Client,
    watcher: &Watcher,
    wrong: &mut Vec<String>,
) {
    for (on, relation) in &case.roles {
        let Some(says) = case.lock(*on, major) else {
            continue;
        };
        if says.work() != TableWork::Rows || watcher.kind(relation) != "r" {
            assert_eq!(says.row_lock(), None, "{says}: its rows are not probed");
            continue;
        }
        let is = row_lock_on(prober, relation).await;
        if is != says.row_lock() {
            let says = says.row_lock();
            wrong.push(format!(
                "{}: the row of {relation} ({on}) is locked {is:?}, not {says:?}",
                case.sql
            ));
        }
    }
}

/// What is documented for all statements together, and in notes.
#[tokio::test]
async fn what_the_notes_say() {
    use LockMode::{AccessExclusive, AccessShare, RowExclusive, ShareUpdateExclusive};
    let database = Server::shared().database().await;
    scene(&database).await;
    let (client, prober) = (database.connect().await, database.connect().await);
    let watcher = Watcher::new(&database).await;
    for (sql, relation, mode) in [
        // Down to partitions and children, in the mode of the parent.
        ("SELECT FROM parted", "parted_1", Some(AccessShare)),
        ("UPDATE parted SET n = 2", "parted_1", Some(RowExclusive)),
        ("TRUNCATE parted", "parted_1", Some(AccessExclusive)),
        (
            "ALTER TABLE parted ADD COLUMN added int",
            "parted_1",
            Some(AccessExclusive),
        ),
        (
            "ALTER TABLE parted ALTER COLUMN n SET STATISTICS 200",
            "parted_1",
            Some(ShareUpdateExclusive),
        ),
        (
            "CREATE TRIGGER made AFTER INSERT ON parted FOR EACH ROW EXECUTE FUNCTION on_row()",
            "parted_1",
            Some(LockMode::ShareRowExclusive),
        ),
        ("ANALYZE parted", "parted_1", Some(ShareUpdateExclusive)),
        ("SELECT FROM base", "derived", Some(AccessShare)),
        (
            "ALTER TABLE base ADD COLUMN added int",
            "derived",
            Some(AccessExclusive),
        ),
        ("LOCK TABLE ONLY parted", "parted_1", None),
        // The strongest of several forms.
        (
            "ALTER TABLE plain ALTER COLUMN n SET STATISTICS 200, SET (fillfactor = 50)",
            "plain",
            Some(ShareUpdateExclusive),
        ),
        (
            "ALTER TABLE plain ALTER COLUMN n SET STATISTICS 200, ALTER COLUMN n SET DEFAULT 3",
            "plain",
            Some(AccessExclusive),
        ),
        // The forms of ALTER TABLE under other names.
        (
            "ALTER VIEW view SET SCHEMA other",
            "view",
            Some(AccessExclusive),
        ),
        (
            "ALTER MATERIALIZED VIEW stored SET SCHEMA other",
            "stored",
            Some(AccessExclusive),
        ),
        (
            "ALTER MATERIALIZED VIEW stored SET WITHOUT CLUSTER",
            "stored",
            Some(ShareUpdateExclusive),
        ),
        (
            "ALTER FOREIGN TABLE remote ADD COLUMN added int",
            "remote",
            Some(AccessExclusive),
        ),
        (
            "ALTER FOREIGN TABLE remote ALTER COLUMN id SET STATISTICS 5",
            "remote",
            Some(ShareUpdateExclusive),
        ),
        // The statement behind.
        ("EXPLAIN SELECT FROM plain", "plain", Some(AccessShare)),
        ("EXPLAIN DELETE FROM plain", "plain", Some(RowExclusive)),
        (
            "PREPARE reading AS SELECT FROM plain",
            "plain",
            Some(AccessShare),
        ),
        // Single notes.
        (
            "ALTER DOMAIN positive ADD CHECK (VALUE < 500) NOT VALID",
            "domained",
            None,
        ),
        (
            "CREATE RULE made AS ON DELETE TO plain DO ALSO DELETE FROM keyless",
            "keyless",
            Some(RowExclusive),
        ),
        (
            "LOCK TABLE view IN SHARE MODE",
            "viewed",
            Some(LockMode::Share),
        ),
        (
            "ALTER TABLE plain RESET (user_catalog_table)",
            "plain",
            Some(AccessExclusive),
        ),
        ("INSERT INTO parted VALUES (1)", "parted_default", None),
    ] {
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute(sql).await.unwrap();
        let mut seen = Seen::default();
        watcher.see_locks(pid_of(&client).await, &mut seen).await;
        assert_eq!(seen.mode(relation), mode, "{sql}: {relation}");
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    // FOR UPDATE when it sets a column of the key.
    let sql = "BEGIN; INSERT INTO parent (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET id = 1000";
    client.batch_execute(sql).await.unwrap();
    assert_eq!(row_lock_on(&prober, "parent").await, Some(RowLock::Update));
    client.batch_execute("ROLLBACK").await.unwrap();
}

/// Roles by their names in the files of cases.
fn role(name: &str) -> LockedRelation {
    StatementLock::all()
        .map(StatementLock::on)
        .find(|on| format!("{on:?}") == name)
        .unwrap_or_else(|| panic!("no row is about a {name}"))
}
