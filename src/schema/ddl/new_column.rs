//! The type and constraints of a new column.

use super::cursor::Cursor;
use super::{Action, CatalogCheck};
use crate::postgres::TableName;
use crate::schema::statements::{LockedRelation, TableWork};

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
    "enforced",
    "using",
];

/// The keywords that end the expression of a default.
const AFTER_DEFAULT: &[&str] = &[
    "not",
    "null",
    "constraint",
    "check",
    "unique",
    "primary",
    "references",
    "collate",
    "generated",
    "deferrable",
    "initially",
    "enforced",
    "storage",
    "compression",
];

const SERIAL: [&str; 6] = [
    "serial",
    "bigserial",
    "smallserial",
    "serial2",
    "serial4",
    "serial8",
];

/// Whether a text is the name of a type, with modifiers and array brackets or without.
pub(super) fn is_type(ty: &str) -> bool {
    let words = [
        "precision",
        "varying",
        "with",
        "without",
        "time",
        "zone",
        "character",
        "char",
        "year",
        "month",
        "day",
        "hour",
        "minute",
        "second",
        "to",
        "array",
    ];
    let mut cursor = Cursor::of(ty);
    let mut is_type = cursor.name().is_some();
    while is_type && !cursor.is_at_end() {
        is_type = cursor.one_of(&words)
            || cursor.group().is_some()
            || cursor.eat_literal()
            || cursor.eat_symbol('[')
            || cursor.eat_symbol(']');
    }
    is_type
}

/// Reads the type and constraints of a new column.
pub(super) fn read(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone());
    let ty = cursor.text_until(AFTER_TYPE).to_owned();
    is_type(&ty).then_some(())?;
    let is_serial = SERIAL.contains(&ty.to_lowercase().as_str());
    let mut has_default = is_serial;
    let (mut calls, mut operators) = (Vec::new(), false);
    let (mut name, mut more) = ("ALTER TABLE … ADD COLUMN", Vec::new());
    let mut referenced = Vec::new();
    while !cursor.is_at_end() {
        let word = cursor.word().to_owned();
        cursor.skip(1);
        match word.as_str() {
            "constraint" => {
                cursor.identifier()?;
            }
            "collate" => {
                cursor.name()?;
            }
            "not" => {
                cursor
                    .one_of(&["null", "deferrable", "enforced", "valid"])
                    .then_some(())?;
            }
            "null" | "deferrable" | "enforced" => {}
            "no" => cursor.eat(&["inherit"]).then_some(())?,
            "initially" => cursor.one_of(&["deferred", "immediate"]).then_some(())?,
            "storage" | "compression" => {
                cursor.identifier()?;
            }
            "options" => {
                cursor.group()?;
            }
            "default" => {
                has_default = true;
                // NULL as the first word is the default itself.
                let text = if cursor.eat(&["null"]) {
                    ""
                } else {
                    cursor.text_until(AFTER_DEFAULT)
                };
                let expression = Cursor::of(text);
                calls = expression.calls();
                operators = expression.has_operators();
                if text.is_empty() {
                    has_default = false;
                }
            }
            "check" => {
                cursor.group()?;
                more.push(new("ALTER TABLE … ADD COLUMN … CHECK"));
            }
            "unique" | "primary" => {
                if word == "primary" {
                    cursor.eat(&["key"]).then_some(())?;
                }
                if cursor.eat(&["nulls"]) {
                    cursor.eat(&["not"]);
                    cursor.eat(&["distinct"]).then_some(())?;
                }
                if cursor.eat(&["with"]) {
                    cursor.group()?;
                }
                if cursor.eat(&["using", "index", "tablespace"]) {
                    cursor.identifier()?;
                }
                more.push(new("ALTER TABLE … ADD COLUMN … UNIQUE"));
            }
            "references" => {
                referenced.push(cursor.name()?);
                cursor.group();
                if cursor.eat(&["match"]) {
                    cursor.identifier()?;
                }
                while cursor.eat(&["on"]) {
                    cursor.one_of(&["delete", "update"]).then_some(())?;
                    if cursor.eat(&["set"]) || cursor.eat(&["no"]) {
                        cursor.skip(1);
                        cursor.group();
                    } else {
                        cursor.one_of(&["cascade", "restrict"]).then_some(())?;
                    }
                }
            }
            "generated" => {
                if !cursor.eat(&["always"]) {
                    cursor.eat(&["by", "default"]);
                }
                cursor.eat(&["as"]).then_some(())?;
                if cursor.eat(&["identity"]) {
                    cursor.group();
                    name = "ALTER TABLE … ADD COLUMN … GENERATED … AS IDENTITY";
                    has_default = true;
                } else {
                    cursor.group()?;
                    name = if cursor.eat(&["stored"]) {
                        has_default = true;
                        "ALTER TABLE … ADD COLUMN … GENERATED … STORED"
                    } else {
                        cursor.eat(&["virtual"]);
                        "ALTER TABLE … ADD COLUMN … GENERATED … VIRTUAL"
                    };
                }
            }
            _ => return None,
        }
    }
    let first = if is_serial {
        new("ALTER TABLE … ADD COLUMN (volatile default)")
    } else if name == "ALTER TABLE … ADD COLUMN" {
        new(name).checking(CatalogCheck::NewColumn {
            ty,
            calls,
            operators,
            has_default,
        })
    } else {
        new(name)
    };
    let mut actions = vec![first];
    actions.extend(more);
    for referenced in referenced {
        let action = new("ALTER TABLE … ADD COLUMN … REFERENCES");
        let action = action.with(LockedRelation::Referenced, referenced);
        // Existing rows get the default, which then has to be checked.
        actions.push(if has_default {
            action.working(TableWork::Scan)
        } else {
            action
        });
    }
    Some(actions)
}
