//! What may be shown of an error's cause: in `{:?}`, which programs print and log.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;

use deadpool_postgres::{PoolError, TimeoutType};
use tokio_postgres::error::DbError;

use super::Error;

/// Routines that raise messages which the application or its functions have written.
const RAISED: [&str; 7] = [
    "exec_stmt_raise",
    "exec_stmt_assert",
    "PLy_elog",
    "PLy_elog_impl",
    "plperl_call_perl_func",
    "throw_tcl_error",
    "pgfdw_report_error",
];

/// The driver's words for a connection that could not be opened.
const LOGIN: [&str; 4] = [
    "error connecting to server",
    "error performing TLS handshake",
    "authentication error",
    "invalid configuration",
];

/// The causes of an error from the first to the last, without what may be data of the application.
pub(super) fn shown(error: &(dyn StdError + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    // Whether what follows is about how the connection was to be opened, whatever its type.
    let mut is_login = false;
    while let Some(error) = next {
        next = error.source();
        if let Some(error) = error.downcast_ref::<DbError>() {
            texts.push(server_error(error));
            break;
        }
        let known = text(error).or_else(|| is_login.then(|| printable(&error.to_string())));
        let Some(text) = known else {
            texts.push("(a cause that may contain data)".to_owned());
            break;
        };
        is_login |= error.is::<tokio_postgres::Error>() && LOGIN.contains(&text.as_str());
        // The driver's words for what follows say nothing of their own.
        if text == "db error" || text.is_empty() || texts.last() == Some(&text) {
            continue;
        }
        texts.push(text);
    }
    texts.join(": ")
}

/// The text of one error without that of its sources; `None` where it may contain data.
fn text(error: &(dyn StdError + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref::<Error>() {
        let hosts = error.0.hosts.as_deref();
        let hosts = hosts.map_or_else(String::new, |hosts| format!(": {hosts}"));
        return Some(printable(&format!("{error}{hosts}")));
    }
    if let Some(error) = error.downcast_ref::<PoolError>() {
        let text = match error {
            PoolError::Timeout(TimeoutType::Wait) => "no connection became free in time",
            PoolError::Timeout(TimeoutType::Create) => "no connection could be opened in time",
            PoolError::Timeout(TimeoutType::Recycle) => "no connection could be checked in time",
            PoolError::Backend(_) => "",
            PoolError::Closed => "the pool is closed",
            PoolError::NoRuntimeSpecified => "the pool has timeouts and no runtime",
            PoolError::PostCreateHook(_) => "the pool's post_create hook failed",
        };
        return Some(text.to_owned());
    }
    if error.is::<tokio_postgres::Error>() || error.is::<io::Error>() {
        return Some(printable(&error.to_string()));
    }
    // Such as why a type's own code refuses the value of a parameter.
    None
}

/// The SQLSTATE, the severity where it is not ERROR, and the message. Never the DETAIL, the HINT or the CONTEXT.
pub(super) fn server_error(error: &DbError) -> String {
    let code = error.code().code();
    let mut text = printable(code);
    let class = code.get(..2).unwrap_or(code);
    if is_raised(error, class) {
        text.push_str(": (a message of a function, which may contain data)");
        return text;
    }
    let quotes_data = quotes_data(error, class);
    let message = if quotes_data {
        masked(error.message())
    } else {
        error.message().to_owned()
    };
    let _ = write!(text, ": {}", printable(&message));
    if quotes_data {
        // Names are no data, and the server sends them apart.
        let names = [
            ("constraint", error.constraint()),
            ("column", error.column()),
            ("table", error.table()),
        ];
        for (what, name) in names {
            if let Some(name) = name {
                let _ = write!(text, ", {what} {}", printable(name));
            }
        }
    }
    text
}

/// Whether what the message quotes can come from data or from a literal: `'…'::regclass` quotes what is in the literal as a
/// relation's name. Names in the statement itself are looked up by the parser.
fn quotes_data(error: &DbError, class: &str) -> bool {
    match error.code().code() {
        "42601" | "42704" => true,
        "42P01" => error.routine() != Some("parserOpenTable"),
        _ => matches!(class, "22" | "23" | "3F" | "58"),
    }
}

fn is_raised(error: &DbError, class: &str) -> bool {
    matches!(class, "P0" | "38" | "39")
        || error.routine().is_some_and(|name| RAISED.contains(&name))
}

/// The message with `…` for all from its first quote to its last: a quoted value may contain quotes. Byte sequences of data
/// are not quoted (`invalid byte sequence for encoding "UTF8": 0xff`).
fn masked(message: &str) -> String {
    let is_quote = |c: char| {
        matches!(
            c,
            '"' | '\''
                | '`'
                | '«'
                | '»'
                | '‹'
                | '›'
                | '„'
                | '“'
                | '”'
                | '‚'
                | '‘'
                | '’'
                | '「'
                | '」'
        )
    };
    let open = message.char_indices().find(|(_, c)| is_quote(*c));
    let mut shown = match open {
        Some((at, quote)) => {
            let behind = at + quote.len_utf8();
            // Without its own closing quote, all of the rest is masked.
            let close = message[behind..].rfind(closing(quote));
            let rest = close.map_or("", |close| &message[behind + close..]);
            format!("{}…{rest}", &message[..behind])
        }
        None => message.to_owned(),
    };
    while let Some(at) = shown.find("0x") {
        let rest = &shown[at + 2..];
        let end = rest
            .find(|c: char| !c.is_ascii_hexdigit())
            .unwrap_or(rest.len());
        shown.replace_range(at..at + 2 + end, "…");
    }
    shown
}

fn closing(quote: char) -> char {
    match quote {
        '«' => '»',
        '»' => '«',
        '‹' => '›',
        '›' => '‹',
        '„' | '“' => '”',
        '‚' | '‘' => '’',
        '「' => '」',
        other => other,
    }
}

/// The text without characters that control a terminal or change the direction of text.
pub(super) fn printable(text: &str) -> String {
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.trim()
        .chars()
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c if acts(c) => '\u{fffd}',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_values_are_masked_whatever_they_contain() {
        for (message, expected) in [
            (
                "invalid input syntax for type integer: \"se\"cret\"",
                "invalid input syntax for type integer: \"…\"",
            ),
            (
                "value \"99999999999\" is out of range for type integer",
                "value \"…\" is out of range for type integer",
            ),
            (
                "unterminated quoted string at or near \"'secret",
                "unterminated quoted string at or near \"…",
            ),
            (
                "syntax error at or near \"'secret'\"",
                "syntax error at or near \"…\"",
            ),
            ("l'entrée « secret » est invalide", "l'…"),
            (
                "ungültige Eingabesyntax für Typ integer: »secret«",
                "ungültige Eingabesyntax für Typ integer: »…«",
            ),
            (
                "invalid byte sequence for encoding \"UTF8\": 0xc3 0x28",
                "invalid byte sequence for encoding \"…\": … …",
            ),
            ("division by zero", "division by zero"),
            ("\"", "\"…"),
        ] {
            assert_eq!(masked(message), expected);
        }
    }

    #[test]
    fn causes_are_shown_once_and_on_one_line() {
        let refused = io::Error::new(io::ErrorKind::ConnectionRefused, "refused\n\u{1b}[2J");
        assert_eq!(shown(&refused), "refused \u{fffd}[2J");
        let nested = Error::new(crate::ErrorKind::Pool).with_source(PoolError::Closed);
        assert_eq!(
            shown(&nested),
            "no connection from the pool: the pool is closed"
        );
        let far = Error::new(crate::ErrorKind::Pool).with_hosts(Some("db:5432".to_owned()));
        assert_eq!(shown(&far), "no connection from the pool: db:5432");
        // Of an unknown type.
        assert_eq!(
            shown(&"x".parse::<i32>().expect_err("no number")),
            "(a cause that may contain data)"
        );
    }
}
