//! Rows locked in one order.

use std::any::type_name;
use std::fmt;
use std::pin::Pin;

use tokio_postgres::types::{ToSql, Type};

use super::Tx;
use crate::error::{Error, Failure, classify, is_undefined_function};
use crate::mode::RowLock;
use crate::postgres::{TableName, name_flaw};
use crate::transaction::sql::rows::{Busy, lock};

/// Rows to be locked, described; from [`Tx::lock_rows`]. Awaited, it locks them.
#[must_use = "a description locks no rows until it is awaited"]
pub struct LockRows<'a, T> {
    tx: &'a Tx,
    table: TableName,
    key: String,
    ids: Vec<T>,
    mode: RowLock,
    busy: Busy,
}

impl Tx {
    /// Locks the rows of a table whose keys are given, in the order of the keys whatever order they are given in; says
    /// which of them there were, in that order.
    ///
    /// Transactions that lock their rows so, before they change any, never deadlock over them: one of two that want
    /// overlapping sets waits for the other at the first row they share. `UPDATE … WHERE id IN (…)` and `SELECT … FOR
    /// UPDATE` without ORDER BY lock in the order of the plan, which differs between statements, and when the statistics
    /// change.
    ///
    /// Eight workers that each change 4 of 40 rows in an order of their own, on a machine of two cores with the server
    /// beside them: 10 commits a second, and 1360 with this call before; where one UPDATE joins its rows with a list, 34
    /// and 1845 (the benchmark `rows`). What costs is not the victim's second run, but the `deadlock_timeout`, a second,
    /// for which all of a cycle stand still until the server has found it.
    ///
    /// The lock is `FOR NO KEY UPDATE`, what an UPDATE takes that leaves the key alone: foreign keys that refer to the
    /// rows go on being checked. [`mode`](LockRows::mode) takes another one; take `FOR UPDATE` before a DELETE, since a
    /// lock that is made stronger later can deadlock again. What waits is bounded by the transaction's
    /// [`lock_timeout`](crate::TransactionOptions::lock_timeout), for each row; [`nowait`](LockRows::nowait) and
    /// [`skip_locked`](LockRows::skip_locked) do not wait.
    ///
    /// An id without a row, or whose row was deleted while it was waited for, is left out; so is NULL. Ids given twice
    /// come back once. The key need not be unique: all rows of an id are locked. Give it an index, or the whole table is
    /// read.
    ///
    /// # Limits
    /// The order is that of the keys as the statement found them. A key that another transaction changes while its row
    /// is waited for keeps its old place (PostgreSQL's documentation of SELECT, “The Locking Clause”). Ids are compared
    /// by PostgreSQL's own operators: `citext` as text. Transactions that also lock other tables need an order of the
    /// tables too.
    ///
    /// # SQL
    /// `SELECT … WHERE key = ANY ($1) ORDER BY key FOR NO KEY UPDATE`: one round trip for ids of type `i64`, `i32`, `i16`
    /// and UUIDs; for others, whose type the server is asked for, two. None without ids. The names are quoted. The role
    /// needs the privileges SELECT, and UPDATE of at least one column.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) when a row was not to be had in time, or at once with
    /// [`nowait`](LockRows::nowait), which [is not retryable](Error::is_retryable); [`Deadlock`](crate::ErrorKind::Deadlock)
    /// and [`Serialization`](crate::ErrorKind::Serialization), as every statement; [`Config`](crate::ErrorKind::Config)
    /// for a name that no table or column can have, and for ids of a type that does not fit the key. Whatever the server
    /// has refused, the transaction has failed, or the savepoint it was asked in.
    ///
    /// # Cancel safety
    /// As the query methods': what was sent goes on on the server, and is cancelled when the transaction ends.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let (from, to) = (42_i64, 7_i64);
    /// keeper
    ///     .transaction(async |tx| {
    ///         tx.lock_rows("account", "id", [from, to]).await?;
    ///         tx.execute("UPDATE account SET balance = balance - 10 WHERE id = $1", &[&from]).await?;
    ///         tx.execute("UPDATE account SET balance = balance + 10 WHERE id = $1", &[&to]).await?;
    ///         Ok::<_, lockkeeper::Error>(())
    ///     })
    ///     .await
    /// # }
    /// ```
    ///
    /// # Longest silence
    /// As the query methods': twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second
    /// more, while its backend is not known to be executing it.
    pub fn lock_rows<T>(
        &self,
        table: impl Into<TableName>,
        key: impl Into<String>,
        ids: impl AsRef<[T]>,
    ) -> LockRows<'_, T>
    where
        T: ToSql + Clone + Send + Sync,
    {
        LockRows {
            tx: self,
            table: table.into(),
            key: key.into(),
            ids: ids.as_ref().to_vec(),
            mode: RowLock::NoKeyUpdate,
            busy: Busy::Wait,
        }
    }
}

