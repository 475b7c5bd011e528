//! What a lock is taken on: the number PostgreSQL sees and the name people read.

#[cfg(feature = "compat")]
pub mod compat;
pub(crate) mod names;
mod sql;

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

/// Stands between namespace and name in what is hashed: ASCII “unit separator”.
const SEPARATOR: char = '\u{1f}';

/// A key of a PostgreSQL advisory lock, with the name it was made from.
///
/// PostgreSQL knows advisory locks by numbers only: either one `int8` or two `int4`. The two key spaces are disjoint:
/// `0` and `(0, 0)` are two locks. Locks belong to a database, not to a schema or a role.
///
/// | made from | lock |
/// |---|---|
/// | `i64` | one `int8` |
/// | `(i32, i32)` | two `int4` |
/// | `&str`, `String`, `Cow<str>`, `Arc<str>` | a name: one `int8`, derived as below, with the empty namespace |
/// | `(&str, &str)`, `(String, String)`, … | a namespace and a name: one `int8`, derived as below |
/// | `(&str, i64)`, also `i32`, `u32`, `u64` | a namespace and a number: the number's decimal text is the name |
///
/// The natural key of a row is its table and its primary key: `("invoice", 42_i64)`. It is the same key as
/// `("invoice", "42")`.
///
/// A name stays with its key and is what logs, errors and reports show. Clones share it.
///
/// # Derivation
///
/// A name becomes the first 8 bytes, read big-endian as a signed number, of the SHA-256 of the namespace, one byte
/// 0x1F, and the name, both in UTF-8. Neither case nor Unicode normal form is folded. Other programs get the same key
/// with [`LockKey::SQL_EXPRESSION`].
///
/// Two names can meet in one number: `("a\u{1f}b", "c")` and `("a", "b\u{1f}c")` do so by construction, others with a
/// chance of about 2⁻⁶⁴ for each pair. Such keys are not equal as values, [`LockKey::same_lock`] holds for them, and
/// taking both in one process is an error rather than a lock shared by accident.
///
/// # Equality and order
///
/// Equality compares number and name, so `LockKey::from(n)` differs from the named key that has the number `n`; ask
/// [`LockKey::same_lock`] for what the server sees. The order is by number first (every `int8` key before every pair of
/// `int4`), then by name: all who sort their keys before they lock them do it in the same order.
///
/// # Examples
///
/// ```
/// use lockkeeper::LockKey;
///
/// let key = LockKey::from(("billing", "invoice:42"));
/// assert_eq!(key.to_string(), r#""billing"/"invoice:42""#);
/// assert_eq!(key.as_i64(), Some(8_693_934_608_900_017_946));
///
/// assert_eq!(LockKey::from(("invoice", 42)), LockKey::from(("invoice", "42")));
/// assert_eq!(LockKey::from(7).as_i64(), Some(7));
/// assert_eq!(LockKey::from((1, 2)).as_i32_pair(), Some((1, 2)));
/// ```
#[derive(Clone)]
pub struct LockKey {
    id: KeyId,
    name: Option<Arc<Name>>,
}

/// The number of a lock: all that PostgreSQL knows of it.
///
/// The derived order is the one in which several locks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum KeyId {
    /// `pg_advisory_lock(int8)`.
    Int8(i64),
    /// `pg_advisory_lock(int4, int4)`.
    Int4(i32, i32),
}

/// Where a key's number came from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    /// Derived by this crate.
    Own { namespace: Box<str>, name: Box<str> },
    /// Derived as another program does it, from these arguments.
    #[cfg_attr(
        not(feature = "compat"),
        expect(dead_code, reason = "only `compat` makes foreign names")
    )]
    Foreign {
        program: &'static str,
        arguments: Box<[Box<str>]>,
    },
}

