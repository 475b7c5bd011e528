//! Procedures of several steps. They determine what is left to do, so that they can be repeated after a failure.

use super::Env;
use super::index::IndexBuild;
use super::index_name::shortened;
use super::options::ChangeOptions;
use super::report::ProcedureReport;
use super::run::Method;
use super::table::Table;
use crate::backoff::Retry;
use crate::deadline::{Deadline, timeout_millis};
use crate::error::{Error, has_a_primary_key, is_a_constraint_already, is_already_there};
use crate::postgres::name_flaw;
use crate::schema::sql::index::{IndexDefinition, Part, attach};
use crate::schema::sql::procedure::{self, Column, Constraint, ForeignKey};

/// How often the steps are started at most. They start over if another session has done a part of them meanwhile.
const MAX_ROUNDS: u32 = 3;

/// The steps of a procedure.
pub(super) trait Steps: Sync {
    /// Determines what is left to do, and does it.
    fn run(&self, procedure: &mut Procedure<'_>) -> impl Future<Output = Result<(), Error>> + Send;
}

/// A procedure that is running.
pub(super) struct Procedure<'a> {
    env: &'a Env,
    options: &'a ChangeOptions,
    pub(super) deadline: Deadline,
    pub(super) report: ProcedureReport,
    /// How often the steps have been started, and whether they may be again.
    pub(super) retry: Retry,
    /// Whether the step failed because another session has done it meanwhile.
    pub(super) is_overtaken: bool,
}

impl<'a> Procedure<'a> {
    fn new(env: &'a Env, options: &'a ChangeOptions) -> Result<Self, Error> {
        options.check()?;
        let deadline = options.deadline();
        Ok(Self {
            env,
            options,
            deadline,
            report: ProcedureReport::default(),
            retry: options.retry(deadline, MAX_ROUNDS),
            is_overtaken: false,
        })
    }

    /// Runs all steps. Starts over if a step has found that another session does the same, which may be an earlier run
    /// whose connection was lost while the server continued.
    pub(super) async fn run(
        env: &'a Env,
        options: &'a ChangeOptions,
        steps: &impl Steps,
    ) -> Result<ProcedureReport, Error> {
        let mut procedure = Self::new(env, options)?;
        loop {
            procedure.retry.begin();
            let error = match steps.run(&mut procedure).await {
                Ok(()) => return Ok(procedure.report),
                Err(error) => error,
            };
            let is_overtaken = std::mem::take(&mut procedure.is_overtaken);
            let pause = env.pause_before_retry(&procedure.retry);
            let Some(pause) = pause.filter(|_| is_overtaken) else {
                return Err(error);
            };
            tracing::debug!(%error, ?pause, "somebody else is at the same: to be looked at again");
            // Cancel safety: no connection is held between two rounds.
            tokio::time::sleep(pause).await;
        }
    }

    /// Runs one statement or a batch as a change.
    pub(super) async fn step(&mut self, sql: String) -> Result<(), Error> {
        let options = self.options.until(&self.deadline);
        let done = self.env.run(&options, &sql, Method::InTransaction).await?;
        self.report.push(sql, done);
        Ok(())
    }

    /// Runs one statement or a batch that may take long and blocks no other session meanwhile.
    pub(super) async fn unhurried_step(&mut self, sql: String) -> Result<(), Error> {
        let options = self.options.until(&self.deadline).unhurried();
        let done = self.env.run(&options, &sql, Method::InTransaction).await?;
        self.report.push(sql, done);
        Ok(())
    }

    /// Runs a step that fails with an `overtaken` error if another session has done it meanwhile.
    pub(super) async fn step_unless_overtaken(
        &mut self,
        overtaken: impl Fn(&Error) -> bool + Send,
        sql: String,
    ) -> Result<(), Error> {
        let done = self.step(sql).await;
        self.is_overtaken = done.as_ref().is_err_and(overtaken);
        done
    }

    pub(super) async fn constraints(&self, table: &Table) -> Result<Vec<Constraint>, Error> {
        let reply = self.env.ask(&procedure::constraints(table.oid)).await?;
        Ok(procedure::read_constraints(&reply))
    }

    async fn constraint(&self, table: &Table, name: &str) -> Result<Option<Constraint>, Error> {
        let mut all = self.constraints(table).await?.into_iter();
        Ok(all.find(|one| one.name == name))
    }

    pub(super) async fn column(
        &self,
        table: &Table,
        name: &str,
        ty: Option<&str>,
    ) -> Result<Option<Column>, Error> {
        let reply = self
            .env
            .ask(&procedure::column(table.oid, name, ty))
            .await?;
        Ok(procedure::read_column(&reply))
    }

    async fn existing_column(&self, table: &Table, name: &str) -> Result<Column, Error> {
        self.column(table, name, None)
            .await?
            .ok_or_else(|| Error::config(format!("{} has no column {name:?}", table.full_name())))
    }

