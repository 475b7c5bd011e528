//! Splits a statement into tokens like PostgreSQL's own lexer (`src/backend/parser/scan.l`). If the text alone does not
//! determine how the server read it, too much counts as a literal, never too little.

use std::iter::Peekable;
#[cfg(feature = "schema")]
use std::ops::Range;
use std::str::CharIndices;

/// A token, and whether white space came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) kind: TokenKind<'a>,
    /// Whether white space or a comment came before it.
    pub(super) spaced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind<'a> {
    /// A keyword or an unquoted identifier, as written.
    Word(&'a str),
    /// The text between the quotes of a quoted identifier, in which a `"` is still doubled.
    Quoted(&'a str),
    /// `$1`, with the `$`.
    Parameter(&'a str),
    /// A string or number of any form. Its text is not kept.
    Literal,
    /// Any other character.
    Symbol(char),
}

/// The tokens of a statement, without comments.
///
/// The last token may be an unterminated literal, because the server keeps only `track_activity_query_size` bytes of a
/// statement. An identifier or comment that is cut off is left out.
pub(super) fn tokens(sql: &str) -> impl Iterator<Item = Token<'_>> {
    Lexer { rest: sql }
}

/// The tokens with their positions in bytes.
#[cfg(feature = "schema")]
pub(crate) fn spans(sql: &str) -> impl Iterator<Item = (Range<usize>, TokenKind<'_>)> {
    let mut rest = sql;
    std::iter::from_fn(move || {
        rest = after_space(rest);
        let start = sql.len() - rest.len();
        let (length, kind) = next_token(rest)?;
        rest = &rest[length..];
        Some((start..start + length, kind))
    })
}

/// The plain string, if any, that turns the rest of the text into one literal because it contains `\'` or is
/// unterminated.
#[cfg(feature = "schema")]
pub(crate) fn ambiguous_string(sql: &str) -> Option<&str> {
    let (span, kind) = spans(sql).last()?;
    let text = &sql[span];
    let quote = text.find('\'')?;
    let is_plain = kind == TokenKind::Literal && !matches!(&text[..1], "e" | "E" | "$");
    let is_open = string(&text.as_bytes()[quote + 1..], Backslash::MayEscape).is_none();
    (is_plain && is_open).then_some(text)
}

struct Lexer<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Lexer<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        let before = self.rest.len();
        self.rest = after_space(self.rest);
        let spaced = self.rest.len() < before;
        let (length, kind) = next_token(self.rest)?;
        self.rest = &self.rest[length..];
        Some(Token { kind, spaced })
    }
}

/// The first token of the text, and its length in bytes.
fn next_token(text: &str) -> Option<(usize, TokenKind<'_>)> {
    let bytes = text.as_bytes();
    let first = text.chars().next()?;
    let second = bytes.get(1).copied();
    // A string with a letter before it: `E'…'` (the only form in which `\` always escapes), `B`, `X`, `N` and `U&`.
    // There must be no white space between the two. A longer word before the quote is a word.
    match (first, second) {
        ('e' | 'E', Some(b'\'')) => {
            return literal(2, string(&bytes[2..], Backslash::Escapes), text);
        }
        ('b' | 'B' | 'x' | 'X' | 'n' | 'N', Some(b'\'')) => {
            return literal(2, string(&bytes[2..], Backslash::MayEscape), text);
        }
        ('u' | 'U', Some(b'&')) if bytes.get(2) == Some(&b'\'') => {
            return literal(3, string(&bytes[3..], Backslash::MayEscape), text);
        }
        _ => {}
    }
    match first {
        '\'' => literal(1, string(&bytes[1..], Backslash::MayEscape), text),
        '"' => {
            let end = quoted(&bytes[1..])?;
            Some((end + 2, TokenKind::Quoted(&text[1..=end])))
        }
        '$' => dollar(text),
        '0'..='9' => Some((number(text), TokenKind::Literal)),
        '.' if second.is_some_and(|byte| byte.is_ascii_digit()) => {
            Some((number(text), TokenKind::Literal))
        }
        c if begins_word(c) => {
            let length = length_while(text, |c| continues_word(c) || c == '$');
            Some((length, TokenKind::Word(&text[..length])))
        }
        c => Some((c.len_utf8(), TokenKind::Symbol(c))),
    }
}

