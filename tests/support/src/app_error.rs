//! The error of an application.

use std::fmt;

use lockkeeper::Error;

/// An application's error, which can hold the driver's and the library's.
#[derive(Debug)]
pub enum AppError {
    /// The application's own.
    Own(u64),
    /// The driver's.
    Driver(tokio_postgres::Error),
    /// The library's.
    Keeper(Error),
}

impl fmt::Display for AppError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(number) => write!(f, "number {number}"),
            Self::Driver(_) => f.write_str("database"),
            Self::Keeper(_) => f.write_str("lockkeeper"),
        }
    }
}

impl std::error::Error for AppError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Own(_) => None,
            Self::Driver(error) => Some(error),
            Self::Keeper(error) => Some(error),
        }
    }
}

impl From<tokio_postgres::Error> for AppError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Driver(error)
    }
}

impl From<Error> for AppError {
    fn from(error: Error) -> Self {
        Self::Keeper(error)
    }
}
