//! ALTER.

use super::cursor::Cursor;
use super::{Action, CatalogCheck, Placement};
use crate::postgres::TableName;
use crate::schema::statements::LockedRelation;

/// Reads the statement after ALTER.
pub(super) fn read(mut cursor: Cursor<'_>) -> (Placement, Option<Vec<Action>>) {
    let mut placement = Placement::InTransaction;
    if cursor.eat(&["system"]) {
        return (Placement::OutsideTransaction, Some(Vec::new()));
    }
    let is_index = cursor.eat(&["index"]);
    let is_relation = is_index
        || cursor.eat(&["table"])
        || cursor.eat(&["foreign", "table"])
        || cursor.eat(&["materialized", "view"])
        || cursor.eat(&["view"]);
    if !is_relation {
        return (Placement::InTransaction, other_object(cursor));
    }
    if cursor.sees(&["all", "in"]) {
        return (Placement::InTransaction, None);
    }
    cursor.eat(&["if", "exists"]);
    cursor.eat(&["only"]);
    let Some(table) = cursor.name() else {
        return (Placement::InTransaction, None);
    };
    let mut actions = Vec::new();
    while !cursor.is_at_end() {
        let part = cursor.until_comma();
        if part.has(&["detach"]) && part.has(&["concurrently"]) {
            placement = Placement::Detach;
        }
        let read = if is_index {
            index_action(part, &table)
        } else {
            table_action(part, &table)
        };
        let Some(read) = read else {
            return (placement, None);
        };
        actions.extend(read);
    }
    (placement, Some(actions))
}

/// Reads an ALTER of an object that is not a relation, or that has statement names of its own.
fn other_object(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    if cursor.eat(&["sequence"]) {
        cursor.eat(&["if", "exists"]);
        let name = cursor.name()?;
        let statement = match cursor.word() {
            "rename" => "ALTER SEQUENCE … RENAME",
            "owner" => "ALTER SEQUENCE … OWNER TO",
            "set" if cursor.word_at(1) == "schema" => "ALTER SEQUENCE … SET SCHEMA",
            _ => "ALTER SEQUENCE",
        };
        return Some(vec![Action::new(statement, name)]);
    }
    let of_table = match cursor.word() {
        "trigger" => "ALTER TRIGGER … RENAME",
        "rule" => "ALTER RULE … RENAME",
        "policy" => "ALTER POLICY",
        // These objects are not relations, and altering them locks none.
        "role" | "user" | "database" | "function" | "procedure" | "routine" | "aggregate"
        | "schema" | "default" | "extension" | "collation" | "operator" | "server"
        | "publication" | "subscription" | "group" | "language" | "conversion" => {
            return Some(Vec::new());
        }
        _ => return None,
    };
    cursor.seek(&["on"]).then_some(())?;
    Some(vec![Action::new(of_table, cursor.name()?)])
}

fn index_action(cursor: Cursor<'_>, index: &TableName) -> Option<Vec<Action>> {
    let name = match (cursor.word(), cursor.word_at(1)) {
        ("rename", _) => "ALTER INDEX … RENAME",
        ("reset", _) => "ALTER INDEX … RESET (…)",
        ("set", "tablespace") => "ALTER INDEX … SET TABLESPACE",
        ("set", _) => "ALTER INDEX … SET (…)",
        ("alter", _) => "ALTER INDEX … ALTER COLUMN … SET STATISTICS",
        ("attach", _) => "ALTER INDEX … ATTACH PARTITION",
        _ => return None,
    };
    Some(vec![Action::new(name, index.clone())])
}

