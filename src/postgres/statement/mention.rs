//! Whether a statement names a relation.

use super::lexer::{self, TokenKind};

/// Whether the statement names the relation, without a schema or with this one.
///
/// Both names are as in the catalog. An unquoted name in the statement matches in lower case, as the server folds it. A
/// column, an alias or a function of that name matches too. An unqualified name depends on `search_path`, and a view or
/// a function hides the relations that it uses.
pub(crate) fn mentions(sql: &str, schema: &str, relation: &str) -> bool {
    // The name before a dot, which may be a qualifier.
    let mut before: Option<bool> = None;
    let mut dotted = false;
    for token in lexer::tokens(sql) {
        let is = |wanted: &str| match token.kind {
            TokenKind::Word(text) => folded_is(text, wanted),
            TokenKind::Quoted(text) => unquoted_is(text, wanted),
            _ => false,
        };
        match token.kind {
            TokenKind::Word(_) | TokenKind::Quoted(_) => {
                let qualifier = if dotted { before } else { None };
                // Without a qualifier, or with the right one.
                if is(relation) && qualifier != Some(false) {
                    return true;
                }
                before = Some(is(schema));
                dotted = false;
            }
            TokenKind::Symbol('.') if before.is_some() => dotted = true,
            _ => {
                before = None;
                dotted = false;
            }
        }
    }
    false
}

/// In encodings with multi-byte characters only ASCII is folded (`downcase_identifier` in PostgreSQL's
/// `src/backend/parser/scansup.c`).
fn folded_is(text: &str, wanted: &str) -> bool {
    text.eq_ignore_ascii_case(wanted) && !wanted.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn unquoted_is(text: &str, wanted: &str) -> bool {
    if text.contains('"') {
        text.replace("\"\"", "\"") == wanted
    } else {
        text == wanted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn users(sql: &str) -> bool {
        mentions(sql, "public", "users")
    }

    #[test]
    fn however_it_is_written() {
        for sql in [
            "UPDATE users SET a = 1",
            "update USERS set a = 1",
            "UPDATE \"users\" SET a = 1",
            "UPDATE public.users SET a = 1",
            "UPDATE \"public\" . /* so */ \"users\" SET a = 1",
            "UPDATE db.public.users SET a = 1",
            "SELECT users.id FROM x, users",
            "(users)",
        ] {
            assert!(users(sql), "{sql}");
        }
    }

    #[test]
    fn another_name_is_no_mention() {
        for sql in [
            "",
            "UPDATE users2 SET a = 1",
            "UPDATE my_users SET a = 1",
            "UPDATE \"Users\" SET a = 1",
            "UPDATE other.users SET a = 1",
            "UPDATE t SET a = 'users'",
            "UPDATE t SET a = $$ users $$ -- users",
            "SELECT t.users FROM t",
            "UPDATE \"users",
        ] {
            assert!(!users(sql), "{sql}");
        }
    }

    #[test]
    fn names_are_as_the_catalog_has_them() {
        assert!(!mentions("UPDATE Users SET a = 1", "public", "Users"));
        assert!(mentions("UPDATE \"Users\" SET a = 1", "public", "Users"));
        assert!(mentions("UPDATE \"a\"\"b\" SET a = 1", "public", "a\"b"));
        assert!(mentions("UPDATE Größe SET a = 1", "public", "größe"));
        assert!(!mentions("UPDATE S.t SET a = 1", "S", "t"));
        assert!(mentions("UPDATE \"S\".t SET a = 1", "S", "t"));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>(), schema in any::<String>(), relation in any::<String>()) {
            mentions(&text, &schema, &relation);
        }

        #[test]
        fn every_quoted_name_is_found(name in "[^\0]{1,20}") {
            let sql = format!("UPDATE \"{}\" SET a = 1", name.replace('"', "\"\""));
            prop_assert!(mentions(&sql, "public", &name));
        }
    }
}
