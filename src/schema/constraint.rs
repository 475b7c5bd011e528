//! Adding constraints without a scan under a blocking lock.

use super::Env;
use super::options::{ChangeOptions, change_options, into_future};
use super::procedure::{Procedure, Steps, check_name};
use super::report::ProcedureReport;
use super::table::Table;
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::procedure::ForeignKey;
use std::time::Duration;

/// The default deadline of a primary key, the same as that of an index.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What happens to referencing rows when the referenced row is deleted or its key changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReferentialAction {
    /// An error at the end of the statement or, if the constraint is deferred, of the transaction.
    NoAction,
    /// An error at once.
    Restrict,
    /// The referencing rows are deleted or changed, too.
    Cascade,
    /// The referencing columns become NULL.
    SetNull,
    /// The referencing columns get their defaults.
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

/// A CHECK constraint to add: [`Schema::add_check`](crate::Schema::add_check). Awaiting it adds the constraint.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddCheck {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    pub(super) table: TableName,
    pub(super) name: String,
    pub(super) expression: String,
}

impl AddCheck {
    /// Adds the constraint, unless it exists, and validates it, unless it is valid.
    ///
    /// # SQL
    /// `ALTER TABLE … ADD CONSTRAINT … CHECK (…) NOT VALID`, briefly under ACCESS EXCLUSIVE; then, in a separate
    /// transaction, `VALIDATE CONSTRAINT`, which reads the table while other sessions read and write it. If a CHECK of
    /// that name exists, the expression is first added to an empty temporary table, to compare the two.
    ///
    /// # Errors
    /// As [`Change::run`](crate::Change::run); [`Config`](crate::ErrorKind::Config) if a different constraint of that
    /// name exists. A row that violates the constraint fails the validation. The constraint then stays NOT VALID, which
    /// prevents further violations; once the rows are corrected, the same call validates it.
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again: it continues with what is left to do.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for AddCheck {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        (procedure.ensure_same_check(&table, &self.name, &self.expression)).await?;
        procedure
            .add_check(&table, &self.name, &self.expression)
            .await
    }
}

change_options!(AddCheck);
into_future!(AddCheck => ProcedureReport);

/// A foreign key to add: [`Schema::add_foreign_key`](crate::Schema::add_foreign_key). Awaiting it adds the foreign key.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddForeignKey {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    pub(super) table: TableName,
    pub(super) name: Option<String>,
    pub(super) key: ForeignKey,
}

impl AddForeignKey {
    /// The constraint's name. The default is the name the server would choose, such as `orders_customer_fkey`. A
    /// repeated call recognizes the constraint by its name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The action when a referenced row is deleted.
    pub fn on_delete(mut self, action: ReferentialAction) -> Self {
        self.key.on_delete = Some(action.as_sql());
        self
    }

    /// The action when the key of a referenced row changes.
    pub fn on_update(mut self, action: ReferentialAction) -> Self {
        self.key.on_update = Some(action.as_sql());
        self
    }

    /// Adds the foreign key, unless it exists, and validates it, unless it is valid.
    ///
    /// For a partitioned table, the foreign keys of its partitions are added and validated first; the table's own
    /// foreign key then adopts them without reading the rows again.
    ///
    /// # SQL
    /// `ALTER TABLE … ADD CONSTRAINT … FOREIGN KEY … NOT VALID`, briefly under SHARE ROW EXCLUSIVE on both tables;
    /// then, in a separate transaction, `VALIDATE CONSTRAINT`, while other sessions read and write. The columns should
    /// have an index, because deletes of referenced rows search them.
    ///
    /// # Errors
    /// As [`AddCheck::run`].
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again: it continues with what is left to do.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        if self.key.columns.is_empty() {
            return Err(Error::config("a foreign key needs at least one column"));
        }
        for column in self.key.columns.iter().chain(&self.key.referenced_columns) {
            check_name("column", column)?;
        }
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for AddForeignKey {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        let referenced = Table::of(&self.env, &self.key.referenced).await?;
        let key = ForeignKey {
            // The full name, because the next connection can have another search_path.
            referenced: referenced.full_name(),
            ..self.key.clone()
        };
        procedure
            .add_foreign_key(&table, self.name.as_deref(), &key, referenced.oid)
            .await
    }
}

