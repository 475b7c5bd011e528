//! Whether a column's values stay unchanged under a new type, and whether a CHECK proves NOT NULL.

use crate::schema::sql::facts::ColumnFacts;

// `src/include/catalog/pg_type.dat`.
const BPCHAR: u32 = 1042;
const VARCHAR: u32 = 1043;
const VARBIT: u32 = 1562;
const BIT: u32 = 1560;
const NUMERIC: u32 = 1700;
const INTERVAL: u32 = 1186;
/// time, timestamp, timestamptz, timetz.
const TIMES: [u32; 4] = [1083, 1114, 1184, 1266];

/// Whether the stored values of a column stay unchanged under its new type, so that the server changes only the
/// catalogs (`ATColumnChangeRequiresRewrite` in `src/backend/commands/tablecmds.c`). In doubt `false`.
pub(super) fn keeps_bytes(facts: &ColumnFacts, ty: &str) -> bool {
    let Some(new) = facts.new else {
        return false;
    };
    keeps(facts.old, facts.old_modifier, new, facts.is_binary, ty)
}

fn keeps(old: u32, old_modifier: i32, new: u32, is_binary: bool, ty: &str) -> bool {
    let numbers = modifiers(ty);
    if old != new {
        // A length would have to be checked, and char and bit without a length have the length 1.
        return is_binary && numbers.is_empty() && new != BPCHAR && new != BIT;
    }
    match (new, numbers.as_slice()) {
        // The modifier is the length plus four (`src/backend/utils/adt/varchar.c`).
        (VARCHAR, [length]) => old_modifier >= 4 && *length >= old_modifier - 4,
        (BPCHAR, [length]) => *length == old_modifier - 4,
        (BPCHAR, []) => old_modifier == 5,
        (VARBIT, [length]) => old_modifier >= 0 && *length >= old_modifier,
        (BIT, [length]) => *length == old_modifier,
        (BIT, []) => old_modifier == 1,
        // `make_numeric_typmod` in `src/backend/utils/adt/numeric.c`.
        (NUMERIC, [precision, rest @ ..]) => {
            let scale = rest.first().copied().unwrap_or(0);
            let old = old_modifier - 4;
            old_modifier >= 4 && *precision >= (old >> 16) && scale == (old & 0x7ff)
        }
        // `interval_support` in `src/backend/utils/adt/timestamp.c`. Fields, such as `interval day`, cut values off.
        (INTERVAL, _) if has_fields(ty) => false,
        (INTERVAL, [precision]) => {
            *precision >= 6
                || (is_full_interval(old_modifier) && *precision >= (old_modifier & 0xffff))
        }
        (_, [precision]) if TIMES.contains(&new) => {
            *precision >= 6 || (old_modifier >= 0 && *precision >= old_modifier)
        }
        (_, []) => true,
        _ => false,
    }
}

/// Whether an interval's type names fields.
fn has_fields(ty: &str) -> bool {
    let lower = ty.to_lowercase();
    ["year", "month", "day", "hour", "minute", "second"]
        .iter()
        .any(|field| lower.contains(field))
}

/// Whether the modifier of an interval has a precision and no fields (`INTERVAL_FULL_RANGE` in
/// `src/include/utils/timestamp.h`).
fn is_full_interval(modifier: i32) -> bool {
    modifier >= 0 && (modifier >> 16) == 0x7fff
}

/// Whether a CHECK, as the tree of its expression, has `column IS NOT NULL` as one of the conditions that it joins by AND.
/// It is read as a tree, because the functions that deparse it open the table.
pub(super) fn proves_not_null(tree: &str, number: i32) -> bool {
    let tree = tree.trim();
    let variable = format!(":arg {{VAR :varno 1 :varattno {number} ");
    if tree.starts_with("{NULLTEST ") {
        return tree.starts_with(&format!("{{NULLTEST {variable}"))
            && tree.contains(":nulltesttype 1 ")
            && tree.contains(":argisrow false");
    }
    tree.starts_with("{BOOLEXPR :boolop and ")
        && nodes_within(tree).any(|node| proves_not_null(node, number))
}

