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

/// The longest name of a server that was built as usual (`NAMEDATALEN - 1`).
const LONGEST_NAME: usize = 63;

/// A name as the server cuts it.
fn cut(mut name: String) -> String {
    let mut end = name.len().min(LONGEST_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
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
                    // The server folds ASCII only, in every encoding of more than one byte a character
                    // (`downcase_identifier` in `src/backend/parser/scansup.c`).
                    TokenKind::Word(word) => Token::Word(cut(word.to_ascii_lowercase())),
                    TokenKind::Quoted(name) => Token::Quoted(cut(name.replace("\"\"", "\""))),
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

    /// Goes back by one token.
    pub(super) fn back(&mut self) {
        self.at = self.at.saturating_sub(1);
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

    /// Reads a name, and whether it is that of a table without its children.
    pub(super) fn relation(&mut self) -> Option<(TableName, bool)> {
        if !self.eat(&["only"]) {
            return Some((self.name()?, false));
        }
        match self.group() {
            Some(mut inside) => {
                let name = inside.name()?;
                inside.is_at_end().then_some((name, true))
            }
            None => Some((self.name()?, true)),
        }
    }

    /// Reads names separated by commas, each with ONLY or without.
    pub(super) fn relations(&mut self) -> Option<Vec<(TableName, bool)>> {
        let mut all = vec![self.relation()?];
        while self.eat_symbol(',') {
            all.push(self.relation()?);
        }
        Some(all)
    }

    /// Reads names separated by commas.
    pub(super) fn names(&mut self) -> Option<Vec<TableName>> {
        let mut names = vec![self.name()?];
        while self.eat_symbol(',') {
            names.push(self.name()?);
        }
        Some(names)
    }

    /// Reads one of these words, if it comes next.
    pub(super) fn one_of(&mut self, words: &[&str]) -> bool {
        let sees = words.contains(&self.word());
        if sees {
            self.skip(1);
        }
        sees
    }

    /// Skips a literal.
    pub(super) fn eat_literal(&mut self) -> bool {
        let is_literal = matches!(self.tokens.get(self.at), Some((_, _, Token::Literal)));
        if is_literal {
            self.skip(1);
        }
        is_literal
    }

    /// The text from here on.
    pub(super) fn rest(&self) -> &'a str {
        match (self.tokens.get(self.at), self.tokens.last()) {
            (Some((from, _, _)), Some((_, to, _))) => &self.text[*from..*to],
            _ => "",
        }
    }

    /// The symbols from here on that are no punctuation: characters of operators.
    pub(super) fn has_operators(&self) -> bool {
        self.tokens[self.at.min(self.tokens.len())..]
            .iter()
            .any(|(_, _, token)| matches!(token, Token::Symbol(c) if !"(),.[];:".contains(*c)))
    }

    /// The names that follow these words anywhere, in parentheses too.
    pub(super) fn names_after(&self, words: &[&str]) -> Vec<TableName> {
        let mut found = Vec::new();
        for at in self.at..self.tokens.len() {
            let follows =
                matches!(&self.tokens[at].2, Token::Word(word) if words.contains(&word.as_str()));
            if !follows {
                continue;
            }
            let mut rest = self.clone();
            rest.at = at + 1;
            loop {
                rest.eat(&["lateral"]);
                let Some((name, _)) = rest.relation() else {
                    break;
                };
                if rest.sees_symbol('(') {
                    // A function.
                    rest.group();
                } else {
                    found.push(name);
                }
                rest.eat(&["as"]);
                let is_alias = !rest.word().is_empty()
                    && ![
                        "where", "join", "on", "left", "inner", "set", "group", "order", "values",
                        "select",
                    ]
                    .contains(&rest.word());
                if is_alias {
                    rest.skip(1);
                }
                if !rest.eat_symbol(',') {
                    break;
                }
            }
        }
        found
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
    let mut parentheses = 0_usize;
    let mut before = String::new();
    for (span, kind) in spans(sql) {
        match kind {
            TokenKind::Symbol('(') => parentheses += 1,
            TokenKind::Symbol(')') => parentheses = parentheses.saturating_sub(1),
            _ => {}
        }
        // The commands of a rule stand in parentheses.
        if depth == 0 && parentheses == 0 && kind == TokenKind::Symbol(';') {
            if let Some(start) = start.take() {
                statements.push(&sql[start..end]);
            }
            before.clear();
            parentheses = 0;
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
        let rule = "CREATE RULE r AS ON DELETE TO t DO (DELETE FROM a; DELETE FROM b)";
        assert_eq!(
            split(&format!("{rule}; DROP TABLE t")),
            [rule, "DROP TABLE t"]
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
        assert_eq!(name("ÄB"), Some(TableName::new("Äb")));
        let long = "x".repeat(70);
        assert_eq!(name(&long), Some(TableName::new(&long[..63])));
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
