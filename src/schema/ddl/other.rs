//! All statements except ALTER, CREATE and DROP.

use super::cursor::Cursor;
use super::{Action, CatalogCheck, Placement, Target, create, drop};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::statements::TableWork;

pub(super) type Read = (Placement, Option<Vec<Action>>);

/// The statement locks nothing that the plan is about.
pub(super) const NOTHING: Option<Vec<Action>> = Some(Vec::new());

pub(super) fn in_transaction(actions: Option<Vec<Action>>) -> Read {
    (Placement::InTransaction, actions)
}

pub(super) fn outside_transaction(actions: Option<Vec<Action>>) -> Read {
    (Placement::OutsideTransaction, actions)
}

/// Reads a whole statement.
pub(super) fn read(mut cursor: Cursor<'_>) -> Read {
    if cursor.sees_symbol('(') {
        return in_transaction(query("SELECT", &cursor));
    }
    let word = cursor.word().to_owned();
    let whole = cursor.clone();
    cursor.skip(1);
    match word.as_str() {
        "create" => create::read(cursor),
        "drop" => drop::read(cursor),
        "reindex" => reindex(cursor),
        "vacuum" => vacuum(cursor),
        "cluster" => cluster(cursor),
        "analyze" | "analyse" => in_transaction(analyze(cursor)),
        "refresh" => in_transaction(refresh(cursor)),
        "truncate" => in_transaction(truncate(cursor)),
        "lock" => in_transaction(lock(cursor)),
        "comment" => in_transaction(comment(cursor)),
        "security" => in_transaction(security_label(cursor)),
        "select" | "values" | "table" | "with" => in_transaction(query("SELECT", &whole)),
        "insert" => {
            cursor.eat(&["into"]);
            in_transaction(insert(cursor))
        }
        "update" => in_transaction(modify("UPDATE", cursor)),
        "delete" => {
            cursor.eat(&["from"]);
            in_transaction(modify("DELETE", cursor))
        }
        "merge" => {
            cursor.eat(&["into"]);
            in_transaction(modify("MERGE … UPDATE", cursor))
        }
        "begin" | "commit" | "rollback" | "abort" | "end" | "savepoint" | "release" | "start"
        | "prepare" => (Placement::TransactionControl, NOTHING),
        "set" => (setting(cursor), NOTHING),
        "reset" | "discard" | "listen" => (Placement::SessionSetting, NOTHING),
        "show" | "grant" | "revoke" | "notify" => in_transaction(NOTHING),
        "reassign" => in_transaction(reassign(cursor)),
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

pub(super) fn one(name: &'static str, target: Option<TableName>) -> Option<Vec<Action>> {
    Some(vec![Action::new(name, target?)])
}

pub(super) fn all(name: &'static str, targets: Vec<(TableName, bool)>) -> Option<Vec<Action>> {
    let actions = (targets.into_iter()).map(|(target, only)| Action::new(name, target).only(only));
    Some(actions.collect())
}

/// A query: what it reads. Functions that it calls are checked in the catalogs.
pub(super) fn query(name: &'static str, cursor: &Cursor<'_>) -> Option<Vec<Action>> {
    // A WITH, or an SQL function, can change rows, and SELECT INTO makes a table.
    let changes = ["insert", "update", "delete", "merge", "into"];
    if cursor.names_after(&changes).iter().any(|_| true) {
        return None;
    }
    let mut actions: Vec<_> = sources(name, cursor);
    actions.push(calling(cursor));
    Some(actions)
}

fn sources(name: &'static str, cursor: &Cursor<'_>) -> Vec<Action> {
    let names = cursor.names_after(&["from", "join", "using", "table"]);
    let read = |table| {
        let mut action = Action::new(name, table);
        action.mode = Some(LockMode::AccessShare);
        action.work = Some(TableWork::Rows);
        action
    };
    names.into_iter().map(read).collect()
}

/// The functions that a statement calls.
fn calling(cursor: &Cursor<'_>) -> Action {
    let check = CatalogCheck::Calls(cursor.calls());
    Action::new("SELECT", None).checking(check)
}

fn insert(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let target = cursor.name()?;
    let selects = cursor.has(&["select"]) || cursor.has(&["with"]) || cursor.has(&["table"]);
    let name = if selects {
        "INSERT … SELECT"
    } else {
        "INSERT"
    };
    let mut actions = vec![Action::new(name, target)];
    actions.extend(sources("SELECT", &cursor));
    // The list of columns is not a call.
    cursor.group();
    actions.push(calling(&cursor));
    Some(actions)
}

fn modify(name: &'static str, mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let (target, only) = cursor.relation()?;
    let mut actions = vec![Action::new(name, target).only(only)];
    actions.extend(sources("SELECT", &cursor));
    actions.push(calling(&cursor));
    Some(actions)
}

fn reassign(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["owned", "by"]).then_some(())?;
    let roles = roles(&mut cursor)?;
    Some(vec![Action::on(
        "ALTER TABLE … OWNER TO",
        Target::OwnedBy(roles),
    )])
}

/// Reads names of roles. CURRENT_USER and the like are the empty name.
pub(super) fn roles(cursor: &mut Cursor<'_>) -> Option<Vec<String>> {
    let mut roles = Vec::new();
    loop {
        let special = ["current_user", "session_user", "current_role"];
        roles.push(if cursor.one_of(&special) {
            String::new()
        } else {
            cursor.identifier()?
        });
        if !cursor.eat_symbol(',') {
            return Some(roles);
        }
    }
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
            let schema = cursor.identifier().map(Target::Schema);
            let actions = schema.map(|schema| vec![Action::on("REINDEX SCHEMA", schema)]);
            return outside_transaction(actions);
        }
        (_, true) => return (Placement::Concurrently, None),
        _ => return outside_transaction(None),
    };
    (Placement::Concurrently, one(name, cursor.name()))
}

