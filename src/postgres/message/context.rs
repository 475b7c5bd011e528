//! Parses the CONTEXT of an error: which row was waited for, and which functions were running.

use super::number::{Number, is_pair, numbers};

/// A line of a CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContextLine {
    /// As the server wrote it.
    pub(crate) raw: String,
    pub(crate) kind: ContextKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ContextKind {
    /// `while updating tuple (0,9) in relation "users"`
    Row(RowContext),
    /// `PL/pgSQL function transfer(integer,integer) line 3 at SQL statement`, which contains no data.
    Function,
    /// Anything else. It may contain data: the text of a statement, a line of a `COPY`, parameters.
    Other,
}

/// The row whose transaction was waited for (`XactLockTableWaitErrorCb` in PostgreSQL's
/// `src/backend/storage/lmgr/lmgr.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowContext {
    pub(crate) page: u32,
    pub(crate) offset: u16,
    /// Without the schema, which the server does not look up.
    pub(crate) relation: String,
    /// Whether it is about an entry of a unique index. Then the relation is usually the index, and the row is the one
    /// that is being inserted (`_bt_doinsert` in PostgreSQL's `src/backend/access/nbtree/nbtinsert.c`). For `ON
    /// CONFLICT` and deferred constraints it is the table, and the conflicting row
    /// (`check_exclusion_or_unique_constraint` in `src/backend/executor/execIndexing.c`). The name tells which.
    pub(crate) index_entry: bool,
    /// Whether it is about a row that may overlap under an exclusion constraint. Then it is the row that was there before.
    pub(crate) exclusion: bool,
}

/// Parses a CONTEXT as a client receives it.
///
/// Only its beginning can name a row, because the wait is the innermost frame. Text of the application follows, which
/// may have the same form.
pub(crate) fn context(text: &str) -> Vec<ContextLine> {
    let mut lines = Vec::new();
    if text.is_empty() {
        return lines;
    }
    let mut rest = Some(text);
    if let Some((end, row)) = leading_row(text) {
        lines.push(ContextLine {
            raw: text[..end].to_owned(),
            kind: ContextKind::Row(row),
        });
        rest = text[end..].strip_prefix('\n');
    }
    // A quoted text may span several lines, and its end cannot be distinguished from a quote within it.
    let mut quoted = false;
    for line in rest.into_iter().flat_map(|rest| rest.split('\n')) {
        let kind = if !quoted && is_function(line) {
            ContextKind::Function
        } else {
            ContextKind::Other
        };
        let closes = line.ends_with(is_quote);
        quoted = !closes && (quoted || line.contains(is_quote));
        lines.push(ContextLine {
            raw: line.to_owned(),
            kind,
        });
    }
    lines
}

/// The maximum number of bytes of a line that names a row.
const MAX_ROW_BYTES: usize = 1000;

/// A row at the beginning of the text, and where it ends: at the end of a line, but maybe not of the first. A name has
/// at most 63 bytes, and so at most 63 line feeds; no sentence has more than a few hundred.
fn leading_row(text: &str) -> Option<(usize, RowContext)> {
    text.match_indices('\n')
        .map(|(end, _)| end)
        .chain([text.len()])
        .take(64)
        .take_while(|end| *end <= MAX_ROW_BYTES)
        .find_map(|end| Some((end, row(&text[..end])?)))
}

fn row(text: &str) -> Option<RowContext> {
    let numbers = numbers(text);
    let [first, second, ..] = numbers.as_slice() else {
        return None;
    };
    let [.., last_but_one, last] = numbers.as_slice() else {
        return None;
    };
    let (page, offset, (relation, words)) = if text[..first.at.start].contains(is_quote) {
        (
            last_but_one,
            last,
            row_after_name(text, last_but_one, last)?,
        )
    } else {
        (first, second, row_before_name(text, first, second)?)
    };
    let words = words.to_lowercase();
    Some(RowContext {
        page: page.value?,
        offset: u16::try_from(offset.value?).ok()?,
        relation: relation.to_owned(),
        index_entry: INDEX.split('|').any(|word| words.contains(word)),
        exclusion: EXCLUSION.split('|').any(|word| words.contains(word)),
    })
}

/// The words of the languages of [`lock_tag`](super::lock_tag), or what their inflected forms have in common,
/// separated by `|`.
const INDEX: &str = "index|indeks|índice|indice|индекс|індекс|インデックス|인덱스|索引";

/// The same for `while checking exclusion constraint on tuple`.
const EXCLUSION: &str =
    "exclusion|exclusión|esclusione|排除|제외|исключени|uteslutning|виключенн|排它";