impl LockKey {
    /// The key that a row of `pg_locks` with `locktype = 'advisory'` is about, without a name.
    ///
    /// `None` if `objsubid` is neither 1 (one `int8`) nor 2 (two `int4`): then the row is not about an advisory lock.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::LockKey;
    ///
    /// assert_eq!(LockKey::from_pg_locks(1, 0, 1), Some(LockKey::from(4_294_967_296)));
    /// assert_eq!(LockKey::from_pg_locks(1, u32::MAX, 2), Some(LockKey::from((1, -1))));
    /// assert_eq!(LockKey::from_pg_locks(1, 0, 0), None);
    /// ```
    #[must_use]
    pub fn from_pg_locks(classid: u32, objid: u32, objsubid: u16) -> Option<Self> {
        let id = match objsubid {
            1 => KeyId::Int8(((u64::from(classid) << 32) | u64::from(objid)).cast_signed()),
            2 => KeyId::Int4(classid.cast_signed(), objid.cast_signed()),
            _ => return None,
        };
        Some(Self::from(id))
    }

    /// The number, if the key is one `int8`: every key made from an `i64` or from a name.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match self.id {
            KeyId::Int8(key) => Some(key),
            KeyId::Int4(..) => None,
        }
    }

    /// The two numbers, if the key is two `int4`.
    #[must_use]
    pub fn as_i32_pair(&self) -> Option<(i32, i32)> {
        match self.id {
            KeyId::Int8(_) => None,
            KeyId::Int4(first, second) => Some((first, second)),
        }
    }

    /// `pg_locks.classid`: the high 32 bits of an `int8`, or the first `int4`, unsigned.
    #[must_use]
    pub fn classid(&self) -> u32 {
        self.id.pg_locks().0
    }

    /// `pg_locks.objid`: the low 32 bits of an `int8`, or the second `int4`, unsigned.
    #[must_use]
    pub fn objid(&self) -> u32 {
        self.id.pg_locks().1
    }

    /// `pg_locks.objsubid`: 1 for one `int8`, 2 for two `int4`.
    #[must_use]
    pub fn objsubid(&self) -> u16 {
        self.id.pg_locks().2
    }

    /// The name the key was made from; `None` for a key made from numbers.
    ///
    /// For a key of `compat` this is the last of its arguments, or the program if it has none.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self.name.as_deref()? {
            Name::Own { name, .. } => Some(name),
            Name::Foreign { program, arguments } => {
                Some(arguments.last().map_or(program, |last| last))
            }
        }
    }

    /// The namespace the key was made from; `None` if there is none or it is empty.
    ///
    /// For a key of `compat` this is the program whose derivation it follows, such as
    /// `rails_migrations`.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        match self.name.as_deref()? {
            Name::Own { namespace, .. } => Some(&**namespace).filter(|text| !text.is_empty()),
            Name::Foreign { program, .. } => Some(program),
        }
    }

    /// Whether both keys are one lock for the server, whatever they are called.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::LockKey;
    ///
    /// let named = LockKey::from("invoice:42");
    /// let number = LockKey::from(1_056_739_463_723_379_492);
    /// assert!(named.same_lock(&number));
    /// assert_ne!(named, number);
    /// ```
    #[must_use]
    pub fn same_lock(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// The number alone, for maps, for sorting and for SQL.
    pub(crate) fn id(&self) -> KeyId {
        self.id
    }

    fn named(namespace: impl Into<Box<str>>, name: impl Into<Box<str>>) -> Self {
        let (namespace, name) = (namespace.into(), name.into());
        let hash = Sha256::new()
            .chain_update(namespace.as_bytes())
            .chain_update([SEPARATOR as u8])
            .chain_update(name.as_bytes());
        let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = hash.finalize().into();
        Self {
            id: KeyId::Int8(i64::from_be_bytes([a, b, c, d, e, f, g, h])),
            name: Some(Arc::new(Name::Own { namespace, name })),
        }
    }

    /// A key with a name and a number that is not derived from it.
    #[cfg(feature = "coordination")]
    pub(crate) fn numbered(namespace: &str, name: &str, number: i64) -> Self {
        let (namespace, name) = (namespace.into(), name.into());
        Self {
            id: KeyId::Int8(number),
            name: Some(Arc::new(Name::Own { namespace, name })),
        }
    }

    #[cfg(feature = "compat")]
    fn foreign(program: &'static str, arguments: &[&str], id: KeyId) -> Self {
        let arguments = arguments.iter().map(|&text| text.into()).collect();
        Self {
            id,
            name: Some(Arc::new(Name::Foreign { program, arguments })),
        }
    }
}

