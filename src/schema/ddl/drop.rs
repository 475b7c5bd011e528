//! DROP.

use super::cursor::Cursor;
use super::other::{NOTHING, Read, all, in_transaction, outside_transaction, roles};
use super::{Action, Dropped, Placement, Target};

/// The catalogs of the objects that a DROP names.
const CATALOGS: [(&[&str], &str); 19] = [
    (&["schema"], "pg_namespace"),
    (&["type"], "pg_type"),
    (&["domain"], "pg_type"),
    (&["function"], "pg_proc"),
    (&["procedure"], "pg_proc"),
    (&["routine"], "pg_proc"),
    (&["aggregate"], "pg_proc"),
    (&["extension"], "pg_extension"),
    (&["collation"], "pg_collation"),
    (&["conversion"], "pg_conversion"),
    (&["server"], "pg_foreign_server"),
    (&["foreign", "data", "wrapper"], "pg_foreign_data_wrapper"),
    (&["statistics"], "pg_statistic_ext"),
    (&["language"], "pg_language"),
    (&["procedural", "language"], "pg_language"),
    (&["publication"], "pg_publication"),
    (&["text", "search", "configuration"], "pg_ts_config"),
    (&["text", "search", "dictionary"], "pg_ts_dict"),
    (&["access", "method"], "pg_am"),
];

pub(super) fn read(mut cursor: Cursor<'_>) -> Read {
    let relation = [
        (&["materialized", "view"][..], "DROP MATERIALIZED VIEW"),
        (&["foreign", "table"], "DROP FOREIGN TABLE"),
        (&["index"], "DROP INDEX"),
        (&["table"], "DROP TABLE"),
        (&["view"], "DROP VIEW"),
        (&["sequence"], "DROP SEQUENCE"),
    ];
    for (words, name) in relation {
        if !cursor.eat(words) {
            continue;
        }
        let concurrently = name == "DROP INDEX" && cursor.eat(&["concurrently"]);
        cursor.eat(&["if", "exists"]);
        let Some(names) = cursor.names() else {
            return in_transaction(None);
        };
        if concurrently {
            let names = names.into_iter().map(|name| (name, false)).collect();
            return (
                Placement::Concurrently,
                all("DROP INDEX CONCURRENTLY", names),
            );
        }
        let name = if name == "DROP TABLE" && cursor.sees(&["cascade"]) {
            "DROP TABLE … CASCADE"
        } else {
            name
        };
        let dropped = |one| Action::on(name, Target::Dropped(Dropped::Relation(one)));
        return in_transaction(Some(names.into_iter().map(dropped).collect()));
    }
    let of_table = [
        ("trigger", "DROP TRIGGER", "pg_trigger"),
        ("rule", "DROP RULE", "pg_rewrite"),
        ("policy", "DROP POLICY", "pg_policy"),
    ];
    for (word, name, catalog) in of_table {
        if cursor.eat(&[word]) {
            return in_transaction(drop_of_table(name, catalog, cursor));
        }
    }
    if cursor.one_of(&["database", "tablespace", "subscription"]) {
        return outside_transaction(NOTHING);
    }
    if cursor.eat(&["owned", "by"]) {
        let roles = roles(&mut cursor);
        let dropped = roles.map(|roles| Target::Dropped(Dropped::Owned(roles)));
        let action = dropped.map(|dropped| vec![Action::on("DROP SCHEMA … CASCADE", dropped)]);
        return in_transaction(action);
    }
    if cursor.one_of(&["role", "user", "group"]) {
        return in_transaction(NOTHING);
    }
    if cursor.eat(&["event", "trigger"]) {
        return in_transaction(NOTHING);
    }
    // Nothing that has rows depends on these without CASCADE: it would have to be dropped, too.
    let of_types = [
        &["operator"][..],
        &["cast"],
        &["text", "search"],
        &["transform"],
        &["access", "method"],
    ];
    if of_types.iter().any(|words| cursor.sees(words)) && !cursor.has(&["cascade"]) {
        return in_transaction(NOTHING);
    }
    in_transaction(drop_object(cursor))
}

fn drop_of_table(
    name: &'static str,
    catalog: &'static str,
    mut cursor: Cursor<'_>,
) -> Option<Vec<Action>> {
    cursor.eat(&["if", "exists"]);
    let of = cursor.identifier()?;
    cursor.eat(&["on"]).then_some(())?;
    let table = cursor.name()?;
    let dropped = Target::Dropped(Dropped::OfTable(catalog, table, of));
    Some(vec![Action::on(name, dropped)])
}

fn drop_object(mut cursor: Cursor<'_>) -> Option<Vec<Action>> {
    let (words, catalog) = CATALOGS.into_iter().find(|(words, _)| cursor.sees(words))?;
    cursor.eat(words);
    cursor.eat(&["if", "exists"]);
    let name = match catalog {
        "pg_namespace" => "DROP SCHEMA … CASCADE",
        "pg_type" if words == ["domain"] => "DROP DOMAIN … CASCADE",
        "pg_type" => "DROP TYPE … CASCADE",
        "pg_statistic_ext" => "DROP STATISTICS",
        _ => "DROP FUNCTION … CASCADE",
    };
    let mut actions = Vec::new();
    loop {
        let object = cursor.name()?;
        // The arguments of a function. Without them, all functions of the name are taken.
        cursor.group();
        actions.push(Action::on(
            name,
            Target::Dropped(Dropped::Object(catalog, object)),
        ));
        if !cursor.eat_symbol(',') {
            break;
        }
    }
    cursor.one_of(&["cascade", "restrict"]);
    cursor.is_at_end().then_some(actions)
}
