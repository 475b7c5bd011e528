//! Constraints, added without a scan under a lock that others wait for.

use super::pace::{Pace, awaited, paced};
use super::recipe::{Recipe, Steps, sound};
use super::report::RecipeReport;
use super::run::Context;
use super::table::Table;
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::recipe::ForeignKey;
use std::time::Duration;

/// A primary key's index may take as long as any.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What becomes of rows whose foreign key refers to a row that is deleted, or whose key is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReferentialAction {
    /// It is an error, at the end of the statement or, where the constraint is deferred, of the transaction.
    NoAction,
    /// It is an error, at once.
    Restrict,
    /// They are deleted, or changed, too.
    Cascade,
    /// Their columns become NULL.
    SetNull,
    /// Their columns become their defaults.
    SetDefault,
}

impl ReferentialAction {
    const fn as_sql(self) -> &'static str {
        match self {
            Self::NoAction => "NO ACTION",
            Self::Restrict => "RESTRICT",
            Self::Cascade => "CASCADE",
            Self::SetNull => "SET NULL",
            Self::SetDefault => "SET DEFAULT",
        }
    }
}

/// A CHECK to be added: [`Schema::add_check`](crate::Schema::add_check). Awaiting it adds it.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddCheck {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    pub(super) table: TableName,
    pub(super) name: String,
    pub(super) expression: String,
}

impl AddCheck {
    /// Adds it, unless it is there, and validates it, unless it is valid.
    ///
    /// # SQL
    /// `ALTER TABLE … ADD CONSTRAINT … CHECK (…) NOT VALID`, under ACCESS EXCLUSIVE for a moment; and in a transaction of
    /// its own `VALIDATE CONSTRAINT`, which reads the table beside others' reads and writes. Where a CHECK of that name is
    /// there, the expression is first given to an empty temporary table, to see whether they are the same.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run); [`Config`](crate::ErrorKind::Config) when there is a constraint of that name
    /// that differs. A row that does not pass fails the validation: then the constraint stays
    /// as it is, not valid, so that no further such rows come; with the rows mended, the same call validates it.
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again: it goes on with what is left to do.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for AddCheck {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        (recipe.same_check(&table, &self.name, &self.expression)).await?;
        recipe.check(&table, &self.name, &self.expression).await
    }
}

paced!(AddCheck);
awaited!(AddCheck => RecipeReport);

/// A foreign key to be added: [`Schema::add_foreign_key`](crate::Schema::add_foreign_key). Awaiting it adds it.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddForeignKey {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    pub(super) table: TableName,
    pub(super) name: Option<String>,
    pub(super) key: ForeignKey,
}

impl AddForeignKey {
    /// What it is to be called; by default after the table and its columns, `orders_customer_fkey`, as the server would.
    /// The name is what it is recognized by when it is added again.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// What deleting a row referred to does.
    pub fn on_delete(mut self, action: ReferentialAction) -> Self {
        self.key.on_delete = Some(action.as_sql());
        self
    }

    /// What changing the key of a row referred to does.
    pub fn on_update(mut self, action: ReferentialAction) -> Self {
        self.key.on_update = Some(action.as_sql());
        self
    }

    /// Adds it, unless it is there, and validates it, unless it is valid.
    ///
    /// Of a partitioned table, those of its partitions are added and validated first, and the table's own then takes them
    /// over without looking at the rows again.
    ///
    /// # SQL
    /// `ALTER TABLE … ADD CONSTRAINT … FOREIGN KEY … NOT VALID`, under SHARE ROW EXCLUSIVE on both tables for a moment;
    /// and in a transaction of its own `VALIDATE CONSTRAINT`, beside others' reads and writes. The columns had better
    /// have an index, for the sake of deletes of the rows referred to.
    ///
    /// # Errors
    /// As [`AddCheck::run`].
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again: it goes on with what is left to do.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        if self.key.columns.is_empty() {
            return Err(Error::config("a foreign key needs at least one column"));
        }
        for column in self.key.columns.iter().chain(&self.key.referenced_columns) {
            sound("column", column)?;
        }
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for AddForeignKey {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        let referenced = Table::of(&self.cx, &self.key.referenced).await?;
        let key = ForeignKey {
            // By its full name, so that the search_path of the next connection is of no matter.
            referenced: referenced.full_name(),
            ..self.key.clone()
        };
        recipe
            .foreign_key(&table, self.name.as_deref(), &key, referenced.oid)
            .await
    }
}

