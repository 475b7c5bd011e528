//! A cursor over the tokens of one statement.

use crate::postgres::TableName;
use crate::postgres::statement::{TokenKind, spans};

/// A token: keywords are compared without case, names are folded as by the server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A keyword or unquoted name, in lower case.
    Word(String),
    /// A quoted name, without its quotes.
    Quoted(String),
    Symbol(char),
    Literal,
}

/// A statement and the position in it.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    text: &'a str,
    tokens: Vec<(usize, usize, Token)>,
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let tokens = spans(text)
            .map(|(span, kind)| {
                let token = match kind {
                    TokenKind::Word(word) => Token::Word(word.to_lowercase()),
                    TokenKind::Quoted(name) => Token::Quoted(name.replace("\"\"", "\"")),
                    TokenKind::Symbol(c) => Token::Symbol(c),
                    TokenKind::Parameter(_) | TokenKind::Literal => Token::Literal,
                };
                (span.start, span.end, token)
            })
            .collect();
        Self {
            text,
            tokens,
            at: 0,
        }
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.at >= self.tokens.len()
    }

    /// The keyword here; empty if there is none.
    pub(super) fn word(&self) -> &str {
        self.word_at(0)
    }

    pub(super) fn word_at(&self, ahead: usize) -> &str {
        match self.tokens.get(self.at + ahead) {
            Some((_, _, Token::Word(word))) => word,
            _ => "",
        }
    }

    pub(super) fn skip(&mut self, tokens: usize) {
        self.at = (self.at + tokens).min(self.tokens.len());
    }

    /// Whether the words come next.
    pub(super) fn sees(&self, words: &[&str]) -> bool {
        self.sees_at(self.at, words)
    }

    fn sees_at(&self, at: usize, words: &[&str]) -> bool {
        let is_word = |token: Option<&(usize, usize, Token)>, word: &str| matches!(token, Some((_, _, Token::Word(found))) if found == word);
        (words.iter().enumerate()).all(|(ahead, word)| is_word(self.tokens.get(at + ahead), word))
    }

    /// Skips the words, if they come next.
    pub(super) fn eat(&mut self, words: &[&str]) -> bool {
        let sees = self.sees(words);
        if sees {
            self.skip(words.len());
        }
        sees
    }

    pub(super) fn sees_symbol(&self, symbol: char) -> bool {
        matches!(self.tokens.get(self.at), Some((_, _, Token::Symbol(c))) if *c == symbol)
    }

    pub(super) fn eat_symbol(&mut self, symbol: char) -> bool {
        let sees = self.sees_symbol(symbol);
        if sees {
            self.skip(1);
        }
        sees
    }

    /// Reads one name without a schema.
    pub(super) fn identifier(&mut self) -> Option<String> {
        let name = match self.tokens.get(self.at) {
            Some((_, _, Token::Word(name) | Token::Quoted(name))) => name.clone(),
            _ => return None,
        };
        self.skip(1);
        Some(name)
    }

    /// Reads a name with or without a schema; of `catalog.schema.table` the last two parts.
    pub(super) fn name(&mut self) -> Option<TableName> {
        let mut parts = vec![self.identifier()?];
        while self.sees_symbol('.') {
            self.skip(1);
            parts.push(self.identifier()?);
        }
        // `table *` is the table with its children.
        self.eat_symbol('*');
        let name = parts.pop()?;
        Some(match parts.pop() {
            Some(schema) => TableName::in_schema(schema, name),
            None => TableName::new(name),
        })
    }

    /// Reads names separated by commas.
    pub(super) fn names(&mut self) -> Vec<TableName> {
        let mut names = Vec::new();
        while let Some(name) = self.name() {
            names.push(name);
            if !self.eat_symbol(',') {
                break;
            }
            self.eat(&["only"]);
        }
        names
    }

    /// Reads a group in parentheses, if one begins here.
    pub(super) fn group(&mut self) -> Option<Self> {
        if !self.sees_symbol('(') {
            return None;
        }
        let from = self.at + 1;
        let mut depth = 0_usize;
        while let Some((_, _, token)) = self.tokens.get(self.at) {
            match token {
                Token::Symbol('(') => depth += 1,
                Token::Symbol(')') => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                break;
            }
        }
        Some(self.part(from, self.at.saturating_sub(1).max(from)))
    }

    /// Reads up to the next comma outside of parentheses, and skips the comma.
    pub(super) fn until_comma(&mut self) -> Self {
        let from = self.at;
        let mut depth = 0_usize;
        while let Some((_, _, token)) = self.tokens.get(self.at) {
            match token {
                Token::Symbol('(' | '[') => depth += 1,
                Token::Symbol(')' | ']') => depth = depth.saturating_sub(1),
                Token::Symbol(',') if depth == 0 => break,
                _ => {}
            }
            self.at += 1;
        }
        let part = self.part(from, self.at);
        self.skip(1);
        part
    }

    fn part(&self, from: usize, to: usize) -> Self {
        Self {
            text: self.text,
            tokens: self.tokens[from.min(to)..to].to_vec(),
            at: 0,
        }
    }

    /// Reads the text up to the first of these words outside of parentheses.
    pub(super) fn text_until(&mut self, words: &[&str]) -> &'a str {
        let from = self.at;
        let mut depth = 0_usize;
        while let Some((_, _, token)) = self.tokens.get(self.at) {
            match token {
                Token::Symbol('(' | '[') => depth += 1,
                Token::Symbol(')' | ']') => depth = depth.saturating_sub(1),
                Token::Word(word) if depth == 0 && words.contains(&word.as_str()) => break,
                _ => {}
            }
            self.at += 1;
        }
        let (Some(first), true) = (self.tokens.get(from), self.at > from) else {
            return "";
        };
        &self.text[first.0..self.tokens[self.at - 1].1]
    }

    /// Whether the words occur from here on, outside of parentheses.
    pub(super) fn has(&self, words: &[&str]) -> bool {
        self.find(words).is_some()
    }

    /// Moves to the end of the words, if they occur outside of parentheses.
    pub(super) fn seek(&mut self, words: &[&str]) -> bool {
        let found = self.find(words);
        if let Some(at) = found {
            self.at = at + words.len();
        }
        found.is_some()
    }

    fn find(&self, words: &[&str]) -> Option<usize> {
        let mut depth = 0_usize;
        for at in self.at..self.tokens.len() {
            match &self.tokens[at].2 {
                Token::Symbol('(') => depth += 1,
                Token::Symbol(')') => depth = depth.saturating_sub(1),
                Token::Word(_) if depth == 0 && self.sees_at(at, words) => return Some(at),
                _ => {}
            }
        }
        None
    }

    /// The names of functions called from here on: words followed by a parenthesis.
    pub(super) fn calls(&self) -> Vec<String> {
        let tokens = &self.tokens[self.at.min(self.tokens.len())..];
        tokens
            .windows(2)
            .filter_map(|pair| match (&pair[0].2, &pair[1].2) {
                (Token::Word(name) | Token::Quoted(name), Token::Symbol('(')) => Some(name.clone()),
                _ => None,
            })
            .collect()
    }
}