impl<T> LockRows<'_, T> {
    /// Another lock than `FOR NO KEY UPDATE`.
    pub fn mode(mut self, mode: RowLock) -> Self {
        self.mode = mode;
        self
    }

    /// Fails where a row is locked by somebody else, instead of waiting: all of the rows or none. Instead of
    /// [`skip_locked`](Self::skip_locked).
    pub fn nowait(mut self) -> Self {
        self.busy = Busy::NoWait;
        self
    }

    /// Leaves out rows that are locked by somebody else, instead of waiting. Instead of [`nowait`](Self::nowait).
    pub fn skip_locked(mut self) -> Self {
        self.busy = Busy::SkipLocked;
        self
    }
}

impl<T: ToSql + Clone + Send + Sync> LockRows<'_, T> {
    async fn lock(self) -> Result<Vec<T>, Error> {
        let flaw = self.table.flaw();
        if let Some(flaw) = flaw.or_else(|| name_flaw("column", &self.key)) {
            return Err(Error::config(flaw));
        }
        if self.ids.is_empty() {
            return Ok(self.ids);
        }
        let sql = lock(&self.table, &self.key, self.mode, self.busy);
        let locked = match array_of::<T>() {
            Some(array) => self.tx.query_typed(&sql, &[(&self.ids, array)]).await,
            None => self.tx.query(&sql, &[&self.ids]).await,
        };
        let places = locked.map_err(|error| match classify(&error) {
            // The driver has refused them for the key's type, or the server has no operator that compares them with it.
            failure if failure == Failure::Driver || is_undefined_function(&error) => {
                Error::config(format!(
                    "ids of type {} do not fit the key {:?} of {}",
                    type_name::<T>(),
                    self.key,
                    self.table
                ))
                .with_source(error)
            }
            failure => Error::new(failure.kind())
                .with_detail(format!("rows of {}", self.table))
                .with_source(error)
                .lacking(|| {
                    format!(
                        "rows of {0}, which the role may not lock: GRANT SELECT, UPDATE ON {0}",
                        self.table
                    )
                }),
        })?;
        let mut found = Vec::with_capacity(places.len());
        for row in places {
            let place: i64 = row.try_get(0)?;
            let id = usize::try_from(place)
                .ok()
                .and_then(|place| self.ids.get(place.checked_sub(1)?));
            // Invariant: the places are those of the array that was sent.
            found.extend(id.cloned());
        }
        Ok(found)
    }
}

/// The type of an array of such ids, where one type is all they can be: that spares asking the server.
fn array_of<T: ToSql>() -> Option<Type> {
    let known = [
        (Type::INT8, Type::INT8_ARRAY),
        (Type::INT4, Type::INT4_ARRAY),
        (Type::INT2, Type::INT2_ARRAY),
        (Type::UUID, Type::UUID_ARRAY),
        (Type::TEXT, Type::TEXT_ARRAY),
    ];
    let mut fitting = known.into_iter().filter(|(one, _)| T::accepts(one));
    match (fitting.next(), fitting.next()) {
        // Texts are compared with more than one type: a parameter of type text would hide an index on `char(n)`.
        (Some((one, array)), None) if one != Type::TEXT => Some(array),
        _ => None,
    }
}

impl<'a, T> IntoFuture for LockRows<'a, T>
where
    T: ToSql + Clone + Send + Sync + 'a,
{
    type Output = Result<Vec<T>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.lock())
    }
}

/// Without the ids, which are data.
impl<T> fmt::Debug for LockRows<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockRows")
            .field("table", &self.table)
            .field("key", &self.key)
            .field("ids", &self.ids.len())
            .field("mode", &self.mode)
            .field("busy", &self.busy)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn the_type_is_said_where_there_is_one_only() {
        assert_eq!(array_of::<i64>(), Some(Type::INT8_ARRAY));
        assert_eq!(array_of::<&i32>(), Some(Type::INT4_ARRAY));
        assert_eq!(array_of::<Option<i16>>(), Some(Type::INT2_ARRAY));
        assert_eq!(array_of::<String>(), None);
        assert_eq!(array_of::<SystemTime>(), None);
    }
}
