//! Locked objects as `DescribeLockTag` writes them (PostgreSQL's `src/backend/storage/lmgr/lmgr.c`).

use std::fmt;

use super::number::{Number, is_pair, numbers};

/// The object that a backend waits for.
///
/// The message contains no names: the server does not look them up, because that would take locks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub(crate) enum LockTag {
    /// A table, index, sequence or view. `database` is 0 for a catalog that all databases share, here and below.
    Relation { database: u32, relation: u32 },
    /// The right to extend a relation.
    Extension { database: u32, relation: u32 },
    /// `pg_database.datfrozenxid` of one database.
    FrozenIds { database: u32 },
    Page {
        database: u32,
        relation: u32,
        page: u32,
    },
    /// A row version: the wait to be the next waiter for the transaction that locked it.
    Tuple {
        database: u32,
        relation: u32,
        page: u32,
        offset: u16,
    },
    /// The end of a transaction, by its 32-bit id: usually the wait for a row that it changed or locked.
    Transaction { xid: u32 },
    /// The end of a transaction that may have no id yet; `CREATE INDEX CONCURRENTLY` waits for it.
    VirtualTransaction { backend: i32, local: u32 },
    /// The end of one `INSERT … ON CONFLICT`.
    SpeculativeToken { xid: u32, token: u32 },
    /// A catalog object that is not a relation: row `object` of the catalog `class`.
    Object {
        database: u32,
        class: u32,
        object: u32,
    },
    /// A lock of old contributed modules.
    UserLock { fields: [u32; 3] },
    /// `classid`, `objid` and `objsubid` as in `pg_locks`.
    Advisory {
        database: u32,
        classid: u32,
        objid: u32,
        objsubid: u16,
    },
    /// A transaction that logical replication applies (16 and later).
    RemoteTransaction {
        database: u32,
        subscription: u32,
        xid: u32,
    },
    /// An unknown object: the text in its position, with words of the sentence around it.
    Unknown { text: String },
}

/// As an English server writes it.
impl fmt::Display for LockTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relation { database, relation } => {
                write!(f, "relation {relation} of database {database}")
            }
            Self::Extension { database, relation } => {
                write!(f, "extension of relation {relation} of database {database}")
            }
            Self::FrozenIds { database } => {
                write!(f, "pg_database.datfrozenxid of database {database}")
            }
            Self::Page {
                database,
                relation,
                page,
            } => write!(
                f,
                "page {page} of relation {relation} of database {database}"
            ),
            Self::Tuple {
                database,
                relation,
                page,
                offset,
            } => write!(
                f,
                "tuple ({page},{offset}) of relation {relation} of database {database}"
            ),
            Self::Transaction { xid } => write!(f, "transaction {xid}"),
            Self::VirtualTransaction { backend, local } => {
                write!(f, "virtual transaction {backend}/{local}")
            }
            Self::SpeculativeToken { xid, token } => {
                write!(f, "speculative token {token} of transaction {xid}")
            }
            Self::Object {
                database,
                class,
                object,
            } => write!(f, "object {object} of class {class} of database {database}"),
            Self::UserLock { fields: [a, b, c] } => write!(f, "user lock [{a},{b},{c}]"),
            Self::Advisory {
                database,
                classid,
                objid,
                objsubid,
            } => write!(f, "advisory lock [{database},{classid},{objid},{objsubid}]"),
            Self::RemoteTransaction {
                database,
                subscription,
                xid,
            } => write!(
                f,
                "remote transaction {xid} of subscription {subscription} of database {database}"
            ),
            Self::Unknown { text } => f.write_str(text),
        }
    }
}

impl LockTag {
    /// Parses the description of an object, possibly with words of the sentence around it, but without other numbers.
    pub(super) fn parse(text: &str) -> Self {
        known(text).unwrap_or_else(|| Self::Unknown {
            text: text
                .trim_matches(|c: char| c.is_whitespace() || c == ';')
                .to_owned(),
        })
    }
}

