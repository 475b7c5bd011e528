//! Adding a column.

use super::lint::{self, Allowed};
use super::options::{ChangeOptions, change_options, into_future};
use super::procedure::{Procedure, Steps, check_name};
use super::refusals;
use super::report::ProcedureReport;
use super::table::Table;
use super::{Env, ddl};
use crate::error::{Error, ErrorKind, has_the_column};
use crate::postgres::TableName;
use crate::schema::sql::{catalog, procedure};

/// A column to add: [`Schema::add_column`](crate::Schema::add_column). Awaiting it adds the column.
#[must_use = "a column is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddColumn {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    pub(super) table: TableName,
    pub(super) column: String,
    pub(super) ty: String,
    pub(super) default: Option<String>,
    pub(super) not_null: bool,
}

impl AddColumn {
    /// The column's default. The expression is the caller's SQL and sent unchanged.
    pub fn default(mut self, expression: impl Into<String>) -> Self {
        self.default = Some(expression.into());
        self
    }

    /// Makes the column NOT NULL, which requires a default if the table has rows. With a volatile default, NOT NULL has
    /// to wait until the existing rows have been filled: see [`run`](Self::run).
    pub fn not_null(mut self) -> Self {
        self.not_null = true;
        self
    }

    /// Adds the column, unless it exists.
    ///
    /// A default that is the same for every row (a constant, `now()`) is cheap, regardless of the number of rows. With
    /// a volatile default (`gen_random_uuid()`, `clock_timestamp()`, a user-defined function that is not declared
    /// otherwise) the server would rewrite the table. So the column is added without the default, which is then set for
    /// new rows in the same transaction. Existing rows keep NULL, and [`ProcedureReport::backfill`] contains the
    /// statement that fills them: run it in batches, and then call [`set_not_null`](crate::Schema::set_not_null).
    ///
    /// # SQL
    /// `ALTER TABLE … ADD COLUMN …`; with a volatile default also `ALTER COLUMN … SET DEFAULT` in the same
    /// transaction.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run): types that make the server rewrite the table (`serial`, a domain with a
    /// constraint) are refused if the table has rows. [`Config`](crate::ErrorKind::Config) if the column exists with
    /// another type.
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        check_name("column", &self.column)?;
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for AddColumn {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        let full = table.full_name();
        let volatile = match &self.default {
            Some(default) => {
                let read = ddl::called_functions(default);
                let sql = catalog::volatile(&read);
                catalog::read_two(&self.env.ask(&sql).await?, "volatile", "domain").0
            }
            None => false,
        };
        let default = self.default.as_deref();
        let there = procedure
            .column(&table, &self.column, Some(&self.ty))
            .await?;
        if there.as_ref().is_some_and(|there| !there.same_type) {
            return Err(Error::config(format!(
                "{full} has a column {:?} already, and its type is not {}",
                self.column, self.ty
            )));
        }
        if there.is_none() {
            let split = volatile && default.is_some();
            let (at_once, not_null) = if split {
                (None, false)
            } else {
                (default, self.not_null)
            };
            let add = procedure::add_column(&full, &self.column, &self.ty, at_once, not_null);
            let statements = ddl::read(&add);
            let timeout = self.options.lock_timeout;
            if let Err(error) =
                lint::check(&self.env, &statements, Allowed::default(), timeout).await
            {
                let advice = refusals::column_advice(&self.ty, &self.column);
                return Err(match advice {
                    Some(advice) if error.kind() == ErrorKind::Config => Error::config(format!(
                        "ADD COLUMN {:?} {} on {full} keeps others waiting while it rewrites the table; {advice}",
                        self.column, self.ty
                    )),
                    _ => error,
                });
            }
            let mut batch = vec![add];
            if let (true, Some(default)) = (split, default) {
                batch.push(procedure::set_default(&full, &self.column, default));
            }
            procedure
                .step_unless_overtaken(has_the_column, procedure::batch(&batch))
                .await?;
        }
        if volatile && there.is_none_or(|there| !there.not_null) {
            procedure.report.backfill = Some(procedure::fill(&full, &self.column));
        }
        Ok(())
    }
}

change_options!(AddColumn);
into_future!(AddColumn => ProcedureReport);