impl KeyId {
    /// `classid`, `objid` and `objsubid` of the lock's row in `pg_locks`.
    pub(crate) fn pg_locks(self) -> (u32, u32, u16) {
        match self {
            KeyId::Int8(key) => {
                let [a, b, c, d, e, f, g, h] = key.to_be_bytes();
                (
                    u32::from_be_bytes([a, b, c, d]),
                    u32::from_be_bytes([e, f, g, h]),
                    1,
                )
            }
            KeyId::Int4(first, second) => (first.cast_unsigned(), second.cast_unsigned(), 2),
        }
    }
}

impl Name {
    /// Bytes of text in the name.
    fn text_len(&self) -> usize {
        match self {
            Name::Own { namespace, name } => namespace.len() + name.len(),
            Name::Foreign { arguments, .. } => arguments.iter().map(|text| text.len()).sum(),
        }
    }
}

impl From<KeyId> for LockKey {
    fn from(id: KeyId) -> Self {
        Self { id, name: None }
    }
}

// There is no `From<i32>`: with it an integer literal would fit two impls, and `LockKey::from(0)` would not compile.
impl From<i64> for LockKey {
    fn from(key: i64) -> Self {
        Self::from(KeyId::Int8(key))
    }
}

impl From<(i32, i32)> for LockKey {
    fn from((first, second): (i32, i32)) -> Self {
        Self::from(KeyId::Int4(first, second))
    }
}

impl From<&LockKey> for LockKey {
    fn from(key: &LockKey) -> Self {
        key.clone()
    }
}

macro_rules! from_name {
    ($($text:ty),+) => {$(
        impl From<$text> for LockKey {
            fn from(name: $text) -> Self {
                Self::named("", name)
            }
        }
    )+};
}
from_name!(&str, String, Cow<'_, str>);

impl From<Arc<str>> for LockKey {
    fn from(name: Arc<str>) -> Self {
        Self::named("", &*name)
    }
}

impl From<&String> for LockKey {
    fn from(name: &String) -> Self {
        Self::named("", name.as_str())
    }
}

macro_rules! from_namespace_and_name {
    ($(($namespace:ty, $name:ty)),+) => {$(
        impl From<($namespace, $name)> for LockKey {
            fn from((namespace, name): ($namespace, $name)) -> Self {
                Self::named(AsRef::<str>::as_ref(&namespace), AsRef::<str>::as_ref(&name))
            }
        }
    )+};
}
from_namespace_and_name!(
    (&str, &str),
    (&str, String),
    (&str, &String),
    (String, &str),
    (String, String),
    (&String, &str),
    (&String, &String),
    (&str, Cow<'_, str>),
    (&str, Arc<str>)
);

macro_rules! from_namespace_and_number {
    ($($number:ty),+) => {$(
        impl From<(&str, $number)> for LockKey {
            fn from((namespace, number): (&str, $number)) -> Self {
                Self::named(namespace, number.to_string())
            }
        }

        impl From<(String, $number)> for LockKey {
            fn from((namespace, number): (String, $number)) -> Self {
                Self::named(namespace, number.to_string())
            }
        }
    )+};
}
from_namespace_and_number!(i32, i64, u32, u64);

impl PartialEq for LockKey {
    fn eq(&self, other: &Self) -> bool {
        // Clones share the name: usually the pointers already tell.
        self.id == other.id
            && match (&self.name, &other.name) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
                (None, None) => true,
                _ => false,
            }
    }
}

impl Eq for LockKey {}

impl Hash for LockKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl PartialOrd for LockKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for LockKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.id
            .cmp(&other.id)
            .then_with(|| self.name.cmp(&other.name))
    }
}

