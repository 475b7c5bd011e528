//! Relations and how they hang together, and what else decides on the locks of a statement. As in `catalog`, nothing here
//! opens a relation.

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::TableName;
use crate::postgres::sql::{is_true, literal, parsed, rows, text};

/// Writes `==`, `<<>>` and `->` as operators that cannot be planted on the `search_path`. Texts of callers are put in
/// afterwards.
pub(super) fn qualified(template: &str) -> String {
    template
        .replace(" == ", " OPERATOR(pg_catalog.=) ")
        .replace(" <<>> ", " OPERATOR(pg_catalog.<>) ")
        .replace(" FROM pg_", " FROM pg_catalog.pg_")
        .replace(" JOIN pg_", " JOIN pg_catalog.pg_")
        .replace("pg_catalog.pg_catalog.", "pg_catalog.")
}

/// The rows of a relation: `pg_class` as `c` and `pg_namespace` as `n`.
pub(super) const RELATION: &str = "c.oid, n.nspname, c.relname, c.relkind, c.relispartition, \
     GREATEST(c.reltuples::pg_catalog.int8, pg_catalog.pg_stat_get_live_tuples(c.oid)) AS tuples";

/// The relations of these names and all that hang together with them by inheritance, foreign keys, indexes, owned
/// sequences and views. The first column says what a row is.
pub(crate) fn graph(names: &[TableName]) -> String {
    let names: Vec<String> = (names.iter().enumerate())
        .map(|(at, name)| {
            let schema = match name.schema() {
                Some(schema) => format!("{}::pg_catalog.name", literal(schema)),
                None => "NULL::pg_catalog.name".to_owned(),
            };
            format!(
                "({at}, {schema}, {}::pg_catalog.name)",
                literal(name.name())
            )
        })
        .collect();
    let template = "WITH RECURSIVE w (at, schema, name) AS (VALUES {names}), \
         named AS MATERIALIZED (SELECT w.at, c.oid FROM pg_class AS c \
         JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         JOIN w ON c.relname == w.name AND CASE WHEN w.schema IS NULL THEN pg_catalog.pg_table_is_visible(c.oid) \
         WHEN w.schema == 'pg_temp'::pg_catalog.name THEN n.oid == pg_catalog.pg_my_temp_schema() \
         ELSE n.nspname == w.schema END), \
         k AS MATERIALIZED (SELECT k.oid, k.conname, k.conrelid, k.confrelid, k.conparentid, k.conkey \
         FROM pg_constraint AS k WHERE k.contype == 'f'), \
         s AS MATERIALIZED (SELECT d.objid, d.refobjid, d.refobjsubid, d.deptype FROM pg_depend AS d \
         JOIN pg_class AS q ON q.oid == d.objid AND q.relkind == 'S' \
         WHERE d.classid == '1259'::pg_catalog.oid AND d.refclassid == '1259'::pg_catalog.oid \
         AND (d.deptype == 'a' OR d.deptype == 'i')), \
         v AS MATERIALIZED (SELECT DISTINCT r.ev_class, d.refobjid FROM pg_rewrite AS r \
         JOIN pg_depend AS d ON d.classid == '2618'::pg_catalog.oid AND d.objid == r.oid \
         AND d.refclassid == '1259'::pg_catalog.oid WHERE r.ev_type == '1' AND d.refobjid <<>> r.ev_class), \
         e (a, b) AS MATERIALIZED (SELECT i.inhrelid, i.inhparent FROM pg_inherits AS i \
         UNION ALL SELECT i.inhparent, i.inhrelid FROM pg_inherits AS i \
         UNION ALL SELECT x.indexrelid, x.indrelid FROM pg_index AS x UNION ALL SELECT x.indrelid, x.indexrelid FROM pg_index AS x \
         UNION ALL SELECT k.conrelid, k.confrelid FROM k UNION ALL SELECT k.confrelid, k.conrelid FROM k \
         UNION ALL SELECT s.objid, s.refobjid FROM s UNION ALL SELECT s.refobjid, s.objid FROM s \
         UNION ALL SELECT v.ev_class, v.refobjid FROM v), \
         f AS (SELECT named.oid FROM named UNION SELECT e.b FROM f JOIN e ON e.a == f.oid) \
         SELECT 'name' AS what, named.at AS a, named.oid AS b, NULL::pg_catalog.oid AS c, NULL::pg_catalog.text AS d, \
         NULL::pg_catalog.bool AS e, NULL::pg_catalog.text AS nspname, NULL::pg_catalog.text AS relname, \
         NULL::pg_catalog.text AS relkind, NULL::pg_catalog.bool AS relispartition, NULL::pg_catalog.int8 AS tuples, \
         NULL::pg_catalog.oid AS oid FROM named \
         UNION ALL SELECT 'relation', 0, p.partdefid, c.relam, NULL, c.relpersistence == 't', n.nspname, c.relname, \
         c.relkind::pg_catalog.text, c.relispartition, \
         GREATEST(c.reltuples::pg_catalog.int8, pg_catalog.pg_stat_get_live_tuples(c.oid)), c.oid FROM f \
         JOIN pg_class AS c ON c.oid == f.oid JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         LEFT JOIN pg_partitioned_table AS p ON p.partrelid == c.oid \
         UNION ALL SELECT 'inherits', 0, i.inhrelid, i.inhparent, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL \
         FROM pg_inherits AS i JOIN f ON f.oid == i.inhparent \
         UNION ALL SELECT 'index', 0, x.indexrelid, x.indrelid, NULL, NULL, NULL, NULL, NULL, x.indisclustered, NULL, NULL FROM pg_index AS x JOIN f ON f.oid == x.indrelid \
         UNION ALL SELECT 'key', 0, k.conrelid, k.confrelid, k.conname::pg_catalog.text, k.conparentid == '0'::pg_catalog.oid, \
         (SELECT pg_catalog.string_agg(a.attname::pg_catalog.text, ',' ORDER BY z.n USING OPERATOR(pg_catalog.<)) \
         FROM pg_catalog.unnest(k.conkey) WITH ORDINALITY AS z (attnum, n) \
         JOIN pg_attribute AS a ON a.attrelid == k.conrelid AND a.attnum == z.attnum), NULL, NULL, NULL, \
         k.conparentid::pg_catalog.int8, NULL \
         FROM k JOIN f ON f.oid == k.conrelid \
         UNION ALL SELECT 'sequence', s.refobjsubid, s.objid, s.refobjid, NULL, s.deptype == 'i', NULL, \
         (SELECT a.attname::pg_catalog.text FROM pg_attribute AS a WHERE a.attrelid == s.refobjid AND a.attnum == s.refobjsubid), \
         NULL, NULL, NULL, NULL FROM s JOIN f ON f.oid == s.refobjid \
         UNION ALL SELECT 'view', 0, v.ev_class, v.refobjid, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL \
         FROM v JOIN f ON f.oid == v.ev_class";
    qualified(template).replace("{names}", &names.join(", "))
}

