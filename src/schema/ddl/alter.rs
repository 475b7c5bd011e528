//! ALTER, except the forms of ALTER TABLE.

use super::cursor::Cursor;
use super::table_action::{self, Kind};
use super::{Action, Dropped, Effect, Placement, Target, excerpt};
use crate::mode::LockMode;

type Read = (Placement, Option<Vec<Action>>, Option<String>);

fn in_transaction(actions: Option<Vec<Action>>) -> Read {
    (Placement::InTransaction, actions, None)
}

/// Reads the statement after ALTER.
pub(super) fn read(mut cursor: Cursor<'_>) -> Read {
    if cursor.eat(&["system"]) {
        return (Placement::OutsideTransaction, Some(Vec::new()), None);
    }
    let kind = if cursor.eat(&["index"]) {
        Kind::Index
    } else if cursor.eat(&["view"]) {
        Kind::View
    } else if cursor.eat(&["materialized", "view"])
        || cursor.eat(&["table"])
        || cursor.eat(&["foreign", "table"])
    {
        Kind::Table
    } else {
        return in_transaction(other_object(cursor));
    };
    if cursor.sees(&["all", "in"]) {
        return in_transaction(None);
    }
    cursor.eat(&["if", "exists"]);
    let Some((table, only)) = cursor.relation() else {
        return in_transaction(None);
    };
    let mut placement = Placement::InTransaction;
    let mut actions = Vec::new();
    let mut unknown = None;
    if cursor.is_at_end() {
        return in_transaction(None);
    }
    while !cursor.is_at_end() {
        let part = cursor.until_comma();
        if part.has(&["detach"]) && part.has(&["concurrently"]) {
            placement = Placement::Detach;
        }
        match table_action::read(part.clone(), &table, kind) {
            Some(read) => actions.extend(read.into_iter().map(|one| {
                let only = only || one.only;
                one.only(only)
            })),
            None => unknown = Some(excerpt(part.rest())),
        }
    }
    table_action::together(&mut actions);
    (placement, Some(actions), unknown)
}

/// Reads an ALTER of an object that is not a relation, or that has statement names of its own.
fn other_object(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let word = cursor.word().to_owned();
    cursor.skip(1);
    let of_table = match word.as_str() {
        "sequence" => return sequence(cursor),
        "type" => return type_(cursor),
        "domain" => return domain(cursor),
        "publication" => return publication(cursor),
        "extension" => return extension(cursor),
        "trigger" => "ALTER TRIGGER … RENAME",
        "rule" => "ALTER RULE … RENAME",
        "policy" => "ALTER POLICY",
        "event" | "access" | "large" | "materialized" => return Some(Vec::new()),
        "text" if cursor.eat(&["search"]) => return Some(Vec::new()),
        // An object of its own, on which the server takes no lock of a relation.
        "statistics" => return Some(Vec::new()),
        "foreign" if cursor.sees(&["data"]) => return Some(Vec::new()),
        // These objects are not relations, and altering them locks none.
        "role" | "user" | "database" | "function" | "procedure" | "routine" | "aggregate"
        | "schema" | "default" | "collation" | "operator" | "server" | "subscription" | "group"
        | "language" | "conversion" | "tablespace" => {
            return Some(Vec::new());
        }
        _ => return None,
    };
    cursor.seek(&["on"]).then_some(())?;
    let (table, _) = cursor.relation()?;
    Some(vec![Action::new(of_table, table)])
}

fn sequence(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["if", "exists"]);
    let name = cursor.name()?;
    let one = |statement| Some(vec![Action::new(statement, name.clone())]);
    match (cursor.word(), cursor.word_at(1)) {
        ("rename", _) => {
            cursor.eat(&["rename", "to"]);
            let new = cursor.identifier()?;
            let action = Action::new("ALTER SEQUENCE … RENAME", name);
            Some(vec![action.then(Effect::Rename(new))])
        }
        ("owner", _) => one("ALTER SEQUENCE … OWNER TO"),
        ("set", "schema") => {
            cursor.skip(2);
            let schema = cursor.identifier()?;
            let action = Action::new("ALTER SEQUENCE … SET SCHEMA", name);
            Some(vec![action.then(Effect::SetSchema(schema))])
        }
        ("set", "logged" | "unlogged") => one("ALTER SEQUENCE … SET UNLOGGED"),
        _ => one("ALTER SEQUENCE"),
    }
}

