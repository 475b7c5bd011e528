//! The table of a backfill and its key, from the catalogs.

use tokio_postgres::SimpleQueryMessage;

use super::{equal, name_literal};
use crate::postgres::TableName;
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// A table that can be processed in the order of a key.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) table: TableName,
    /// The oids of the table and its partitions.
    pub(crate) oids: Vec<u32>,
    pub(crate) key: Vec<KeyColumn>,
    /// The operators of the key's index: `<`, `>` and, for each column, `=`.
    pub(super) less: String,
    pub(super) greater: String,
}

/// A column of the key.
#[derive(Clone, Debug)]
pub(crate) struct KeyColumn {
    pub(crate) name: String,
    /// The type, quoted and with its schema.
    pub(crate) type_name: String,
    pub(super) equal: String,
    /// What determines the order of the values. A checkpoint is valid only for the same order.
    pub(super) order: String,
    pub(super) text: KeyText,
}

/// On which settings the text of a key's values depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyText {
    /// On none.
    Fixed,
    /// On `DateStyle`: a date or a time.
    Time,
    /// On other settings, or unknown.
    Settings,
}

impl KeyText {
    fn of(schema: &str, name: &str, category: &str) -> Self {
        const NUMBERS: [&str; 5] = ["int2", "int4", "int8", "numeric", "oid"];
        const OTHERS: [&str; 4] = ["uuid", "bytea", "pg_lsn", "jsonb"];
        match category {
            "D" => Self::Time,
            // Texts, enumerations, booleans, network addresses, bit strings.
            "S" | "E" | "B" | "I" | "V" => Self::Fixed,
            "N" if schema == "pg_catalog" && NUMBERS.contains(&name) => Self::Fixed,
            "U" if schema == "pg_catalog" && OTHERS.contains(&name) => Self::Fixed,
            // Floats, intervals, money; ranges, arrays and composites of them and of times.
            _ => Self::Settings,
        }
    }
}

/// Queries the table, its partitions, the columns of the key, and the operators of a unique index on exactly these
/// columns: one message of three statements. Of several such indexes, the primary key's comes first, so that all runs
/// use the same one.
///
/// The planner uses an index only for operators of its operator family. For most types they are in `pg_catalog`; for
/// types of extensions such as `citext` they are in the extension's schema.
pub(crate) fn target(table: &TableName, key: &[String]) -> String {
    let schema = table.schema().map_or_else(
        || "pg_catalog.pg_table_is_visible(c.oid)".to_owned(),
        |schema| equal("n.nspname", &name_literal(schema)),
    );
    let target = format!(
        "t AS MATERIALIZED (SELECT c.oid, n.nspname, c.relname, c.relkind FROM pg_catalog.pg_class AS c \
         JOIN pg_catalog.pg_namespace AS n ON {} WHERE {} AND {schema})",
        equal("n.oid", "c.relnamespace"),
        equal("c.relname", &name_literal(table.name())),
    );
    let columns: Vec<String> = key
        .iter()
        .zip(1..)
        .map(|(name, place)| format!("({place}, {})", name_literal(name)))
        .collect();
    let columns = format!(
        "k AS MATERIALIZED (SELECT v.place, v.name, a.attnum, a.attcollation, a.atttypid, a.attnotnull AND NOT EXISTS \
         (SELECT FROM pg_catalog.pg_constraint AS o WHERE {} AND {} AND NOT o.convalidated \
         AND a.attnum OPERATOR(pg_catalog.=) ANY (o.conkey)) AS not_null \
         FROM (VALUES {}) AS v (place, name) CROSS JOIN t \
         JOIN pg_catalog.pg_attribute AS a ON {} AND {} AND a.attnum OPERATOR(pg_catalog.>) 0)",
        equal("o.conrelid", "a.attrelid"),
        equal("o.contype", "'n'"),
        columns.join(", "),
        equal("a.attrelid", "t.oid"),
        equal("a.attname", "v.name"),
    );
    let operator = |strategy: u32| {
        format!(
            "(SELECT pg_catalog.format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_catalog.pg_amop AS m \
             JOIN pg_catalog.pg_operator AS o ON {} JOIN pg_catalog.pg_namespace AS n ON {} \
             WHERE {} AND {} AND {} AND {})",
            equal("o.oid", "m.amopopr"),
            equal("n.oid", "o.oprnamespace"),
            equal("m.amopfamily", "c.opcfamily"),
            equal("m.amoplefttype", "c.opcintype"),
            equal("m.amoprighttype", "c.opcintype"),
            equal("m.amopstrategy", &strategy.to_string()),
        )
    };
    let columns_of_key = key.len();
    format!(
        "WITH RECURSIVE {target}, p AS (SELECT t.oid FROM t UNION SELECT i.inhrelid FROM p \
         JOIN pg_catalog.pg_inherits AS i ON {}) \
         SELECT p.oid, {} AS is_it, t.nspname, t.relname, t.relkind FROM t CROSS JOIN p; \
         WITH {target}, {columns} SELECT k.place, k.not_null, n.nspname, y.typname, y.typcategory, \
         (SELECT pg_catalog.format(' COLLATE %I.%I', s.nspname, o.collname) FROM pg_catalog.pg_collation AS o \
         JOIN pg_catalog.pg_namespace AS s ON {} WHERE {}) AS collation FROM k \
         JOIN pg_catalog.pg_type AS y ON {} JOIN pg_catalog.pg_namespace AS n ON {}; \
         WITH {target}, {columns}, \
         i AS (SELECT i.indexrelid, i.indisprimary, i.indclass, i.indkey, i.indcollation FROM t JOIN pg_catalog.pg_index AS i ON {} \
         WHERE i.indisunique AND i.indisvalid AND i.indpred IS NULL AND {}) \
         SELECT i.indexrelid, k.place, {} AS less, {} AS greater, {} AS equal FROM i \
         JOIN k ON i.indkey[k.place OPERATOR(pg_catalog.-) 1] OPERATOR(pg_catalog.=) k.attnum \
         AND i.indcollation[k.place OPERATOR(pg_catalog.-) 1] OPERATOR(pg_catalog.=) k.attcollation \
         JOIN pg_catalog.pg_opclass AS c ON c.oid OPERATOR(pg_catalog.=) i.indclass[k.place OPERATOR(pg_catalog.-) 1] \
         JOIN pg_catalog.pg_am AS w ON {} AND {} \
         ORDER BY i.indisprimary DESC, c.opcdefault DESC, i.indexrelid",
        equal("i.inhparent", "p.oid"),
        equal("p.oid", "t.oid"),
        equal("s.oid", "o.collnamespace"),
        equal("o.oid", "k.attcollation"),
        equal("y.oid", "k.atttypid"),
        equal("n.oid", "y.typnamespace"),
        equal("i.indrelid", "t.oid"),
        equal("i.indnkeyatts", &columns_of_key.to_string()),
        operator(1),
        operator(5),
        operator(3),
        // In other access methods (GiST, WITHOUT OVERLAPS) these strategies are other operators.
        equal("w.oid", "c.opcmethod"),
        equal("w.amname", "'btree'"),
    )
}