/// The words that distinguish objects of the same form, in lower case: of all languages of PostgreSQL 14 to 18
/// (`src/backend/po`), or what their inflected forms have in common. They are separated by `|`.
mod word {
    pub(super) const DATABASE: &str = "databas|datenbank|base de d|bazy danych|banco de dados|veritaban|баз|ბაზ|データベース|데이터베이스|\
         数据库";
    pub(super) const RELATION: &str = "relation|relaci|relazion|relacj|relaç|tabel|nesne|отношени|відношенн|ურთიერთობ|リレーション|\
         릴레이션|관계|关系";
    pub(super) const EXTENSION: &str = "extens|estension|ekstensi|erweiterung|utökning|rozszerzeni|uzantı|расширени|розширенн|\
         გაფართოებ|拡張|확장|扩展";
    pub(super) const PAGE: &str =
        "page|seite|página|pagina|sida|strona|sayfa|halaman|страниц|сторінк|გვერდ|ページ|페이지|页";
    pub(super) const OBJECT: &str =
        "obje|oggett|obiekt|obyek|nesne|объект|єкт|オブジェクト|개체|对象";
    pub(super) const TRANSACTION: &str =
        "transac|transak|transaz|transaç|транзак|ტრანზაქ|トランザクション|트랜잭션|事务";
    pub(super) const TOKEN: &str = "token|jeton|маркер|トークン|토큰|记号";
    /// The only language that writes a tuple's offset before its page.
    pub(super) const JAPANESE_TUPLE: &str = "タプル";
}

/// Numbers come in the order of their words: each language has all words before the numbers, or all after them.
fn known(text: &str) -> Option<LockTag> {
    let numbers = numbers(text);
    let values: Option<Vec<u32>> = numbers.iter().map(|number| number.value).collect();
    let lower = text.to_lowercase();
    let position = |words: &str| words.split('|').filter_map(|word| lower.find(word)).min();
    let comes_first = |first: &str, second: &str| Some(position(first)? < position(second)?);
    let has = |words: &str| position(words).is_some();

    let between = |first: &Number, second: &Number| &text[first.at.end..second.at.start];
    match (values?.as_slice(), numbers.as_slice()) {
        (&[database], _) if lower.contains("datfrozenxid") => Some(LockTag::FrozenIds { database }),
        (&[xid], _) if has(word::TRANSACTION) => Some(LockTag::Transaction { xid }),
        (&[backend, local], [first, second]) if between(first, second) == "/" => {
            let sign = if text[..first.at.start].ends_with('-') {
                -1
            } else {
                1
            };
            Some(LockTag::VirtualTransaction {
                backend: i32::try_from(sign * i64::from(backend)).ok()?,
                local,
            })
        }
        (&[a, b], _) if has(word::TRANSACTION) => {
            let (token, xid) = if comes_first(word::TRANSACTION, word::TOKEN)? {
                (b, a)
            } else {
                (a, b)
            };
            Some(LockTag::SpeculativeToken { xid, token })
        }
        (&[a, b], _) => {
            let (relation, database) = if comes_first(word::DATABASE, word::RELATION)? {
                (b, a)
            } else {
                (a, b)
            };
            Some(if has(word::EXTENSION) {
                LockTag::Extension { database, relation }
            } else {
                LockTag::Relation { database, relation }
            })
        }
        (&[a, b, c], [first, .., last]) if in_brackets(text, first, last) => {
            Some(LockTag::UserLock { fields: [a, b, c] })
        }
        (&[a, b, c], _) => {
            let of = |words| {
                Some(if comes_first(word::DATABASE, words)? {
                    (a, b, c)
                } else {
                    (c, b, a)
                })
            };
            if let Some((database, subscription, xid)) = of(word::TRANSACTION) {
                Some(LockTag::RemoteTransaction {
                    database,
                    subscription,
                    xid,
                })
            } else if let Some((database, relation, page)) = of(word::PAGE) {
                Some(LockTag::Page {
                    database,
                    relation,
                    page,
                })
            } else {
                let (database, class, object) = of(word::OBJECT)?;
                Some(LockTag::Object {
                    database,
                    class,
                    object,
                })
            }
        }
        (&[database, classid, objid, objsubid], [first, .., last])
            if in_brackets(text, first, last) =>
        {
            Some(LockTag::Advisory {
                database,
                classid,
                objid,
                objsubid: u16::try_from(objsubid).ok()?,
            })
        }
        (&[a, b, c, d], [n1, n2, n3, n4]) => {
            // The pair is in parentheses, so its position is clear without words.
            let (pair, relation, database) =
                if is_pair(text, n1, n2) && in_parentheses(text, n1, n2) {
                    ((a, b), c, d)
                } else if is_pair(text, n3, n4) && in_parentheses(text, n3, n4) {
                    ((c, d), b, a)
                } else {
                    return None;
                };
            let (page, offset) = page_and_offset(pair, lower.contains(word::JAPANESE_TUPLE))?;
            Some(LockTag::Tuple {
                database,
                relation,
                page,
                offset,
            })
        }
        _ => None,
    }
}