fn type_(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let name = cursor.name()?;
    let on = |statement, cascade| {
        let mut action = Action::on(statement, Target::Type(name.clone(), cascade));
        action.mode = Some(LockMode::AccessExclusive);
        action
    };
    // A composite type has a relation, too, which is locked.
    let mut actions = Vec::new();
    while !cursor.is_at_end() {
        let part = cursor.until_comma();
        let cascade = part.has(&["cascade"]);
        let action = match (part.word(), part.word_at(1)) {
            ("add", "value") | ("rename", "value") => return Some(Vec::new()),
            ("set", "schema") | ("owner", _) | ("rename", "to") => {
                on("ALTER TYPE … RENAME ATTRIBUTE … CASCADE", false)
            }
            ("set", _) => return Some(Vec::new()),
            ("add", "attribute") => on("ALTER TYPE … ADD ATTRIBUTE … CASCADE", cascade),
            ("drop", "attribute") => {
                let mut part = part;
                part.skip(2);
                part.eat(&["if", "exists"]);
                let dropped = Dropped::Column(name.clone(), part.identifier()?);
                let name = "ALTER TYPE … DROP ATTRIBUTE … CASCADE";
                actions.push(Action::on(name, Target::Dropped(dropped)));
                on(name, cascade)
            }
            ("alter", "attribute") => on("ALTER TYPE … ALTER ATTRIBUTE … CASCADE", cascade),
            ("rename", "attribute") => on("ALTER TYPE … RENAME ATTRIBUTE … CASCADE", cascade),
            _ => return None,
        };
        actions.push(action);
    }
    (!actions.is_empty()).then_some(actions)
}

fn domain(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let name = cursor.name()?;
    let statement = match (cursor.word(), cursor.word_at(1)) {
        ("add", _) if cursor.has(&["not", "valid"]) => return Some(Vec::new()),
        ("add", _) => "ALTER DOMAIN … ADD CONSTRAINT",
        ("validate", _) => "ALTER DOMAIN … VALIDATE CONSTRAINT",
        ("set", "not") => "ALTER DOMAIN … SET NOT NULL",
        ("set", "default" | "schema") | ("drop" | "rename" | "owner", _) => return Some(Vec::new()),
        _ => return None,
    };
    Some(vec![Action::on(statement, Target::Domain(name))])
}

fn publication(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let name = cursor.identifier()?;
    let statement = match cursor.word() {
        "add" => "ALTER PUBLICATION … ADD TABLE",
        "drop" => "ALTER PUBLICATION … DROP TABLE",
        "set" if cursor.word_at(1).is_empty() => return Some(Vec::new()),
        "set" => "ALTER PUBLICATION … SET TABLE",
        "owner" | "rename" => return Some(Vec::new()),
        _ => return None,
    };
    cursor.skip(1);
    let mut actions = published(statement, cursor)?;
    if statement.contains("SET") {
        // Those that go are locked, too.
        actions.push(Action::on(statement, Target::Publication(name)));
    }
    Some(actions)
}

/// Reads `TABLE a, ONLY b (…) WHERE (…), TABLES IN SCHEMA s`.
pub(super) fn published(statement: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let mut actions = Vec::new();
    let mut of_schemas = false;
    while !cursor.is_at_end() {
        let mut part = cursor.until_comma();
        if part.eat(&["tables", "in", "schema"]) || part.eat(&["all", "tables", "in", "schema"]) {
            of_schemas = true;
            continue;
        }
        if part.eat(&["table"]) {
            of_schemas = false;
        }
        if of_schemas {
            continue;
        }
        let (name, only) = part.relation()?;
        actions.push(Action::new(statement, name).only(only));
    }
    Some(actions)
}

fn extension(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.identifier()?;
    match (cursor.word(), cursor.word_at(1)) {
        // The script of an update can do anything.
        ("update", _) => None,
        ("add" | "drop", "table" | "view" | "sequence" | "materialized" | "foreign") => {
            cursor.skip(2);
            cursor.one_of(&["view", "table"]);
            Some(vec![Action::new(
                "ALTER EXTENSION … ADD TABLE",
                cursor.name()?,
            )])
        }
        ("set", "schema") => None,
        _ => Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use super::*;
    use crate::postgres::TableName;

    #[test]
    fn objects_without_relations_lock_nothing_and_scripts_are_not_understood() {
        for sql in [
            "ALTER ROLE r SUPERUSER",
            "ALTER TYPE e ADD VALUE 'x'",
            "ALTER DOMAIN d DROP CONSTRAINT c",
            "ALTER DOMAIN d ADD CONSTRAINT c CHECK (true) NOT VALID",
            "ALTER PUBLICATION p OWNER TO r",
        ] {
            let read = &read(sql)[0];
            assert_eq!(read.actions, Some(Vec::new()), "{sql}");
        }
        for sql in [
            "ALTER EXTENSION e UPDATE",
            "ALTER TABLE ALL IN TABLESPACE a SET TABLESPACE b",
        ] {
            assert!(read(sql)[0].unknown.is_some(), "{sql}");
        }
    }

    #[test]
    fn tables_of_publications_are_read() {
        let sql = "ALTER PUBLICATION p ADD TABLE a (x, y) WHERE (x > 1), ONLY s.b, TABLES IN SCHEMA c, d, TABLE e";
        let actions = read(sql)[0].actions.clone().unwrap_or_default();
        let names: Vec<_> = (actions.iter())
            .map(|one| match &one.target {
                Target::Relation(name) => (name.to_string(), one.only),
                other => panic!("{other:?}"),
            })
            .collect();
        let expected = [(r#""a""#, false), (r#""s"."b""#, true), (r#""e""#, false)];
        assert_eq!(names, expected.map(|(name, only)| (name.to_owned(), only)));
        let name = TableName::new("a");
        assert_eq!(actions[0].target, Target::Relation(name));
    }
}
