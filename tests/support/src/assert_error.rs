//! Errors, asserted by their kind and by what they say.

use std::error::Error as StdError;
use std::fmt;

use lockkeeper::{Error, ErrorKind};
use tokio_postgres::error::DbError;

/// Asserts the kind of an error and a part of its text, which is one line as [`Display`](std::fmt::Display) gives it.
#[track_caller]
pub fn assert_error(error: &Error, kind: ErrorKind, text: &str) {
    assert_eq!(error.kind(), kind, "{error:?}");
    let shown = error.to_string();
    assert!(shown.contains(text), "{text:?} is not in {shown:?}");
    assert!(!shown.contains('\n'), "{shown:?}");
}

/// The same, where `what` says which of several cases it is.
#[track_caller]
pub fn assert_error_in(what: impl fmt::Display, error: &Error, kind: ErrorKind, text: &str) {
    assert_eq!(error.kind(), kind, "{what}: {error:?}");
    let shown = error.to_string();
    assert!(shown.contains(text), "{what}: {text:?} is not in {shown:?}");
    assert!(!shown.contains('\n'), "{what}: {shown:?}");
}

/// The server's error at the end of a chain of sources.
#[must_use]
pub fn server_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a DbError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<DbError>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The SQLSTATE of the server's error at the end of a chain of sources; `none` where there is none.
#[must_use]
pub fn sqlstate<'a>(error: &'a (dyn StdError + 'static)) -> &'a str {
    server_error(error).map_or("none", |found| found.code().code())
}

/// A statement that fails with this SQLSTATE.
#[must_use]
pub fn raise(sqlstate: &str) -> String {
    format!("DO $$ BEGIN RAISE EXCEPTION 'raised by a test' USING ERRCODE = '{sqlstate}'; END $$")
}
