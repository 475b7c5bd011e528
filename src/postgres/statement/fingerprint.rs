//! A hash that statements have in common if they differ only in their data.

use std::borrow::Cow;
use std::fmt;

use sha2::{Digest as _, Sha256};

use super::lexer::{self, TokenKind};

/// Equal for statements that differ only in literals, in the length of lists of literals, in white space, comments, and
/// the case of keywords and unquoted names. It is the same in every process and build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct StatementFingerprint(u64);

/// 16 hexadecimal digits.
impl fmt::Display for StatementFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The fingerprint of a statement.
///
/// A parameter counts as a literal, so `id = $1` and `id = 7` are equal. A truncated text has the fingerprint of its
/// beginning, which differs from that of the whole statement.
pub(crate) fn fingerprint(sql: &str) -> StatementFingerprint {
    let mut hash = Sha256::new();
    for atom in atoms(sql) {
        let mut buffer = [0; 4];
        let (tag, text) = match &atom {
            Atom::Word(word) => (b'w', &**word),
            Atom::Quoted(name) => (b'q', *name),
            Atom::Literal => (b'l', ""),
            Atom::AndSoOn => (b'm', ""),
            Atom::Symbol(c) => (b's', &*c.encode_utf8(&mut buffer)),
        };
        hash.update([tag]);
        hash.update(text);
        // No token contains it: PostgreSQL's text has no zero bytes.
        hash.update([0]);
    }
    let digest = hash.finalize();
    let first = digest.iter().take(8);
    StatementFingerprint(first.fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Atom<'a> {
    Word(Cow<'a, str>),
    Quoted(&'a str),
    Literal,
    /// The previous element is repeated, or could be.
    AndSoOn,
    Symbol(char),
}

/// Whether a sign after the word belongs to the following number.
fn is_before_a_sign(word: &str) -> bool {
    matches!(
        word,
        "all"
            | "and"
            | "any"
            | "between"
            | "by"
            | "case"
            | "default"
            | "distinct"
            | "else"
            | "for"
            | "from"
            | "having"
            | "in"
            | "like"
            | "limit"
            | "not"
            | "offset"
            | "on"
            | "or"
            | "return"
            | "returning"
            | "select"
            | "then"
            | "to"
            | "when"
            | "where"
    )
}

/// Lists that are nested deeper stay unchanged, so that the work does not grow with the square of the depth.
const MAX_DEPTH: usize = 64;

fn atoms(sql: &str) -> Vec<Atom<'_>> {
    let mut atoms = Vec::new();
    let mut open = Vec::new();
    for token in lexer::tokens(sql) {
        match token.kind {
            TokenKind::Word(word) => match word_atom(word, &atoms) {
                Atom::Literal => push_literal(&mut atoms),
                atom => atoms.push(atom),
            },
            TokenKind::Quoted(name) => atoms.push(Atom::Quoted(name)),
            TokenKind::Literal | TokenKind::Parameter(_) => push_literal(&mut atoms),
            TokenKind::Symbol(c @ ('(' | '[')) => {
                open.push(atoms.len());
                atoms.push(Atom::Symbol(c));
            }
            TokenKind::Symbol(c @ (')' | ']')) => {
                let start = open.pop().filter(|_| open.len() < MAX_DEPTH);
                if let Some(start) = start {
                    shorten_list(&mut atoms, start + 1);
                }
                atoms.push(Atom::Symbol(c));
                if let Some(start) = start {
                    drop_repeated_row(&mut atoms, start);
                }
            }
            TokenKind::Symbol(c) => atoms.push(Atom::Symbol(c)),
        }
    }
    while atoms.last() == Some(&Atom::Symbol(';')) {
        atoms.pop();
    }
    atoms
}

/// `TRUE`, `FALSE` and `NULL` are values, except in `IS NULL`, `NOT NULL` and similar.
fn word_atom<'a>(word: &'a str, before: &[Atom<'a>]) -> Atom<'a> {
    let lower = if word.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(word.to_ascii_lowercase())
    } else {
        Cow::Borrowed(word)
    };
    let is_value = matches!(&*lower, "true" | "false" | "null");
    let is_test = match before.last() {
        Some(Atom::Word(before)) => matches!(&**before, "is" | "not" | "set"),
        _ => false,
    };
    if is_value && !is_test {
        Atom::Literal
    } else {
        Atom::Word(lower)
    }
}

/// A sign is part of a number if it cannot be an operator between two values.
fn push_literal(atoms: &mut Vec<Atom<'_>>) {
    if let [before @ .., Atom::Symbol('-' | '+')] = atoms.as_slice() {
        let between = match before.last() {
            None => false,
            Some(Atom::Word(word)) => !is_before_a_sign(word),
            Some(Atom::Symbol(c)) => matches!(c, ')' | ']'),
            Some(Atom::Quoted(_) | Atom::Literal | Atom::AndSoOn) => true,
        };
        if !between {
            atoms.pop();
        }
    }
    // Adjacent strings are one.
    if atoms.last() != Some(&Atom::Literal) {
        atoms.push(Atom::Literal);
    }
}

/// Turns `?, ?, ?` into `?, …`, and `?` too: the elements from `start` to the end, which are all equal and contain a
/// literal.
fn shorten_list(atoms: &mut Vec<Atom<'_>>, start: usize) {
    let mut depth = 0_usize;
    let mut elements = atoms[start..].split(|atom| {
        match atom {
            Atom::Symbol('(' | '[') => depth += 1,
            Atom::Symbol(')' | ']') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && *atom == Atom::Symbol(',')
    });
    let first = elements.next().unwrap_or_default();
    let length = first.len();
    let varies = first
        .iter()
        .any(|atom| matches!(atom, Atom::Literal | Atom::AndSoOn));
    if varies && elements.all(|element| element == first) {
        atoms.truncate(start + length);
        atoms.push(Atom::AndSoOn);
    }
}

/// Turns `(?, …), (?, …)` into `(?, …)`: the group from `start` to the end, if an equal one is before it.
fn drop_repeated_row(atoms: &mut Vec<Atom<'_>>, start: usize) {
    let (before, group) = atoms.split_at(start);
    let [before @ .., Atom::Symbol(',')] = before else {
        return;
    };
    let varies = group
        .iter()
        .any(|atom| matches!(atom, Atom::Literal | Atom::AndSoOn));
    if varies && before.ends_with(group) {
        atoms.truncate(start - 1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Asserts that all have one fingerprint.
    fn assert_same(statements: &[&str]) {
        for statement in statements {
            assert_eq!(
                fingerprint(statement),
                fingerprint(statements[0]),
                "{statement} → {:?}, {:?}",
                atoms(statement),
                atoms(statements[0])
            );
        }
    }

    #[test]
    fn literals_and_parameters_do_not_matter() {
        assert_same(&[
            "UPDATE account SET name = 'a', balance = 5 WHERE id = 1",
            "UPDATE account SET name = E'\\'', balance = -5.5e-3 WHERE id = 22;",
            "UPDATE account SET name = $1, balance = $2 WHERE id = $3",
            "UPDATE account SET name = $$x$$, balance = NULL WHERE id = +3",
        ]);
    }

    #[test]
    fn spelling_does_not_matter() {
        assert_same(&[
            "SELECT a, \"B\" FROM t WHERE x <= 1",
            "select A,\"B\"\n\tfrom T -- so\n where X<=2 /* and on */",
        ]);
    }

    #[test]
    fn the_length_of_lists_does_not_matter() {
        assert_same(&[
            "DELETE FROM t WHERE id IN (1)",
            "DELETE FROM t WHERE id IN (1, 2)",
            "DELETE FROM t WHERE id IN ($1,$2,$3)",
            "DELETE FROM t WHERE id IN ('a', -2, null)",
        ]);
        assert_same(&[
            "SELECT 1 WHERE id IN ($1::uuid)",
            "SELECT 1 WHERE id IN ($1::uuid, $2::uuid)",
        ]);
        assert_same(&[
            "INSERT INTO t (a, b) VALUES (1, 'x')",
            "INSERT INTO t (a, b) VALUES (1, 'x'), (2, 'y'), (3, 'z')",
        ]);
        assert_same(&[
            "INSERT INTO t (a, b) VALUES (1, DEFAULT)",
            "INSERT INTO t (a, b) VALUES (1, DEFAULT), (2, DEFAULT)",
        ]);
        assert_same(&["SELECT ARRAY[1]", "SELECT ARRAY[1, 2]"]);
        assert_same(&["SELECT f((1, 2), (3, 4))", "SELECT f((1, 2))"]);
    }

    #[test]
    fn other_statements_differ() {
        let statements = [
            "",
            "SELECT a FROM t",
            "SELECT b FROM t",
            "SELECT a FROM t WHERE x = 1",
            "SELECT a FROM t WHERE x IS NULL",
            "SELECT a FROM t WHERE x IS TRUE",
            "SELECT a FROM t WHERE x ? 'a'",
            "SELECT a FROM t WHERE x = y - 1",
            "SELECT a FROM t WHERE x = \"Y\" - 1",
            "SELECT a FROM t WHERE x = f(1) - 1",
            "SELECT a FROM t WHERE x IN (1, y)",
            "SELECT a FROM t WHERE x IN (1, y, 2)",
            "UPDATE t SET a = 1",
            "UPDATE \"T\" SET a = 1",
            "UPDATE t SET a = 1, b = 2",
        ];
        let mut fingerprints: Vec<_> = statements.iter().map(|sql| fingerprint(sql)).collect();
        fingerprints.sort_unstable();
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), statements.len());
    }

    /// A fingerprint outlives the process: it is written to logs, and counted by other programs. It is computed
    /// independently by: `printf 'wupdate\0wt\0wset\0wa\0s=\0l\0' | sha256sum`.
    #[test]
    fn it_is_stable() {
        assert_eq!(
            fingerprint("UPDATE t SET a = 1").to_string(),
            "5db1dd4b2dfb5502"
        );
    }

    #[test]
    fn deep_and_long_lists_are_bounded() {
        let deep = format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000));
        fingerprint(&deep);
        let long = format!("a IN ({}1)", "1, ".repeat(100_000));
        assert_eq!(fingerprint(&long), fingerprint("a IN (7)"));
    }

    proptest! {
        #[test]
        fn every_text_has_one(text in any::<String>()) {
            prop_assert_eq!(fingerprint(&text).to_string().len(), 16);
        }

        #[test]
        fn values_do_not_matter(a in any::<i64>(), b in any::<f64>(), c in "[^'\\\\]{0,9}", n in 1..9_usize) {
            let list = vec![format!("{a}"); n].join(",");
            let statement = format!("UPDATE t SET a = {a}, b = {b:e}, c = '{c}' WHERE d IN ({list}) AND e > -1");
            let expected = fingerprint("update t set a = $1, b = $2, c = $3 where d in ($4) and e > $5");
            prop_assert_eq!(fingerprint(&statement), expected, "{}", statement);
        }
    }
}
