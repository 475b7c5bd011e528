//! The statements of the procedures, and catalog queries that determine which of them are left to do.

use tokio_postgres::SimpleQueryMessage;

use super::catalog::proves_not_null;
use super::columns;
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};
use crate::postgres::table_name::TableName;

pub(crate) fn add_check(table: &TableName, name: &str, expression: &str) -> String {
    // The line break ends a comment at the end of the caller's text.
    format!(
        "ALTER TABLE {table} ADD CONSTRAINT {} CHECK ({expression}\n) NOT VALID",
        identifier(name)
    )
}

/// Whether a CHECK has the same expression. It adds the expression to an empty temporary table that the transaction
/// drops.
pub(crate) fn is_same_check(
    table: &TableName,
    oid: u32,
    name: &str,
    expression: &str,
    lock_timeout: i32,
) -> String {
    let aside = TableName::in_schema("pg_temp", table.name());
    let expression_of = |of: &str| {
        format!(
            "SELECT pg_catalog.pg_get_expr(k.conbin, k.conrelid) FROM pg_catalog.pg_constraint AS k \
             WHERE k.conname OPERATOR(pg_catalog.=) {}::pg_catalog.name AND k.conrelid OPERATOR(pg_catalog.=) {of}",
            literal(name)
        )
    };
    let other = format!(
        "ANY (SELECT c.oid FROM pg_catalog.pg_class AS c WHERE c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name \
         AND c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema())",
        literal(table.name())
    );
    format!(
        "SET LOCAL lock_timeout = {lock_timeout}; CREATE TEMPORARY TABLE {} (LIKE {table}) ON COMMIT DROP; {}; \
         SELECT COALESCE(pg_catalog.texteq(({}), ({})), false) AS yes",
        identifier(table.name()),
        add_check(&aside, name, expression),
        expression_of(&format!("'{oid}'::pg_catalog.oid")),
        expression_of(&other)
    )
}

/// The expression of a CHECK that implies NOT NULL.
pub(crate) fn is_not_null(column: &str) -> String {
    format!("{} IS NOT NULL", identifier(column))
}

pub(crate) fn validate(table: &TableName, name: &str) -> String {
    format!(
        "ALTER TABLE {table} VALIDATE CONSTRAINT {}",
        identifier(name)
    )
}

pub(crate) fn drop_constraint(table: &TableName, name: &str) -> String {
    format!(
        "ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {}",
        identifier(name)
    )
}

pub(crate) fn set_not_null(table: &TableName, column: &str) -> String {
    format!(
        "ALTER TABLE {table} ALTER COLUMN {} SET NOT NULL",
        identifier(column)
    )
}

pub(crate) fn primary_key_using(table: &TableName, index: &str) -> String {
    let index = identifier(index);
    format!("ALTER TABLE {table} ADD CONSTRAINT {index} PRIMARY KEY USING INDEX {index}")
}

/// The primary key of a partitioned table alone.
pub(crate) fn primary_key_only(table: &TableName, name: &str, key: &[String]) -> String {
    format!(
        "ALTER TABLE ONLY {table} ADD CONSTRAINT {} PRIMARY KEY ({})",
        identifier(name),
        columns(key)
    )
}

/// The definition of a foreign key to add.
#[derive(Clone, Debug)]
pub(crate) struct ForeignKey {
    pub(crate) columns: Vec<String>,
    pub(crate) referenced: TableName,
    pub(crate) referenced_columns: Vec<String>,
    pub(crate) on_delete: Option<&'static str>,
    pub(crate) on_update: Option<&'static str>,
}

impl ForeignKey {
    /// The actions on delete and on update, as in `pg_constraint`.
    pub(crate) fn actions(&self) -> (char, char) {
        let code = |action: Option<&str>| match action {
            None | Some("NO ACTION") => 'a',
            Some("RESTRICT") => 'r',
            Some("CASCADE") => 'c',
            Some("SET NULL") => 'n',
            Some(_) => 'd',
        };
        (code(self.on_delete), code(self.on_update))
    }
}

