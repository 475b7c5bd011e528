//! A new column.

use super::ddl;
use super::pace::{Pace, awaited, paced};
use super::recipe::{Recipe, Steps, sound};
use super::refusal::{self, Allowed};
use super::report::RecipeReport;
use super::run::Context;
use super::table::Table;
use crate::error::{Error, has_the_column};
use crate::postgres::TableName;
use crate::schema::sql::{catalog, recipe};

/// A column to be added: [`Schema::add_column`](crate::Schema::add_column). Awaiting it adds it.
#[must_use = "a column is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddColumn {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    pub(super) table: TableName,
    pub(super) column: String,
    pub(super) ty: String,
    pub(super) default: Option<String>,
    pub(super) not_null: bool,
}

impl AddColumn {
    /// Its default. It is SQL of the caller's, and sent as it is.
    pub fn default(mut self, expression: impl Into<String>) -> Self {
        self.default = Some(expression.into());
        self
    }

    /// NOT NULL, for which it needs a default where the table has rows. With a volatile default it comes only after the
    /// rows have been filled: see [`run`](Self::run).
    pub fn not_null(mut self) -> Self {
        self.not_null = true;
        self
    }

    /// Adds it, unless it is there.
    ///
    /// A default that is the same for every row (a constant, `now()`) costs nothing, however many rows there are. With a
    /// volatile one (`gen_random_uuid()`, `clock_timestamp()`, a function of one's own that is not declared otherwise) the
    /// server would rewrite the table: so the column comes without it, which then becomes the default of new rows in the
    /// same transaction. The rows that are there keep NULL, and [`RecipeReport::backfill`] says what fills them: batch by
    /// batch is for the caller, and so is [`set_not_null`](crate::Schema::set_not_null) after it.
    ///
    /// # SQL
    /// `ALTER TABLE … ADD COLUMN …`; with a volatile default `ALTER COLUMN … SET DEFAULT` in the same
    /// transaction.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run): types that make the server rewrite the table (`serial`, a domain with a
    /// constraint) are refused, where it has rows. [`Config`](crate::ErrorKind::Config) when there is such a column of
    /// another type.
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        sound("column", &self.column)?;
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for AddColumn {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        let full = table.full_name();
        let volatile = match &self.default {
            Some(default) => {
                let read = ddl::read_default(default);
                let sql = catalog::volatile(&read);
                catalog::two(&self.cx.ask(&sql).await?, "volatile", "domain").0
            }
            None => false,
        };
        let default = self.default.as_deref();
        let there = recipe.column(&table, &self.column, Some(&self.ty)).await?;
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
            let add = recipe::add_column(&full, &self.column, &self.ty, at_once, not_null);
            let statements = ddl::read(&add);
            let timeout = self.pace.lock_timeout;
            refusal::check(&self.cx, &statements, Allowed::default(), timeout).await?;
            let mut batch = vec![add];
            if let (true, Some(default)) = (split, default) {
                batch.push(recipe::set_default(&full, &self.column, default));
            }
            recipe
                .step_unless(has_the_column, recipe::batch(&batch))
                .await?;
        }
        if volatile && there.is_none_or(|there| !there.not_null) {
            recipe.report.backfill = Some(recipe::fill(&full, &self.column));
        }
        Ok(())
    }
}

paced!(AddColumn);
awaited!(AddColumn => RecipeReport);
