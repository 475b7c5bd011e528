//! The server's error, parsed, and the parts of its text that may be shown.

use std::sync::Arc;

use crate::postgres::message::{
    ContextKind, ContextLine, DeadlockDetail, LineKind, RowContext, context, deadlock_detail,
};
use crate::postgres::statement::{self, StatementKind};

use super::ServerError;

/// The routine that writes the DETAIL of a deadlock. Any function can raise this SQLSTATE with any DETAIL.
const OWN_DETAIL: &str = "DeadLockReport";

/// The routines whose messages name nothing but relations.
const OWN_MESSAGES: [&str; 7] = [
    OWN_DETAIL,
    "ProcessInterrupts",
    "heap_acquire_tuplock",
    "heap_lock_tuple",
    "heapam_tuple_lock",
    "LockTableRecurse",
    "RangeVarGetRelidExtended",
];

/// The parsed error.
#[derive(Debug, Default)]
pub(super) struct ServerMessage {
    pub(super) detail: DeadlockDetail,
    /// The row that was waited for, or the entry of a unique index.
    pub(super) row: Option<Arc<RowContext>>,
    /// The parent whose row a foreign key's check waited for.
    pub(super) parent: Option<Parent>,
    /// Whether the server sent a CONTEXT: then, without a [`parent`](Self::parent), it was in no such check.
    pub(super) has_context: bool,
    pub(super) shown: ShownMessage,
}

/// The redaction that may be shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ShownMessage {
    pub(super) sqlstate: Option<Box<str>>,
    pub(super) message: Option<Box<str>>,
    pub(super) detail: Option<Box<str>>,
    pub(super) context: Option<Box<str>>,
    pub(super) routine: Option<Box<str>>,
    /// The number of lines of DETAIL and CONTEXT that may contain data.
    pub(super) withheld: usize,
}

/// The table that a foreign key refers to, by the names in the check's query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parent {
    pub(super) schema: String,
    pub(super) name: String,
}

impl ServerMessage {
    pub(super) fn read(error: Option<&ServerError>, literals: bool) -> Self {
        let Some(error) = error else {
            return Self::default();
        };
        let routine = error.routine.as_deref();
        let is_own = routine.is_none_or(|routine| routine == OWN_DETAIL);
        let detail = error.detail.as_deref().filter(|_| is_own);
        let detail = detail.map(deadlock_detail).unwrap_or_default();
        let context = error.context.as_deref().map(context).unwrap_or_default();
        let row = context.iter().find_map(|line| match &line.kind {
            ContextKind::Row(row) => Some(Arc::new(row.clone())),
            _ => None,
        });
        let mut shown = ShownMessage {
            sqlstate: Some(error.sqlstate.as_str().into()),
            routine: error.routine.as_deref().map(Into::into),
            ..ShownMessage::default()
        };
        let own_message = routine.is_some_and(|routine| OWN_MESSAGES.contains(&routine));
        if literals {
            shown.message = Some(error.message.as_str().into());
            shown.detail = error.detail.as_deref().map(Into::into);
            shown.context = error.context.as_deref().map(Into::into);
        } else {
            shown.message = own_message.then(|| error.message.as_str().into());
            shown.detail(
                error.detail.as_deref(),
                &detail,
                routine.is_some() && is_own,
            );
            shown.context(&context);
        }
        Self {
            parent: parent(&context),
            has_context: !context.is_empty(),
            detail,
            row,
            shown,
        }
    }
}

impl ShownMessage {
    /// A line that cannot be parsed in the server's own DETAIL is in an unknown language, and contains no data.
    fn detail(&mut self, raw: Option<&str>, read: &DeadlockDetail, is_own: bool) {
        if !is_own {
            self.withheld += raw.map_or(0, |raw| raw.lines().count());
            return;
        }
        let lines = read.lines.iter().map(|line| match &line.kind {
            LineKind::Wait(_) | LineKind::Unparsed => line.raw.clone(),
            LineKind::Statement { statement, .. } => {
                let head = line.raw.strip_suffix(statement.as_str());
                format!(
                    "{}{}",
                    head.unwrap_or_default(),
                    statement::redact(statement)
                )
            }
        });
        self.detail = joined(&lines.collect::<Vec<_>>());
    }