    /// Adds a NOT VALID constraint with the statement `add`, unless it exists, and validates it, unless it is valid.
    async fn add_and_validate(
        &mut self,
        table: &Table,
        name: &str,
        kind: char,
        add: String,
    ) -> Result<(), Error> {
        if self.constraint(table, name).await?.is_none() {
            // The constraint that another session has added meanwhile may be a different one.
            self.step_unless_overtaken(is_already_there, add).await?;
        }
        match self.constraint(table, name).await? {
            Some(there) if there.kind != kind => Err(Error::config(format!(
                "{} has a constraint {name:?} already, of another kind; choose another name",
                table.full_name()
            ))),
            Some(there) if !there.is_valid => {
                let validated = self
                    .unhurried_step(procedure::validate(&table.full_name(), name))
                    .await;
                if validated.is_err() {
                    // Another session that sets the column NOT NULL drops the CHECK when it is done.
                    let there = self.constraint(table, name).await;
                    self.is_overtaken = there.is_ok_and(|there| there.is_none());
                }
                validated
            }
            _ => Ok(()),
        }
    }

    /// Refuses a different CHECK of that name.
    pub(super) async fn ensure_same_check(
        &self,
        table: &Table,
        name: &str,
        expression: &str,
    ) -> Result<(), Error> {
        check_name("constraint", name)?;
        match self.constraint(table, name).await? {
            Some(there) if there.kind == 'c' => {}
            _ => return Ok(()),
        }
        let timeout = timeout_millis(self.options.lock_timeout);
        let full = table.full_name();
        let sql = procedure::is_same_check(&full, table.oid, name, expression, timeout);
        if self.env.is_yes(&sql).await? {
            return Ok(());
        }
        Err(Error::config(format!(
            "{full} has a CHECK {name:?} already, and it differs from the one wanted; choose another name"
        )))
    }

    pub(super) async fn add_check(
        &mut self,
        table: &Table,
        name: &str,
        expression: &str,
    ) -> Result<(), Error> {
        check_name("constraint", name)?;
        let add = procedure::add_check(&table.full_name(), name, expression);
        self.add_and_validate(table, name, 'c', add).await
    }

    /// Adds a foreign key. For a partitioned table, those of its partitions come first; the table's own foreign key
    /// then adopts them without reading the rows again.
    pub(super) async fn add_foreign_key(
        &mut self,
        table: &Table,
        name: Option<&str>,
        key: &ForeignKey,
        referenced: u32,
    ) -> Result<(), Error> {
        let own = default_key_name(table, key);
        let name = name.unwrap_or(&own);
        check_name("constraint", name)?;
        let full = table.full_name();
        if table.kind != 'p' {
            self.has_valid_foreign_key(table, name, key, referenced)
                .await?;
            let add = procedure::add_foreign_key(&full, name, key, false);
            return self.add_and_validate(table, name, 'f', add).await;
        }
        if self
            .has_valid_foreign_key(table, name, key, referenced)
            .await?
        {
            return Ok(());
        }
        for partition in table.partitions(self.env).await? {
            Box::pin(self.add_foreign_key(&partition, None, key, referenced)).await?;
        }
        let add = procedure::add_foreign_key(&full, name, key, true);
        self.step_unless_overtaken(is_already_there, add).await
    }

    /// Whether the foreign key exists and is valid. Refuses a different foreign key of that name.
    async fn has_valid_foreign_key(
        &self,
        table: &Table,
        name: &str,
        key: &ForeignKey,
        referenced: u32,
    ) -> Result<bool, Error> {
        match self.constraint(table, name).await? {
            Some(there) if there.kind == 'f' => {
                let by_name = !key.referenced_columns.is_empty();
                if there.columns != key.columns
                    || there.referenced != Some(referenced)
                    || (by_name && there.referenced_columns != key.referenced_columns)
                    || there.actions != key.actions()
                {
                    return Err(Error::config(format!(
                        "{} has a foreign key {name:?} already, and it differs from the one wanted; choose another name",
                        table.full_name()
                    )));
                }
                Ok(there.is_valid)
            }
            _ => Ok(false),
        }
    }

    /// Adds a valid CHECK that the column is not NULL, and returns its name; `None` if the column is already NOT NULL.
    async fn prove_not_null(
        &mut self,
        table: &Table,
        column: &str,
    ) -> Result<Option<String>, Error> {
        let name = proof_name(table, column);
        if self.existing_column(table, column).await?.not_null {
            return Ok(None);
        }
        if let Some(there) = self.constraint(table, &name).await?
            && !proves(&there, column)
        {
            return Err(Error::config(format!(
                "{} has a constraint {name:?} already, which is not CHECK ({column:?} IS NOT NULL); rename it",
                table.full_name()
            )));
        }
        self.add_check(table, &name, &procedure::is_not_null(column))
            .await?;
        Ok(Some(name))
    }