pub(crate) fn add_foreign_key(
    table: &TableName,
    name: &str,
    key: &ForeignKey,
    valid: bool,
) -> String {
    let mut sql = format!(
        "ALTER TABLE {table} ADD CONSTRAINT {} FOREIGN KEY ({}) REFERENCES {}",
        identifier(name),
        columns(&key.columns),
        key.referenced
    );
    if !key.referenced_columns.is_empty() {
        sql.push_str(&format!(" ({})", columns(&key.referenced_columns)));
    }
    for (event, action) in [("DELETE", key.on_delete), ("UPDATE", key.on_update)] {
        if let Some(action) = action {
            sql.push_str(&format!(" ON {event} {action}"));
        }
    }
    if !valid {
        sql.push_str(" NOT VALID");
    }
    sql
}

pub(crate) fn add_column(
    table: &TableName,
    column: &str,
    ty: &str,
    default: Option<&str>,
    not_null: bool,
) -> String {
    let default = default.map_or_else(String::new, |default| format!(" DEFAULT ({default}\n)"));
    let not_null = if not_null { " NOT NULL" } else { "" };
    format!(
        "ALTER TABLE {table} ADD COLUMN {} {ty}{default}{not_null}",
        identifier(column)
    )
}

pub(crate) fn set_default(table: &TableName, column: &str, default: &str) -> String {
    format!(
        "ALTER TABLE {table} ALTER COLUMN {} SET DEFAULT ({default}\n)",
        identifier(column)
    )
}

/// Sets the column's default in existing rows. Too long for one statement; to be run in batches.
pub(crate) fn fill(table: &TableName, column: &str) -> String {
    let column = identifier(column);
    format!("UPDATE {table} SET {column} = DEFAULT WHERE {column} IS NULL")
}

/// Swaps two tables in one transaction. `catch_up` is the caller's SQL and runs while no other session can read or
/// write the old table. `likeness` gives the new table what the old one has.
pub(crate) fn swap(
    table: &TableName,
    new: &TableName,
    old: &str,
    catch_up: Option<&str>,
    likeness: &[String],
) -> String {
    let likeness: String = likeness.iter().map(|sql| format!("{sql}; ")).collect();
    let catch_up = catch_up.map_or_else(String::new, |sql| {
        let sql = sql.trim_end().trim_end_matches(';');
        format!("{sql}\n; ")
    });
    format!(
        "LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE; {catch_up}{likeness}ALTER TABLE {table} RENAME TO {}; \
         ALTER TABLE {new} RENAME TO {}; COMMENT ON TABLE {} IS {}",
        identifier(old),
        identifier(table.name()),
        table.sibling(old),
        literal(&replaced_by(new))
    )
}

/// The comment of a table that was replaced, by which a completed swap is recognized.
pub(crate) fn replaced_by(new: &TableName) -> String {
    format!("replaced by lockkeeper with {new}")
}

/// Whether a table has this comment.
pub(crate) fn has_comment(table: u32, comment: &str) -> String {
    format!(
        "SELECT COALESCE(pg_catalog.texteq(pg_catalog.obj_description('{table}'::pg_catalog.oid, 'pg_class'), {}), false) AS yes",
        literal(comment)
    )
}

pub(crate) fn drop_table(table: &TableName) -> String {
    format!("DROP TABLE IF EXISTS {table}")
}

/// Several statements as one batch.
pub(crate) fn batch(statements: &[String]) -> String {
    statements.join("; ")
}

/// A constraint of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Constraint {
    pub(crate) name: String,
    /// `pg_constraint.contype`.
    pub(crate) kind: char,
    pub(crate) is_valid: bool,
    pub(crate) columns: Vec<String>,
    pub(crate) referenced: Option<u32>,
    pub(crate) index: Option<u32>,
    /// Whether it is a CHECK that its column is not NULL, and nothing else.
    pub(crate) is_proof: bool,
    pub(crate) referenced_columns: Vec<String>,
    /// `confdeltype` and `confupdtype`.
    pub(crate) actions: (char, char),
}

pub(crate) fn constraints(table: u32) -> String {
    format!(
        "SELECT k.conname, k.contype, k.convalidated, k.confrelid, k.conindid, k.confdeltype, k.confupdtype, \
         {} AS proof, \
         (SELECT pg_catalog.string_agg(a.attname::pg_catalog.text, pg_catalog.chr(10) \
         ORDER BY c.place USING OPERATOR(pg_catalog.<)) \
         FROM pg_catalog.unnest(k.confkey) WITH ORDINALITY AS c (attnum, place) \
         JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) k.confrelid \
         AND a.attnum OPERATOR(pg_catalog.=) c.attnum) AS referenced, \
         (SELECT pg_catalog.string_agg(a.attname::pg_catalog.text, pg_catalog.chr(10) \
         ORDER BY c.place USING OPERATOR(pg_catalog.<)) \
         FROM pg_catalog.unnest(k.conkey) WITH ORDINALITY AS c (attnum, place) \
         JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) k.conrelid \
         AND a.attnum OPERATOR(pg_catalog.=) c.attnum) AS columns \
         FROM pg_catalog.pg_constraint AS k WHERE k.conrelid OPERATOR(pg_catalog.=) '{table}'::pg_catalog.oid",
        proves_not_null("k")
    )
}

