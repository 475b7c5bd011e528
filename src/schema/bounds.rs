//! Whether a CHECK implies the bounds of a partition, so that ATTACH PARTITION does not read it.
//!
//! The server proves more than this (`ConstraintImpliedByRelConstraint` in `src/backend/commands/tablecmds.c`). What is
//! recognized here: one key column; comparisons of it with constants, joined by AND, or a list of constants.

use super::Env;
use crate::deadline::timeout_millis;
use crate::error::Error;
use crate::schema::sql::bounds as sql;
use std::time::Duration;

/// A constant, without its quotes and its type.
type Constant = String;

/// What `FOR VALUES …` says of one column; `None` for no limit.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Bounds {
    Range {
        from: Option<Constant>,
        to: Option<Constant>,
    },
    List(Vec<Constant>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Constant(String),
    Symbol(char),
}

/// The tokens of an expression as the server writes it; `None` for what is not expected there.
fn tokens(text: &str) -> Option<Vec<Token<'_>>> {
    let mut all = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' => {
                let end = rest[1..].find('\'')? + 2;
                // A doubled quote is not one that ends it.
                if rest[end..].starts_with('\'') || rest[..end].contains('\\') {
                    return None;
                }
                all.push(Token::Constant(rest[1..end - 1].to_owned()));
                end
            }
            '"' => {
                let end = rest[1..].find('"')? + 2;
                if rest[end..].starts_with('"') {
                    return None;
                }
                all.push(Token::Word(&rest[1..end - 1]));
                end
            }
            c if c.is_ascii_digit() || c == '.' => {
                let end = rest
                    .find(|c: char| !(c.is_ascii_digit() || c == '.'))
                    .unwrap_or(rest.len());
                let sign = if all.last() == Some(&Token::Symbol('-')) {
                    all.pop();
                    "-"
                } else {
                    ""
                };
                all.push(Token::Constant(format!("{sign}{}", &rest[..end])));
                end
            }
            c if c.is_alphabetic() || c == '_' => {
                let end = rest
                    .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                    .unwrap_or(rest.len());
                all.push(Token::Word(&rest[..end]));
                end
            }
            c => {
                all.push(Token::Symbol(c));
                c.len_utf8()
            }
        };
        rest = rest[length..].trim_start();
    }
    Some(all)
}

/// A constant with or without a cast and parentheses around it.
fn constant(tokens: &[Token<'_>]) -> Option<Constant> {
    let tokens = within_parentheses(tokens);
    let (Token::Constant(value), rest) = tokens.split_first()? else {
        return None;
    };
    let is_cast = |rest: &[Token<'_>]| {
        rest.iter().all(|token| match token {
            Token::Word(_) => true,
            Token::Symbol(c) => ":()[]".contains(*c),
            // The length of a type.
            Token::Constant(length) => length.chars().all(|c| c.is_ascii_digit()),
        }) && rest
            .first()
            .is_none_or(|first| *first == Token::Symbol(':'))
    };
    is_cast(rest).then(|| value.clone())
}

fn within_parentheses<'t, 'a>(mut tokens: &'t [Token<'a>]) -> &'t [Token<'a>] {
    while let [Token::Symbol('('), inside @ .., Token::Symbol(')')] = tokens {
        let mut depth = 1_usize;
        let mut closes_early = false;
        for token in inside {
            match token {
                Token::Symbol('(') => depth += 1,
                Token::Symbol(')') => depth -= 1,
                _ => {}
            }
            closes_early |= depth == 0;
            depth = depth.max(1);
        }
        if closes_early {
            return tokens;
        }
        tokens = inside;
    }
    tokens
}

/// Splits at a token outside of parentheses.
fn split<'t, 'a>(tokens: &'t [Token<'a>], at: &Token<'_>) -> Vec<&'t [Token<'a>]> {
    let mut depth = 0_usize;
    let mut parts = Vec::new();
    let mut start = 0;
    for (n, token) in tokens.iter().enumerate() {
        match token {
            Token::Symbol('(' | '[') => depth += 1,
            Token::Symbol(')' | ']') => depth = depth.saturating_sub(1),
            token if depth == 0 && token == at => {
                parts.push(&tokens[start..n]);
                start = n + 1;
            }
            _ => {}
        }
    }
    parts.push(&tokens[start..]);
    parts
}

/// Reads `FROM (1) TO (2)` or `IN (1, 2)`, behind FOR VALUES.
fn bounds(text: &str) -> Option<Bounds> {
    let lower = text.to_ascii_lowercase();
    let limit = |tokens: &[Token<'_>]| -> Option<Option<Constant>> {
        match within_parentheses(tokens) {
            [Token::Word(word)]
                if word.eq_ignore_ascii_case("minvalue")
                    || word.eq_ignore_ascii_case("maxvalue") =>
            {
                Some(None)
            }
            one => constant(one).map(Some),
        }
    };
    let tokens = tokens(text)?;
    match tokens.split_first()? {
        (Token::Word(word), list) if word.eq_ignore_ascii_case("in") => {
            let list = split(within_parentheses(list), &Token::Symbol(','));
            let list: Option<Vec<_>> = list.into_iter().map(constant).collect();
            Some(Bounds::List(list?))
        }
        (Token::Word(word), _) if word.eq_ignore_ascii_case("from") => {
            let to = if lower.contains(" to ") || lower.contains(")to") || lower.contains(" to(") {
                tokens.iter().position(
                    |token| matches!(token, Token::Word(word) if word.eq_ignore_ascii_case("to")),
                )?
            } else {
                return None;
            };
            Some(Bounds::Range {
                from: limit(&tokens[1..to])?,
                to: limit(&tokens[to + 1..])?,
            })
        }
        _ => None,
    }
}