    pub(super) async fn set_not_null(&mut self, table: &Table, column: &str) -> Result<(), Error> {
        check_name("column", column)?;
        let full = table.full_name();
        let unproven = self.existing_column(table, column).await?.unproven;
        if let Some(constraint) = unproven {
            self.unhurried_step(procedure::validate(&full, &constraint))
                .await?;
        }
        if let Some(proof) = self.prove_not_null(table, column).await? {
            let set = procedure::set_not_null(&full, column);
            let drop = procedure::drop_constraint(&full, &proof);
            return self.step(procedure::batch(&[set, drop])).await;
        }
        self.drop_proof(table, column).await
    }

    /// Drops the CHECK that an earlier run has left behind.
    async fn drop_proof(&mut self, table: &Table, column: &str) -> Result<(), Error> {
        let name = proof_name(table, column);
        // A different CHECK of that name is not a procedure's.
        let there = self.constraint(table, &name).await?;
        if there.is_some_and(|there| proves(&there, column)) {
            let sql = procedure::drop_constraint(&table.full_name(), &name);
            self.step(sql).await?;
        }
        Ok(())
    }

    pub(super) async fn add_primary_key(
        &mut self,
        table: &Table,
        name: Option<&str>,
        key: &[String],
    ) -> Result<(), Error> {
        let own = shortened(&table.name, "pkey");
        let name = name.unwrap_or(&own);
        check_name("constraint", name)?;
        for column in key {
            check_name("column", column)?;
        }
        let full = table.full_name();
        let all = self.constraints(table).await?;
        if let Some(there) = all.iter().find(|one| one.kind == 'p') {
            if there.columns != key {
                return Err(Error::config(format!(
                    "{full} has a primary key already, of {}",
                    there.columns.join(", ")
                )));
            }
            if table.kind == 'p' {
                return self.attach_keys(table, there, key).await;
            }
            for column in key {
                self.drop_proof(table, column).await?;
            }
            return Ok(());
        }
        if table.kind == 'p' {
            for partition in table.partitions(self.env).await? {
                Box::pin(self.add_primary_key(&partition, None, key)).await?;
            }
            for column in key {
                Box::pin(self.set_not_null(table, column)).await?;
            }
            let add = procedure::primary_key_only(&full, name, key);
            let overtaken = |error: &Error| has_a_primary_key(error) || is_already_there(error);
            self.step_unless_overtaken(overtaken, add).await?;
            let all = self.constraints(table).await?;
            return match all.iter().find(|one| one.kind == 'p') {
                Some(there) => self.attach_keys(table, there, key).await,
                None => Ok(()),
            };
        }
        let definition = IndexDefinition {
            name: name.to_owned(),
            unique: true,
            parts: key.iter().map(|column| Part::column(column)).collect(),
            ..IndexDefinition::default()
        };
        // The index comes before the proofs, because its build takes longest and can fail because of the data.
        let build = IndexBuild::new(self.env, self.options, &self.deadline);
        build.run(table, &definition, &mut self.report).await?;
        let mut batch = Vec::new();
        let mut proofs = Vec::new();
        for column in key {
            if let Some(proof) = self.prove_not_null(table, column).await? {
                batch.push(procedure::set_not_null(&full, column));
                proofs.push(procedure::drop_constraint(&full, &proof));
            }
        }
        batch.push(procedure::primary_key_using(&full, name));
        batch.extend(proofs);
        self.step_unless_overtaken(is_a_constraint_already, procedure::batch(&batch))
            .await
    }

    /// Attaches the primary keys of partitions to that of the partitioned table.
    async fn attach_keys(
        &mut self,
        table: &Table,
        parent: &Constraint,
        key: &[String],
    ) -> Result<(), Error> {
        for partition in table.partitions(self.env).await? {
            // The partition may be new, or an earlier run has not reached it.
            Box::pin(self.add_primary_key(&partition, None, key)).await?;
            let all = self.constraints(&partition).await?;
            let Some(own) = all.into_iter().find(|one| one.kind == 'p') else {
                continue;
            };
            let build = IndexBuild::new(self.env, self.options, &self.deadline);
            let index = build.find(&partition, &own.name).await?;
            if index.is_some_and(|index| index.attached_to.is_none()) {
                let (parent, own) = (table.sibling(&parent.name), partition.sibling(&own.name));
                self.step(attach(&parent, &own)).await?;
            }
        }
        Ok(())
    }
}

/// Refuses a name that PostgreSQL does not accept.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), Error> {
    name_flaw(what, name).map_or(Ok(()), |flaw| Err(Error::config(flaw)))
}

/// The name that the server would choose.
fn default_key_name(table: &Table, key: &ForeignKey) -> String {
    shortened(&format!("{}_{}", table.name, key.columns.join("_")), "fkey")
}

/// Whether the constraint is a CHECK that this column is not NULL, and nothing else.
fn proves(constraint: &Constraint, column: &str) -> bool {
    constraint.is_proof && constraint.columns == [column]
}

fn proof_name(table: &Table, column: &str) -> String {
    shortened(&format!("{}_{column}", table.name), "is_not_null")
}