/// A key as people read it: always one line of at most 500 characters.
///
/// `123`, `(1, 2)`, `"invoice:42"`, `"billing"/"invoice:42"`, `rails_migrations("app")`. Control characters, quotes and
/// backslashes are escaped as in a Rust literal. A name of more than 120 characters shows its beginning, its length in
/// bytes and the number: `"aaaa…" [1048576 bytes, key 123]`. Different keys look different, unless their names differ
/// but not their numbers, and are too long to be shown.
impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(name) = self.name.as_deref() else {
            return fmt::Display::fmt(&self.id, f);
        };
        let complete = match name {
            Name::Own { namespace, name } if namespace.is_empty() => write_quoted(f, name)?,
            Name::Own { namespace, name } => {
                let complete = write_quoted(f, namespace)?;
                f.write_char('/')?;
                write_quoted(f, name)? && complete
            }
            Name::Foreign { program, arguments } => write_call(f, program, arguments)?,
        };
        if complete {
            return Ok(());
        }
        write!(f, " [{} bytes, key {}]", name.text_len(), self.id)
    }
}

/// Name and number, as bounded as `Display`: `LockKey("invoice:42" = 1056739463723379492)`.
impl fmt::Debug for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            Some(_) => write!(f, "LockKey({self} = {})", self.id),
            None => write!(f, "LockKey({})", self.id),
        }
    }
}

/// `123` or `(1, 2)`.
impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyId::Int8(key) => write!(f, "{key}"),
            KeyId::Int4(first, second) => write!(f, "({first}, {second})"),
        }
    }
}

/// `program("first", "second")`, at most three arguments; says whether it is complete.
fn write_call(
    f: &mut fmt::Formatter<'_>,
    program: &str,
    arguments: &[Box<str>],
) -> Result<bool, fmt::Error> {
    const SHOWN: usize = 3;

    let mut complete = arguments.len() <= SHOWN;
    write!(f, "{program}(")?;
    for (index, argument) in arguments.iter().take(SHOWN).enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        complete &= write_quoted(f, argument)?;
    }
    f.write_str(if arguments.len() <= SHOWN {
        ")"
    } else {
        ", …)"
    })?;
    Ok(complete)
}

/// The text in quotes, escaped, cut after 120 characters of output; says whether it is complete.
fn write_quoted(f: &mut fmt::Formatter<'_>, text: &str) -> Result<bool, fmt::Error> {
    const SHOWN: usize = 120;

    let mut left = SHOWN;
    let mut complete = true;
    f.write_char('"')?;
    for c in text.chars() {
        // In double quotes the single quote needs no escape; `char::escape_debug` has one for it.
        let width = if c == '\'' { 1 } else { c.escape_debug().len() };
        if width > left {
            f.write_char('…')?;
            complete = false;
            break;
        }
        left -= width;
        if c == '\'' {
            f.write_char(c)?;
        } else {
            write!(f, "{}", c.escape_debug())?;
        }
    }
    f.write_char('"')?;
    Ok(complete)
}

/// Displays a text as a string literal that means the same with `standard_conforming_strings` on and off.
struct SqlLiteral<'a>(&'a str);

