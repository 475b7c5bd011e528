//! Escapes texts of unknown content for each format, and shortens them.

/// Escapes a text for HTML, between tags or in an attribute with double quotes.
pub(super) fn html(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars().map(printable) {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// Escapes a text for a quoted string of DOT, where `&` starts an entity and `\` an escape sequence.
pub(super) fn dot(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars().map(printable) {
        match c {
            '\n' | '\t' => safe.push(' '),
            '&' => safe.push_str("&amp;"),
            '"' | '\\' => {
                safe.push('\\');
                safe.push(c);
            }
            c => safe.push(c),
        }
    }
    safe
}

/// Escapes a text for a quoted label of Mermaid. All characters that Mermaid, or Markdown within it, could interpret
/// become numeric entities.
pub(super) fn mermaid(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut chars = text.chars().map(printable).peekable();
    let mut is_first = true;
    while let Some(c) = chars.next() {
        // `1. ` and `- ` at the beginning of a line start a list.
        let ends_word = chars.peek().is_none_or(|next| next.is_whitespace());
        let is_plain = c.is_alphanumeric()
            || matches!(
                c,
                ' ' | ',' | '/' | '(' | ')' | '=' | '…' | '?' | ':' | '\u{fffd}'
            )
            || (matches!(c, '.' | '-') && !ends_word && !is_first);
        match c {
            '\n' | '\t' => safe.push(' '),
            c if is_plain || !c.is_ascii() => safe.push(c),
            c => {
                safe.push('#');
                safe.push_str(&u32::from(c).to_string());
                safe.push(';');
            }
        }
        is_first = false;
    }
    safe
}

/// Replaces characters that end a document, move a cursor, or change the direction of text.
fn printable(c: char) -> char {
    let acts = (c.is_control() && !matches!(c, '\n' | '\t'))
        || matches!(
            c,
            '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'
                ..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{fdd0}'..='\u{fdef}'
        )
        || u32::from(c) & 0xfffe == 0xfffe;
    if acts { '\u{fffd}' } else { c }
}

/// The text on one line, in at most this many columns of a fixed-width font. `…` stands for what is cut off.
pub(super) fn fit(text: &str, columns: usize, keep_end: bool) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ");
    if width(&line) <= columns {
        return line;
    }
    let room = columns.saturating_sub(1);
    let mut used = 0;
    let mut fits = |c: &char| {
        used += columns_of(*c);
        used <= room
    };
    if keep_end {
        let end: Vec<_> = line.chars().rev().take_while(&mut fits).collect();
        format!("…{}", end.into_iter().rev().collect::<String>())
    } else {
        let start: String = line.chars().take_while(&mut fits).collect();
        format!("{start}…")
    }
}

pub(super) fn width(text: &str) -> usize {
    text.chars().map(columns_of).sum()
}

/// An upper bound: Chinese, Japanese and Korean characters, and all others that may be as wide, count as two columns.
fn columns_of(c: char) -> usize {
    match c {
        '\u{0}'..='\u{36f}' | '…' => 1,
        '\u{fffd}' => 2,
        '\u{370}'..='\u{58f}' => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn markup_is_text() {
        let odd = "</script><b a=\"1\" b='2'>&amp;\u{0}\u{202e}`#35;\\n";
        assert_eq!(
            html(odd),
            "&lt;/script&gt;&lt;b a=&quot;1&quot; b=&#39;2&#39;&gt;&amp;amp;\u{fffd}\u{fffd}`#35;\\n"
        );
        assert_eq!(
            dot(odd),
            "</script><b a=\\\"1\\\" b='2'>&amp;amp;\u{fffd}\u{fffd}`#35;\\\\n"
        );
        assert_eq!(
            mermaid("a \"b\" <c> #d; `e` 1. x - src/pay.rs:42"),
            "a #34;b#34; #60;c#62; #35;d#59; #96;e#96; 1#46; x #45; src/pay.rs:42"
        );
    }

    #[test]
    fn long_texts_lose_one_end() {
        assert_eq!(fit("a  b\n c", 5, false), "a b c");
        assert_eq!(fit("abcdef", 4, false), "abc…");
        assert_eq!(fit("abcdef", 4, true), "…def");
        assert_eq!(fit("日本語", 5, false), "日本…");
        assert_eq!(fit("abc", 0, false), "…");
    }

    proptest! {
        #[test]
        fn no_text_escapes_its_format(text in any::<String>(), markup in "[<>&\"'\\\\#;`\\[\\]{}|\n a-]{0,40}") {
            for text in [text, markup] {
                let safe = html(&text);
                prop_assert!(!safe.contains(['<', '>', '"', '\'', '\0']));
                let back = safe
                    .replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'")
                    .replace("&amp;", "&");
                prop_assert_eq!(back, text.chars().map(printable).collect::<String>());
                let safe = dot(&text);
                let unescaped = safe.replace("\\\\", "").replace("\\\"", "");
                prop_assert!(!unescaped.contains(['"', '\\', '\n']));
                let safe = mermaid(&text);
                let acts = |c| "\"<>&`\n[]{}|\\".contains(c);
                prop_assert!(!safe.contains(acts));
            }
        }

        #[test]
        fn a_fitted_text_fits(text in any::<String>(), columns in 1..60_usize, keep_end in any::<bool>()) {
            prop_assert!(width(&fit(&text, columns, keep_end)) <= columns);
        }
    }
}
