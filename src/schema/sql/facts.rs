//! What decides on the locks and the work of a change of a column or a constraint.

use tokio_postgres::SimpleQueryMessage;

use super::graph::qualified;
use crate::postgres::sql::{is_true, literal, parsed, rows, text};

/// What decides on a change of a column, in the table and its children. One row for each of them.
#[derive(Clone, Debug)]
pub(crate) struct ColumnFacts {
    pub(crate) relation: u32,
    pub(crate) number: i32,
    pub(crate) is_not_null: bool,
    pub(crate) old: u32,
    pub(crate) old_modifier: i32,
    pub(crate) new: Option<u32>,
    /// Whether there is a cast that leaves the stored values unchanged.
    pub(crate) is_binary: bool,
    /// Whether a validated CHECK mentions the column, or the whole row.
    pub(crate) is_checked: bool,
    /// Whether an index of the column cannot keep its contents when the type changes: it has expressions or a predicate,
    /// or the new type has another default operator class.
    pub(crate) rebuilds_index: bool,
    /// Whether the column is one of an index at all.
    pub(crate) is_indexed: bool,
    /// The expression trees of the validated CHECK constraints.
    pub(crate) checks: Vec<String>,
}

/// The facts of a column in these relations. `ty` is the new type, and may be empty.
pub(crate) fn column_facts(relations: &[u32], column: &str, ty: &str) -> String {
    let oids: Vec<_> = relations.iter().map(u32::to_string).collect();
    qualified(
        "WITH y AS (SELECT pg_catalog.to_regtype({type})::pg_catalog.oid AS oid) \
         SELECT a.attrelid AS relation, a.attnum AS number, a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint AS k \
         WHERE k.conrelid == a.attrelid AND k.contype == 'n' AND NOT k.convalidated AND k.conkey == ARRAY[a.attnum]) AS is_not_null, \
         a.atttypid AS old, a.atttypmod AS old_modifier, y.oid AS new, EXISTS (SELECT FROM pg_cast AS k \
         WHERE k.castsource == a.atttypid AND k.castmethod == 'b' AND k.casttarget == y.oid) AS is_binary, \
         EXISTS (SELECT FROM pg_constraint AS k WHERE k.conrelid == a.attrelid AND k.contype == 'c' AND k.convalidated \
         AND (a.attnum == ANY (k.conkey) OR '0'::pg_catalog.int2 == ANY (k.conkey))) AS is_checked, \
         EXISTS (SELECT FROM pg_depend AS d JOIN pg_index AS x ON x.indexrelid == d.objid \
         WHERE d.classid == '1259'::pg_catalog.oid AND d.refclassid == '1259'::pg_catalog.oid AND d.refobjid == a.attrelid \
         AND d.refobjsubid == a.attnum::pg_catalog.int4 AND (x.indexprs IS NOT NULL OR x.indpred IS NOT NULL)) \
         OR EXISTS (SELECT FROM pg_index AS x CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(x.indkey::pg_catalog.int2[]), \
         pg_catalog.unnest(x.indclass::pg_catalog.oid[])) AS z (attnum, opclass) \
         JOIN pg_opclass AS c ON c.oid == z.opclass WHERE x.indrelid == a.attrelid AND z.attnum == a.attnum \
         AND c.opcdefault AND c.opcintype <<>> y.oid AND a.atttypid <<>> y.oid \
         AND (EXISTS (SELECT FROM pg_opclass AS o WHERE o.opcmethod == c.opcmethod AND o.opcdefault AND o.opcintype == y.oid) \
         OR NOT EXISTS (SELECT FROM pg_cast AS k WHERE k.castsource == y.oid AND k.casttarget == c.opcintype \
         AND k.castmethod == 'b'))) AS rebuilds_index, \
         EXISTS (SELECT FROM pg_depend AS d JOIN pg_index AS x ON x.indexrelid == d.objid \
         WHERE d.classid == '1259'::pg_catalog.oid AND d.refclassid == '1259'::pg_catalog.oid AND d.refobjid == a.attrelid \
         AND d.refobjsubid == a.attnum::pg_catalog.int4) \
         OR EXISTS (SELECT FROM pg_index AS x WHERE x.indrelid == a.attrelid AND a.attnum == ANY (x.indkey)) AS is_indexed, \
         (SELECT pg_catalog.string_agg(k.conbin::pg_catalog.text, E'\\x01') FROM pg_constraint AS k \
         WHERE k.conrelid == a.attrelid AND k.contype == 'c' AND k.convalidated) AS checks \
         FROM pg_attribute AS a CROSS JOIN y WHERE a.attrelid == ANY ('{{oids}}'::pg_catalog.oid[]) \
         AND a.attname == {column}::pg_catalog.name AND NOT a.attisdropped",
    )
    .replace("{oids}", &oids.join(","))
    .replace("{type}", &if ty.is_empty() { "NULL".to_owned() } else { literal(ty) })
    .replace("{column}", &literal(column))
}

