//! CREATE.

use super::alter::published;
use super::cursor::Cursor;
use super::other::{NOTHING, Read, in_transaction, one, outside_transaction, query};
use super::{Action, Effect, Placement};
use crate::postgres::TableName;
use crate::schema::statements::LockedRelation;

pub(super) fn read(mut cursor: Cursor<'_>) -> Read {
    cursor.eat(&["or", "replace"]);
    let unlogged = cursor.eat(&["unlogged"]);
    if cursor.eat(&["unique", "index"]) || cursor.eat(&["index"]) {
        return create_index(cursor);
    }
    cursor.one_of(&["global", "local"]);
    cursor.one_of(&["temporary", "temp"]);
    if cursor.eat(&["table"]) || cursor.eat(&["foreign", "table"]) {
        return in_transaction(create_table(cursor));
    }
    if cursor.eat(&["materialized", "view"]) {
        cursor.eat(&["if", "not", "exists"]);
        return in_transaction(created(cursor, 'm'));
    }
    let nothing = in_transaction(NOTHING);
    match cursor.word() {
        "sequence" => {
            cursor.skip(1);
            cursor.eat(&["if", "not", "exists"]);
            in_transaction(created(cursor, 'S'))
        }
        "view" | "recursive" => {
            cursor.eat(&["recursive"]);
            cursor.eat(&["view"]);
            in_transaction(create_view(cursor))
        }
        "trigger" => in_transaction(trigger("CREATE TRIGGER", cursor)),
        "constraint" => in_transaction(trigger("CREATE CONSTRAINT TRIGGER … FROM", cursor)),
        "rule" => {
            cursor.seek(&["to"]);
            in_transaction(one("CREATE RULE", cursor.name()))
        }
        "policy" => in_transaction(on_table("CREATE POLICY", cursor)),
        "statistics" => {
            cursor.seek(&["from"]);
            in_transaction(one("CREATE STATISTICS", cursor.name()))
        }
        "publication" => in_transaction(publication(cursor)),
        "schema" => {
            // The elements are statements.
            let mut rest = cursor;
            rest.skip(1);
            in_transaction(if rest.has(&["create"]) || rest.has(&["grant"]) {
                None
            } else {
                NOTHING
            })
        }
        "database" | "tablespace" | "subscription" => outside_transaction(NOTHING),
        "role" | "user" | "function" | "procedure" | "type" | "domain" | "extension"
        | "aggregate" | "operator" | "cast" | "collation" | "server" | "foreign" | "event"
        | "language" | "text" | "conversion" | "default" | "access" | "transform" | "group"
        | "trusted" | "procedural" => nothing,
        _ if unlogged => nothing,
        _ => in_transaction(None),
    }
}

/// Reads the name of something new.
fn created(mut cursor: Cursor<'_>, kind: char) -> Option<Vec<Action>> {
    let name = cursor.name()?;
    let action = Action::new("CREATE TABLE AS", None);
    let mut actions = vec![action.then(Effect::Create(name, kind))];
    if kind == 'm' {
        actions.extend(query("SELECT", &cursor)?);
    }
    Some(actions)
}

fn create_view(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let name = cursor.name()?;
    let action = Action::new("CREATE OR REPLACE VIEW", name.clone());
    Some(vec![action.then(Effect::Create(name, 'v'))])
}

fn on_table(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.seek(&["on"]).then_some(())?;
    one(name, cursor.name())
}

fn trigger(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    // The name of the trigger can be a keyword; so can that of a column behind OF.
    cursor.skip(2);
    cursor.seek(&["on"]).then_some(())?;
    let table = cursor.name()?;
    let each_row = cursor.has(&["for", "each", "row"]) || cursor.has(&["for", "row"]);
    // A trigger for each statement is not one of the partitions.
    Some(vec![Action::new(name, table).only(!each_row)])
}

fn publication(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.skip(1);
    cursor.identifier()?;
    if !cursor.eat(&["for"]) {
        return NOTHING;
    }
    if cursor.sees(&["all"]) {
        return NOTHING;
    }
    // WITH follows in the last part, after the name.
    published("CREATE PUBLICATION … FOR TABLE", cursor)
}

fn create_index(mut cursor: Cursor<'_>) -> Read {
    let (placement, name) = if cursor.eat(&["concurrently"]) {
        (Placement::Concurrently, "CREATE INDEX CONCURRENTLY")
    } else {
        (Placement::InTransaction, "CREATE INDEX")
    };
    cursor.eat(&["if", "not", "exists"]);
    let index = if cursor.sees(&["on"]) {
        None
    } else {
        cursor.identifier()
    };
    if !cursor.eat(&["on"]) {
        return (placement, None);
    }
    let Some((table, only)) = cursor.relation() else {
        return (placement, None);
    };
    let name = match name {
        "CREATE INDEX" if only => "CREATE INDEX … ON ONLY",
        name => name,
    };
    let mut action = Action::new(name, table.clone()).only(only);
    if let Some(index) = index {
        let index = match table.schema() {
            Some(schema) => TableName::in_schema(schema, index),
            None => TableName::new(index),
        };
        action.effect = Effect::Create(index, 'i');
    }
    (placement, Some(vec![action]))
}

fn create_table(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["if", "not", "exists"]);
    let name = cursor.name()?;
    let mut kind = if cursor.has(&["partition", "by"]) {
        'p'
    } else {
        'r'
    };
    if cursor.has(&["server"]) {
        kind = 'f';
    }
    let new = Action::new("CREATE TABLE AS", None).then(Effect::Create(name.clone(), kind));
    let mut actions = vec![new];
    if cursor.eat(&["partition", "of"]) {
        let parent = cursor.name()?;
        let action = Action::new("CREATE TABLE … PARTITION OF", parent);
        actions.push(action.with(LockedRelation::Partition, name));
        return Some(actions);
    }
    if cursor.eat(&["of"]) {
        cursor.name()?;
    }
    if let Some(mut columns) = cursor.group() {
        while !columns.is_at_end() {
            let mut part = columns.until_comma();
            if part.eat(&["like"]) {
                let source = Action::new("CREATE TABLE … LIKE", None);
                actions.push(source.with(LockedRelation::Source, part.name()));
            }
            while part.seek(&["references"]) {
                let action = Action::new("CREATE TABLE … REFERENCES", None);
                let action = action.with(LockedRelation::Referenced, part.name());
                actions.push(action.with(LockedRelation::Table, name.clone()));
            }
        }
    }
    if cursor.seek(&["as"]) {
        // The rows of a prepared statement are not known.
        (!cursor.sees(&["execute"])).then_some(())?;
        actions.extend(query("SELECT", &cursor)?);
        return Some(actions);
    }
    if cursor.eat(&["inherits"]) {
        for parent in cursor.group()?.names()? {
            let action = Action::new("CREATE TABLE … INHERITS", None);
            let action = action.with(LockedRelation::Parent, parent);
            actions.push(action.with(LockedRelation::Table, name.clone()));
        }
    }
    Some(actions)
}