/// `while updating tuple (0,9) in relation "users"`, and in Korean `0,9 튜플(해당 릴레이션 "users")을 갱신하는 중에 발생`: returns the
/// name, and all words around it.
fn row_before_name<'a>(
    text: &'a str,
    first: &Number,
    second: &Number,
) -> Option<(&'a str, String)> {
    if !is_pair(text, first, second) {
        return None;
    }
    let before = &text[..first.at.start];
    let behind = &text[second.at.end..];
    let open = behind.find(is_quote)?;
    let quote = behind[open..].chars().next()?;
    let name = open + quote.len_utf8();
    if before.is_empty() {
        let close = behind.rfind('"').filter(|close| *close >= name)?;
        let (between, after) = (&behind[..open], &behind[close + 1..]);
        let words = format!("{between} {after}");
        let plain = !words.contains(|c: char| c.is_ascii_digit() || c == '\n');
        let korean = between.contains("튜플")
            && words.contains("릴레이션")
            && after.contains(|c: char| ('가'..='힣').contains(&c));
        return (korean && plain).then_some((&behind[name..close], words));
    }
    let before = before.strip_suffix('(')?;
    let between = behind[..open].strip_prefix(')')?;
    let words = format!("{before} {between}");
    let plain = !words.contains(|c: char| c.is_ascii_digit() || matches!(c, '(' | ')' | '\n'));
    // Nothing follows the name.
    let inside = behind[name..].strip_suffix(closing(quote))?;
    // French puts a space inside its quotes, and a name may have one too.
    let spaced = quote == '«' && between.contains("relation ");
    let inside = if spaced {
        let inside = inside.strip_prefix([' ', '\u{a0}', '\u{202f}'])?;
        inside.strip_suffix([' ', '\u{a0}', '\u{202f}'])?
    } else {
        inside
    };
    (plain && !before.trim().is_empty()).then_some((inside, words))
}

/// `リレーション"users"のタプル(0,9)の更新中`, Chinese `当更新关系"users"的元组(0, 9)时`, Turkish `"users" nesnesindeki (0,9) satırı
/// güncellenirken`. Checks the words too, because the text of a statement can have this form.
fn row_after_name<'a>(text: &'a str, first: &Number, second: &Number) -> Option<(&'a str, String)> {
    let head = text[..first.at.start].strip_suffix('(')?;
    let tail = text[second.at.end..].strip_prefix(')')?;
    let (before, _) = head.split_once('"')?;
    let close = head.rfind('"').filter(|close| *close > before.len())?;
    let between = &head[close + 1..];
    let words = format!("{before} {between} {tail}");
    let plain = !words.contains(|c: char| c.is_ascii_digit() || matches!(c, '"' | '\n'));
    let known = match before.trim_end() {
        "" => between.trim_start().starts_with("nesnesindeki"),
        before if before.ends_with("リレーション") => between.contains("タプル"),
        before if before.ends_with("关系") => between.contains("元组"),
        _ => false,
    };
    (plain && known && is_pair(text, first, second))
        .then_some((&head[before.len() + 1..close], words))
}

fn is_quote(c: char) -> bool {
    matches!(c, '"' | '«' | '»' | '„' | '“' | '”' | '「' | '」')
}

fn closing(open: char) -> &'static [char] {
    match open {
        '«' => &['»'],
        '»' => &['«'],
        '„' => &['“', '”'],
        '“' => &['”'],
        '「' => &['」'],
        _ => &['"'],
    }
}

