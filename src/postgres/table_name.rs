//! What a table is called, quoted wherever it goes into SQL.

use std::fmt;

use super::sql::identifier;

/// The most bytes a name may have on a server built as usual (`NAMEDATALEN - 1`).
const MAX_BYTES: usize = 63;

/// The name of a table, with or without its schema. Always quoted in what is sent, so that any name is safe, and means
/// exactly itself: `Orders` is not `orders`.
///
/// A pair is schema and table, each exactly as given. One text is read as `table` or `schema.table`, split at its first
/// dot; a part between double quotes is what stands between them (`""` in it is one `"`), and every other part is taken
/// as it is, without folding its case. A table with a dot in its name is so `"a.b"` in quotes, or the second of a pair.
///
/// A name without a schema is looked for along the `search_path` of the connection that the work is done on.
///
/// # Examples
///
/// ```
/// use lockkeeper::TableName;
///
/// assert_eq!(TableName::from("orders").to_string(), r#""orders""#);
/// assert_eq!(TableName::from("shop.orders"), TableName::from(("shop", "orders")));
/// assert_eq!(TableName::from(r#"shop."a.b""#), TableName::from(("shop", "a.b")));
/// assert_eq!(TableName::from(("my shop", "Ord\"er")).to_string(), r#""my shop"."Ord""er""#);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    schema: Option<String>,
    name: String,
}

impl TableName {
    /// A table along the `search_path`, its name exactly as given, dots and quotes included.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            schema: None,
            name: name.into(),
        }
    }

    /// A table of a schema, both names exactly as given.
    #[must_use]
    pub fn in_schema(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            schema: Some(schema.into()),
            name: name.into(),
        }
    }

    getters! {
        /// The schema, where it is said; without quotes.
        text schema;

        /// The table's own name, without quotes.
        name: &str;
    }

    /// Another table of the same schema.
    #[cfg(feature = "schema")]
    pub(crate) fn sibling(&self, name: &str) -> Self {
        Self {
            schema: self.schema.clone(),
            name: name.to_owned(),
        }
    }

    /// Why no server can have a table of this name, if so.
    pub(crate) fn flaw(&self) -> Option<String> {
        let schema = self
            .schema
            .as_deref()
            .and_then(|schema| name_flaw("schema", schema));
        schema.or_else(|| name_flaw("table", &self.name))
    }
}

/// Why no server can have something of this kind and name, if so. A longer name is cut by the server, and would be
/// another one where it is looked for in the catalogs.
pub(crate) fn name_flaw(what: &str, name: &str) -> Option<String> {
    if name.is_empty() {
        Some(format!("the {what} has an empty name; at least one byte"))
    } else if name.contains('\0') {
        Some(format!(
            "the {what}'s name {name:?} has a NUL in it, which no name of PostgreSQL's can have"
        ))
    } else if name.len() > MAX_BYTES {
        Some(format!(
            "the {what}'s name {name:?} has {} bytes; at most {MAX_BYTES}, beyond which PostgreSQL cuts it",
            name.len()
        ))
    } else {
        None
    }
}

/// Quoted, as it goes into SQL: `"shop"."orders"`.
impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{}.", identifier(schema))?;
        }
        f.write_str(&identifier(&self.name))
    }
}

/// `table` or `schema.table`; see [`TableName`].
impl From<&str> for TableName {
    fn from(text: &str) -> Self {
        let (first, rest) = first_part(text);
        match rest {
            Some(rest) if !first.is_empty() && !rest.is_empty() => {
                Self::in_schema(first, unquoted(rest))
            }
            _ => Self::new(unquoted(text)),
        }
    }
}

/// `table` or `schema.table`; see [`TableName`].
impl From<String> for TableName {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

/// `table` or `schema.table`; see [`TableName`].
impl From<&String> for TableName {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

/// Schema and table, exactly as given.
impl<S: Into<String>, T: Into<String>> From<(S, T)> for TableName {
    fn from((schema, name): (S, T)) -> Self {
        Self::in_schema(schema, name)
    }
}

impl From<&Self> for TableName {
    fn from(name: &Self) -> Self {
        name.clone()
    }
}

/// What stands before the first dot outside of quotes, without its quotes, and what behind it.
fn first_part(text: &str) -> (String, Option<&str>) {
    let mut in_quotes = false;
    // Quotes in the middle of a name are part of it.
    let quoted = text.starts_with('"');
    for (at, c) in text.char_indices() {
        match c {
            '"' if quoted => in_quotes = !in_quotes,
            '.' if !in_quotes => return (unquoted(&text[..at]), Some(&text[at + 1..])),
            _ => {}
        }
    }
    (unquoted(text), None)
}

/// A part between quotes without them; any other part as it is.
fn unquoted(part: &str) -> String {
    let inside = part
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    match inside {
        Some(inside) if !inside.is_empty() && !inside.replace("\"\"", "").contains('"') => {
            inside.replace("\"\"", "\"")
        }
        _ => part.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(text: &str) -> (Option<String>, String) {
        let name = TableName::from(text);
        (name.schema, name.name)
    }

    #[test]
    fn one_text_is_a_table_or_a_schema_and_a_table() {
        let some = |schema: &str, name: &str| (Some(schema.to_owned()), name.to_owned());
        let none = |name: &str| (None, name.to_owned());
        assert_eq!(parts("orders"), none("orders"));
        assert_eq!(parts("Orders of 2024"), none("Orders of 2024"));
        assert_eq!(parts("shop.orders"), some("shop", "orders"));
        assert_eq!(parts("a.b.c"), some("a", "b.c"));
        assert_eq!(parts("\"a.b\""), none("a.b"));
        assert_eq!(parts("\"a.b\".\"c\"\"d\""), some("a.b", "c\"d"));
        assert_eq!(parts("ab\"c"), none("ab\"c"));
        assert_eq!(parts("\"open"), none("\"open"));
        assert_eq!(parts(".a"), none(".a"));
        assert_eq!(parts("a."), none("a."));
        assert_eq!(parts(""), none(""));
    }

    #[test]
    fn flaws_are_named() {
        assert_eq!(TableName::from(("a", "b")).flaw(), None);
        assert!(TableName::new("").flaw().is_some());
        assert!(TableName::in_schema("", "t").flaw().is_some());
        assert!(TableName::new("a\0b").flaw().is_some());
        assert!(TableName::new("é".repeat(31)).flaw().is_none());
        assert!(TableName::new("é".repeat(32)).flaw().is_some());
    }

    proptest! {
        /// What is shown is read back as the same name.
        #[test]
        fn the_quoted_form_survives_the_round_trip(
            schema in prop::option::of("[a-z\". ]{1,6}"), name in "[a-zA-Z\". ]{1,6}",
        ) {
            let name = TableName { schema, name };
            prop_assert_eq!(TableName::from(name.to_string()), name);
        }
    }
}
