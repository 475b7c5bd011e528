//! Steps that find out what is left to do and do that, so that a recipe can be run again after it failed half-way.

use super::index::Build;
use super::index_name::shortened;
use super::pace::Pace;
use super::report::RecipeReport;
use super::run::{Context, How};
use super::table::Table;
use crate::deadline::{Deadline, timeout_millis};
use crate::error::{Error, has_a_primary_key, is_a_constraint_already, is_already_there};
use crate::postgres::name_flaw;
use crate::schema::sql::catalog;
use crate::schema::sql::index::{Definition, Part, attach};
use crate::schema::sql::recipe::{self, Column, Constraint, ForeignKey};

/// How often what is left to do is looked for again because somebody else has done a part of it meanwhile.
const MOST_LOOKS: u32 = 3;

/// What a recipe does, from the first look.
pub(super) trait Steps: Sync {
    /// Finds out what is left to do, and does it.
    fn take(&self, recipe: &mut Recipe<'_>) -> impl Future<Output = Result<(), Error>> + Send;
}

/// A recipe under way.
pub(super) struct Recipe<'a> {
    cx: &'a Context,
    pace: &'a Pace,
    pub(super) deadline: Deadline,
    pub(super) report: RecipeReport,
    /// How often what is left to do has been looked for.
    pub(super) looks: u32,
    /// Whether the step that failed was overtaken by somebody else's.
    pub(super) is_overtaken: bool,
}

impl<'a> Recipe<'a> {
    fn new(cx: &'a Context, pace: &'a Pace) -> Result<Self, Error> {
        pace.check()?;
        Ok(Self {
            cx,
            pace,
            deadline: pace.deadline(),
            report: RecipeReport::default(),
            looks: 0,
            is_overtaken: false,
        })
    }

    /// Takes all steps; from the first look again where a step has found that somebody else is at the same, which may be a
    /// run whose connection was lost while the server went on.
    pub(super) async fn run(
        cx: &'a Context,
        pace: &'a Pace,
        steps: &impl Steps,
    ) -> Result<RecipeReport, Error> {
        let mut recipe = Self::new(cx, pace)?;
        loop {
            recipe.looks += 1;
            let error = match steps.take(&mut recipe).await {
                Ok(()) => return Ok(recipe.report),
                Err(error) => error,
            };
            let pause = pace.pause(recipe.looks, cx.jitter.next());
            let again = std::mem::take(&mut recipe.is_overtaken);
            if !again || recipe.looks >= MOST_LOOKS || recipe.deadline.remaining() <= pause {
                return Err(error);
            }
            tracing::debug!(%error, ?pause, "somebody else is at the same: to be looked at again");
            // Cancel safety: nothing is held between two looks.
            tokio::time::sleep(pause).await;
        }
    }

    /// Runs one statement, or a batch, as a change.
    pub(super) async fn step(&mut self, sql: String) -> Result<(), Error> {
        let pace = self.pace.until(&self.deadline);
        let done = self.cx.run(&pace, &sql, How::Transaction).await?;
        self.report.push(sql, done);
        Ok(())
    }

    /// A step that fails so when somebody else has taken it meanwhile.
    pub(super) async fn step_unless(
        &mut self,
        overtaken: impl Fn(&Error) -> bool + Send,
        sql: String,
    ) -> Result<(), Error> {
        let done = self.step(sql).await;
        self.is_overtaken = done.as_ref().is_err_and(overtaken);
        done
    }

    pub(super) async fn constraints(&self, table: &Table) -> Result<Vec<Constraint>, Error> {
        let reply = self.cx.ask(&recipe::constraints(table.oid)).await?;
        Ok(recipe::found_constraints(&reply))
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
        let reply = self.cx.ask(&recipe::column(table.oid, name, ty)).await?;
        Ok(recipe::found_column(&reply))
    }

    async fn existing_column(&self, table: &Table, name: &str) -> Result<Column, Error> {
        self.column(table, name, None)
            .await?
            .ok_or_else(|| Error::config(format!("{} has no column {name:?}", table.full_name())))
    }