/// Reads `a (x, y), ONLY b`.
fn with_columns(mut cursor: Cursor<'_>) -> Option<Vec<(TableName, bool)>> {
    let mut tables = Vec::new();
    while !cursor.is_at_end() {
        let mut part = cursor.until_comma();
        tables.push(part.relation()?);
        part.group();
        part.is_at_end().then_some(())?;
    }
    Some(tables)
}

fn every_table(name: &'static str) -> Option<Vec<Action>> {
    Some(vec![Action::on(
        name,
        Target::Database(name == "CLUSTER (all)"),
    )])
}

fn analyze(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let in_parentheses = cursor.group().is_some();
    if !in_parentheses {
        cursor.eat(&["verbose"]);
    }
    if cursor.is_at_end() {
        return every_table("ANALYZE");
    }
    all("ANALYZE", with_columns(cursor)?)
}

fn vacuum(mut cursor: Cursor<'_>) -> Read {
    let (mut full, mut analyze) = (false, false);
    if let Some(mut options) = cursor.group() {
        while !options.is_at_end() {
            let part = options.until_comma();
            let off = ["off", "false", "no"].contains(&part.word_at(1));
            full |= part.word() == "full" && !off;
            analyze |= ["analyze", "analyse"].contains(&part.word()) && !off;
            // `FULL 0` or `FULL 'off'` is a value that is not read here.
            if part.word() == "full"
                && part.word_at(1).is_empty()
                && part.rest().len() > "full".len()
            {
                return outside_transaction(None);
            }
        }
    } else {
        full = cursor.eat(&["full"]);
        while ["freeze", "verbose", "analyze", "analyse"].contains(&cursor.word()) {
            analyze |= cursor.word().starts_with("analy");
            cursor.skip(1);
        }
    }
    let name = match (full, analyze) {
        (true, _) => "VACUUM FULL",
        (false, true) => "VACUUM (ANALYZE)",
        (false, false) => "VACUUM",
    };
    if cursor.is_at_end() {
        return outside_transaction(every_table(name));
    }
    outside_transaction(with_columns(cursor).and_then(|tables| all(name, tables)))
}