    fn context(&mut self, context: &[ContextLine]) {
        let mut lines = Vec::new();
        let is_other = |line: &ContextLine| line.kind == ContextKind::Other;
        for block in context.chunk_by(|a, b| is_other(a) && is_other(b)) {
            if !is_other(&block[0]) {
                lines.push(block[0].raw.clone());
                continue;
            }
            let raw: Vec<_> = block.iter().map(|line| line.raw.as_str()).collect();
            match quoted_statement(&raw.join("\n")) {
                Some(statement) => lines.push(statement),
                None => self.withheld += block.len(),
            }
        }
        self.context = joined(&lines);
    }
}

fn joined(lines: &[String]) -> Option<Box<str>> {
    (!lines.is_empty()).then(|| lines.join("\n").into())
}

/// `SQL statement "…"`, in any language, without the literals.
///
/// All text after the first quote is read as SQL, so that a quote within the statement does not turn data into plain
/// text. If several of these lines follow one another, the text between them samples like a quoted name.
fn quoted_statement(text: &str) -> Option<String> {
    let is_quote = |c: char| matches!(c, '"' | '«' | '»' | '„' | '“' | '”' | '「' | '」');
    let open = text.find(is_quote)?;
    // The data of `COPY t, line 3: "…"` and of parameters is in quotes too.
    let label = text[..open].trim();
    if label.is_empty() || label.contains(|c: char| c.is_ascii_digit() || c == ':' || c == ',') {
        return None;
    }
    let inside = text[open..].strip_prefix(is_quote)?.trim_end();
    let inside = inside.strip_suffix(is_quote)?.trim();
    if matches!(statement::kind(inside), StatementKind::Other) {
        return None;
    }
    // The label is replaced, because it can contain any text.
    Some(format!("SQL statement \"{}\"", statement::redact(inside)))
}

/// The query of a foreign key's check for its parent (`RI_FKey_check` in PostgreSQL's
/// `src/backend/utils/adt/ri_triggers.c`): `… 1 FROM ONLY "public"."parent" x WHERE "id" OPERATOR(pg_catalog.=) $1 FOR
/// KEY SHARE OF x`. The checks for children have the parameter on the left.
fn parent(context: &[ContextLine]) -> Option<Parent> {
    let line = context
        .iter()
        .find(|line| line.kind == ContextKind::Other)?;
    let (_, rest) = line.raw.split_once(" 1 FROM ")?;
    if !rest.contains(" FOR KEY SHARE OF x") {
        return None;
    }
    let rest = rest.strip_prefix("ONLY ").unwrap_or(rest);
    let (schema, rest) = quoted_name(rest)?;
    let (name, rest) = quoted_name(rest.strip_prefix('.')?)?;
    rest.starts_with(" x WHERE \"")
        .then_some(Parent { schema, name })
}