fn table_action(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone());
    let one = |name| Some(vec![new(name)]);
    let with = |name, role, other| Some(vec![new(name).with(role, other)]);
    let word = cursor.word().to_owned();
    cursor.skip(1);
    match word.as_str() {
        "add" => add(cursor, table),
        "drop" => drop_part(cursor, table),
        "alter" => alter_part(cursor, table),
        "validate" => {
            cursor.eat(&["constraint"]);
            let name = cursor.identifier()?;
            let cascade = false;
            let action = new("ALTER TABLE … VALIDATE CONSTRAINT");
            Some(vec![
                action.checking(CatalogCheck::Constraint { name, cascade }),
            ])
        }
        "rename" => match cursor.word() {
            "to" => one("ALTER TABLE … RENAME"),
            "constraint" => one("ALTER TABLE … RENAME CONSTRAINT"),
            _ => one("ALTER TABLE … RENAME COLUMN"),
        },
        "attach" => {
            cursor.eat(&["partition"]);
            let name = "ALTER TABLE … ATTACH PARTITION";
            with(name, LockedRelation::Partition, cursor.name())
        }
        "detach" => {
            cursor.eat(&["partition"]);
            let partition = cursor.name();
            let name = match cursor.word() {
                "concurrently" => "ALTER TABLE … DETACH PARTITION CONCURRENTLY",
                "finalize" => "ALTER TABLE … DETACH PARTITION … FINALIZE",
                _ => "ALTER TABLE … DETACH PARTITION",
            };
            with(name, LockedRelation::Partition, partition)
        }
        "set" => match cursor.word() {
            "schema" => one("ALTER TABLE … SET SCHEMA"),
            "logged" => one("ALTER TABLE … SET LOGGED"),
            "unlogged" => one("ALTER TABLE … SET UNLOGGED"),
            "tablespace" => one("ALTER TABLE … SET TABLESPACE"),
            "access" => one("ALTER TABLE … SET ACCESS METHOD"),
            "without" if cursor.word_at(1) == "cluster" => one("ALTER TABLE … SET WITHOUT CLUSTER"),
            "without" => one("ALTER TABLE … SET WITHOUT OIDS"),
            "" => one("ALTER TABLE … SET (…)"),
            _ => None,
        },
        "reset" => one("ALTER TABLE … RESET (…)"),
        "cluster" => one("ALTER TABLE … CLUSTER ON"),
        "owner" => one("ALTER TABLE … OWNER TO"),
        "inherit" => {
            let name = "ALTER TABLE … INHERIT";
            with(name, LockedRelation::Parent, cursor.name())
        }
        "no" if cursor.eat(&["inherit"]) => {
            let name = "ALTER TABLE … NO INHERIT";
            with(name, LockedRelation::Parent, cursor.name())
        }
        "no" => one("ALTER TABLE … NO FORCE ROW LEVEL SECURITY"),
        "force" => one("ALTER TABLE … FORCE ROW LEVEL SECURITY"),
        "of" => one("ALTER TABLE … OF"),
        "not" => one("ALTER TABLE … NOT OF"),
        "replica" => one("ALTER TABLE … REPLICA IDENTITY"),
        "enable" | "disable" => {
            let last = [cursor.word(), cursor.word_at(1)];
            if last.contains(&"trigger") {
                one("ALTER TABLE … DISABLE TRIGGER")
            } else if last.contains(&"rule") {
                one("ALTER TABLE … DISABLE RULE")
            } else {
                one("ALTER TABLE … ENABLE ROW LEVEL SECURITY")
            }
        }
        _ => None,
    }
}

fn add(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let is_constraint = cursor.eat(&["constraint"]);
    if is_constraint {
        cursor.identifier()?;
    }
    if let Some(action) = constraint(&mut cursor, table) {
        return Some(vec![action]);
    }
    if is_constraint {
        return None;
    }
    cursor.eat(&["column"]);
    cursor.eat(&["if", "not", "exists"]);
    cursor.identifier()?;
    Some(column(cursor, table))
}

