//! Relations and how they hang together, and what else decides on the locks of a statement. As in `catalog`, nothing here
//! opens a relation.

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::TableName;
use crate::postgres::sql::{is_true, literal, parsed, rows, text};

/// Writes `==`, `<<>>` and `->` as operators that cannot be planted on the `search_path`. Texts of callers are put in
/// afterwards.
fn qualified(template: &str) -> String {
    template
        .replace(" == ", " OPERATOR(pg_catalog.=) ")
        .replace(" <<>> ", " OPERATOR(pg_catalog.<>) ")
        .replace(" FROM pg_", " FROM pg_catalog.pg_")
        .replace(" JOIN pg_", " JOIN pg_catalog.pg_")
        .replace("pg_catalog.pg_catalog.", "pg_catalog.")
}

/// The rows of a relation: `pg_class` as `c` and `pg_namespace` as `n`.
const RELATION: &str = "c.oid, n.nspname, c.relname, c.relkind, c.relispartition, \
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

fn role_is(owner: &str, roles: &[String]) -> String {
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

/// What is dropped: objects of `pg_depend` as `(classid, objid, objsubid)`.
pub(crate) enum Start<'a> {
    Relation(u32),
    Column(u32, &'a str),
    Constraint(u32, &'a str),
    /// A trigger, rule or policy of a relation.
    OfTable(&'a str, u32, &'a str),
    Object(&'a str, &'a TableName),
    Owned(&'a [String]),
}

impl Start<'_> {
    fn sql(&self) -> String {
        let oid = |oid: &u32| format!("'{oid}'::pg_catalog.oid");
        let class =
            |catalog: &str| format!("'pg_catalog.{catalog}'::pg_catalog.regclass::pg_catalog.oid");
        let qualified_with = |template: &str, name: &str| {
            qualified(template).replace("{name}", &format!("{}::pg_catalog.name", literal(name)))
        };
        match self {
            Self::Relation(relation) => {
                format!("SELECT '1259'::pg_catalog.oid, {}, 0", oid(relation))
            }
            Self::Column(relation, column) => qualified_with(
                &format!(
                    "SELECT '1259'::pg_catalog.oid, a.attrelid, a.attnum::pg_catalog.int4 FROM pg_attribute AS a \
                     WHERE a.attrelid == {} AND a.attname == {{name}} AND NOT a.attisdropped",
                    oid(relation)
                ),
                column,
            ),
            Self::Constraint(relation, name) => qualified_with(
                &format!(
                    "SELECT '2606'::pg_catalog.oid, k.oid, 0 FROM pg_constraint AS k \
                     WHERE k.conrelid == {} AND k.conname == {{name}}",
                    oid(relation)
                ),
                name,
            ),
            Self::OfTable(catalog, relation, name) => {
                let (owner, named) = match *catalog {
                    "pg_trigger" => ("tgrelid", "tgname"),
                    "pg_rewrite" => ("ev_class", "rulename"),
                    _ => ("polrelid", "polname"),
                };
                qualified_with(
                    &format!(
                        "SELECT {}, o.oid, 0 FROM {catalog} AS o WHERE o.{owner} == {} AND o.{named} == {{name}}",
                        class(catalog),
                        oid(relation)
                    ),
                    name,
                )
            }
            Self::Object(catalog, name) => object(catalog, &class(catalog), name),
            Self::Owned(roles) => {
                qualified(
                    "SELECT d.classid, d.objid, d.objsubid FROM pg_shdepend AS d \
                 JOIN pg_database AS b ON b.oid == d.dbid AND b.datname == pg_catalog.current_database() \
                 WHERE (d.deptype == 'o' OR d.deptype == 'r') AND d.refclassid == '1260'::pg_catalog.oid AND ",
                ) + &role_is("d.refobjid", roles)
            }
        }
    }
}

/// The objects of a name; of a function, those with any arguments.
fn object(catalog: &str, class: &str, name: &TableName) -> String {
    // The column of the name, that of the schema, and the function that says whether the name alone finds it.
    let (named, schema, is_visible) = match catalog {
        "pg_namespace" => ("nspname", "", ""),
        "pg_extension" => ("extname", "", ""),
        "pg_foreign_server" => ("srvname", "", ""),
        "pg_foreign_data_wrapper" => ("fdwname", "", ""),
        "pg_language" => ("lanname", "", ""),
        "pg_publication" => ("pubname", "", ""),
        "pg_am" => ("amname", "", ""),
        "pg_type" => ("typname", "typnamespace", "pg_type_is_visible"),
        "pg_proc" => ("proname", "pronamespace", "pg_function_is_visible"),
        "pg_collation" => ("collname", "collnamespace", "pg_collation_is_visible"),
        "pg_conversion" => ("conname", "connamespace", "pg_conversion_is_visible"),
        "pg_statistic_ext" => ("stxname", "stxnamespace", "pg_statistics_obj_is_visible"),
        "pg_ts_config" => ("cfgname", "cfgnamespace", "pg_ts_config_is_visible"),
        _ => ("dictname", "dictnamespace", "pg_ts_dict_is_visible"),
    };
    let of_schema = match name.schema() {
        Some(of) if !schema.is_empty() => format!(
            " AND o.{schema} OPERATOR(pg_catalog.=) (SELECT m.oid FROM pg_catalog.pg_namespace AS m \
             WHERE m.nspname OPERATOR(pg_catalog.=) {}::pg_catalog.name)",
            literal(of)
        ),
        None if !is_visible.is_empty() => format!(" AND pg_catalog.{is_visible}(o.oid)"),
        _ => String::new(),
    };
    format!(
        "SELECT {class}, o.oid, 0 FROM pg_catalog.{catalog} AS o \
         WHERE o.{named} OPERATOR(pg_catalog.=) {}::pg_catalog.name{of_schema}",
        literal(name.name())
    )
}

/// The relations that are locked when an object is dropped with all that depends on it: the owners of dropped columns,
/// constraints, triggers, rules, defaults and policies, dropped relations, the parents of dropped partitions and the
/// default partitions beside them. `lock` is `statistics` for tables that lose only extended statistics.
///
/// With RESTRICT, which is the default, the server drops what depends automatically, and refuses if there is anything
/// else; then it makes no difference what is found here (`findDependentObjects` in `src/backend/catalog/dependency.c`).
pub(crate) fn dropped(start: &Start<'_>) -> String {
    qualified(&format!(
        "WITH RECURSIVE g (c, o, s) AS (({{start}}) UNION SELECT x.c, x.o, x.s FROM g CROSS JOIN LATERAL \
         (SELECT d.classid AS c, d.objid AS o, d.objsubid AS s FROM pg_depend AS d \
         WHERE d.refclassid == g.c AND d.refobjid == g.o AND (g.s == 0 OR d.refobjsubid == g.s) \
         UNION ALL SELECT d.refclassid, d.refobjid, d.refobjsubid FROM pg_depend AS d \
         WHERE d.classid == g.c AND d.objid == g.o AND (g.s == 0 OR d.objsubid == g.s) \
         AND (d.deptype == 'i' OR d.deptype == 'e')) AS x), \
         l (oid, lock) AS (SELECT g.o, '' FROM g WHERE g.c == '1259'::pg_catalog.oid \
         UNION ALL SELECT x.indrelid, '' FROM g JOIN pg_index AS x ON x.indexrelid == g.o WHERE g.c == '1259'::pg_catalog.oid \
         UNION ALL SELECT i.inhparent, '' FROM g JOIN pg_class AS c ON c.oid == g.o AND c.relispartition \
         AND c.relkind <<>> 'i' AND c.relkind <<>> 'I' JOIN pg_inherits AS i ON i.inhrelid == g.o WHERE g.c == '1259'::pg_catalog.oid AND g.s == 0 \
         UNION ALL SELECT p.partdefid, '' FROM g JOIN pg_class AS c ON c.oid == g.o AND c.relispartition \
         JOIN pg_inherits AS i ON i.inhrelid == g.o JOIN pg_partitioned_table AS p ON p.partrelid == i.inhparent \
         WHERE g.c == '1259'::pg_catalog.oid AND g.s == 0 \
         UNION ALL SELECT k.conrelid, '' FROM g JOIN pg_constraint AS k ON k.oid == g.o WHERE g.c == '2606'::pg_catalog.oid \
         UNION ALL SELECT t.tgrelid, '' FROM g JOIN pg_trigger AS t ON t.oid == g.o WHERE g.c == '2620'::pg_catalog.oid \
         UNION ALL SELECT r.ev_class, '' FROM g JOIN pg_rewrite AS r ON r.oid == g.o WHERE g.c == '2618'::pg_catalog.oid \
         UNION ALL SELECT a.adrelid, '' FROM g JOIN pg_attrdef AS a ON a.oid == g.o WHERE g.c == '2604'::pg_catalog.oid \
         UNION ALL SELECT p.polrelid, '' FROM g JOIN pg_policy AS p ON p.oid == g.o WHERE g.c == '3256'::pg_catalog.oid \
         UNION ALL SELECT x.stxrelid, 'statistics' FROM g JOIN pg_statistic_ext AS x ON x.oid == g.o \
         WHERE g.c == '3381'::pg_catalog.oid) \
         SELECT DISTINCT {RELATION}, l.lock FROM l JOIN pg_class AS c ON c.oid == l.oid \
         JOIN pg_namespace AS n ON n.oid == c.relnamespace WHERE c.relkind <<>> 't' \
         ORDER BY c.oid USING OPERATOR(pg_catalog.<)"
    ))
    .replace("{start}", &start.sql())
}

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

/// The names of these functions that are not built in, or that are said to do something with a relation by its name.
pub(crate) fn foreign_functions(calls: &[String]) -> String {
    let names: Vec<_> = calls.iter().map(|call| literal(call)).collect();
    qualified(&format!(
        "SELECT DISTINCT p.proname AS name FROM pg_proc AS p WHERE p.proname == ANY (ARRAY[{}]::pg_catalog.name[]) \
         AND p.oid OPERATOR(pg_catalog.>=) '16384'::pg_catalog.oid",
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
