//! All statements except ALTER.

use super::cursor::Cursor;
use super::{Action, Placement, Target};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::statements::LockedRelation;

type Read = (Placement, Option<Vec<Action>>);

/// The statement locks nothing that the plan is about.
const NOTHING: Option<Vec<Action>> = Some(Vec::new());

fn in_transaction(actions: Option<Vec<Action>>) -> Read {
    (Placement::InTransaction, actions)
}

fn outside_transaction(actions: Option<Vec<Action>>) -> Read {
    (Placement::OutsideTransaction, actions)
}

/// Reads a whole statement.
pub(super) fn read(mut cursor: Cursor<'_>) -> Read {
    let word = cursor.word().to_owned();
    cursor.skip(1);
    match word.as_str() {
        "create" => create(cursor),
        "drop" => drop_statement(cursor),
        "reindex" => reindex(cursor),
        "vacuum" => vacuum(cursor),
        "cluster" => cluster(cursor),
        "analyze" | "analyse" => {
            let in_parentheses = cursor.group().is_some();
            if !in_parentheses {
                cursor.eat(&["verbose"]);
            }
            in_transaction(all("ANALYZE", cursor.names()))
        }
        "refresh" => {
            cursor.eat(&["materialized", "view"]);
            let name = if cursor.eat(&["concurrently"]) {
                "REFRESH MATERIALIZED VIEW CONCURRENTLY"
            } else {
                "REFRESH MATERIALIZED VIEW"
            };
            in_transaction(one(name, cursor.name()))
        }
        "truncate" => {
            cursor.eat(&["table"]);
            cursor.eat(&["only"]);
            let names = cursor.names();
            let name = if cursor.has(&["cascade"]) {
                "TRUNCATE … CASCADE"
            } else {
                "TRUNCATE"
            };
            in_transaction(all(name, names))
        }
        "lock" => in_transaction(lock(cursor)),
        "comment" => in_transaction(comment(cursor)),
        "insert" => {
            cursor.eat(&["into"]);
            in_transaction(one("INSERT", cursor.name()))
        }
        "update" => {
            cursor.eat(&["only"]);
            in_transaction(one("UPDATE", cursor.name()))
        }
        "delete" => {
            cursor.eat(&["from"]);
            cursor.eat(&["only"]);
            in_transaction(one("DELETE", cursor.name()))
        }
        "begin" | "commit" | "rollback" | "abort" | "end" | "savepoint" | "release" | "start"
        | "prepare" => (Placement::TransactionControl, NOTHING),
        "set" => (setting(cursor), NOTHING),
        "reset" | "discard" | "listen" => (Placement::SessionSetting, NOTHING),
        "show" | "grant" | "revoke" | "notify" | "security" | "reassign" => in_transaction(NOTHING),
        _ => in_transaction(None),
    }
}

fn setting(mut cursor: Cursor<'_>) -> Placement {
    if cursor.sees(&["constraints"]) || cursor.sees(&["transaction"]) {
        return Placement::InTransaction;
    }
    if !cursor.eat(&["local"]) {
        return Placement::SessionSetting;
    }
    // Setting names are case-insensitive, even in quotes. A name in U&"…" is not decoded.
    match cursor.identifier() {
        Some(name) if name.eq_ignore_ascii_case("lock_timeout") => Placement::SessionSetting,
        Some(name) if name == "u" && cursor.sees_symbol('&') => Placement::SessionSetting,
        Some(_) => Placement::InTransaction,
        None => Placement::SessionSetting,
    }
}

fn one(name: &'static str, target: Option<TableName>) -> Option<Vec<Action>> {
    Some(vec![Action::new(name, target?)])
}

fn all(name: &'static str, targets: Vec<TableName>) -> Option<Vec<Action>> {
    let actions = targets.into_iter().map(|target| Action::new(name, target));
    Some(actions.collect())
}

