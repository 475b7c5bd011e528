//! All statements except ALTER.

use super::cursor::Cursor;
use super::{Action, Placement, Target};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::statements::LockedRelation;

type Read = (Placement, Option<Vec<Action>>);

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
            (Placement::InTransaction, all("ANALYZE", cursor.names()))
        }
        "refresh" => {
            cursor.eat(&["materialized", "view"]);
            let name = if cursor.eat(&["concurrently"]) {
                "REFRESH MATERIALIZED VIEW CONCURRENTLY"
            } else {
                "REFRESH MATERIALIZED VIEW"
            };
            (Placement::InTransaction, one(name, cursor.name()))
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
            (Placement::InTransaction, all(name, names))
        }
        "lock" => (Placement::InTransaction, lock(cursor)),
        "comment" => (Placement::InTransaction, comment(cursor)),
        "insert" => {
            cursor.eat(&["into"]);
            (Placement::InTransaction, one("INSERT", cursor.name()))
        }
        "update" => {
            cursor.eat(&["only"]);
            (Placement::InTransaction, one("UPDATE", cursor.name()))
        }
        "delete" => {
            cursor.eat(&["from"]);
            cursor.eat(&["only"]);
            (Placement::InTransaction, one("DELETE", cursor.name()))
        }
        "begin" | "commit" | "rollback" | "abort" | "end" | "savepoint" | "release" | "start"
        | "prepare" => (Placement::TransactionControl, Some(Vec::new())),
        "set" => (setting(cursor), Some(Vec::new())),
        "reset" | "discard" | "listen" => (Placement::SessionSetting, Some(Vec::new())),
        "show" | "grant" | "revoke" | "notify" | "security" | "reassign" => {
            (Placement::InTransaction, Some(Vec::new()))
        }
        _ => (Placement::InTransaction, None),
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
    let nothing = (Placement::InTransaction, Some(Vec::new()));
    match cursor.word() {
        "table" => {
            cursor.skip(1);
            (Placement::InTransaction, create_table(cursor))
        }
        "temporary" | "temp" | "global" | "local" => nothing,
        "view" | "recursive" => {
            cursor.eat(&["recursive"]);
            cursor.eat(&["view"]);
            (
                Placement::InTransaction,
                one("CREATE OR REPLACE VIEW", cursor.name()),
            )
        }
        "trigger" => (Placement::InTransaction, on_table("CREATE TRIGGER", cursor)),
        "constraint" => (
            Placement::InTransaction,
            on_table("CREATE CONSTRAINT TRIGGER … FROM", cursor),
        ),
        "rule" => {
            cursor.seek(&["to"]);
            (Placement::InTransaction, one("CREATE RULE", cursor.name()))
        }
        "policy" => (Placement::InTransaction, on_table("CREATE POLICY", cursor)),
        "statistics" => {
            cursor.seek(&["from"]);
            (
                Placement::InTransaction,
                one("CREATE STATISTICS", cursor.name()),
            )
        }
        "database" | "tablespace" | "subscription" => {
            (Placement::OutsideTransaction, Some(Vec::new()))
        }
        "schema" | "role" | "user" | "function" | "procedure" | "type" | "domain" | "sequence"
        | "extension" | "materialized" | "aggregate" | "operator" | "cast" | "collation"
        | "server" | "foreign" | "publication" | "event" | "language" | "text" => nothing,
        _ if unlogged => nothing,
        _ => (Placement::InTransaction, None),
    }
}

fn on_table(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.seek(&["on"]).then_some(())?;
    one(name, cursor.name())
}

fn create_index(mut cursor: Cursor<'_>) -> Read {
    let concurrently = cursor.eat(&["concurrently"]);
    let (placement, name) = if concurrently {
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
            let schema = cursor.identifier().map(|schema| Action {
                target: Target::Schema(schema),
                ..Action::new("DROP SCHEMA … CASCADE", None)
            });
            return (Placement::InTransaction, schema.map(|action| vec![action]));
        }
        "trigger" => return (Placement::InTransaction, on_table("DROP TRIGGER", cursor)),
        "rule" => return (Placement::InTransaction, on_table("DROP RULE", cursor)),
        "policy" => return (Placement::InTransaction, on_table("DROP POLICY", cursor)),
        "database" | "tablespace" | "subscription" => {
            return (Placement::OutsideTransaction, Some(Vec::new()));
        }
        // With CASCADE, any dependent relation can be dropped, too.
        "schema" | "role" | "user" | "function" | "procedure" | "type" | "domain" | "extension"
        | "publication" | "server" | "aggregate"
            if !cascade =>
        {
            return (Placement::InTransaction, Some(Vec::new()));
        }
        _ => return (Placement::InTransaction, None),
    };
    (Placement::InTransaction, all(name, cursor.names()))
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
            return (
                Placement::InTransaction,
                one("REINDEX INDEX", cursor.name()),
            );
        }
        ("table", false) => {
            return (
                Placement::InTransaction,
                one("REINDEX TABLE", cursor.name()),
            );
        }
        ("schema", false) => {
            let schema = cursor.identifier().map(|schema| Action {
                target: Target::Schema(schema),
                ..Action::new("REINDEX SCHEMA", None)
            });
            return (
                Placement::OutsideTransaction,
                schema.map(|action| vec![action]),
            );
        }
        (_, true) => return (Placement::Concurrently, None),
        _ => return (Placement::OutsideTransaction, None),
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
        return (
            Placement::OutsideTransaction,
            Some(vec![Action::new(name, None)]),
        );
    }
    (Placement::OutsideTransaction, all(name, names))
}

fn cluster(mut cursor: Cursor<'_>) -> Read {
    if cursor.group().is_none() {
        cursor.eat(&["verbose"]);
    }
    match cursor.name() {
        Some(table) => (Placement::InTransaction, one("CLUSTER", Some(table))),
        None => (
            Placement::OutsideTransaction,
            Some(vec![Action::new("CLUSTER (all)", None)]),
        ),
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
        Some(Vec::new())
    }
}