    /// Adds a constraint that is not valid yet by `add`, unless it is there, and validates it, unless it is.
    async fn add_and_validate(
        &mut self,
        table: &Table,
        name: &str,
        kind: char,
        add: String,
    ) -> Result<(), Error> {
        if self.constraint(table, name).await?.is_none() {
            // What another session was faster with need not be the same.
            self.step_unless(is_already_there, add).await?;
        }
        match self.constraint(table, name).await? {
            Some(there) if there.kind != kind => Err(Error::config(format!(
                "{} has a constraint {name:?} already, of another kind; choose another name",
                table.full_name()
            ))),
            Some(there) if !there.is_valid => {
                let validated = self.step(recipe::validate(&table.full_name(), name)).await;
                if validated.is_err() {
                    // A proof is dropped by whoever has it first.
                    let there = self.constraint(table, name).await;
                    self.is_overtaken = there.is_ok_and(|there| there.is_none());
                }
                validated
            }
            _ => Ok(()),
        }
    }

    /// Refuses another CHECK of that name.
    pub(super) async fn same_check(
        &self,
        table: &Table,
        name: &str,
        expression: &str,
    ) -> Result<(), Error> {
        sound("constraint", name)?;
        match self.constraint(table, name).await? {
            Some(there) if there.kind == 'c' => {}
            _ => return Ok(()),
        }
        let timeout = timeout_millis(self.pace.lock_timeout);
        let full = table.full_name();
        let sql = recipe::is_same_check(&full, table.oid, name, expression, timeout);
        if catalog::yes(&self.cx.ask(&sql).await?) {
            return Ok(());
        }
        Err(Error::config(format!(
            "{full} has a CHECK {name:?} already, and it differs from the one wanted; choose another name"
        )))
    }

    pub(super) async fn check(
        &mut self,
        table: &Table,
        name: &str,
        expression: &str,
    ) -> Result<(), Error> {
        sound("constraint", name)?;
        let add = recipe::add_check(&table.full_name(), name, expression);
        self.add_and_validate(table, name, 'c', add).await
    }

    /// A foreign key; of a partitioned table those of its partitions first, which that of the table then takes over
    /// without looking at the rows again.
    pub(super) async fn foreign_key(
        &mut self,
        table: &Table,
        name: Option<&str>,
        key: &ForeignKey,
        referenced: u32,
    ) -> Result<(), Error> {
        let own = default_key_name(table, key);
        let name = name.unwrap_or(&own);
        sound("constraint", name)?;
        let full = table.full_name();
        if table.kind != 'p' {
            self.same_key(table, name, key, referenced).await?;
            let add = recipe::add_foreign_key(&full, name, key, false);
            return self.add_and_validate(table, name, 'f', add).await;
        }
        if self.same_key(table, name, key, referenced).await? {
            return Ok(());
        }
        for partition in table.partitions(self.cx).await? {
            Box::pin(self.foreign_key(&partition, None, key, referenced)).await?;
        }
        let add = recipe::add_foreign_key(&full, name, key, true);
        self.step_unless(is_already_there, add).await
    }

    /// Whether the foreign key is there and valid. Another one of that name is refused.
    async fn same_key(
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

    /// A valid CHECK that the column is not NULL, and its name; `None` where the column is NOT NULL.
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
        self.check(table, &name, &recipe::is_not_null(column))
            .await?;
        Ok(Some(name))
    }

    pub(super) async fn not_null(&mut self, table: &Table, column: &str) -> Result<(), Error> {
        sound("column", column)?;
        let full = table.full_name();
        let unproven = self.existing_column(table, column).await?.unproven;
        if let Some(constraint) = unproven {
            self.step(recipe::validate(&full, &constraint)).await?;
        }
        if let Some(proof) = self.prove_not_null(table, column).await? {
            let set = recipe::set_not_null(&full, column);
            let drop = recipe::drop_constraint(&full, &proof);
            return self.step(recipe::batch(&[set, drop])).await;
        }
        self.drop_proof(table, column).await
    }