fn create(mut cursor: Cursor<'_>) -> Read {
    cursor.eat(&["or", "replace"]);
    let unlogged = cursor.eat(&["unlogged"]);
    if cursor.eat(&["unique", "index"]) || cursor.eat(&["index"]) {
        return create_index(cursor);
    }
    let nothing = in_transaction(NOTHING);
    match cursor.word() {
        "table" => {
            cursor.skip(1);
            in_transaction(create_table(cursor))
        }
        "temporary" | "temp" | "global" | "local" => nothing,
        "view" | "recursive" => {
            cursor.eat(&["recursive"]);
            cursor.eat(&["view"]);
            in_transaction(one("CREATE OR REPLACE VIEW", cursor.name()))
        }
        "trigger" => in_transaction(on_table("CREATE TRIGGER", cursor)),
        "constraint" => in_transaction(on_table("CREATE CONSTRAINT TRIGGER … FROM", cursor)),
        "rule" => {
            cursor.seek(&["to"]);
            in_transaction(one("CREATE RULE", cursor.name()))
        }
        "policy" => in_transaction(on_table("CREATE POLICY", cursor)),
        "statistics" => {
            cursor.seek(&["from"]);
            in_transaction(one("CREATE STATISTICS", cursor.name()))
        }
        "database" | "tablespace" | "subscription" => outside_transaction(NOTHING),
        "schema" | "role" | "user" | "function" | "procedure" | "type" | "domain" | "sequence"
        | "extension" | "materialized" | "aggregate" | "operator" | "cast" | "collation"
        | "server" | "foreign" | "publication" | "event" | "language" | "text" => nothing,
        _ if unlogged => nothing,
        _ => in_transaction(None),
    }
}

fn on_table(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.seek(&["on"]).then_some(())?;
    one(name, cursor.name())
}

fn of_schema(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    Some(vec![Action {
        target: Target::Schema(cursor.identifier()?),
        ..Action::new(name, None)
    }])
}

fn create_index(mut cursor: Cursor<'_>) -> Read {
    let (placement, name) = if cursor.eat(&["concurrently"]) {
        (Placement::Concurrently, "CREATE INDEX CONCURRENTLY")
    } else {
        (Placement::InTransaction, "CREATE INDEX")
    };
    if !cursor.seek(&["on"]) {
        return (placement, None);
    }
    let name = match name {
        "CREATE INDEX" if cursor.eat(&["only"]) => "CREATE INDEX … ON ONLY",
        name => name,
    };
    (placement, one(name, cursor.name()))
}

fn create_table(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["if", "not", "exists"]);
    cursor.name()?;
    let mut actions = Vec::new();
    if cursor.eat(&["partition", "of"]) {
        actions.push(Action::new("CREATE TABLE … PARTITION OF", cursor.name()?));
        return Some(actions);
    }
    if let Some(mut columns) = cursor.group() {
        while !columns.is_at_end() {
            let mut part = columns.until_comma();
            if part.eat(&["like"]) {
                let source = Action::new("CREATE TABLE … LIKE", None);
                actions.push(source.with(LockedRelation::Source, part.name()));
            } else if part.seek(&["references"]) {
                let action = Action::new("CREATE TABLE … REFERENCES", None);
                actions.push(action.with(LockedRelation::Referenced, part.name()));
            }
        }
    }
    if cursor.eat(&["inherits"]) {
        for parent in cursor.group()?.names() {
            let action = Action::new("CREATE TABLE … INHERITS", None);
            actions.push(action.with(LockedRelation::Parent, parent));
        }
    }
    Some(actions)
}