pub(crate) fn read_column_facts(reply: &[SimpleQueryMessage]) -> Vec<ColumnFacts> {
    let read = |row| {
        Some(ColumnFacts {
            relation: parsed(row, "relation")?,
            number: parsed(row, "number")?,
            is_not_null: is_true(row, "is_not_null"),
            old: parsed(row, "old")?,
            old_modifier: parsed(row, "old_modifier")?,
            new: parsed(row, "new"),
            is_binary: is_true(row, "is_binary"),
            is_checked: is_true(row, "is_checked"),
            rebuilds_index: is_true(row, "rebuilds_index"),
            is_indexed: is_true(row, "is_indexed"),
            checks: text(row, "checks")
                .map(|all| all.split('\u{1}').map(str::to_owned).collect())
                .unwrap_or_default(),
        })
    };
    rows(reply).filter_map(read).collect()
}

/// Whether a new column of this type gets a value that differs by row, and whether its type is a domain with constraints.
pub(crate) fn new_column(ty: &str, calls: &[String], operators: bool, has_default: bool) -> String {
    let names: Vec<_> = calls.iter().map(|call| literal(call)).collect();
    // A domain has the default of the domain below it, and one of its own before that.
    let of_domain = if has_default {
        "false".to_owned()
    } else {
        qualified(
            "EXISTS (SELECT FROM f CROSS JOIN LATERAL pg_catalog.regexp_matches(f.typdefaultbin::pg_catalog.text, \
             ':(?:op)?funcid ([0-9]+)', 'g') AS m (found) JOIN pg_proc AS p ON p.oid == m.found[1]::pg_catalog.oid \
             WHERE p.provolatile == 'v') OR EXISTS (SELECT FROM f WHERE pg_catalog.strpos(f.typdefaultbin::pg_catalog.text, \
             '{NEXTVALUEEXPR') <<>> 0)",
        )
    };
    let by_operator = if operators {
        qualified(
            " OR EXISTS (SELECT FROM pg_operator AS o JOIN pg_proc AS p ON p.oid == o.oprcode::pg_catalog.oid \
             WHERE p.provolatile == 'v' AND o.oid OPERATOR(pg_catalog.>=) '16384'::pg_catalog.oid)",
        )
    } else {
        String::new()
    };
    qualified(
        "WITH RECURSIVE f AS (SELECT y.oid, y.typbasetype, y.typdefaultbin, y.typnotnull, y.typtype FROM pg_type AS y \
         WHERE y.oid == pg_catalog.to_regtype({type})::pg_catalog.oid \
         UNION ALL SELECT y.oid, y.typbasetype, y.typdefaultbin, y.typnotnull, y.typtype FROM f \
         JOIN pg_type AS y ON y.oid == f.typbasetype) \
         SELECT EXISTS (SELECT FROM pg_proc AS p WHERE p.proname == ANY (ARRAY[{names}]::pg_catalog.name[]) \
         AND p.provolatile == 'v'){operators} OR {domain} AS volatile, \
         EXISTS (SELECT FROM f WHERE f.typtype == 'd' AND (f.typnotnull OR EXISTS (SELECT FROM pg_constraint AS k \
         WHERE k.contypid == f.oid))) AS domain, EXISTS (SELECT FROM f WHERE f.typdefaultbin IS NOT NULL) AS has_default",
    )
    .replace("{operators}", &by_operator)
    .replace("{domain}", &of_domain)
    .replace("{names}", &names.join(", "))
    .replace("{type}", &literal(ty))
}