    /// Drops the CHECK that an earlier run has left.
    async fn drop_proof(&mut self, table: &Table, column: &str) -> Result<(), Error> {
        let name = proof_name(table, column);
        // One of that name that says anything else is not ours.
        let there = self.constraint(table, &name).await?;
        if there.is_some_and(|there| proves(&there, column)) {
            let sql = recipe::drop_constraint(&table.full_name(), &name);
            self.step(sql).await?;
        }
        Ok(())
    }

    pub(super) async fn primary_key(
        &mut self,
        table: &Table,
        name: Option<&str>,
        key: &[String],
    ) -> Result<(), Error> {
        let own = shortened(&table.name, "pkey");
        let name = name.unwrap_or(&own);
        sound("constraint", name)?;
        for column in key {
            sound("column", column)?;
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
            for partition in table.partitions(self.cx).await? {
                Box::pin(self.primary_key(&partition, None, key)).await?;
            }
            for column in key {
                Box::pin(self.not_null(table, column)).await?;
            }
            let add = recipe::primary_key_only(&full, name, key);
            let overtaken = |error: &Error| has_a_primary_key(error) || is_already_there(error);
            self.step_unless(overtaken, add).await?;
            let all = self.constraints(table).await?;
            return match all.iter().find(|one| one.kind == 'p') {
                Some(there) => self.attach_keys(table, there, key).await,
                None => Ok(()),
            };
        }
        let definition = Definition {
            name: name.to_owned(),
            unique: true,
            parts: key.iter().map(|column| Part::column(column)).collect(),
            ..Definition::default()
        };
        // Before the proofs, because it may take the longest and fail for the data.
        let mut batch = Vec::new();
        let build = Build {
            cx: self.cx,
            pace: self.pace,
            deadline: &self.deadline,
            progress: None,
            waits: true,
        };
        build.on(table, &definition, &mut self.report).await?;
        let mut proofs = Vec::new();
        for column in key {
            if let Some(proof) = self.prove_not_null(table, column).await? {
                batch.push(recipe::set_not_null(&full, column));
                proofs.push(recipe::drop_constraint(&full, &proof));
            }
        }
        batch.push(recipe::primary_key_using(&full, name));
        batch.extend(proofs);
        self.step_unless(is_a_constraint_already, recipe::batch(&batch))
            .await
    }

    /// Attaches the primary keys of partitions to that of the partitioned table.
    async fn attach_keys(
        &mut self,
        table: &Table,
        parent: &Constraint,
        key: &[String],
    ) -> Result<(), Error> {
        for partition in table.partitions(self.cx).await? {
            // One that has come since, or was not reached.
            Box::pin(self.primary_key(&partition, None, key)).await?;
            let all = self.constraints(&partition).await?;
            let Some(own) = all.into_iter().find(|one| one.kind == 'p') else {
                continue;
            };
            let build = Build {
                cx: self.cx,
                pace: self.pace,
                deadline: &self.deadline,
                progress: None,
                waits: true,
            };
            let index = build.find(&partition, &own.name).await?;
            if index.is_some_and(|index| index.attached_to.is_none()) {
                let (parent, own) = (table.sibling(&parent.name), partition.sibling(&own.name));
                self.step(attach(&parent, &own)).await?;
            }
        }
        Ok(())
    }
}

/// Refuses a name that no server can have.
pub(super) fn sound(what: &str, name: &str) -> Result<(), Error> {
    name_flaw(what, name).map_or(Ok(()), |flaw| Err(Error::config(flaw)))
}

/// The name that the server would choose.
fn default_key_name(table: &Table, key: &ForeignKey) -> String {
    shortened(&format!("{}_{}", table.name, key.columns.join("_")), "fkey")
}

/// Whether it is what proves that the column is not NULL, and no more.
fn proves(constraint: &Constraint, column: &str) -> bool {
    constraint.is_proof && constraint.columns == [column]
}

fn proof_name(table: &Table, column: &str) -> String {
    shortened(&format!("{}_{column}", table.name), "is_not_null")
}
