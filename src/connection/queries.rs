//! The driver's query methods, given to each type that owns a session.

/// Implements tokio-postgres' query methods on a type with a `fn session(&self) -> &Session`.
///
/// They have the driver's names, arguments and error type. Each statement is watched: whether it was answered decides
/// whether the connection can ever go back, and its SQLSTATE whether the transaction is worth repeating.
macro_rules! query_methods {
    ($type:ty) => {
        /// The driver's query methods. Each is cancel safe in this sense: a statement whose future is dropped goes on
        /// on the server, statements after it wait for it, and it is cancelled when its owner ends.
        ///
        /// A statement may take as long as the backend is executing it. If the server does not show that it is, the statement
        /// ends with the driver's error for a closed connection after at most twice
        /// [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more. The streams of `query_raw`,
        /// `copy_in` and `copy_out` are the driver's own: a wait for their next row has no bound but the caller's.
        ///
        /// If the server has closed the connection before, the statement ends with the server's reason where that is known (25P03,
        /// 57P01, 57P05), and else with the driver's error for a closed connection: see [`Connector`](crate::Connector). After
        /// 0A000 ("cached plan must not change result type") the pool's cached statements are forgotten:
        /// [`prepare_cached`](Self::prepare_cached) prepares again.
        ///
        /// A text is not sent where it shows that it ends this crate's transaction (`COMMIT`, `ROLLBACK`, `PREPARE
        /// TRANSACTION`) or releases a guard's session locks (`DISCARD ALL`, `pg_advisory_unlock_all()`). It fails with
        /// SQLSTATE 2D000, and so does the transaction
        /// ([`TransactionEnded`](crate::ErrorKind::TransactionEnded)).
        impl $type {
            /// See [`tokio_postgres::Client::query`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn query<T>(
                &self,
                statement: &T,
                params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
            ) -> Result<Vec<tokio_postgres::Row>, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(session.client().query(statement, params)))
                    .await
            }

            /// See [`tokio_postgres::Client::query_one`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's; one of its own when there is not exactly one row.
            pub async fn query_one<T>(
                &self,
                statement: &T,
                params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
            ) -> Result<tokio_postgres::Row, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.client().query_one(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::query_opt`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's; one of its own when there is more than one row.
            pub async fn query_opt<T>(
                &self,
                statement: &T,
                params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
            ) -> Result<Option<tokio_postgres::Row>, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.client().query_opt(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::query_raw`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn query_raw<T, P, I>(
                &self,
                statement: &T,
                params: I,
            ) -> Result<tokio_postgres::RowStream, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
                P: tokio_postgres::types::BorrowToSql,
                I: IntoIterator<Item = P>,
                I::IntoIter: ExactSizeIterator,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.untracked_client().query_raw(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::query_typed`]: one round trip, without preparing.
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn query_typed(
                &self,
                statement: &str,
                params: &[(
                    &(dyn tokio_postgres::types::ToSql + Sync),
                    tokio_postgres::types::Type,
                )],
            ) -> Result<Vec<tokio_postgres::Row>, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(statement));
                running
                    .run(std::pin::pin!(
                        session.client().query_typed(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::execute`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn execute<T>(
                &self,
                statement: &T,
                params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
            ) -> Result<u64, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(session.client().execute(statement, params)))
                    .await
            }

            /// See [`tokio_postgres::Client::execute_typed`]: one round trip, without preparing.
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn execute_typed(
                &self,
                statement: &str,
                params: &[(
                    &(dyn tokio_postgres::types::ToSql + Sync),
                    tokio_postgres::types::Type,
                )],
            ) -> Result<u64, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(statement));
                running
                    .run(std::pin::pin!(
                        session.client().execute_typed(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::execute_raw`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn execute_raw<T, P, I>(
                &self,
                statement: &T,
                params: I,
            ) -> Result<u64, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
                P: tokio_postgres::types::BorrowToSql,
                I: IntoIterator<Item = P>,
                I::IntoIter: ExactSizeIterator,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.client().execute_raw(statement, params)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::batch_execute`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn batch_execute(&self, sql: &str) -> Result<(), tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .run(std::pin::pin!(session.client().batch_execute(sql)))
                    .await
            }

            /// See [`tokio_postgres::Client::simple_query`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn simple_query(
                &self,
                sql: &str,
            ) -> Result<Vec<tokio_postgres::SimpleQueryMessage>, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .run(std::pin::pin!(session.client().simple_query(sql)))
                    .await
            }

            /// See [`tokio_postgres::Client::prepare`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn prepare(
                &self,
                sql: &str,
            ) -> Result<tokio_postgres::Statement, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .prepare(sql, std::pin::pin!(session.client().prepare(sql)))
                    .await
            }

            /// See [`tokio_postgres::Client::prepare_typed`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn prepare_typed(
                &self,
                sql: &str,
                types: &[tokio_postgres::types::Type],
            ) -> Result<tokio_postgres::Statement, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .prepare(
                        sql,
                        std::pin::pin!(session.client().prepare_typed(sql, types)),
                    )
                    .await
            }

            /// See [`deadpool_postgres::ClientWrapper::prepare_cached`]: a round trip only the first time on a
            /// connection.
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn prepare_cached(
                &self,
                sql: &str,
            ) -> Result<tokio_postgres::Statement, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .prepare(sql, std::pin::pin!(session.client().prepare_cached(sql)))
                    .await
            }

            /// See [`deadpool_postgres::ClientWrapper::prepare_typed_cached`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn prepare_typed_cached(
                &self,
                sql: &str,
                types: &[tokio_postgres::types::Type],
            ) -> Result<tokio_postgres::Statement, tokio_postgres::Error> {
                let session = self.session();
                let running = session.begin_logged($crate::connection::Sent::Text(sql));
                running
                    .prepare(
                        sql,
                        std::pin::pin!(session.client().prepare_typed_cached(sql, types)),
                    )
                    .await
            }

            /// See [`tokio_postgres::Client::copy_in`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn copy_in<T, U>(
                &self,
                statement: &T,
            ) -> Result<tokio_postgres::CopyInSink<U>, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
                U: bytes::Buf + 'static + Send,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.untracked_client().copy_in(statement)
                    ))
                    .await
            }

            /// See [`tokio_postgres::Client::copy_out`].
            ///
            /// # Longest silence
            /// Twice [`longest_silence`](crate::KeeperBuilder::longest_silence), and up to a second more, unless the backend
            /// is executing the statement.
            ///
            /// # Errors
            /// The driver's.
            pub async fn copy_out<T>(
                &self,
                statement: &T,
            ) -> Result<tokio_postgres::CopyOutStream, tokio_postgres::Error>
            where
                T: ?Sized + $crate::connection::ToStatement,
            {
                let session = self.session();
                let running = session.begin_logged(statement.as_sent());
                running
                    .run(std::pin::pin!(
                        session.untracked_client().copy_out(statement)
                    ))
                    .await
            }

            /// The connection itself, for code that is generic over a `GenericClient`: `client()` is
            /// [`deadpool_postgres::GenericClient`], `&***client()` is [`tokio_postgres::GenericClient`].
            ///
            /// Do not end the transaction or unlock through it. What is run here is not watched: a statement left
            /// unanswered is noticed only after a moment's wait when its owner ends, and the connection is closed then.
            pub fn client(&self) -> &deadpool_postgres::Client {
                self.session().untracked_client()
            }
        }
    };
}

pub(crate) use query_methods;
