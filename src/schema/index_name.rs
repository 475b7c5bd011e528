//! Names of indexes: default names, names that have to be shortened, and names of the remains of failed builds.

use crate::key::LockKey;
use crate::postgres::text::beginning;
use crate::schema::sql::index::IndexDefinition;

const MAX_NAME: usize = 63;

/// A name that only the index with this oid can have, and that [`is_remnant_of`] recognizes.
pub(super) fn aside_name(name: &str, oid: u32) -> String {
    let tail = format!("_ccold{oid}");
    format!("{}{tail}", beginning(name, MAX_NAME - tail.len()))
}

/// Whether `name` is that of a remnant that a failed REINDEX CONCURRENTLY leaves of `index`: the index's name,
/// truncated if it is long, `_ccnew` or `_ccold`, and a number if there are several (`ChooseRelationName` in
/// `src/backend/commands/indexcmds.c`).
pub(super) fn is_remnant_of(name: &str, index: &str) -> bool {
    ["_ccnew", "_ccold"].iter().any(|mark| {
        name.rfind(mark).is_some_and(|at| {
            let (head, tail) = (&name[..at], &name[at + mark.len()..]);
            let is_cut = name.len() + 4 >= MAX_NAME && index.starts_with(head);
            tail.bytes().all(|byte| byte.is_ascii_digit()) && (head == index || is_cut)
        })
    })
}

/// The name that the server would choose. A name that has to be shortened gets a hash, which keeps it unique.
pub(super) fn default_name(table: &str, definition: &IndexDefinition) -> String {
    let mut name = table.to_owned();
    for part in &definition.parts {
        name.push('_');
        name.push_str(part.column.as_deref().unwrap_or("expr"));
    }
    shortened(&name, "idx")
}

/// `name_suffix`, shortened to the maximum length of a name.
pub(super) fn shortened(name: &str, suffix: &str) -> String {
    let whole = format!("{name}_{suffix}");
    if whole.len() <= MAX_NAME {
        return whole;
    }
    let hash = LockKey::from(whole.as_str()).as_i64().unwrap_or_default();
    let tail = format!("_{:08x}_{suffix}", hash.cast_unsigned() >> 32);
    format!("{}{tail}", beginning(name, MAX_NAME - tail.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::sql::index::Part;

    fn on(columns: &[&str]) -> IndexDefinition {
        IndexDefinition {
            parts: columns.iter().map(|column| Part::column(column)).collect(),
            ..IndexDefinition::default()
        }
    }

    #[test]
    fn default_names_are_those_of_the_server() {
        assert_eq!(default_name("orders", &on(&["a", "b"])), "orders_a_b_idx");
        let expression = IndexDefinition {
            parts: vec![Part::expression("lower(a)")],
            ..IndexDefinition::default()
        };
        assert_eq!(default_name("orders", &expression), "orders_expr_idx");
        let table = "é".repeat(31);
        let (one, other) = (
            default_name(&table, &on(&["a"])),
            default_name(&table, &on(&["b"])),
        );
        assert!(
            one.len() <= MAX_NAME && other.len() <= MAX_NAME,
            "{one} {other}"
        );
        assert_ne!(one, other);
    }

    #[test]
    fn remnants_of_a_reindex_are_recognized() {
        assert!(is_remnant_of("i_ccnew", "i"));
        assert!(is_remnant_of("i_ccold12", "i"));
        assert!(!is_remnant_of("i2_ccnew", "i"));
        assert!(!is_remnant_of("i_ccnews", "i"));
        assert!(!is_remnant_of("i", "i"));
        let long = "a".repeat(63);
        assert!(is_remnant_of(&format!("{}_ccnew", "a".repeat(57)), &long));
        assert!(!is_remnant_of("aaa_ccnew", &long));
        for name in ["i", &long, &"é".repeat(31)] {
            let aside = aside_name(name, u32::MAX);
            assert!(
                aside.len() <= MAX_NAME && is_remnant_of(&aside, name),
                "{aside}"
            );
        }
    }
}
