//! The forms of ALTER TABLE. A form of which only a part is understood is not understood.

use super::cursor::Cursor;
use super::{Action, CatalogCheck, Dropped, Effect, Target, new_column};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::statements::{LockedRelation, TableWork};

/// The word after ALTER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Table,
    Index,
    View,
}

/// Reads one form.
pub(super) fn read(cursor: Cursor<'_>, table: &TableName, kind: Kind) -> Option<Vec<Action>> {
    if kind == Kind::Index {
        index_action(cursor, table)
    } else {
        table_action(cursor, table)
    }
}

/// What the forms of one statement mean together.
pub(super) fn together(actions: &mut [Action]) {
    // Without a default, a new column has no values that its foreign key would have to check. The server leaves the check
    // out only if no other foreign key is added by the statement (`transformAlterTableStmt` in
    // `src/backend/parser/parse_utilcmd.c`).
    let drops = actions.iter().any(|one| one.name.contains("DROP "));
    let has_key = actions
        .iter()
        .any(|one| one.name.starts_with("ALTER TABLE … ADD FOREIGN KEY"));
    for action in actions {
        if has_key && action.name == "ALTER TABLE … ADD COLUMN … REFERENCES" {
            action.work = Some(TableWork::Scan);
        }
        // What is dropped is dropped first, and proves nothing to the other forms.
        if drops {
            match &mut action.check {
                CatalogCheck::NewType { using, .. } => *using = true,
                CatalogCheck::NotNull { .. } => action.check = CatalogCheck::Nothing,
                CatalogCheck::UsingIndex { .. } => {
                    action.name = "ALTER TABLE … ADD PRIMARY KEY USING INDEX (nullable column)";
                }
                _ => {}
            }
        }
    }
}

fn index_action(mut cursor: Cursor<'_>, index: &TableName) -> Option<Vec<Action>> {
    let one = |name| Some(vec![Action::new(name, index.clone())]);
    match (cursor.word(), cursor.word_at(1)) {
        ("rename", "to") => {
            cursor.skip(2);
            let new = cursor.identifier()?;
            let action = Action::new("ALTER INDEX … RENAME", index.clone());
            Some(vec![action.then(Effect::Rename(new))])
        }
        ("reset", "") => options(cursor, index, "ALTER INDEX … RESET (…)"),
        ("set", "tablespace") => one("ALTER INDEX … SET TABLESPACE"),
        ("set", "") => options(cursor, index, "ALTER INDEX … SET (…)"),
        ("alter", _) => one("ALTER INDEX … ALTER COLUMN … SET STATISTICS"),
        ("attach", "partition") => {
            cursor.skip(2);
            let action = Action::new("ALTER INDEX … ATTACH PARTITION", index.clone());
            Some(vec![
                action.with(LockedRelation::PartitionIndex, cursor.name()?),
            ])
        }
        ("depends", _) => one("ALTER INDEX … DEPENDS ON EXTENSION"),
        ("no", "depends") => one("ALTER INDEX … DEPENDS ON EXTENSION"),
        _ => None,
    }
}

/// Reads `SET (…)` or `RESET (…)`.
fn options(mut cursor: Cursor<'_>, table: &TableName, name: &'static str) -> Option<Vec<Action>> {
    cursor.skip(1);
    let mut group = cursor.group()?;
    let mut names = Vec::new();
    while !group.is_at_end() {
        let mut part = group.until_comma();
        let mut option = part.identifier()?;
        while part.eat_symbol('.') {
            option = part.identifier()?;
        }
        names.push(option);
    }
    cursor.is_at_end().then_some(())?;
    let action = Action::new(name, table.clone());
    Some(vec![action.checking(CatalogCheck::Options(names))])
}