fn cluster(mut cursor: Cursor<'_>) -> Read {
    if cursor.group().is_none() {
        cursor.eat(&["verbose"]);
    }
    if cursor.is_at_end() {
        return outside_transaction(every_table("CLUSTER (all)"));
    }
    let Some(mut table) = cursor.name() else {
        return in_transaction(None);
    };
    let mut index = None;
    if cursor.eat(&["using"]) {
        index = cursor.identifier();
    } else if cursor.eat(&["on"]) {
        // CLUSTER index ON table.
        index = Some(table.name().to_owned());
        match cursor.name() {
            Some(name) => table = name,
            None => return in_transaction(None),
        }
    }
    if !cursor.is_at_end() {
        return in_transaction(None);
    }
    let action = Action::new("CLUSTER", table);
    in_transaction(Some(vec![match index {
        Some(index) => action.checking(CatalogCheck::NamedIndex { index }),
        None => action,
    }]))
}

fn refresh(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["materialized", "view"]).then_some(())?;
    let name = if cursor.eat(&["concurrently"]) {
        "REFRESH MATERIALIZED VIEW CONCURRENTLY"
    } else {
        "REFRESH MATERIALIZED VIEW"
    };
    one(name, cursor.name())
}

fn truncate(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["table"]);
    let tables = cursor.relations()?;
    let mut actions = Vec::new();
    let restart = cursor.eat(&["restart", "identity"]);
    cursor.eat(&["continue", "identity"]);
    let name = if cursor.eat(&["cascade"]) {
        "TRUNCATE … CASCADE"
    } else {
        cursor.eat(&["restrict"]);
        "TRUNCATE"
    };
    cursor.is_at_end().then_some(())?;
    for (table, only) in tables {
        let action = Action::new(name, table).only(only);
        actions.push(if restart {
            action.checking(CatalogCheck::Sequences { column: None })
        } else {
            action
        });
    }
    Some(actions)
}

fn lock(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["table"]);
    let names = cursor.relations()?;
    let mode = if cursor.eat(&["in"]) {
        let mode = cursor.text_until(&["mode"]).parse::<LockMode>().ok()?;
        cursor.eat(&["mode"]);
        Some(mode)
    } else {
        None
    };
    cursor.eat(&["nowait"]);
    cursor.is_at_end().then_some(())?;
    let mut actions = all("LOCK TABLE", names)?;
    for action in &mut actions {
        action.mode = mode;
    }
    Some(actions)
}

fn comment(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["on"]).then_some(())?;
    let relations = [
        (&["table"][..], "COMMENT ON TABLE"),
        (&["foreign", "table"], "COMMENT ON TABLE"),
        (&["index"], "COMMENT ON INDEX"),
        (&["view"], "COMMENT ON VIEW"),
        (&["materialized", "view"], "COMMENT ON MATERIALIZED VIEW"),
        (&["sequence"], "COMMENT ON SEQUENCE"),
    ];
    for (words, name) in relations {
        if cursor.eat(words) {
            return one(name, cursor.name());
        }
    }
    if cursor.eat(&["column"]) {
        return one("COMMENT ON COLUMN", Some(column_of(&mut cursor)?));
    }
    for (word, name) in [
        ("constraint", "COMMENT ON CONSTRAINT"),
        ("trigger", "COMMENT ON TRIGGER"),
        ("policy", "COMMENT ON POLICY"),
        ("rule", "COMMENT ON RULE"),
    ] {
        if cursor.eat(&[word]) {
            cursor.seek(&["on"]).then_some(())?;
            if cursor.eat(&["domain"]) {
                return NOTHING;
            }
            return one(name, cursor.name());
        }
    }
    NOTHING
}

/// Reads the name of a column, of which the last part is the column's own. Returns the table.
fn column_of(cursor: &mut Cursor<'_>) -> Option<TableName> {
    let mut parts = vec![cursor.identifier()?];
    while cursor.eat_symbol('.') {
        parts.push(cursor.identifier()?);
    }
    parts.pop();
    let table = parts.pop()?;
    Some(match parts.pop() {
        Some(schema) => TableName::in_schema(schema, table),
        None => TableName::new(table),
    })
}

/// A security label locks what a comment does.
fn security_label(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    cursor.eat(&["label"]).then_some(())?;
    if cursor.eat(&["for"]) && !cursor.eat_literal() {
        cursor.identifier()?;
    }
    comment(cursor)
}