/// Reads a table constraint after its name.
fn constraint(cursor: &mut Cursor<'_>, table: &TableName) -> Option<Action> {
    let not_valid = cursor.has(&["not", "valid"]);
    let not_enforced = cursor.has(&["not", "enforced"]);
    let choose = |valid, not_valid_name, not_enforced_name| {
        if not_enforced {
            not_enforced_name
        } else if not_valid {
            not_valid_name
        } else {
            valid
        }
    };
    let new = |name| Action::new(name, table.clone());
    if cursor.sees(&["check"]) {
        Some(new(choose(
            "ALTER TABLE … ADD CHECK",
            "ALTER TABLE … ADD CHECK … NOT VALID",
            "ALTER TABLE … ADD CHECK … NOT ENFORCED",
        )))
    } else if cursor.sees(&["foreign", "key"]) {
        let name = choose(
            "ALTER TABLE … ADD FOREIGN KEY",
            "ALTER TABLE … ADD FOREIGN KEY … NOT VALID",
            "ALTER TABLE … ADD FOREIGN KEY … NOT ENFORCED",
        );
        let referenced = cursor.seek(&["references"]).then(|| cursor.name());
        Some(new(name).with(LockedRelation::Referenced, referenced.flatten()))
    } else if cursor.sees(&["not", "null"]) {
        Some(new(if not_valid {
            "ALTER TABLE … ADD NOT NULL … NOT VALID"
        } else {
            "ALTER TABLE … ADD NOT NULL"
        }))
    } else if cursor.sees(&["primary", "key"]) {
        if cursor.seek(&["using", "index"]) && !cursor.sees(&["tablespace"]) {
            let index = cursor.identifier()?;
            let action = new("ALTER TABLE … ADD PRIMARY KEY USING INDEX");
            Some(action.checking(CatalogCheck::UsingIndex { index }))
        } else {
            Some(new("ALTER TABLE … ADD PRIMARY KEY"))
        }
    } else if cursor.sees(&["unique"]) {
        let by_index = cursor.seek(&["using", "index"]) && !cursor.sees(&["tablespace"]);
        Some(new(if by_index {
            "ALTER TABLE … ADD UNIQUE USING INDEX"
        } else {
            "ALTER TABLE … ADD UNIQUE"
        }))
    } else if cursor.sees(&["exclude"]) {
        Some(new("ALTER TABLE … ADD EXCLUDE"))
    } else {
        None
    }
}

/// The keywords that can follow a column's type.
const AFTER_TYPE: &[&str] = &[
    "collate",
    "default",
    "not",
    "null",
    "constraint",
    "check",
    "unique",
    "primary",
    "references",
    "generated",
    "storage",
    "compression",
    "deferrable",
    "initially",
    "options",
    "using",
];

fn column(mut cursor: Cursor<'_>, table: &TableName) -> Vec<Action> {
    let new = |name| Action::new(name, table.clone());
    let ty = cursor.text_until(AFTER_TYPE).to_owned();
    let serial = [
        "serial",
        "bigserial",
        "smallserial",
        "serial2",
        "serial4",
        "serial8",
    ];
    let mut actions = Vec::new();
    let mut default = cursor.clone();
    if serial.contains(&ty.to_lowercase().as_str()) {
        actions.push(new("ALTER TABLE … ADD COLUMN (volatile default)"));
    } else if cursor.has(&["as", "identity"]) {
        actions.push(new("ALTER TABLE … ADD COLUMN … GENERATED … AS IDENTITY"));
    } else if cursor.has(&["generated"]) && cursor.has(&["stored"]) {
        actions.push(new("ALTER TABLE … ADD COLUMN … GENERATED … STORED"));
    } else if cursor.has(&["generated"]) {
        actions.push(new("ALTER TABLE … ADD COLUMN … GENERATED … VIRTUAL"));
    } else {
        let mut calls = Vec::new();
        if default.seek(&["default"]) {
            let mut expression = default.clone();
            let text = expression.text_until(&[
                "not",
                "constraint",
                "check",
                "unique",
                "primary",
                "references",
                "collate",
            ]);
            calls = Cursor::of(text).calls();
            // Operators can be volatile, too, but no built-in operator is.
        }
        let check = CatalogCheck::NewColumn { ty, calls };
        actions.push(new("ALTER TABLE … ADD COLUMN").checking(check));
    }
    if cursor.has(&["check"]) {
        actions.push(new("ALTER TABLE … ADD COLUMN … CHECK"));
    }
    if cursor.has(&["unique"]) || cursor.has(&["primary", "key"]) {
        actions.push(new("ALTER TABLE … ADD COLUMN … UNIQUE"));
    }
    if cursor.seek(&["references"]) {
        let action = new("ALTER TABLE … ADD COLUMN … REFERENCES");
        actions.push(action.with(LockedRelation::Referenced, cursor.name()));
    }
    actions
}