/// A candidate index, with the operators of its columns.
struct Index {
    oid: u32,
    operators: Vec<Option<[String; 3]>>,
}

/// Reads the reply of [`target`]. The error is the reason why a backfill cannot process the table.
pub(crate) fn read_target(
    table: &TableName,
    key: &[String],
    reply: &[SimpleQueryMessage],
) -> Result<Target, String> {
    let mut answers =
        reply.split(|message| matches!(message, SimpleQueryMessage::CommandComplete(_)));
    let mut next = || answers.next().unwrap_or_default();
    let (tables, columns, indexes) = (next(), next(), next());

    let mut oids = Vec::new();
    let mut kind = None;
    let mut resolved = table.clone();
    for row in rows(tables) {
        oids.extend(parsed::<u32>(row, "oid"));
        kind = text(row, "relkind");
        if let (Some(schema), Some(name)) = (text(row, "nspname"), text(row, "relname")) {
            resolved = TableName::in_schema(schema, name);
        }
    }
    match kind.as_deref() {
        None => return Err(format!("there is no table {table}")),
        Some("r") if oids.len() > 1 => {
            return Err(format!(
                "other tables inherit from {table}, and a key is unique in one table only; backfill each of them"
            ));
        }
        Some("r" | "p") => {}
        Some(_) => {
            return Err(format!(
                "{table} is not a table; a backfill needs one, partitioned or not"
            ));
        }
    }

    let mut types = vec![None; key.len()];
    for row in rows(columns) {
        let place = place(row).filter(|place| *place < key.len());
        let (Some(place), Some(schema), Some(name)) =
            (place, text(row, "nspname"), text(row, "typname"))
        else {
            continue;
        };
        if !is_true(row, "not_null") {
            return Err(format!(
                "the column {:?} of {table} may be NULL, and rows without a key would be left out; a key is NOT NULL",
                key[place]
            ));
        }
        let category = text(row, "typcategory").unwrap_or_default();
        let type_name = format!("{}.{}", identifier(&schema), identifier(&name));
        let order = format!(
            "{}{}",
            ordered_as(&schema, &name).unwrap_or(&type_name),
            text(row, "collation").unwrap_or_default()
        );
        types[place] = Some((type_name, order, KeyText::of(&schema, &name, &category)));
    }
    if let Some(missing) = types.iter().position(Option::is_none) {
        return Err(format!("{table} has no column {:?}", key[missing]));
    }
    let types = types.into_iter().flatten();

    let mut candidates: Vec<Index> = Vec::new();
    for row in rows(indexes) {
        let (Some(oid), Some(place)) = (parsed(row, "indexrelid"), place(row)) else {
            continue;
        };
        let known = candidates.iter().position(|index| index.oid == oid);
        let at = known.unwrap_or_else(|| {
            candidates.push(Index {
                oid,
                operators: vec![None; key.len()],
            });
            candidates.len() - 1
        });
        let operators = ["less", "greater", "equal"].map(|name| text(row, name));
        if let [Some(less), Some(greater), Some(equal)] = operators
            && let Some(slot) = candidates[at].operators.get_mut(place)
        {
            *slot = Some([less, greater, equal]);
        }
    }
    let columns = key
        .iter()
        .map(|name| format!("{name:?}"))
        .collect::<Vec<_>>()
        .join(", ");
    // A row comparison has one operator for all of its columns.
    let usable = candidates.into_iter().find_map(|index| {
        let operators = index.operators.into_iter().collect::<Option<Vec<_>>>()?;
        let same = operators
            .iter()
            .all(|these| these[..2] == operators[0][..2]);
        same.then_some(operators)
    });
    let Some(operators) = usable else {
        return Err(format!(
            "no unique index of {table} has the key ({columns}) as its columns, in this order, for all rows; a row's key \
             must be its own, and the next rows are looked for by it"
        ));
    };
    let [less, greater, _] = operators[0].clone();
    let key = key
        .iter()
        .zip(types)
        .zip(operators)
        .map(
            |((name, (type_name, order, text)), [.., equal])| KeyColumn {
                name: name.clone(),
                order: format!("{order} USING {less}"),
                type_name,
                equal,
                text,
            },
        )
        .collect();
    Ok(Target {
        table: resolved,
        oids,
        key,
        less,
        greater,
    })
}