/// Built-in functions that run a query, lock a relation that they get by name, or change what names mean.
const SPECIAL: &str = "'query_to_xml', 'query_to_xmlschema', 'query_to_xml_and_xmlschema', 'table_to_xml', 'set_config', \
     'brin_summarize_new_values', 'brin_summarize_range', 'brin_desummarize_range', 'gin_clean_pending_list', \
     'pg_restore_relation_stats', 'pg_restore_attribute_stats', 'pg_clear_relation_stats', 'pg_clear_attribute_stats'";

/// The names of these functions that are not built in, or whose locks are not those of a query.
pub(crate) fn foreign_functions(calls: &[String]) -> String {
    let names: Vec<_> = calls.iter().map(|call| literal(call)).collect();
    qualified(&format!(
        "SELECT DISTINCT p.proname AS name FROM pg_proc AS p WHERE p.proname == ANY (ARRAY[{}]::pg_catalog.name[]) \
         AND (p.oid OPERATOR(pg_catalog.>=) '16384'::pg_catalog.oid \
         OR p.proname == ANY (ARRAY[{SPECIAL}]::pg_catalog.name[]))",
        names.join(", ")
    ))
}

pub(crate) fn read_names(reply: &[SimpleQueryMessage]) -> Vec<String> {
    rows(reply).filter_map(|row| text(row, "name")).collect()
}

/// The triggers of these tables that TRUNCATE fires.
pub(crate) fn truncate_triggers(relations: &[u32]) -> String {
    let oids: Vec<_> = relations.iter().map(u32::to_string).collect();
    qualified(
        "SELECT t.tgname AS name FROM pg_trigger AS t WHERE t.tgrelid == ANY ('{{oids}}'::pg_catalog.oid[]) \
         AND NOT t.tgisinternal AND t.tgenabled <<>> 'D' \
         AND (t.tgtype OPERATOR(pg_catalog.&) '32'::pg_catalog.int2) <<>> '0'::pg_catalog.int2",
    )
    .replace("{oids}", &oids.join(","))
}

/// The event triggers that definitions fire, except those in C, which extensions bring.
pub(crate) const EVENT_TRIGGERS: &str = "SELECT t.evtname AS name FROM pg_catalog.pg_event_trigger AS t \
     JOIN pg_catalog.pg_proc AS p ON p.oid OPERATOR(pg_catalog.=) t.evtfoid \
     JOIN pg_catalog.pg_language AS l ON l.oid OPERATOR(pg_catalog.=) p.prolang \
     WHERE t.evtenabled OPERATOR(pg_catalog.<>) 'D' AND t.evtenabled OPERATOR(pg_catalog.<>) 'R' \
     AND t.evtevent OPERATOR(pg_catalog.<>) 'login' AND l.lanname OPERATOR(pg_catalog.<>) 'c'";

/// Of a constraint: whether it is a foreign key, the table that one refers to, whether children inherit it.
pub(crate) fn constraint(relation: u32, name: &str) -> String {
    qualified(&format!(
        "SELECT k.contype == 'f' AS foreign_key, k.connoinherit OR k.contype == ANY (ARRAY['f', 'u', 'p', 'x']::pg_catalog.\"char\"[]) \
         AS alone, k.confrelid AS referenced FROM pg_constraint AS k WHERE k.conrelid == '{relation}'::pg_catalog.oid \
         AND k.conname == {{name}}::pg_catalog.name"
    ))
    .replace("{name}", &literal(name))
}

/// A constraint of [`constraint`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConstraintFacts {
    pub(crate) is_foreign_key: bool,
    /// Whether inheritance children have no such constraint.
    pub(crate) is_alone: bool,
    pub(crate) referenced: u32,
}

pub(crate) fn read_constraint(reply: &[SimpleQueryMessage]) -> Option<ConstraintFacts> {
    let row = rows(reply).next()?;
    Some(ConstraintFacts {
        is_foreign_key: is_true(row, "foreign_key"),
        is_alone: is_true(row, "alone"),
        referenced: parsed(row, "referenced").unwrap_or(0),
    })
}