fn drop_statement(mut cursor: Cursor<'_>) -> Read {
    let word = cursor.word().to_owned();
    cursor.skip(1);
    if word == "materialized" {
        cursor.eat(&["view"]);
    }
    let concurrently = word == "index" && cursor.eat(&["concurrently"]);
    cursor.eat(&["if", "exists"]);
    let cascade = cursor.has(&["cascade"]);
    let name = match word.as_str() {
        "index" if concurrently => {
            let names = all("DROP INDEX CONCURRENTLY", cursor.names());
            return (Placement::Concurrently, names);
        }
        "index" => "DROP INDEX",
        "table" if cascade => "DROP TABLE … CASCADE",
        "table" => "DROP TABLE",
        "view" => "DROP VIEW",
        "materialized" => "DROP MATERIALIZED VIEW",
        "sequence" => "DROP SEQUENCE",
        "schema" if cascade => {
            return in_transaction(of_schema("DROP SCHEMA … CASCADE", cursor));
        }
        "trigger" => return in_transaction(on_table("DROP TRIGGER", cursor)),
        "rule" => return in_transaction(on_table("DROP RULE", cursor)),
        "policy" => return in_transaction(on_table("DROP POLICY", cursor)),
        "database" | "tablespace" | "subscription" => {
            return outside_transaction(NOTHING);
        }
        // With CASCADE, any dependent relation can be dropped, too.
        "schema" | "role" | "user" | "function" | "procedure" | "type" | "domain" | "extension"
        | "publication" | "server" | "aggregate"
            if !cascade =>
        {
            return in_transaction(NOTHING);
        }
        _ => return in_transaction(None),
    };
    in_transaction(all(name, cursor.names()))
}

fn reindex(mut cursor: Cursor<'_>) -> Read {
    let options = cursor.group();
    let mut concurrently = options.is_some_and(|options| options.has(&["concurrently"]));
    let what = cursor.word().to_owned();
    cursor.skip(1);
    concurrently |= cursor.eat(&["concurrently"]);
    let name = match (what.as_str(), concurrently) {
        ("index", true) => "REINDEX INDEX CONCURRENTLY",
        ("table", true) => "REINDEX TABLE CONCURRENTLY",
        ("index", false) => {
            return in_transaction(one("REINDEX INDEX", cursor.name()));
        }
        ("table", false) => {
            return in_transaction(one("REINDEX TABLE", cursor.name()));
        }
        ("schema", false) => {
            return outside_transaction(of_schema("REINDEX SCHEMA", cursor));
        }
        (_, true) => return (Placement::Concurrently, None),
        _ => return outside_transaction(None),
    };
    (Placement::Concurrently, one(name, cursor.name()))
}

fn vacuum(mut cursor: Cursor<'_>) -> Read {
    let mut full = false;
    if let Some(mut options) = cursor.group() {
        while !options.is_at_end() {
            let part = options.until_comma();
            let off = ["off", "false", "no"].contains(&part.word_at(1));
            full |= part.word() == "full" && !off;
        }
    } else {
        full = cursor.eat(&["full"]);
        while ["freeze", "verbose", "analyze"].contains(&cursor.word()) {
            cursor.skip(1);
        }
    }
    let names = cursor.names();
    let name = if full { "VACUUM FULL" } else { "VACUUM" };
    if names.is_empty() {
        // Every table of the database.
        return outside_transaction(Some(vec![Action::new(name, None)]));
    }
    outside_transaction(all(name, names))
}

fn cluster(mut cursor: Cursor<'_>) -> Read {
    if cursor.group().is_none() {
        cursor.eat(&["verbose"]);
    }
    match cursor.name() {
        Some(table) => in_transaction(one("CLUSTER", Some(table))),
        None => outside_transaction(Some(vec![Action::new("CLUSTER (all)", None)])),
    }
}

fn lock(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["table"]);
    cursor.eat(&["only"]);
    let names = cursor.names();
    let mode = if cursor.eat(&["in"]) {
        Some(cursor.text_until(&["mode"]).parse::<LockMode>().ok()?)
    } else {
        None
    };
    let mut actions = all("LOCK TABLE", names)?;
    for action in &mut actions {
        action.mode = mode;
    }
    Some(actions)
}

fn comment(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["on"]);
    if cursor.eat(&["table"]) {
        one("COMMENT ON TABLE", cursor.name())
    } else if cursor.eat(&["index"]) {
        one("COMMENT ON INDEX", cursor.name())
    } else if cursor.eat(&["column"]) {
        // The last part is the column's name.
        let mut parts = vec![cursor.identifier()?];
        while cursor.eat_symbol('.') {
            parts.push(cursor.identifier()?);
        }
        parts.pop();
        let table = parts.pop()?;
        let table = match parts.pop() {
            Some(schema) => TableName::in_schema(schema, table),
            None => TableName::new(table),
        };
        one("COMMENT ON COLUMN", Some(table))
    } else {
        NOTHING
    }
}