/// A literal of a prefix and the following bytes; an unterminated one extends to the end of the text.
fn literal(prefix: usize, end: Option<usize>, text: &str) -> Option<(usize, TokenKind<'_>)> {
    Some((
        end.map_or(text.len(), |end| prefix + end),
        TokenKind::Literal,
    ))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Backslash {
    Escapes,
    /// In a plain string `\` escapes if `standard_conforming_strings` is off, which the text does not tell.
    MayEscape,
}

/// The number of bytes from after the opening quote of a string to after its closing one. `None` if the string is
/// unterminated, or ambiguous: whether `\'` ends a plain string depends on a setting, and so does all text after it.
fn string(bytes: &[u8], backslash: Backslash) -> Option<usize> {
    let mut at = 0;
    loop {
        match (bytes.get(at)?, bytes.get(at + 1)) {
            (b'\'', Some(b'\'')) => at += 2,
            (b'\'', _) => return Some(at + 1),
            (b'\\', Some(b'\'')) if backslash == Backslash::MayEscape => return None,
            // It escapes any character, including a second `\`. A byte of a longer character is neither a quote nor
            // `\`.
            (b'\\', _) => at += 2,
            _ => at += 1,
        }
    }
}

/// The number of bytes of a quoted identifier, from after its opening quote to its closing one.
fn quoted(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match (bytes.get(at)?, bytes.get(at + 1)) {
            (b'"', Some(b'"')) => at += 2,
            (b'"', _) => return Some(at),
            _ => at += 1,
        }
    }
}

/// `$1`, `$tag$…$tag$`, or a single `$`.
fn dollar(text: &str) -> Option<(usize, TokenKind<'_>)> {
    let behind = &text[1..];
    let digits = length_while(behind, |c| c.is_ascii_digit());
    if digits > 0 {
        return Some((1 + digits, TokenKind::Parameter(&text[..=digits])));
    }
    // A tag is an identifier without `$`. The closing tag must be equal to it.
    let tag = length_while(behind, continues_word);
    let inside = &behind[tag..];
    if inside.is_empty() {
        // The text ends in the opening tag, or before its end.
        return None;
    }
    if !inside.starts_with('$') {
        return Some((1, TokenKind::Symbol('$')));
    }
    let delimiter = &text[..tag + 2];
    let end = text[delimiter.len()..].find(delimiter);
    literal(delimiter.len() * 2, end, text)
}

/// The number of bytes of a number, and of everything attached to it (`1_000`, `0x1F`, `12ab`). PostgreSQL up to 14
/// reads `12ab` as a number and a name, and later versions reject it; an unquoted token may still be data.
fn number(text: &str) -> usize {
    let part = |text: &str| length_while(text, |c| continues_word(c) || c == '.');
    let mut length = part(text);
    let prefixed = matches!(
        text.as_bytes(),
        [b'0', b'x' | b'X' | b'o' | b'O' | b'b' | b'B', ..]
    );
    let exponent = text[..length].ends_with(['e', 'E']) && !prefixed;
    if exponent && let [b'+' | b'-', b'0'..=b'9', ..] = text.as_bytes()[length..] {
        length += 1 + part(&text[length + 1..]);
    }
    length
}

/// Skips white space and comments; an unterminated comment extends to the end of the text.
pub(super) fn after_space(text: &str) -> &str {
    let mut rest = text;
    loop {
        // Control characters are no tokens of SQL, and must not be shown.
        rest = rest.trim_start_matches(|c: char| c == ' ' || c.is_ascii_control());
        rest = if rest.starts_with("--") {
            &rest[rest.find(['\n', '\r']).unwrap_or(rest.len())..]
        } else if let Some(inside) = rest.strip_prefix("/*") {
            after_comment(inside)
        } else {
            return rest;
        };
    }
}

/// The text after a `/* … */`, given the text after its opening. Comments nest.
fn after_comment(inside: &str) -> &str {
    let mut characters = inside.char_indices().peekable();
    let next_is = |characters: &mut Peekable<CharIndices<'_>>, wanted| {
        characters.next_if(|(_, c)| *c == wanted).is_some()
    };
    let mut depth = 1;
    while let Some((at, c)) = characters.next() {
        match c {
            '/' if next_is(&mut characters, '*') => depth += 1,
            '*' if next_is(&mut characters, '/') => {
                depth -= 1;
                if depth == 0 {
                    return &inside[at + 2..];
                }
            }
            _ => {}
        }
    }
    ""
}