/// What a row of [`graph`] says.
pub(crate) enum GraphRow {
    /// The relation of the name at this position.
    Name(usize, u32),
    Relation {
        relation: GraphRelation,
        default: Option<u32>,
    },
    Inherits {
        child: u32,
        parent: u32,
    },
    Index {
        index: u32,
        table: u32,
        is_clustered: bool,
    },
    Key(GraphKey),
    Sequence {
        sequence: u32,
        table: u32,
        column: String,
        is_identity: bool,
    },
    View {
        view: u32,
        relation: u32,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct GraphRelation {
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    pub(crate) kind: char,
    pub(crate) is_partition: bool,
    pub(crate) rows: Option<u64>,
}

/// A foreign key. One of a partition has a parent.
#[derive(Clone, Debug)]
pub(crate) struct GraphKey {
    pub(crate) parent: Option<u32>,
    pub(crate) table: u32,
    pub(crate) referenced: u32,
    pub(crate) name: String,
    pub(crate) columns: String,
}

pub(crate) fn read_graph(reply: &[SimpleQueryMessage]) -> Vec<GraphRow> {
    let read = |row| {
        Some(match text(row, "what")?.as_str() {
            "name" => GraphRow::Name(parsed(row, "a")?, parsed(row, "b")?),
            "relation" => GraphRow::Relation {
                relation: read_relation(row)?,
                default: parsed(row, "b").filter(|oid| *oid != 0),
            },
            "inherits" => GraphRow::Inherits {
                child: parsed(row, "b")?,
                parent: parsed(row, "c")?,
            },
            "index" => GraphRow::Index {
                index: parsed(row, "b")?,
                table: parsed(row, "c")?,
                is_clustered: is_true(row, "relispartition"),
            },
            "key" => GraphRow::Key(GraphKey {
                parent: parsed(row, "tuples").filter(|oid| *oid != 0),
                table: parsed(row, "b")?,
                referenced: parsed(row, "c")?,
                name: text(row, "d")?,
                columns: text(row, "nspname").unwrap_or_default(),
            }),
            "sequence" => GraphRow::Sequence {
                sequence: parsed(row, "b")?,
                table: parsed(row, "c")?,
                column: text(row, "relname").unwrap_or_default(),
                is_identity: is_true(row, "e"),
            },
            "view" => GraphRow::View {
                view: parsed(row, "b")?,
                relation: parsed(row, "c")?,
            },
            _ => return None,
        })
    };
    rows(reply).filter_map(read).collect()
}

fn read_relation(row: &tokio_postgres::SimpleQueryRow) -> Option<GraphRelation> {
    Some(GraphRelation {
        oid: parsed(row, "oid")?,
        schema: text(row, "nspname")?,
        name: text(row, "relname")?,
        kind: parsed(row, "relkind")?,
        is_partition: is_true(row, "relispartition"),
        rows: parsed::<i64>(row, "tuples").and_then(|rows| u64::try_from(rows).ok()),
    })
}

/// The relations of a reply, each with its `lock`, if the query has that column.
pub(crate) fn read_relations(reply: &[SimpleQueryMessage]) -> Vec<(GraphRelation, String)> {
    let read = |row| Some((read_relation(row)?, text(row, "lock").unwrap_or_default()));
    rows(reply).filter_map(read).collect()
}

/// Every table and materialized view of the database, partitioned ones too, and those of other sessions' temporary
/// schemas not.
pub(crate) fn every_table(is_clustered: bool) -> String {
    let condition = if is_clustered {
        " AND EXISTS (SELECT FROM pg_index AS x WHERE x.indrelid == c.oid AND x.indisclustered)"
    } else {
        ""
    };
    qualified(&format!(
        "SELECT {RELATION} FROM pg_class AS c JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         WHERE c.relkind == ANY (ARRAY['r', 'p', 'm']::pg_catalog.\"char\"[]) \
         AND c.oid OPERATOR(pg_catalog.>=) '16384'::pg_catalog.oid \
         AND (c.relpersistence <<>> 't' OR n.oid == pg_catalog.pg_my_temp_schema()){condition}"
    ))
}

/// Every relation of a schema that is locked by itself.
pub(crate) fn of_schema(schema: &str) -> String {
    qualified(&format!(
        "SELECT {RELATION} FROM pg_class AS c JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         WHERE c.relkind == ANY (ARRAY['r', 'p', 'm']::pg_catalog.\"char\"[]) AND n.nspname == "
    )) + &format!("{}::pg_catalog.name", literal(schema))
}

/// Every relation of these roles; an empty name is the current role.
pub(crate) fn owned_by(roles: &[String]) -> String {
    qualified(&format!(
        "SELECT {RELATION} FROM pg_class AS c JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         WHERE c.relkind <<>> 't' AND "
    )) + &role_is("c.relowner", roles)
}

pub(super) fn role_is(owner: &str, roles: &[String]) -> String {
    let names: Vec<_> = (roles.iter())
        .map(|role| match role.as_str() {
            "" => "CURRENT_USER::pg_catalog.name".to_owned(),
            role => format!("{}::pg_catalog.name", literal(role)),
        })
        .collect();
    format!(
        "{owner} OPERATOR(pg_catalog.=) ANY (SELECT r.oid FROM pg_catalog.pg_roles AS r \
         WHERE r.rolname OPERATOR(pg_catalog.=) ANY (ARRAY[{}]))",
        names.join(", ")
    )
}

/// The tables of a publication, and their children.
pub(crate) fn of_publication(name: &str) -> String {
    qualified(&format!(
        "WITH RECURSIVE f AS (SELECT r.prrelid AS oid FROM pg_publication_rel AS r \
         JOIN pg_publication AS p ON p.oid == r.prpubid WHERE p.pubname == {{name}}::pg_catalog.name \
         UNION SELECT i.inhrelid FROM f JOIN pg_inherits AS i ON i.inhparent == f.oid) \
         SELECT {RELATION} FROM f JOIN pg_class AS c ON c.oid == f.oid JOIN pg_namespace AS n ON n.oid == c.relnamespace"
    ))
    .replace("{name}", &literal(name))
}

/// Which type a name means: `y` of `pg_type`.
fn type_is(name: &TableName) -> String {
    let by_schema = match name.schema() {
        Some(schema) => format!(
            "y.typnamespace OPERATOR(pg_catalog.=) (SELECT m.oid FROM pg_catalog.pg_namespace AS m \
             WHERE m.nspname OPERATOR(pg_catalog.=) {}::pg_catalog.name)",
            literal(schema)
        ),
        None => "pg_catalog.pg_type_is_visible(y.oid)".to_owned(),
    };
    format!(
        "y.typname OPERATOR(pg_catalog.=) {}::pg_catalog.name AND {by_schema}",
        literal(name.name())
    )
}

/// The tables with a column of a domain, or of a domain over it.
pub(crate) fn of_domain(domain: &TableName) -> String {
    qualified(&format!(
        "WITH RECURSIVE f AS (SELECT y.oid FROM pg_type AS y WHERE {{type}} \
         UNION SELECT y.oid FROM f JOIN pg_type AS y ON y.typbasetype == f.oid) \
         SELECT DISTINCT {RELATION} FROM f JOIN pg_attribute AS a ON a.atttypid == f.oid AND NOT a.attisdropped \
         JOIN pg_class AS c ON c.oid == a.attrelid JOIN pg_namespace AS n ON n.oid == c.relnamespace \
         WHERE c.relkind == ANY (ARRAY['r', 'm']::pg_catalog.\"char\"[])"
    ))
    .replace("{type}", &type_is(domain))
}

/// The relation of a composite type, and the tables of that type and their children.
pub(crate) fn of_type(ty: &TableName, with_tables: bool) -> String {
    let tables = if with_tables {
        "UNION SELECT c.oid FROM pg_class AS c JOIN y ON y.oid == c.reloftype \
         UNION SELECT c.oid FROM y JOIN pg_class AS c ON c.oid == y.typrelid"
    } else {
        ""
    };
    qualified(&format!(
        "WITH RECURSIVE y AS (SELECT y.oid, y.typrelid FROM pg_type AS y WHERE {{type}}), \
         t AS (SELECT y.typrelid AS oid FROM y {tables}), \
         f AS (SELECT t.oid FROM t UNION SELECT i.inhrelid FROM f JOIN pg_inherits AS i ON i.inhparent == f.oid) \
         SELECT DISTINCT {RELATION} FROM f JOIN pg_class AS c ON c.oid == f.oid JOIN pg_namespace AS n ON n.oid == c.relnamespace"
    ))
    .replace("{type}", &type_is(ty))
}