impl fmt::Display for SqlLiteral<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A backslash is an escape in a plain literal only if that setting is off; in `E''` always. A doubled quote is
        // right in both, and not subject to `backslash_quote`.
        f.write_str(if self.0.contains('\\') { "E'" } else { "'" })?;
        for c in self.0.chars() {
            if matches!(c, '\'' | '\\') {
                f.write_char(c)?;
            }
            f.write_char(c)?;
        }
        f.write_char('\'')
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id_of(key: impl Into<LockKey>) -> KeyId {
        key.into().id()
    }

    #[test]
    fn literals_need_no_suffix() {
        let zero: LockKey = 0.into();
        assert_eq!(zero.id(), KeyId::Int8(0));
        assert_eq!(id_of(42), KeyId::Int8(42));
        assert_eq!(id_of(-1), KeyId::Int8(-1));
        assert_eq!(id_of((1, 2)), KeyId::Int4(1, 2));
        assert_eq!(LockKey::from((0, 0)).id(), KeyId::Int4(0, 0));
    }

    #[test]
    fn a_number_in_a_namespace_is_its_decimal_text() {
        let same = |a: LockKey, b: &str| assert_eq!(a, LockKey::from(("row", b)));
        same(("row", 42).into(), "42");
        same(("row", i64::MIN).into(), "-9223372036854775808");
        same(("row", u64::MAX).into(), "18446744073709551615");
        same(("row", u32::MAX).into(), "4294967295");
        same((String::from("row"), 0_i64).into(), "0");
    }

    #[test]
    fn every_form_of_a_name_is_one_key() {
        let bare = LockKey::from("x");
        let owned = String::from("x");
        for same in [
            LockKey::from(&owned),
            LockKey::from(owned.clone()),
            LockKey::from(Cow::Borrowed("x")),
            LockKey::from(Arc::<str>::from("x")),
            LockKey::from(("", "x")),
            LockKey::from(&bare),
        ] {
            assert_eq!(same, bare);
        }
        let (space, name) = (String::from("a"), String::from("b"));
        let pair = LockKey::from(("a", "b"));
        for same in [
            LockKey::from((&space, &name)),
            LockKey::from(("a", name.clone())),
            LockKey::from(("a", &name)),
            LockKey::from((&space, "b")),
            LockKey::from((space.clone(), "b")),
            LockKey::from((space.clone(), name.clone())),
        ] {
            assert_eq!(same, pair);
        }
        assert_eq!((bare.namespace(), bare.name()), (None, Some("x")));
        assert_eq!((pair.namespace(), pair.name()), (Some("a"), Some("b")));
        assert_eq!(LockKey::from(1).name(), None);
    }

    #[test]
    fn names_hash_as_documented() {
        // Computed with Python's hashlib, and by PostgreSQL 15 with `SQL_EXPRESSION`.
        for (namespace, name, number) in [
            ("", "", -7_184_503_128_943_178),
            ("", "invoice:42", 1_056_739_463_723_379_492),
            ("billing", "invoice:42", 8_693_934_608_900_017_946),
        ] {
            assert_eq!(LockKey::from((namespace, name)).as_i64(), Some(number));
        }
    }

    #[test]
    fn names_can_meet_in_one_number() {
        let (a, b) = (
            LockKey::from(("a\u{1f}b", "c")),
            LockKey::from(("a", "b\u{1f}c")),
        );
        assert!(a.same_lock(&b));
        assert_ne!(a, b);
        assert_ne!(a.cmp(&b), Ordering::Equal);
    }

    #[test]
    fn key_spaces_are_apart_and_ordered() {
        let sorted = [
            id_of(-1),
            id_of(0),
            id_of(4_294_967_298),
            id_of((0, 0)),
            id_of((1, 2)),
        ];
        assert!(sorted.is_sorted());
        assert!(!LockKey::from(4_294_967_298).same_lock(&(1, 2).into()));
        let coordinates = |key: LockKey| (key.classid(), key.objid(), key.objsubid());
        assert_eq!(coordinates(4_294_967_298.into()), (1, 2, 1));
        assert_eq!(coordinates((1, 2).into()), (1, 2, 2));
        assert_eq!(coordinates((-1).into()), (u32::MAX, u32::MAX, 1));
        assert_eq!(coordinates((-1, i32::MIN).into()), (u32::MAX, 1 << 31, 2));
    }

    #[test]
    fn display_is_quoted_and_escaped() {
        let shown = |key: LockKey| key.to_string();
        assert_eq!(shown((-5).into()), "-5");
        assert_eq!(shown((1, -2).into()), "(1, -2)");
        assert_eq!(shown("".into()), r#""""#);
        assert_eq!(shown("it's */ é 漢 😀".into()), r#""it's */ é 漢 😀""#);
        assert_eq!(shown("a\n\"\\\0".into()), r#""a\n\"\\\0""#);
        assert_eq!(shown("\u{202e}\u{2028}".into()), r#""\u{202e}\u{2028}""#);
        assert_ne!(shown(("a", "b").into()), shown("a\"/\"b".into()));
        assert_eq!(
            format!("{:?}", LockKey::from("invoice:42")),
            r#"LockKey("invoice:42" = 1056739463723379492)"#,
        );
        assert_eq!(format!("{:?}", LockKey::from((1, 2))), "LockKey((1, 2))");
    }

    #[test]
    fn long_names_are_cut_and_stay_distinguishable() {
        let (a, b) = ("é".repeat(500_000), "é".repeat(500_001));
        let (a, b) = (LockKey::from(&a), LockKey::from(&b));
        let shown = a.to_string();
        let head = "é".repeat(120);
        let number = a.as_i64().expect("a name is an int8");
        assert_eq!(shown, format!("\"{head}…\" [1000000 bytes, key {number}]"));
        assert_ne!(shown, b.to_string());
        // What just fits is not cut.
        let fits = "x".repeat(120);
        assert_eq!(LockKey::from(&fits).to_string(), format!("\"{fits}\""));
    }

    #[test]
    fn sql_refuses_only_nul() {
        assert_eq!(LockKey::sql_expression("a\0", "b"), None);
        assert_eq!(LockKey::sql_expression("a", "\0"), None);
        let sql = LockKey::sql_expression("a'b", r"c\d").expect("no NUL");
        assert!(sql.contains("'a''b'") && sql.contains(r"E'c\\d'"), "{sql}");
    }

    /// Reads a literal as PostgreSQL would; the rest of the SQL comes with it.
    fn read_literal(sql: &str, standard_conforming_strings: bool) -> (String, &str) {
        let (body, escapes) = match sql.strip_prefix("E'") {
            Some(body) => (body, true),
            None => (&sql[1..], !standard_conforming_strings),
        };
        let mut text = String::new();
        let mut chars = body.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '\'' if body[at + 1..].starts_with('\'') => text.extend(chars.next().map(|_| '\'')),
                '\'' => return (text, &body[at + 1..]),
                '\\' if escapes => text.extend(chars.next().map(|(_, c)| c)),
                c => text.push(c),
            }
        }
        panic!("unterminated literal in {sql}");
    }

    fn nasty_text() -> impl Strategy<Value = String> {
        prop_oneof![any::<String>(), r"[a\\\\'\$\x1f\n;\-*/\u{202e}😀]{0,300}"]
    }

    proptest! {
        #[test]
        fn display_is_one_bounded_line(namespace in nasty_text(), name in nasty_text()) {
            let key = LockKey::from((namespace, name));
            for shown in [key.to_string(), format!("{key:?}")] {
                prop_assert!(shown.chars().count() <= 500);
                let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
                prop_assert!(!shown.contains(breaks));
            }
        }

        #[test]
        fn different_names_look_different(a in nasty_text(), b in nasty_text(), c in nasty_text(), d in nasty_text()) {
            let (one, other) = (LockKey::from((a, b)), LockKey::from((c, d)));
            prop_assert_eq!(one == other, one.to_string() == other.to_string());
        }

        #[test]
        fn sql_literals_survive_both_settings(namespace in nasty_text(), name in nasty_text(), standard: bool) {
            prop_assume!(!namespace.contains('\0') && !name.contains('\0'));
            let sql = LockKey::sql_expression(&namespace, &name).expect("no NUL");
            let (before, between) = LockKey::SQL_EXPRESSION.split_once("$1::pg_catalog.text").expect("has $1");
            let (between, after) = between.split_once("$2::pg_catalog.text").expect("has $2");
            let (read, rest) = read_literal(sql.strip_prefix(before).expect("same head"), standard);
            prop_assert_eq!(read, namespace);
            let (read, rest) = read_literal(rest.strip_prefix(between).expect("same middle"), standard);
            prop_assert_eq!(read, name);
            prop_assert_eq!(rest, after);
        }

        #[test]
        fn pg_locks_gives_the_key_back(key: i64, pair: (i32, i32)) {
            for key in [LockKey::from(key), LockKey::from(pair)] {
                let (classid, objid, objsubid) = (key.classid(), key.objid(), key.objsubid());
                prop_assert_eq!(LockKey::from_pg_locks(classid, objid, objsubid), Some(key));
            }
        }

        #[test]
        fn equal_keys_are_equal_everywhere(a in nasty_text(), b in nasty_text()) {
            let (one, other) = (LockKey::from(&a), LockKey::from(&b));
            prop_assert_eq!(one == other, a == b);
            prop_assert_eq!(one.cmp(&other) == Ordering::Equal, a == b);
            prop_assert!(one.same_lock(&other) == (a == b));
        }
    }
}