/// The statements of a batch, without the semicolons between them. A semicolon in a function body `BEGIN ATOMIC … END`
/// does not end the statement.
pub(super) fn split(sql: &str) -> Vec<&str> {
    let mut statements = Vec::new();
    let mut start = None;
    let mut end = 0;
    let mut depth = 0_usize;
    let mut before = String::new();
    for (span, kind) in spans(sql) {
        if depth == 0 && kind == TokenKind::Symbol(';') {
            if let Some(start) = start.take() {
                statements.push(&sql[start..end]);
            }
            before.clear();
            continue;
        }
        start.get_or_insert(span.start);
        end = span.end;
        let word = match kind {
            TokenKind::Word(word) => word.to_lowercase(),
            _ => String::new(),
        };
        match word.as_str() {
            "atomic" if before == "begin" => depth = 1,
            "case" if depth > 0 => depth += 1,
            "end" if depth > 0 => depth -= 1,
            _ => {}
        }
        before = word;
    }
    if let Some(start) = start {
        statements.push(&sql[start..end]);
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_split_where_the_server_would() {
        assert_eq!(
            split(" -- a;\nSELECT ';' ; ; SELECT $$;$$, \"a;b\" /* ; */ ;"),
            ["SELECT ';'", "SELECT $$;$$, \"a;b\""]
        );
        let body = "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END";
        assert_eq!(
            split(&format!("{body}; DROP TABLE t")),
            [body, "DROP TABLE t"]
        );
        assert!(split(" ; -- nothing").is_empty());
    }

    #[test]
    fn names_are_folded_as_the_server_does() {
        let name = |text| Cursor::of(text).name();
        assert_eq!(name("Orders x"), Some(TableName::new("orders")));
        assert_eq!(
            name("Shop.\"Ord\"\"er\""),
            Some(TableName::in_schema("shop", "Ord\"er"))
        );
        assert_eq!(name("db.s.t"), Some(TableName::in_schema("s", "t")));
        assert_eq!(name("(a)"), None);
    }

    #[test]
    fn parts_end_at_commas_outside_of_parentheses() {
        let mut cursor = Cursor::of("add a numeric(10, 2) default f(1, g(2)), drop b");
        let mut first = cursor.until_comma();
        assert!(first.eat(&["add"]) && first.identifier().is_some());
        assert_eq!(first.text_until(&["default"]), "numeric(10, 2)");
        assert!(first.has(&["default"]) && !first.has(&["drop"]));
        assert_eq!(first.calls(), ["f", "g"]);
        assert!(cursor.eat(&["drop", "b"]) && cursor.is_at_end());
    }
}