fn table_action(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone());
    let altering = |name| new(name).then(Effect::Alters);
    let one = |name| Some(vec![altering(name)]);
    let word = cursor.word().to_owned();
    cursor.skip(1);
    match word.as_str() {
        "add" => add(cursor, table),
        "drop" => drop_part(cursor, table),
        "alter" => alter_part(cursor, table),
        "validate" => {
            cursor.eat(&["constraint"]);
            let name = cursor.identifier()?;
            let action = new("ALTER TABLE … VALIDATE CONSTRAINT");
            let action = action.checking(CatalogCheck::Constraint { name });
            cursor.is_at_end().then(|| vec![action])
        }
        "rename" => rename(cursor, table),
        "attach" => attach(cursor, table),
        "detach" => {
            cursor.eat(&["partition"]).then_some(())?;
            let partition = cursor.name()?;
            let name = match cursor.word() {
                "concurrently" => "ALTER TABLE … DETACH PARTITION CONCURRENTLY",
                "finalize" => "ALTER TABLE … DETACH PARTITION … FINALIZE",
                "" => "ALTER TABLE … DETACH PARTITION",
                _ => return None,
            };
            Some(vec![
                altering(name).with(LockedRelation::Partition, partition),
            ])
        }
        "set" => match cursor.word() {
            "schema" => {
                cursor.skip(1);
                let schema = cursor.identifier()?;
                let action = new("ALTER TABLE … SET SCHEMA");
                let action = action.checking(CatalogCheck::Sequences { column: None });
                Some(vec![action.then(Effect::SetSchema(schema))])
            }
            "logged" | "unlogged" => {
                let name = if cursor.word() == "logged" {
                    "ALTER TABLE … SET LOGGED"
                } else {
                    "ALTER TABLE … SET UNLOGGED"
                };
                Some(vec![
                    altering(name).checking(CatalogCheck::Sequences { column: None }),
                ])
            }
            "tablespace" => one("ALTER TABLE … SET TABLESPACE"),
            "access" => one("ALTER TABLE … SET ACCESS METHOD"),
            "without" if cursor.word_at(1) == "cluster" => one("ALTER TABLE … SET WITHOUT CLUSTER"),
            "without" => one("ALTER TABLE … SET WITHOUT OIDS"),
            "" => {
                let mut set = cursor;
                set.back();
                options(set, table, "ALTER TABLE … SET (…)")
            }
            _ => None,
        },
        "reset" => {
            cursor.back();
            options(cursor, table, "ALTER TABLE … RESET (…)")
        }
        "cluster" => {
            cursor.eat(&["on"]).then_some(())?;
            let index = cursor.identifier()?;
            let action = new("ALTER TABLE … CLUSTER ON");
            Some(vec![action.checking(CatalogCheck::NamedIndex { index })])
        }
        "owner" => Some(vec![
            new("ALTER TABLE … OWNER TO").checking(CatalogCheck::Sequences { column: None }),
        ]),
        "inherit" => {
            let parent = cursor.name()?;
            Some(vec![
                altering("ALTER TABLE … INHERIT").with(LockedRelation::Parent, parent),
            ])
        }
        "no" if cursor.eat(&["inherit"]) => {
            let parent = cursor.name()?;
            Some(vec![
                altering("ALTER TABLE … NO INHERIT").with(LockedRelation::Parent, parent),
            ])
        }
        "no" if cursor.sees(&["force", "row"]) => one("ALTER TABLE … NO FORCE ROW LEVEL SECURITY"),
        "force" => one("ALTER TABLE … FORCE ROW LEVEL SECURITY"),
        "of" => one("ALTER TABLE … OF"),
        "not" if cursor.sees(&["of"]) => one("ALTER TABLE … NOT OF"),
        "replica" => {
            if cursor.seek(&["using", "index"]) {
                let index = cursor.identifier()?;
                let action = new("ALTER TABLE … REPLICA IDENTITY USING INDEX");
                Some(vec![action.checking(CatalogCheck::NamedIndex { index })])
            } else {
                one("ALTER TABLE … REPLICA IDENTITY")
            }
        }
        "enable" | "disable" => {
            let last = [cursor.word(), cursor.word_at(1)];
            if last.contains(&"trigger") {
                one("ALTER TABLE … DISABLE TRIGGER")
            } else if last.contains(&"rule") {
                one("ALTER TABLE … DISABLE RULE")
            } else if last[0] == "row" {
                one("ALTER TABLE … ENABLE ROW LEVEL SECURITY")
            } else {
                None
            }
        }
        "options" => one("ALTER FOREIGN TABLE … OPTIONS"),
        _ => None,
    }
}

fn rename(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone());
    let action = if cursor.eat(&["to"]) {
        new("ALTER TABLE … RENAME").then(Effect::Rename(cursor.identifier()?))
    } else if cursor.eat(&["constraint"]) {
        let old = cursor.identifier()?;
        cursor.eat(&["to"]).then_some(())?;
        let effect = Effect::RenameConstraint(old.clone(), cursor.identifier()?);
        let check = CatalogCheck::Constraint { name: old };
        new("ALTER TABLE … RENAME CONSTRAINT")
            .checking(check)
            .then(effect)
    } else {
        cursor.eat(&["column"]);
        let old = cursor.identifier()?;
        cursor.eat(&["to"]).then_some(())?;
        let effect = Effect::RenameColumn(old, cursor.identifier()?);
        new("ALTER TABLE … RENAME COLUMN").then(effect)
    };
    cursor.is_at_end().then(|| vec![action])
}