/// A common name for types with the same order and the same text.
fn ordered_as(schema: &str, name: &str) -> Option<&'static str> {
    match name {
        _ if schema != "pg_catalog" => None,
        "int2" | "int4" | "int8" => Some("integer"),
        "text" | "varchar" => Some("text"),
        _ => None,
    }
}

fn place(row: &tokio_postgres::SimpleQueryRow) -> Option<usize> {
    parsed::<usize>(row, "place")?.checked_sub(1)
}

/// Queries the planner's estimate of the table's rows: `pg_class.reltuples`, adjusted to the table's current size and
/// summed over partitions.
pub(crate) fn estimate(table: &TableName) -> String {
    format!("EXPLAIN SELECT FROM {table}")
}

pub(crate) fn read_estimate(reply: &[SimpleQueryMessage]) -> Option<u64> {
    let plan = rows(reply).next()?;
    let (_, rest) = plan.try_get(0).ok()??.split_once(" rows=")?;
    rest.split(' ').next()?.parse().ok()
}

impl Target {
    pub(crate) fn schema(&self) -> &str {
        self.table.schema().unwrap_or_default()
    }

    /// The text that identifies what a backfill does.
    pub(crate) fn definition(&self, set: &str, filter: Option<&str>) -> String {
        let key: Vec<String> = self
            .key
            .iter()
            .map(|column| identifier(&column.name))
            .collect();
        let filter = filter.map_or_else(String::new, |filter| format!(" WHERE {filter}"));
        format!("{} ({}) SET {set}{filter}", self.table, key.join(", "))
    }

    /// A value of the key. Each text is cast to its column's type.
    pub(super) fn value(&self, texts: &[String]) -> String {
        let values: Vec<String> = texts
            .iter()
            .zip(&self.key)
            .map(|(value, column)| format!("{}::{}", literal(value), column.type_name))
            .collect();
        row_of(&values)
    }

    /// The key's columns, as a row if there are several.
    pub(super) fn columns(&self) -> String {
        let columns: Vec<String> = self
            .key
            .iter()
            .map(|column| identifier(&column.name))
            .collect();
        row_of(&columns)
    }
}

/// A row of several values, or the only value.
fn row_of(values: &[String]) -> String {
    match values {
        [one] => one.clone(),
        several => format!("ROW({})", several.join(", ")),
    }
}