fn quoted_name(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix('"')?;
    let mut name = String::new();
    loop {
        let end = rest.find('"')?;
        name.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(behind) => {
                name.push('"');
                rest = behind;
            }
            None => return Some((name, rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: &str = "while locking tuple (0,1) in relation \"parent\"\n\
        SQL statement \"SELECT 1 FROM ONLY \"public\".\"pa\"\"rent\" x WHERE \"id\" OPERATOR(pg_catalog.=) $1 \
        FOR KEY SHARE OF x\"";

    fn error(detail: Option<&str>, context: Option<&str>, routine: Option<&str>) -> ServerError {
        ServerError {
            sqlstate: "40P01".into(),
            message: "a message".into(),
            detail: detail.map(Into::into),
            context: context.map(Into::into),
            routine: routine.map(Into::into),
        }
    }

    fn read(detail: Option<&str>, context: Option<&str>, routine: Option<&str>) -> ServerMessage {
        ServerMessage::read(Some(&error(detail, context, routine)), false)
    }

    #[test]
    fn a_foreign_keys_check_names_its_parent() {
        let message = read(None, Some(CHECK), None);
        let parent = Parent {
            schema: "public".into(),
            name: "pa\"rent".into(),
        };
        assert_eq!(message.parent, Some(parent));
        assert!(message.row.is_some_and(|row| row.relation == "parent"));
        // The check for children, when a parent is deleted.
        let children = CHECK.replace(
            "\"id\" OPERATOR(pg_catalog.=) $1",
            "$1 OPERATOR(pg_catalog.=) \"parent_id\"",
        );
        assert_eq!(read(None, Some(&children), None).parent, None);
        // With a partitioned parent.
        let partitioned = CHECK.replace("ONLY ", "");
        assert!(read(None, Some(&partitioned), None).parent.is_some());
        let german = CHECK.replace("SQL statement \"SELECT", "SQL-Anweisung »SELECT");
        assert!(read(None, Some(&german), None).parent.is_some());
    }

    #[test]
    fn texts_that_may_contain_data_are_withheld() {
        let shown = read(None, Some(CHECK), None).shown;
        let expected = "while locking tuple (0,1) in relation \"parent\"\n\
            SQL statement \"SELECT ? FROM ONLY \"public\".\"pa\"\"rent\" x WHERE \"id\" OPERATOR(pg_catalog.=) $1 \
            FOR KEY SHARE OF x\"";
        assert_eq!(shown.context.as_deref(), Some(expected));
        for (context, expected, withheld) in [
            (
                "SQL statement \"UPDATE t SET a = 'secret'\"\nSQL statement \"DELETE FROM t WHERE b = 'secret'\"\n\
                 PL/pgSQL function f(text) line 3 at SQL statement",
                Some(
                    "SQL statement \"UPDATE t SET a = ?\"\nSQL statement \"DELETE FROM t WHERE b = ?\"\n\
                     PL/pgSQL function f(text) line 3 at SQL statement",
                ),
                0,
            ),
            (
                "SQL-Anweisung »UPDATE t SET a = 'secret\nsecret \"secret'«",
                Some("SQL statement \"UPDATE t SET a = ?\""),
                0,
            ),
            ("COPY t, line 1, column a: \"secret\"", None, 1),
            ("unnamed portal with parameters: $1 = 'secret'", None, 1),
            ("PL/pgSQL assignment \"x := secret\"\nsecret", None, 2),
            ("secret", None, 1),
            ("line 3 of t \"SELECT secret\"", None, 1),
            ("column a: \"SELECT secret\"", None, 1),
            ("COPY t, column a \"SELECT secret\"", None, 1),
        ] {
            let shown = read(None, Some(context), None).shown;
            // Two statements in a row are still two.
            let one_line = |text: &str| text.replace("\"\nSQL statement \"", "\" SQL statement \"");
            assert_eq!(
                shown.context.as_deref().map(one_line),
                expected.map(one_line)
            );
            assert_eq!(shown.withheld, withheld, "{context}");
        }
        let whole = ServerMessage::read(Some(&error(None, Some("secret"), None)), true).shown;
        assert_eq!(whole.context.as_deref(), Some("secret"));
    }

    #[test]
    fn only_the_servers_own_detail_counts() {
        let detail = "Process 1 waits for ShareLock on transaction 5; blocked by process 2.\n\
            Process 2 waits for ShareLock on transaction 6; blocked by process 1.";
        let own = read(Some(detail), None, Some("DeadLockReport"));
        assert!(own.detail.is_cycle());
        assert_eq!(own.shown.detail.as_deref(), Some(detail));
        assert_eq!(own.shown.message.as_deref(), Some("a message"));
        let raised = read(Some(detail), None, Some("exec_stmt_raise"));
        assert_eq!(raised.detail.waits().count(), 0);
        assert_eq!((raised.shown.detail, raised.shown.message), (None, None));
        assert_eq!(raised.shown.withheld, 2);
        // An unknown language.
        let unread = read(Some("??"), None, Some("DeadLockReport"));
        assert_eq!(unread.shown.detail.as_deref(), Some("??"));
        // The routine is unknown.
        let unknown = read(Some(detail), None, None);
        assert!(unknown.detail.is_cycle());
        assert_eq!((unknown.shown.detail, unknown.shown.withheld), (None, 2));
        // As in the server's log.
        let logged = format!("{detail}\nProcess 1: UPDATE t SET a = 'secret'");
        let logged = read(Some(&logged), None, Some("DeadLockReport"))
            .shown
            .detail;
        assert!(logged.is_some_and(|text| text.ends_with("\nProcess 1: UPDATE t SET a = ?")));
    }
}