/// The nodes directly within a node.
fn nodes_within(tree: &str) -> impl Iterator<Item = &str> {
    let (mut depth, mut start) = (0_usize, 0);
    let mut escaped = false;
    tree.char_indices().filter_map(move |(at, c)| {
        if escaped {
            escaped = false;
            return None;
        }
        match c {
            // A brace in a name is escaped (`outToken` in `src/backend/nodes/outfuncs.c`).
            '\\' => escaped = true,
            '{' => {
                depth += 1;
                if depth == 2 {
                    start = at;
                }
            }
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 1 {
                    return Some(&tree[start..=at]);
                }
            }
            _ => {}
        }
        None
    })
}

/// The numbers between the parentheses of a type.
fn modifiers(ty: &str) -> Vec<i32> {
    let inside = ty
        .split_once('(')
        .and_then(|(_, rest)| rest.split_once(')'));
    let inside = inside.map_or("", |(inside, _)| inside);
    (inside.split(','))
        .filter_map(|number| number.trim().parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_changes_without_a_rewrite() {
        assert!(keeps(VARCHAR, 14, VARCHAR, false, "varchar(20)"));
        assert!(!keeps(VARCHAR, 24, VARCHAR, false, "varchar(10)"));
        assert!(keeps(VARCHAR, 14, VARCHAR, false, "character varying"));
        assert!(!keeps(VARCHAR, -1, VARCHAR, false, "varchar(10)"));
        assert!(keeps(VARCHAR, 14, 25, true, "text"));
        assert!(keeps(25, -1, VARCHAR, true, "varchar"));
        assert!(!keeps(25, -1, VARCHAR, true, "varchar(10)"));
        assert!(!keeps(23, -1, 20, false, "bigint"));
        assert!(keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(12, 2)"
        ));
        assert!(!keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(12, 3)"
        ));
        assert!(!keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(8,2)"
        ));
        assert!(keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric"
        ));
        assert!(!keeps(NUMERIC, -1, NUMERIC, false, "numeric(10,2)"));
        assert!(!keeps(BPCHAR, 14, BPCHAR, false, "char"));
        assert!(keeps(1184, 3, 1184, false, "timestamptz(6)"));
        assert!(!keeps(1184, -1, 1184, false, "timestamptz(0)"));
        assert!(!keeps(1114, -1, 1184, false, "timestamptz"));
    }

    #[test]
    fn intervals_keep_their_values_with_more_precision() {
        let full = |precision: i32| (0x7fff << 16) | precision;
        assert!(keeps(INTERVAL, full(0), INTERVAL, false, "interval(3)"));
        assert!(!keeps(INTERVAL, full(3), INTERVAL, false, "interval(0)"));
        assert!(!keeps(INTERVAL, -1, INTERVAL, false, "interval(3)"));
        assert!(keeps(INTERVAL, full(2), INTERVAL, false, "interval"));
        assert!(!keeps(
            INTERVAL,
            -1,
            INTERVAL,
            false,
            "interval year to month"
        ));
        assert!(!keeps(
            INTERVAL,
            full(0),
            INTERVAL,
            false,
            "interval second(3)"
        ));
    }

    #[test]
    fn not_null_is_proven_by_one_of_several_conditions() {
        let test = "{NULLTEST :arg {VAR :varno 1 :varattno 2 :vartype 23} :nulltesttype 1 :argisrow false :location 1}";
        let other = "{OPEXPR :opno 521 :args ({VAR :varno 1 :varattno 2} {CONST :constvalue 4})}";
        let joined =
            |op: &str| format!("{{BOOLEXPR :boolop {op} :args ({other} {test}) :location 3}}");
        assert!(proves_not_null(test, 2));
        assert!(!proves_not_null(test, 22));
        assert!(!proves_not_null(&test.replace("type 1", "type 0"), 2));
        assert!(proves_not_null(&joined("and"), 2));
        assert!(!proves_not_null(&joined("or"), 2));
        assert!(!proves_not_null(other, 2));
    }
}
