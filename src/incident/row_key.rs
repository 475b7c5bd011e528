//! The key of a row.

use std::fmt;
use std::sync::Arc;

/// The primary key of a row, or another key that identifies it: `id = 7`, or `(a, b) = (1, x)`.
///
/// Values are in the server's text format. Reports show them even if literals are not enabled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey(Arc<[Column]>);

type Column = (Box<str>, Option<Box<str>>);

impl RowKey {
    /// Columns with their values, in the order of the key; `None` for NULL.
    pub(crate) fn new(columns: impl IntoIterator<Item = (String, Option<String>)>) -> Self {
        let columns = columns
            .into_iter()
            .map(|(name, value)| (name.into(), value.map(Into::into)));
        Self(columns.collect())
    }

    /// The columns and their values, in the order of the key; `None` for NULL.
    pub fn columns(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.0
            .iter()
            .map(|(name, value)| (&**name, value.as_deref()))
    }
}

/// One line; a long value is cut.
impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(name, value)] = &*self.0 {
            return write!(
                f,
                "{} = {}",
                Short(name),
                Short(value.as_deref().unwrap_or("NULL"))
            );
        }
        f.write_str("(")?;
        for (at, (name, _)) in self.columns().enumerate() {
            write!(f, "{}{}", if at > 0 { ", " } else { "" }, Short(name))?;
        }
        f.write_str(") = (")?;
        for (at, (_, value)) in self.columns().enumerate() {
            let value = Short(value.unwrap_or("NULL"));
            write!(f, "{}{value}", if at > 0 { ", " } else { "" })?;
        }
        f.write_str(")")
    }
}

/// The maximum number of characters of a name or value.
const SHOWN: usize = 63;

struct Short<'a>(&'a str);

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, c) in self.0.chars().enumerate() {
            if at == SHOWN {
                return f.write_str("…");
            }
            match c {
                '\'' | '"' => write!(f, "{c}")?,
                c => write!(f, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(columns: &[(&str, Option<&str>)]) -> RowKey {
        let owned =
            |(name, value): &(&str, Option<&str>)| ((*name).to_owned(), value.map(str::to_owned));
        RowKey::new(columns.iter().map(owned))
    }

    #[test]
    fn display_is_a_condition() {
        assert_eq!(key(&[("id", Some("7"))]).to_string(), "id = 7");
        assert_eq!(
            key(&[("a", Some("1")), ("b", Some("x")), ("c", None)]).to_string(),
            "(a, b, c) = (1, x, NULL)"
        );
        assert_eq!(key(&[]).to_string(), "() = ()");
        let long = key(&[("name", Some(&"é\n".repeat(60)))]).to_string();
        assert!(
            long.starts_with("name = é\\né") && long.ends_with('…'),
            "{long}"
        );
        assert!(long.chars().count() < 110);
    }
}