/// PostgreSQL treats every non-ASCII character as a letter, including the no-break space.
fn begins_word(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn continues_word(c: char) -> bool {
    begins_word(c) || c.is_ascii_digit()
}

fn length_while(text: &str, is_part: impl Fn(char) -> bool) -> usize {
    text.find(|c| !is_part(c)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::TokenKind::{Literal, Parameter, Quoted, Symbol, Word};
    use super::*;

    fn kinds(sql: &str) -> Vec<TokenKind<'_>> {
        tokens(sql).map(|token| token.kind).collect()
    }

    #[test]
    fn words_parameters_and_quoted_names() {
        assert_eq!(
            kinds("a1$2 $1 _b \"C \"\"d\"\"\" $12x é"),
            [
                Word("a1$2"),
                Parameter("$1"),
                Word("_b"),
                Quoted("C \"\"d\"\""),
                Parameter("$12"),
                Word("x"),
                Word("é")
            ]
        );
    }

    #[test]
    fn each_form_of_a_literal_is_one_token() {
        for literal in [
            "''",
            "'a'",
            "'it''s'",
            r"'C:\dir\\'",
            r"E'\'\\'",
            r"e'a\'b''c'",
            "B'01'",
            "x'1F'",
            "N'é'",
            r"U&'\0061'",
            "$$a'b$$",
            "$q$ $$ $Q$ $q$",
            "$é$x$é$",
            "1",
            "1_000",
            "0x1F",
            "0b01",
            "1e-5",
            "1.5E+10",
            ".5",
            "1.",
            "12ab",
        ] {
            assert_eq!(kinds(literal), [Literal], "{literal}");
            let within = format!("a {literal};b");
            assert_eq!(
                kinds(&within),
                [Word("a"), Literal, Symbol(';'), Word("b")],
                "{literal}"
            );
        }
    }

    #[test]
    fn what_resembles_a_literal() {
        assert_eq!(kinds("t1"), [Word("t1")]);
        assert_eq!(kinds("a$b$c$b$"), [Word("a$b$c$b$")]);
        assert_eq!(kinds("0x1e-5"), [Literal, Symbol('-'), Literal]);
        assert_eq!(kinds("ee'a'"), [Word("ee"), Literal]);
        assert_eq!(kinds("$a b$"), [Symbol('$'), Word("a"), Word("b$")]);
        assert_eq!(
            kinds("a[1]"),
            [Word("a"), Symbol('['), Literal, Symbol(']')]
        );
    }

    #[test]
    fn comments_nest_and_are_white_space() {
        let spaced: Vec<_> = tokens("a/* ' /* */ \" */b--'\nc- -d/**/e/***/f/*/ */g")
            .map(|token| (token.kind, token.spaced))
            .collect();
        assert_eq!(
            spaced,
            [
                (Word("a"), false),
                (Word("b"), true),
                (Word("c"), true),
                (Symbol('-'), false),
                (Symbol('-'), true),
                (Word("d"), false),
                (Word("e"), true),
                (Word("f"), true),
                (Word("g"), true),
            ]
        );
    }

    #[test]
    fn unterminated_tokens_extend_to_the_end() {
        for open in [
            "'a b",
            "E'a \\' b",
            "$$ a b",
            "$x$ a $$ b",
            "$x$ a b $x",
            "U&'a b",
        ] {
            assert_eq!(kinds(&format!("a {open}")), [Word("a"), Literal], "{open}");
        }
        assert_eq!(kinds("a -- b\rc"), [Word("a"), Word("c")]);
        for open in ["/* b", "/* /* b */", "-- b", "\"b", "$b"] {
            assert_eq!(kinds(&format!("a {open}")), [Word("a")], "{open}");
        }
    }

    /// `standard_conforming_strings` decides where the string ends, and what is inside the next one.
    #[test]
    fn an_ambiguous_string_takes_the_rest_with_it() {
        assert_eq!(kinds(r"a 'b\' c 'd' e"), [Word("a"), Literal]);
        assert_eq!(kinds(r"a 'b\\\' c 'd' e"), [Word("a"), Literal]);
        assert_eq!(kinds(r"a 'b\\' c"), [Word("a"), Literal, Word("c")]);
    }
}