change_options!(AddForeignKey);
into_future!(AddForeignKey => ProcedureReport);

/// A column to make NOT NULL: [`Schema::set_not_null`](crate::Schema::set_not_null). Awaiting it changes the column.
#[must_use = "a column is left as it is until it is awaited"]
#[derive(Clone, Debug)]
pub struct SetNotNull {
    pub(super) env: Env,
    pub(super) options: ChangeOptions,
    pub(super) table: TableName,
    pub(super) column: String,
}

impl SetNotNull {
    /// Makes the column NOT NULL, unless it is.
    ///
    /// # SQL
    /// `ADD CONSTRAINT …_is_not_null CHECK (… IS NOT NULL) NOT VALID`; `VALIDATE CONSTRAINT`, while other sessions read
    /// and write; then in one transaction `SET NOT NULL`, which needs no scan because of the valid CHECK, and `DROP
    /// CONSTRAINT`.
    ///
    /// # Errors
    /// As [`AddCheck::run`]: a row with a NULL fails the validation, and the CHECK stays, which prevents further NULLs.
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again: it continues with what is left to do.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for SetNotNull {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        procedure.set_not_null(&table, &self.column).await
    }
}

change_options!(SetNotNull);
into_future!(SetNotNull => ProcedureReport);

/// A primary key to add: [`Schema::add_primary_key`](crate::Schema::add_primary_key). Awaiting it adds the primary key.
#[must_use = "a constraint is not added until it is awaited"]
#[derive(Clone, Debug)]
pub struct AddPrimaryKey {
    env: Env,
    options: ChangeOptions,
    table: TableName,
    name: Option<String>,
    columns: Vec<String>,
}

impl AddPrimaryKey {
    pub(super) fn new(
        env: Env,
        options: ChangeOptions,
        table: TableName,
        columns: Vec<String>,
    ) -> Self {
        Self {
            env,
            options: options.or_deadline(DEADLINE),
            table,
            name: None,
            columns,
        }
    }

    /// The name of the constraint and its index. The default is the name the server would choose, such as
    /// `orders_pkey`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Adds the primary key, unless the table has one on these columns.
    ///
    /// For a partitioned table, the primary keys of its partitions are added first, then one on the table alone, to
    /// which they are attached.
    ///
    /// # SQL
    /// A unique index, as by [`create_index`](crate::Schema::create_index); for each nullable column a valid CHECK that
    /// it is not NULL, as by [`set_not_null`](crate::Schema::set_not_null); then in one transaction, briefly under
    /// ACCESS EXCLUSIVE, `SET NOT NULL`, `ADD CONSTRAINT … PRIMARY KEY USING INDEX`, and `DROP CONSTRAINT` of the
    /// CHECKs.
    ///
    /// # Errors
    /// As [`CreateIndex::run`](crate::CreateIndex::run) and [`AddCheck::run`].
    ///
    /// # Cancel safety
    /// Can be dropped at any point, and called again: it continues with what is left to do.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ProcedureReport, Error> {
        if self.columns.is_empty() {
            return Err(Error::config("a primary key needs at least one column"));
        }
        Procedure::run(&self.env, &self.options, &self).await
    }
}

impl Steps for AddPrimaryKey {
    async fn run(&self, procedure: &mut Procedure<'_>) -> Result<(), Error> {
        let table = Table::of(&self.env, &self.table).await?;
        procedure
            .add_primary_key(&table, self.name.as_deref(), &self.columns)
            .await
    }
}

change_options!(AddPrimaryKey);
into_future!(AddPrimaryKey => ProcedureReport);