/// Whether a line is only a frame of a PL/pgSQL function: the language's name, and no other number than a line number.
fn is_function(line: &str) -> bool {
    // Korean quotes the function.
    let line = line
        .replacen("함수 \"", "함수 ", 1)
        .replacen("\" 의 ", " 의 ", 1);
    let of_its_own = |number: &Number| {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        !line[..number.at.start].ends_with(is_part) && !line[number.at.end..].starts_with(is_part)
    };
    line.contains("PL/pgSQL")
        && !line.contains(|c| is_quote(c) || matches!(c, '\'' | '$' | '=' | ':' | ';'))
        && numbers(&line)
            .iter()
            .filter(|number| of_its_own(number))
            .count()
            <= 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::languages::{LANGUAGES, Language, format};
    use super::*;

    fn row_of(text: &str) -> Option<RowContext> {
        match context(text).into_iter().next()?.kind {
            ContextKind::Row(row) => Some(row),
            _ => None,
        }
    }

    fn language() -> impl Strategy<Value = &'static Language> {
        prop::sample::select(LANGUAGES.iter().collect::<Vec<_>>())
    }

    #[test]
    fn the_row_is_parsed_in_every_language() {
        for language in &LANGUAGES {
            for (at, template) in language.contexts.into_iter().enumerate() {
                let line = format(template, &[&4_294_967_295_u32, &9, &"users"]);
                let expected = RowContext {
                    page: u32::MAX,
                    offset: 9,
                    relation: "users".to_owned(),
                    index_entry: at == 4,
                    exclusion: at == 7,
                };
                assert_eq!(row_of(&line), Some(expected), "{}: {line}", language.code);
            }
        }
    }

    /// Words of languages that the catalogs above lack, in the order that those use.
    #[test]
    fn the_row_is_parsed_in_other_languages() {
        for line in [
            "\"a b\" nesnesindeki (1,2) indeks kaydı (insert)",
            "podczas (1,2) relacji \"a b\"",
            "zzz (1, 2) zzz “a b”",
            "zzz (1,2) zzz „a b“",
            "zzz (1,2) zzz 「a b」",
        ] {
            let row = row_of(line).expect("a row");
            assert_eq!(
                (row.page, row.offset, row.relation.as_str()),
                (1, 2, "a b"),
                "{line}"
            );
        }
    }

    #[test]
    fn every_frame_is_kept() {
        let text = "while locking tuple (0,3) in relation \"account\"\n\
                    SQL statement \"SELECT 1\n  FROM ONLY account\n  WHERE id = 4\"\n\
                    PL/pgSQL function transfer(integer,numeric) line 3 at SQL statement\n\
                    COPY account, line 7: \"8,nine\"";
        let lines = context(text);
        let raw: Vec<_> = lines.iter().map(|line| line.raw.as_str()).collect();
        assert_eq!(raw.join("\n"), text);
        let kinds: Vec<_> = lines.iter().skip(1).map(|line| &line.kind).collect();
        use ContextKind::{Function, Other};
        assert_eq!(kinds, [&Other, &Other, &Other, &Function, &Other]);
        assert_eq!(context(""), []);
    }

    #[test]
    fn functions_are_distinguished_from_data_in_every_language() {
        for language in &LANGUAGES {
            let function = format(language.function, &[&"f(int4,numeric)", &12, &"PERFORM"]);
            let sql = format(language.sql, &[&"SELECT\nPL/pgSQL 5\n, PL/pgSQL"]);
            let kinds: Vec<_> = context(&format!("{sql}\n{function}"))
                .into_iter()
                .map(|line| line.kind)
                .collect();
            use ContextKind::{Function, Other};
            assert_eq!(kinds, [Other, Other, Other, Function], "{sql} {function}");
        }
        for data in [
            "PL/pgSQL assignment \"x := 5\"",
            "PL/pgSQL x = 5",
            "PL/pgSQL function f() 1 2",
            "unnamed portal with parameters: $1 = 'PL/pgSQL'",
        ] {
            assert_eq!(context(data)[0].kind, ContextKind::Other, "{data}");
        }
    }

    #[test]
    fn statements_are_not_mistaken_for_rows() {
        for language in &LANGUAGES {
            for statement in [
                "SELECT f(1,2)",
                "INSERT INTO \"a\" VALUES (1,2)\n, (3,4)",
                "(1,2) \"a\"",
                "1,2",
                "\" (1,2) \"",
            ] {
                let text = format(language.sql, &[&statement]);
                assert_eq!(row_of(&text), None, "{text}");
            }
        }
        let behind = "SQL statement \"x\"\nwhile locking tuple (0,3) in relation \"account\"";
        assert!(
            context(behind)
                .iter()
                .all(|line| line.kind == ContextKind::Other)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_name_is_found_again(
            language in language(),
            at in 0..8_usize,
            page in any::<u32>(),
            offset in 1..=u16::MAX,
            name in "[^\0\n]{1,63}|[a-z\"'«»„“()0-9,\n ]{1,20}",
            behind in prop::option::of(Just("SQL statement \"UPDATE t SET a = 'b'\"")),
        ) {
            // If a line of the name ends in a quote, the end of the name is ambiguous.
            let name = name.replace('\n', " \n");
            let mut text = format(language.contexts[at], &[&page, &offset, &name]);
            let length = text.len();
            if let Some(behind) = behind {
                text.push('\n');
                text.push_str(behind);
            }
            let lines = context(&text);
            prop_assert_eq!(&lines[0].raw, &text[..length]);
            let row = row_of(&text);
            prop_assert_eq!(row, Some(RowContext { page, offset, relation: name, index_entry: at == 4, exclusion: at == 7 }));
        }

        #[test]
        fn any_text_is_kept(text in any::<String>()) {
            let lines: Vec<_> = context(&text).into_iter().map(|line| line.raw).collect();
            prop_assert_eq!(lines.join("\n"), text);
        }

        /// A damaged line gives the same name or a part of the text, and never panics.
        #[test]
        fn damaged_text_is_parsed_or_kept(
            language in language(),
            at in 0..8_usize,
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..4),
        ) {
            let text = format(language.contexts[at], &[&1, &2, &"users"]);
            let damaged = super::super::languages::damage(&text, &edits);
            let lines: Vec<_> = context(&damaged).into_iter().map(|line| line.raw).collect();
            prop_assert_eq!(lines.join("\n"), damaged);
        }
    }
}
