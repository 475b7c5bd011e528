//! The key of a name as SQL: the expression that computes it at the server.

use super::{LockKey, SqlLiteral};

/// The SQL of a name's key, around an expression for the namespace and one for the name.
macro_rules! key_sql {
    ($namespace:literal, $name:literal) => {
        concat!(
            "('x' OPERATOR(pg_catalog.||) pg_catalog.encode(pg_catalog.substr(",
            "pg_catalog.sha256(pg_catalog.convert_to(",
            $namespace,
            " OPERATOR(pg_catalog.||) pg_catalog.chr(31) OPERATOR(pg_catalog.||) ",
            $name,
            ", 'UTF8')), 1, 8), 'hex'))::pg_catalog.bit(64)::pg_catalog.int8",
        )
    };
}

impl LockKey {
    /// The key of a namespace and a name as a PostgreSQL expression: `$1` is the namespace (`''` for a bare name) and
    /// `$2` the name, both `text`; the result is an `int8`.
    ///
    /// For programs in other languages that share a lock, and for `psql`. Nothing in it depends on `search_path`. It
    /// works on PostgreSQL 11 and later, whatever the database's encoding, as long as the encoding has the characters.
    ///
    /// # SQL
    ///
    /// ```sql
    /// ('x' OPERATOR(pg_catalog.||) pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(pg_catalog.convert_to(
    ///     $1::pg_catalog.text OPERATOR(pg_catalog.||) pg_catalog.chr(31) OPERATOR(pg_catalog.||) $2::pg_catalog.text,
    ///     'UTF8')), 1, 8), 'hex'))::pg_catalog.bit(64)::pg_catalog.int8
    /// ```
    ///
    /// or, where nobody plants functions or operators on the `search_path`:
    ///
    /// ```sql
    /// ('x' || encode(substr(sha256(convert_to($1 || chr(31) || $2, 'UTF8')), 1, 8), 'hex'))::bit(64)::int8
    /// ```
    pub const SQL_EXPRESSION: &str = key_sql!("$1::pg_catalog.text", "$2::pg_catalog.text");

    /// [`LockKey::SQL_EXPRESSION`] for one name, as literals: an expression of type `int8` to put into a statement that
    /// takes no parameters.
    ///
    /// It reads the same whatever `standard_conforming_strings` and `search_path` are set to. `None` if the namespace
    /// or the name contains the character NUL, which PostgreSQL's `text` cannot hold.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::LockKey;
    ///
    /// let sql = LockKey::sql_expression("billing", "invoice:42").expect("no NUL in it");
    /// assert!(sql.contains("'billing'") && sql.contains("'invoice:42'"));
    /// assert_eq!(LockKey::sql_expression("", "a\0b"), None);
    /// ```
    #[must_use]
    pub fn sql_expression(namespace: &str, name: &str) -> Option<String> {
        if namespace.contains('\0') || name.contains('\0') {
            return None;
        }
        let (namespace, name) = (SqlLiteral(namespace), SqlLiteral(name));
        Some(format!(key_sql!("{}", "{}"), namespace, name))
    }
}