/// The Japanese translation of 14 to 18 swaps the two. If that is corrected in the future, the offset can tell in some
/// cases: it is never 0 and has 16 bits (`src/include/storage/off.h`).
fn page_and_offset((first, second): (u32, u32), swapped: bool) -> Option<(u32, u16)> {
    let as_offset = |number| u16::try_from(number).ok().filter(|offset| *offset > 0);
    if swapped && let Some(offset) = as_offset(first) {
        return Some((second, offset));
    }
    Some((first, as_offset(second)?))
}

fn in_brackets(text: &str, first: &Number, last: &Number) -> bool {
    text[..first.at.start].ends_with('[') && text[last.at.end..].starts_with(']')
}

fn in_parentheses(text: &str, first: &Number, last: &Number) -> bool {
    text[..first.at.start].ends_with('(') && text[last.at.end..].starts_with(')')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::languages::{LANGUAGES, Language, format};
    use super::*;

    /// One object of each kind in the catalogs, in this language.
    fn objects(language: &Language, n: [u32; 3], offset: u16) -> Vec<(LockTag, String)> {
        let [a, b, c] = n;
        let local = a;
        let backend = i32::try_from(b / 2).expect("half of a u32");
        vec![
            (
                LockTag::Relation {
                    database: b,
                    relation: a,
                },
                format(language.relation, &[&a, &b]),
            ),
            (
                LockTag::Extension {
                    database: b,
                    relation: a,
                },
                format(language.extension, &[&a, &b]),
            ),
            (
                LockTag::FrozenIds { database: a },
                format(language.frozen_ids, &[&a]),
            ),
            (
                LockTag::Page {
                    database: c,
                    relation: b,
                    page: a,
                },
                format(language.page, &[&a, &b, &c]),
            ),
            (
                LockTag::Tuple {
                    database: c,
                    relation: b,
                    page: a,
                    offset,
                },
                format(language.tuple, &[&a, &offset, &b, &c]),
            ),
            (
                LockTag::Transaction { xid: a },
                format(language.transaction, &[&a]),
            ),
            (
                LockTag::VirtualTransaction { backend, local },
                format(language.virtual_transaction, &[&backend, &local]),
            ),
            (
                LockTag::VirtualTransaction { backend: -1, local },
                format(language.virtual_transaction, &[&-1, &local]),
            ),
            (
                LockTag::SpeculativeToken { xid: b, token: a },
                format(language.speculative_token, &[&a, &b]),
            ),
            (
                LockTag::Object {
                    database: c,
                    class: b,
                    object: a,
                },
                format(language.object, &[&a, &b, &c]),
            ),
            (
                LockTag::UserLock { fields: n },
                format(language.user_lock, &[&a, &b, &c]),
            ),
            (
                LockTag::Advisory {
                    database: a,
                    classid: b,
                    objid: c,
                    objsubid: offset,
                },
                format(language.advisory_lock, &[&a, &b, &c, &offset]),
            ),
            (
                LockTag::RemoteTransaction {
                    database: c,
                    subscription: b,
                    xid: a,
                },
                format(language.remote_transaction, &[&a, &b, &c]),
            ),
        ]
    }

    /// The first of `%1$u,%2$u` in the Japanese tuple is the page of a small table, so it is often below 2^16.
    fn check(language: &Language, n: [u32; 3], offset: u16) {
        for (expected, text) in objects(language, n, offset) {
            assert_eq!(LockTag::parse(&text), expected, "{}: {text}", language.code);
        }
    }

    #[test]
    fn every_kind_is_parsed_in_every_language() {
        for language in &LANGUAGES {
            check(language, [11, 22, 33], 44);
            check(language, [0, 0, 0], 1);
            check(language, [u32::MAX; 3], u16::MAX);
            let text = format(language.unrecognized, &[&7]);
            assert_eq!(LockTag::parse(&text), LockTag::Unknown { text });
        }
    }

    #[test]
    fn english_is_written_as_the_server_does() {
        let english = &LANGUAGES[0];
        assert_eq!(english.code, "en");
        for (object, text) in objects(english, [1, 2, 3], 4) {
            assert_eq!(object.to_string(), text);
        }
    }

    /// Each of the words distinguishes objects, also those of languages that the catalogs above lack: in the order of a
    /// language with its words before the numbers.
    #[test]
    fn each_word_is_known() {
        for database in word::DATABASE.split('|') {
            for relation in word::RELATION.split('|') {
                let text = format!("zz {relation}zz 1 zz {database}zz 2");
                assert_eq!(
                    LockTag::parse(&text).to_string(),
                    "relation 1 of database 2",
                    "{text}"
                );
                let text = format!("zz {database}zz 2 zz {relation}zz 1");
                assert_eq!(
                    LockTag::parse(&text).to_string(),
                    "relation 1 of database 2",
                    "{text}"
                );
            }
            let known = [
                (word::PAGE, "page 1 of relation 2 of database 3"),
                (word::OBJECT, "object 1 of class 2 of database 3"),
                (
                    word::TRANSACTION,
                    "remote transaction 1 of subscription 2 of database 3",
                ),
            ];
            for (words, expected) in known {
                for word in words.split('|') {
                    let text = format!("{word} 1 zz 2 {database} 3");
                    assert_eq!(LockTag::parse(&text).to_string(), expected, "{text}");
                }
            }
        }
        for transaction in word::TRANSACTION.split('|') {
            let text = format!("{transaction} 1");
            assert_eq!(LockTag::parse(&text).to_string(), "transaction 1", "{text}");
            for token in word::TOKEN.split('|') {
                let text = format!("{token} 1 {transaction} 2");
                let expected = "speculative token 1 of transaction 2";
                assert_eq!(LockTag::parse(&text).to_string(), expected, "{text}");
            }
        }
        for extension in word::EXTENSION.split('|') {
            let text = format!("{extension} relation 1 database 2");
            let expected = "extension of relation 1 of database 2";
            assert_eq!(LockTag::parse(&text).to_string(), expected, "{text}");
        }
    }

    /// Turkish has its words after the numbers, and one of its lines is in the other order.
    #[test]
    fn words_may_follow_their_numbers() {
        for (text, expected) in [
            ("2 veritabanzz 1 nesnezz", "relation 1 of database 2"),
            (
                "1 nesnezz uzantı 2 veritabanzz",
                "extension of relation 1 of database 2",
            ),
            (
                "1 sayfazz 2 nesnezz 3 veritabanzz",
                "page 1 of relation 2 of database 3",
            ),
            (
                "1 nesnezz 2 zz 3 veritabanzz",
                "object 1 of class 2 of database 3",
            ),
            (
                "(1,2) zz 3 nesnezz 4 veritabanzz",
                "tuple (1,2) of relation 3 of database 4",
            ),
        ] {
            assert_eq!(LockTag::parse(text).to_string(), expected, "{text}");
        }
    }

    #[test]
    fn an_unambiguous_form_needs_no_words() {
        for (text, expected) in [
            (
                "?? (1, 2) ?? 3 ?? 4",
                "tuple (1,2) of relation 3 of database 4",
            ),
            ("??4??3??(1,2)", "tuple (1,2) of relation 3 of database 4"),
            ("? [1,2,3,4]", "advisory lock [1,2,3,4]"),
            ("? [1,2,3]", "user lock [1,2,3]"),
            ("? 1/2", "virtual transaction 1/2"),
        ] {
            assert_eq!(LockTag::parse(text).to_string(), expected, "{text}");
        }
    }

    #[test]
    fn an_ambiguous_object_is_unknown() {
        for text in [
            "",
            "?",
            "? 1",
            "? 1 ? 2",
            "? 1 ? 2 ? 3",
            "1 2 3 4",
            "1 2 3 4 5",
            "relation 4294967296 of database 1",
            "advisory lock [1,2,3,65536]",
            "tuple (1,0) of relation 2 of database 3",
            "virtual transaction 4000000000/1",
        ] {
            let unknown = LockTag::Unknown {
                text: text.to_owned(),
            };
            assert_eq!(LockTag::parse(text), unknown);
        }
    }

    /// If the offset of a Japanese tuple is not a valid offset, the usual order is assumed.
    #[test]
    fn a_corrected_japanese_translation_is_parsed_if_possible() {
        let language = LANGUAGES
            .iter()
            .find(|language| language.code == "ja")
            .expect("a language of the catalogs");
        let mended = language.tuple.replace("%2$u,%1$u", "%1$u,%2$u");
        assert_ne!(mended, language.tuple);
        for page in [0, 65_536] {
            let text = format(&mended, &[&page, &9, &3, &4]);
            let expected = format!("tuple ({page},9) of relation 3 of database 4");
            assert_eq!(LockTag::parse(&text).to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn any_numbers_are_found_again(n in any::<[u32; 3]>(), offset in 1..=u16::MAX) {
            for language in &LANGUAGES {
                check(language, n, offset);
            }
        }

        #[test]
        fn any_text_is_parsed(text in any::<String>()) {
            LockTag::parse(&text);
        }
    }
}