/// What a CHECK says of the column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Proof {
    not_null: bool,
    /// Constants that the column is at least; those that it is less than.
    at_least: Vec<Constant>,
    less_than: Vec<Constant>,
    one_of: Vec<Constant>,
}

impl Proof {
    /// Adds a condition, if it is one of the recognized ones.
    fn add(&mut self, tokens: &[Token<'_>], column: &str) {
        let tokens = within_parentheses(tokens);
        let parts = split(tokens, &Token::Word("AND"));
        if parts.len() > 1 {
            for part in parts {
                self.add(part, column);
            }
            return;
        }
        let Some((first, rest)) = tokens.split_first() else {
            return;
        };
        if *first != Token::Word(column) {
            return;
        }
        match rest {
            [Token::Word("IS"), Token::Word("NOT"), Token::Word("NULL")] => self.not_null = true,
            [Token::Symbol('>'), Token::Symbol('='), value @ ..] => {
                self.at_least.extend(constant(value))
            }
            [Token::Symbol('<'), value @ ..] if value.first() != Some(&Token::Symbol('=')) => {
                self.less_than.extend(constant(value));
            }
            [Token::Symbol('='), Token::Word("ANY"), list @ ..] => {
                let list = within_parentheses(list);
                let end = list.iter().position(|token| *token == Token::Symbol(']'));
                if let ([Token::Word("ARRAY"), Token::Symbol('['), ..], Some(end)) = (list, end) {
                    let values = split(&list[2..end], &Token::Symbol(','));
                    let values: Option<Vec<_>> = values.into_iter().map(constant).collect();
                    self.one_of = values.unwrap_or_default();
                }
            }
            [Token::Symbol('='), value @ ..] => self.one_of = constant(value).into_iter().collect(),
            _ => {}
        }
    }
}

/// Comparisons `left >= right` that prove the bounds, if all are true; `None` if nothing could.
fn conditions(bounds: &Bounds, proof: &Proof) -> Option<Vec<(Constant, &'static str, Constant)>> {
    match bounds {
        Bounds::Range { from, to } => {
            let mut all = Vec::new();
            if let Some(from) = from {
                all.push((proof.at_least.first()?.clone(), ">=", from.clone()));
            }
            if let Some(to) = to {
                all.push((proof.less_than.first()?.clone(), "<=", to.clone()));
            }
            Some(all)
        }
        // Each value of the CHECK has to be one of the list.
        Bounds::List(list) if !proof.one_of.is_empty() => {
            let is_in = proof.one_of.iter().all(|value| list.contains(value));
            is_in.then(Vec::new)
        }
        Bounds::List(_) => None,
    }
}

/// Whether a valid CHECK of the partition implies these bounds, which are what follows FOR VALUES.
///
/// Cancel safety: only reads the catalogs.
pub(super) async fn are_implied(
    env: &Env,
    parent: u32,
    partition: u32,
    values: &str,
    lock_timeout: Duration,
) -> Result<bool, Error> {
    let Some(bounds) = bounds(values) else {
        return Ok(false);
    };
    let asked = sql::checks(parent, partition, timeout_millis(lock_timeout));
    let Some(found) = sql::read_checks(&env.ask(&asked).await?) else {
        return Ok(false);
    };
    let mut proof = Proof {
        not_null: found.is_not_null,
        ..Proof::default()
    };
    for check in &found.checks {
        let text = check.strip_prefix("CHECK ").unwrap_or(check);
        if let Some(tokens) = tokens(text) {
            proof.add(&tokens, &found.column);
        }
    }
    if !proof.not_null {
        return Ok(false);
    }
    match conditions(&bounds, &proof) {
        None => Ok(false),
        Some(all) if all.is_empty() => Ok(true),
        Some(all) => env.is_yes(&sql::comparisons(&found.ty, &all)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(check: &str) -> Proof {
        let mut proof = Proof::default();
        proof.add(&tokens(check).unwrap_or_default(), "v");
        proof
    }

    #[test]
    fn bounds_of_one_column_are_read() {
        let range = |from: Option<&str>, to: Option<&str>| Bounds::Range {
            from: from.map(str::to_owned),
            to: to.map(str::to_owned),
        };
        assert_eq!(
            bounds("FROM (0) TO (-10)"),
            Some(range(Some("0"), Some("-10")))
        );
        let dates = "from ('2024-01-01') to (MAXVALUE)";
        assert_eq!(bounds(dates), Some(range(Some("2024-01-01"), None)));
        assert_eq!(
            bounds("IN ('a', 'b')"),
            Some(Bounds::List(vec!["a".into(), "b".into()]))
        );
        for other in [
            "FROM (1, 2) TO (3, 4)",
            "FROM (now()) TO (MAXVALUE)",
            "WITH (MODULUS 2, REMAINDER 0)",
            "IN (NULL)",
        ] {
            assert_eq!(bounds(other), None, "{other}");
        }
    }

    #[test]
    fn conditions_are_read_as_the_server_writes_them() {
        let found =
            proof("(((v >= '2024-01-01'::date) AND (v < ('2025-01-01'::date)) AND (w > 3)))");
        assert_eq!(found.at_least, ["2024-01-01"]);
        assert_eq!(found.less_than, ["2025-01-01"]);
        assert!(proof("((v IS NOT NULL))").not_null);
        assert_eq!(proof("((v = ANY (ARRAY[1, 2])))").one_of, ["1", "2"]);
        assert_eq!(proof("((v = '-5'::integer))").one_of, ["-5"]);
        for nothing in [
            "(((v >= 0) OR (v < 10)))",
            "((v <= 10))",
            "(((v + 1) >= 0))",
            "((w >= 0))",
            "((v >= f(1)))",
        ] {
            assert_eq!(proof(nothing), Proof::default(), "{nothing}");
        }
    }
}
