//! What indexes are called: by default, when a name is too long, and what is left of a build.

use crate::key::LockKey;
use crate::schema::sql::index::Definition;

const MAX_NAME: usize = 63;

/// A name that only this index can have, and by which [`is_left_of`] knows it.
pub(super) fn set_aside(name: &str, oid: u32) -> String {
    let tail = format!("_ccold{oid}");
    let mut end = name.len().min(MAX_NAME - tail.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{tail}", &name[..end])
}

/// Whether it is what REINDEX CONCURRENTLY leaves of an index: its name, cut where it is long, `_ccnew` or `_ccold`, and a
/// number where there are several (`ChooseRelationName` in `src/backend/commands/indexcmds.c`).
pub(super) fn is_left_of(name: &str, index: &str) -> bool {
    ["_ccnew", "_ccold"].iter().any(|mark| {
        name.rfind(mark).is_some_and(|at| {
            let (head, tail) = (&name[..at], &name[at + mark.len()..]);
            let is_cut = name.len() + 4 >= MAX_NAME && index.starts_with(head);
            tail.bytes().all(|byte| byte.is_ascii_digit()) && (head == index || is_cut)
        })
    })
}

/// The name that the server would choose, or one like it that differs from others where it has to be cut.
pub(super) fn default_name(table: &str, definition: &Definition) -> String {
    let mut name = table.to_owned();
    for part in &definition.parts {
        name.push('_');
        name.push_str(part.column.as_deref().unwrap_or("expr"));
    }
    shortened(&name, "idx")
}

/// `name_suffix`, at most as long as a name may be.
pub(super) fn shortened(name: &str, suffix: &str) -> String {
    let whole = format!("{name}_{suffix}");
    if whole.len() <= MAX_NAME {
        return whole;
    }
    let hash = LockKey::from(whole.as_str()).as_i64().unwrap_or_default();
    let tail = format!("_{:08x}_{suffix}", hash.cast_unsigned() >> 32);
    let mut end = MAX_NAME - tail.len();
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{tail}", &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::sql::index::Part;

    fn on(columns: &[&str]) -> Definition {
        Definition {
            parts: columns.iter().map(|column| Part::column(column)).collect(),
            ..Definition::default()
        }
    }

    #[test]
    fn names_are_the_servers_or_short() {
        assert_eq!(default_name("orders", &on(&["a", "b"])), "orders_a_b_idx");
        let expression = Definition {
            parts: vec![Part::expression("lower(a)")],
            ..Definition::default()
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
    fn what_a_reindex_leaves_is_recognized() {
        assert!(is_left_of("i_ccnew", "i"));
        assert!(is_left_of("i_ccold12", "i"));
        assert!(!is_left_of("i2_ccnew", "i"));
        assert!(!is_left_of("i_ccnews", "i"));
        assert!(!is_left_of("i", "i"));
        let long = "a".repeat(63);
        assert!(is_left_of(&format!("{}_ccnew", "a".repeat(57)), &long));
        assert!(!is_left_of("aaa_ccnew", &long));
        for name in ["i", &long, &"é".repeat(31)] {
            let aside = set_aside(name, u32::MAX);
            assert!(
                aside.len() <= MAX_NAME && is_left_of(&aside, name),
                "{aside}"
            );
        }
    }
}
