//! What is dropped with all that depends on it.

use super::graph::{RELATION, qualified, role_is};
use crate::postgres::TableName;
use crate::postgres::sql::literal;

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
