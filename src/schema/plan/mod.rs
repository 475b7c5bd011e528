//! Predicts which relations a batch would lock, in which modes, and for which work, from its statements and the
//! catalogs. A batch is one transaction: each statement runs under the locks that the statements before it took.

mod graph;
mod rules;
mod types;

use std::collections::HashMap;

use super::Env;
use super::ddl::{self, Action, CatalogCheck, Dropped, Effect, Target};
use crate::error::{Error, ErrorKind};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, CatalogRelation};
use crate::schema::sql::facts;
use crate::schema::statements::{LockedRelation, TableWork};

/// One lock that would be taken.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PlannedLock {
    pub(super) relation: CatalogRelation,
    pub(super) statement: &'static str,
    pub(super) on: LockedRelation,
    pub(super) mode: LockMode,
    pub(super) work: TableWork,
    /// The position of the statement in the batch.
    pub(super) at: usize,
    /// The mode in which the transaction holds the relation while the work is done: this or a stronger one, which a part
    /// of the same statement or a statement before it took.
    pub(super) under: LockMode,
}

impl PlannedLock {
    /// A lock that is not one of a batch.
    pub(super) fn alone(relation: CatalogRelation, mode: LockMode) -> Self {
        Self {
            relation,
            statement: "",
            on: LockedRelation::Table,
            mode,
            work: TableWork::Brief,
            at: 0,
            under: mode,
        }
    }
}

/// What of a statement was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NotUnderstood {
    pub(super) statement: String,
    pub(super) part: String,
}

/// The prediction for a batch.
#[derive(Clone, Debug, Default)]
pub(super) struct LockPlan {
    /// In the order of the batch's text.
    pub(super) locks: Vec<PlannedLock>,
    /// The statements whose locks are unknown, or known in part.
    pub(super) unrecognized: Vec<NotUnderstood>,
}

impl LockPlan {
    /// Makes the prediction. It takes no locks.
    ///
    /// Cancel safety: only reads the catalogs.
    pub(super) async fn of(env: &Env, statements: &[ddl::Statement<'_>]) -> Result<Self, Error> {
        let mut plan = Self::default();
        let mut names = Vec::new();
        let mut asks = false;
        for (_, action) in actions_of(statements) {
            asks |= action.target != Target::None
                || !action.others.is_empty()
                || action.check != CatalogCheck::Nothing;
            names_of(action, &mut names);
        }
        names.sort_unstable();
        names.dedup();
        if asks {
            let major = catalog::read_major_version(&env.ask(catalog::VERSION).await?).ok_or_else(
                || {
                    Error::new(ErrorKind::Database)
                        .with_detail("the server does not say its version")
                },
            )?;
            let graph = graph::Graph::load(env, &names).await?;
            let mut rules = rules::Rules::new(env, major, graph);
            for (at, action) in actions_of(statements) {
                if let Some(part) = rules.add(at, action).await? {
                    plan.not_understood(statements[at].text, part);
                }
            }
            plan.locks = rules.locks;
            plan.event_triggers(env, statements).await?;
        }
        let mut path_changed = false;
        for statement in statements {
            if let Some(part) = &statement.unknown {
                plan.not_understood(statement.text, part.clone());
            }
            let words: Vec<String> = (statement.text.split_whitespace().take(3))
                .map(str::to_lowercase)
                .collect();
            if path_changed && !statement.actions.as_ref().is_some_and(Vec::is_empty) {
                let part = "names after a change of search_path or role".to_owned();
                plan.not_understood(statement.text, part);
            }
            path_changed |= words.first().is_some_and(|word| word == "set")
                && words.iter().any(|word| {
                    word.starts_with("search_path") || word.starts_with("role") || word == "session"
                });
        }
        plan.locks_held();
        Ok(plan)
    }

    /// The functions of event triggers can do anything during a definition.
    async fn event_triggers(
        &mut self,
        env: &Env,
        statements: &[ddl::Statement<'_>],
    ) -> Result<(), Error> {
        fn fires(action: &Action) -> bool {
            ![
                "SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "LOCK", "VACUUM",
                "ANALYZE", "CLUSTER",
            ]
            .iter()
            .any(|word| action.name.starts_with(word))
        }
        let mut fired = Vec::new();
        for one in statements {
            if one.actions.iter().flatten().any(fires) {
                fired.push(one.text);
            }
        }
        if fired.is_empty() {
            return Ok(());
        }
        let names = facts::read_names(&env.ask(facts::EVENT_TRIGGERS).await?);
        if let Some(name) = names.first() {
            for statement in fired {
                self.not_understood(
                    statement,
                    format!("the function of the event trigger {name:?}"),
                );
            }
        }
        Ok(())
    }

    fn not_understood(&mut self, statement: &str, part: String) {
        if !self
            .unrecognized
            .iter()
            .any(|one| one.statement == statement)
        {
            self.unrecognized.push(NotUnderstood {
                statement: statement.to_owned(),
                part,
            });
        }
    }

    /// Fills in under which mode the work of each lock is done. The locks are in the order of the statements.
    fn locks_held(&mut self) {
        let mut held: HashMap<u32, LockMode> = HashMap::new();
        for of_statement in self.locks.chunk_by_mut(|one, next| one.at == next.at) {
            for lock in of_statement.iter() {
                let strongest = held.entry(lock.relation.oid).or_insert(lock.mode);
                *strongest = (*strongest).max(lock.mode);
            }
            for lock in of_statement {
                lock.under = held.get(&lock.relation.oid).copied().unwrap_or(lock.mode);
            }
        }
    }

    /// Each relation once, with its strongest mode and the most work.
    pub(super) fn merged(&self) -> Vec<PlannedLock> {
        let mut merged: Vec<PlannedLock> = Vec::new();
        let mut positions = HashMap::new();
        for lock in &self.locks {
            match positions.get(&lock.relation.oid) {
                None => {
                    positions.insert(lock.relation.oid, merged.len());
                    merged.push(lock.clone());
                }
                Some(at) => {
                    let one: &mut PlannedLock = &mut merged[*at];
                    // What is worse decides what the lock is said to be for.
                    let is_worse = (lock.work, lock.mode) > (one.work, one.mode);
                    let (mode, under) = (one.mode.max(lock.mode), one.under.max(lock.under));
                    if is_worse {
                        *one = lock.clone();
                    }
                    one.mode = mode;
                    one.under = under;
                }
            }
        }
        merged
    }
}

fn actions_of<'a>(
    statements: &'a [ddl::Statement<'_>],
) -> impl Iterator<Item = (usize, &'a Action)> {
    (statements.iter().enumerate())
        .flat_map(|(at, one)| one.actions.iter().flatten().map(move |action| (at, action)))
}

/// The names of relations in an action.
fn names_of(action: &Action, names: &mut Vec<TableName>) {
    match &action.target {
        Target::Relation(name)
        | Target::Dropped(
            Dropped::Relation(name)
            | Dropped::Column(name, _)
            | Dropped::Constraint(name, _)
            | Dropped::OfTable(_, name, _),
        ) => names.push(name.clone()),
        _ => {}
    }
    names.extend(action.others.iter().map(|(_, name)| name.clone()));
    if let Effect::Create(name, _) = &action.effect {
        names.push(name.clone());
    }
}

impl CatalogRelation {
    /// The relation's name for messages, in which control characters are escaped.
    pub(super) fn label(&self) -> String {
        printable(&TableName::in_schema(&self.schema, &self.name).to_string())
    }
}

/// A text in which a terminal obeys nothing.
pub(super) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            printable.extend(c.escape_unicode());
        } else {
            printable.push(c);
        }
    }
    printable
}