pub(crate) fn read_constraints(reply: &[SimpleQueryMessage]) -> Vec<Constraint> {
    let read = |row| {
        let some = |column| parsed::<u32>(row, column).filter(|oid| *oid > 0);
        let names = |column| {
            text(row, column)
                .map_or_else(Vec::new, |all| all.split('\n').map(str::to_owned).collect())
        };
        let action = |column| parsed::<char>(row, column).unwrap_or(' ');
        Some(Constraint {
            name: text(row, "conname")?,
            kind: parsed(row, "contype")?,
            is_valid: is_true(row, "convalidated"),
            columns: names("columns"),
            referenced: some("confrelid"),
            index: some("conindid"),
            is_proof: is_true(row, "proof"),
            referenced_columns: names("referenced"),
            actions: (action("confdeltype"), action("confupdtype")),
        })
    };
    rows(reply).filter_map(read).collect()
}

/// Whether a column of a table is nullable, and whether it has this type.
pub(crate) fn column(table: u32, name: &str, ty: Option<&str>) -> String {
    let same = ty.map_or_else(
        || "true".to_owned(),
        |ty| {
            format!(
                "COALESCE(a.atttypid OPERATOR(pg_catalog.=) pg_catalog.to_regtype({})::pg_catalog.oid, true)",
                literal(ty)
            )
        },
    );
    format!(
        "SELECT a.attnotnull, {same} AS same, (SELECT k.conname FROM pg_catalog.pg_constraint AS k \
         WHERE k.conrelid OPERATOR(pg_catalog.=) a.attrelid AND k.contype OPERATOR(pg_catalog.=) 'n' \
         AND NOT k.convalidated AND k.conkey OPERATOR(pg_catalog.=) ARRAY[a.attnum]) AS unproven FROM pg_catalog.pg_attribute AS a \
         WHERE a.attrelid OPERATOR(pg_catalog.=) '{table}'::pg_catalog.oid AND a.attnum OPERATOR(pg_catalog.>) 0 \
         AND a.attname OPERATOR(pg_catalog.=) {}::pg_catalog.name AND NOT a.attisdropped",
        literal(name)
    )
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) not_null: bool,
    pub(crate) same_type: bool,
    /// The name of its NOT NULL constraint, if that is not valid (PostgreSQL 18).
    pub(crate) unproven: Option<String>,
}

pub(crate) fn read_column(reply: &[SimpleQueryMessage]) -> Option<Column> {
    let row = rows(reply).next()?;
    Some(Column {
        not_null: is_true(row, "attnotnull"),
        same_type: is_true(row, "same"),
        unproven: text(row, "unproven"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_comments_end_before_what_follows() {
        let table = TableName::from("t");
        let sql = add_check(&table, "c", "a > 0 -- positive");
        assert!(sql.ends_with("positive\n) NOT VALID"), "{sql}");
        let sql = swap(
            &table,
            &TableName::from("n"),
            "o",
            Some("INSERT INTO n TABLE t -- all; "),
            &[],
        );
        assert!(sql.contains("-- all\n; ALTER TABLE"), "{sql}");
    }

    #[test]
    fn names_are_quoted() {
        let key = ForeignKey {
            columns: vec!["a\"b".into()],
            referenced: TableName::in_schema("S", "P"),
            referenced_columns: vec!["Id".into()],
            on_delete: Some("SET NULL"),
            on_update: None,
        };
        assert_eq!(
            add_foreign_key(&TableName::new("T"), "n", &key, false),
            "ALTER TABLE \"T\" ADD CONSTRAINT \"n\" FOREIGN KEY (\"a\"\"b\") REFERENCES \"S\".\"P\" (\"Id\") \
             ON DELETE SET NULL NOT VALID"
        );
    }
}