fn drop_part(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let is_constraint = cursor.eat(&["constraint"]);
    if !is_constraint {
        cursor.eat(&["column"]);
    }
    cursor.eat(&["if", "exists"]);
    let name = cursor.identifier()?;
    let cascade = cursor.has(&["cascade"]);
    let (statement, check) = if is_constraint {
        let check = CatalogCheck::Constraint { name, cascade };
        ("ALTER TABLE … DROP CONSTRAINT", check)
    } else {
        let column = name;
        let check = CatalogCheck::DropColumn { column, cascade };
        ("ALTER TABLE … DROP COLUMN", check)
    };
    Some(vec![Action::new(statement, table.clone()).checking(check)])
}

fn alter_part(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone());
    if cursor.eat(&["constraint"]) {
        let name = if cursor.has(&["not", "enforced"]) {
            "ALTER TABLE … ALTER CONSTRAINT … NOT ENFORCED"
        } else if cursor.has(&["enforced"]) {
            "ALTER TABLE … ALTER CONSTRAINT … ENFORCED"
        } else {
            "ALTER TABLE … ALTER CONSTRAINT … DEFERRABLE"
        };
        return Some(vec![new(name)]);
    }
    cursor.eat(&["column"]);
    let column = cursor.identifier()?;
    if cursor.eat(&["type"]) || cursor.eat(&["set", "data", "type"]) {
        let ty = cursor.text_until(&["collate", "using"]).to_owned();
        let using = cursor.has(&["using"]) || cursor.has(&["collate"]);
        let check = CatalogCheck::NewType { column, ty, using };
        return Some(vec![
            new("ALTER TABLE … ALTER COLUMN … TYPE").checking(check),
        ]);
    }
    let name = match (cursor.word(), cursor.word_at(1)) {
        ("set", "not") => {
            let action = new("ALTER TABLE … ALTER COLUMN … SET NOT NULL");
            return Some(vec![action.checking(CatalogCheck::NotNull { column })]);
        }
        ("set", "default") => "ALTER TABLE … ALTER COLUMN … SET DEFAULT",
        ("set", "statistics") => "ALTER TABLE … ALTER COLUMN … SET STATISTICS",
        ("set", "storage") => "ALTER TABLE … ALTER COLUMN … SET STORAGE",
        ("set", "compression") => "ALTER TABLE … ALTER COLUMN … SET COMPRESSION",
        ("set", "generated") => "ALTER TABLE … ALTER COLUMN … SET GENERATED",
        ("set", "expression") => "ALTER TABLE … ALTER COLUMN … SET EXPRESSION",
        ("set", "") => "ALTER TABLE … ALTER COLUMN … SET (…)",
        ("reset", _) => "ALTER TABLE … ALTER COLUMN … RESET (…)",
        ("restart", _) => "ALTER TABLE … ALTER COLUMN … RESTART",
        ("add", "generated") => "ALTER TABLE … ALTER COLUMN … ADD GENERATED … AS IDENTITY",
        ("drop", "default") => "ALTER TABLE … ALTER COLUMN … DROP DEFAULT",
        ("drop", "not") => "ALTER TABLE … ALTER COLUMN … DROP NOT NULL",
        ("drop", "expression") => "ALTER TABLE … ALTER COLUMN … DROP EXPRESSION",
        ("drop", "identity") => "ALTER TABLE … ALTER COLUMN … DROP IDENTITY",
        _ => return None,
    };
    Some(vec![new(name)])
}