fn attach(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    cursor.eat(&["partition"]).then_some(())?;
    let partition = cursor.name()?;
    let is_default = cursor.sees(&["default"]);
    (is_default || cursor.eat(&["for", "values"])).then_some(())?;
    let name = "ALTER TABLE … ATTACH PARTITION";
    let action = Action::new(name, table.clone()).with(LockedRelation::Partition, partition);
    let action = action.checking(CatalogCheck::Bounds(cursor.rest().to_owned()));
    Some(vec![action.then(Effect::Alters)])
}

fn add(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let is_constraint = cursor.eat(&["constraint"]);
    let name = if is_constraint {
        Some(cursor.identifier()?)
    } else {
        None
    };
    if let Some(action) = constraint(&mut cursor, table) {
        let is_key = action.name.contains("FOREIGN KEY");
        let effect = name.map_or(Effect::Alters, |name| Effect::AddConstraint(name, is_key));
        return Some(vec![action.then(effect)]);
    }
    if is_constraint {
        return None;
    }
    cursor.eat(&["column"]);
    cursor.eat(&["if", "not", "exists"]);
    let name = cursor.identifier()?;
    let mut actions = new_column::read(cursor, table)?;
    actions[0].effect = Effect::AddColumn(name);
    Some(actions)
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
    if cursor.eat(&["check"]) {
        cursor.group()?;
        let action = new(choose(
            "ALTER TABLE … ADD CHECK",
            "ALTER TABLE … ADD CHECK … NOT VALID",
            "ALTER TABLE … ADD CHECK … NOT ENFORCED",
        ));
        Some(if cursor.has(&["no", "inherit"]) {
            action.checking(CatalogCheck::NoInherit)
        } else {
            action
        })
    } else if cursor.sees(&["foreign", "key"]) {
        let name = choose(
            "ALTER TABLE … ADD FOREIGN KEY",
            "ALTER TABLE … ADD FOREIGN KEY … NOT VALID",
            "ALTER TABLE … ADD FOREIGN KEY … NOT ENFORCED",
        );
        cursor.seek(&["references"]).then_some(())?;
        Some(new(name).with(LockedRelation::Referenced, cursor.name()?))
    } else if cursor.eat(&["not", "null"]) {
        let column = cursor.identifier()?;
        Some(if not_valid {
            new("ALTER TABLE … ADD NOT NULL … NOT VALID")
        } else {
            new("ALTER TABLE … ADD NOT NULL").checking(CatalogCheck::NotNull { column })
        })
    } else if cursor.sees(&["primary", "key"]) {
        if cursor.seek(&["using", "index"]) && !cursor.sees(&["tablespace"]) {
            let index = cursor.identifier()?;
            let action = new("ALTER TABLE … ADD PRIMARY KEY USING INDEX");
            Some(action.checking(CatalogCheck::UsingIndex { index }))
        } else {
            Some(new("ALTER TABLE … ADD PRIMARY KEY"))
        }
    } else if cursor.sees(&["unique"]) {
        if cursor.seek(&["using", "index"]) && !cursor.sees(&["tablespace"]) {
            let index = cursor.identifier()?;
            let action = new("ALTER TABLE … ADD UNIQUE USING INDEX");
            Some(action.checking(CatalogCheck::NamedIndex { index }))
        } else {
            Some(new("ALTER TABLE … ADD UNIQUE"))
        }
    } else if cursor.sees(&["exclude"]) {
        Some(new("ALTER TABLE … ADD EXCLUDE"))
    } else {
        None
    }
}

fn drop_part(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let is_constraint = cursor.eat(&["constraint"]);
    if !is_constraint {
        cursor.eat(&["column"]);
    }
    cursor.eat(&["if", "exists"]);
    let name = cursor.identifier()?;
    cursor.one_of(&["cascade", "restrict"]);
    cursor.is_at_end().then_some(())?;
    let (statement, dropped) = if is_constraint {
        let dropped = Dropped::Constraint(table.clone(), name.clone());
        ("ALTER TABLE … DROP CONSTRAINT", dropped)
    } else {
        let dropped = Dropped::Column(table.clone(), name.clone());
        ("ALTER TABLE … DROP COLUMN", dropped)
    };
    let mut of_table = Action::new(statement, table.clone()).then(Effect::Alters);
    if is_constraint {
        of_table = of_table.checking(CatalogCheck::Constraint { name });
    }
    Some(vec![
        of_table,
        Action::on(statement, Target::Dropped(dropped)),
    ])
}