paced!(AddForeignKey);
awaited!(AddForeignKey => RecipeReport);

/// A column to become NOT NULL: [`Schema::set_not_null`](crate::Schema::set_not_null). Awaiting it makes it so.
#[must_use = "a column is left as it is until it is awaited"]
#[derive(Clone, Debug)]
pub struct SetNotNull {
    pub(super) cx: Context,
    pub(super) pace: Pace,
    pub(super) table: TableName,
    pub(super) column: String,
}

impl SetNotNull {
    /// Makes the column NOT NULL, unless it is.
    ///
    /// # SQL
    /// `ADD CONSTRAINT …_is_not_null CHECK (… IS NOT NULL) NOT VALID`; `VALIDATE CONSTRAINT`, beside others' reads and
    /// writes; `SET NOT NULL`, which that proof spares the scan, and `DROP CONSTRAINT`, together in one transaction.
    ///
    /// # Errors
    /// As [`AddCheck::run`]: a row with a NULL fails the validation, and the CHECK stays, so that no further ones come.
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again: it goes on with what is left to do.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for SetNotNull {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        recipe.not_null(&table, &self.column).await
    }
}

paced!(SetNotNull);
awaited!(SetNotNull => RecipeReport);

/// A primary key to be added: [`Schema::add_primary_key`](crate::Schema::add_primary_key). Awaiting it adds it.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddPrimaryKey {
    cx: Context,
    pace: Pace,
    table: TableName,
    name: Option<String>,
    columns: Vec<String>,
}

impl AddPrimaryKey {
    pub(super) fn new(cx: Context, pace: Pace, table: TableName, columns: Vec<String>) -> Self {
        Self {
            cx,
            pace: pace.or_deadline(DEADLINE),
            table,
            name: None,
            columns,
        }
    }

    /// What the constraint and its index are to be called; by default `orders_pkey`, as the server would.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Adds it, unless the table has a primary key of these columns.
    ///
    /// Of a partitioned table, those of its partitions are added first, then one of the table alone, to which theirs are
    /// attached.
    ///
    /// # SQL
    /// A unique index as by [`create_index`](crate::Schema::create_index); for each column that can be NULL the proof
    /// that it is not, as by [`set_not_null`](crate::Schema::set_not_null); and in one transaction under ACCESS EXCLUSIVE,
    /// for a moment, `SET NOT NULL`, `ADD CONSTRAINT … PRIMARY KEY USING INDEX`, and the proofs are dropped.
    ///
    /// # Errors
    /// As [`CreateIndex::run`](crate::CreateIndex::run) and [`AddCheck::run`].
    ///
    /// # Cancel safety
    /// May be dropped at any point, and called again: it goes on with what is left to do.
    pub async fn run(self) -> Result<RecipeReport, Error> {
        if self.columns.is_empty() {
            return Err(Error::config("a primary key needs at least one column"));
        }
        Recipe::run(&self.cx, &self.pace, &self).await
    }
}

impl Steps for AddPrimaryKey {
    async fn take(&self, recipe: &mut Recipe<'_>) -> Result<(), Error> {
        let table = Table::of(&self.cx, &self.table).await?;
        recipe
            .primary_key(&table, self.name.as_deref(), &self.columns)
            .await
    }
}

paced!(AddPrimaryKey);
awaited!(AddPrimaryKey => RecipeReport);