fn alter_part(mut cursor: Cursor<'_>, table: &TableName) -> Option<Vec<Action>> {
    let new = |name| Action::new(name, table.clone()).then(Effect::Alters);
    if cursor.eat(&["constraint"]) {
        let name = cursor.identifier()?;
        let (statement, work) = if cursor.has(&["not", "enforced"]) {
            ("ALTER TABLE … ALTER CONSTRAINT … NOT ENFORCED", None)
        } else if cursor.has(&["enforced"]) {
            ("ALTER TABLE … ALTER CONSTRAINT … ENFORCED", None)
        } else if cursor.has(&["no", "inherit"]) {
            ("ALTER TABLE … ALTER CONSTRAINT … NO INHERIT", None)
        } else if cursor.has(&["inherit"]) {
            // The children are checked.
            (
                "ALTER TABLE … ALTER CONSTRAINT … INHERIT",
                Some(TableWork::Scan),
            )
        } else if cursor.has(&["deferrable"]) || cursor.has(&["initially"]) {
            ("ALTER TABLE … ALTER CONSTRAINT … DEFERRABLE", None)
        } else {
            return None;
        };
        let mut action = new(statement).checking(CatalogCheck::Constraint { name });
        action.work = work;
        return Some(vec![action]);
    }
    cursor.eat(&["column"]);
    let column = if cursor.eat_literal() {
        // By number, as for the columns of an index.
        String::new()
    } else {
        cursor.identifier()?
    };
    if cursor.eat(&["type"]) || cursor.eat(&["set", "data", "type"]) {
        let ty = cursor.text_until(&["collate", "using"]).to_owned();
        new_column::is_type(&ty).then_some(())?;
        let using = cursor.has(&["using"]) || cursor.has(&["collate"]);
        let check = CatalogCheck::NewType { column, ty, using };
        return Some(vec![
            new("ALTER TABLE … ALTER COLUMN … TYPE").checking(check),
        ]);
    }
    let sequences = CatalogCheck::Sequences {
        column: Some(column.clone()),
    };
    let identity = |name| Some(vec![new(name).checking(sequences.clone())]);
    let name = match (cursor.word(), cursor.word_at(1)) {
        ("set", "not") => {
            let action = new("ALTER TABLE … ALTER COLUMN … SET NOT NULL");
            return Some(vec![action.checking(CatalogCheck::NotNull { column })]);
        }
        ("set", "default") => "ALTER TABLE … ALTER COLUMN … SET DEFAULT",
        ("set", "statistics") => "ALTER TABLE … ALTER COLUMN … SET STATISTICS",
        ("set", "storage") => "ALTER TABLE … ALTER COLUMN … SET STORAGE",
        ("set", "compression") => "ALTER TABLE … ALTER COLUMN … SET COMPRESSION",
        // SET GENERATED, SET INCREMENT BY and so on, in any order.
        (
            "set",
            "generated" | "increment" | "minvalue" | "maxvalue" | "start" | "restart" | "cache"
            | "cycle" | "no" | "sequence" | "logged" | "unlogged" | "as",
        ) => return identity("ALTER TABLE … ALTER COLUMN … SET GENERATED"),
        ("set", "expression") => "ALTER TABLE … ALTER COLUMN … SET EXPRESSION",
        ("set", "") => "ALTER TABLE … ALTER COLUMN … SET (…)",
        ("reset", _) => "ALTER TABLE … ALTER COLUMN … RESET (…)",
        ("restart", _) => return identity("ALTER TABLE … ALTER COLUMN … RESTART"),
        ("add", "generated") => "ALTER TABLE … ALTER COLUMN … ADD GENERATED … AS IDENTITY",
        ("drop", "default") => "ALTER TABLE … ALTER COLUMN … DROP DEFAULT",
        ("drop", "not") => "ALTER TABLE … ALTER COLUMN … DROP NOT NULL",
        ("drop", "expression") => "ALTER TABLE … ALTER COLUMN … DROP EXPRESSION",
        ("drop", "identity") => return identity("ALTER TABLE … ALTER COLUMN … DROP IDENTITY"),
        ("options", _) => "ALTER FOREIGN TABLE … ALTER COLUMN … OPTIONS",
        _ => return None,
    };
    let mut action = new(name);
    if name.contains("SET STATISTICS") || name.ends_with("SET (…)") {
        action.effect = Effect::None;
        action.mode = Some(LockMode::ShareUpdateExclusive);
    }
    Some(vec![action])
}
