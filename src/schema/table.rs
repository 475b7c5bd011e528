//! A table that was found in the catalogs.

use super::Env;
use crate::blocker::Blocker;
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, CatalogRelation, Relationship};

/// An existing table, with its oid and its full name.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    /// `pg_class.relkind`.
    pub(super) kind: char,
}

impl Table {
    /// Finds a table. Without it, the result is an error of kind `Config`.
    pub(super) async fn of(env: &Env, name: &TableName) -> Result<Self, Error> {
        match Self::find(env, name).await? {
            Some(table) => Ok(table),
            None => Err(Error::config(format!(
                "there is no table {name}{}",
                if name.schema().is_none() {
                    " on the search_path"
                } else {
                    ""
                }
            ))),
        }
    }

    pub(super) async fn find(env: &Env, name: &TableName) -> Result<Option<Self>, Error> {
        Ok(Self::related(env, name).await?.into_iter().find_map(|one| {
            let is_table = matches!(one.kind, 'r' | 'p' | 'm' | 'f');
            (one.relationship == Relationship::Itself && is_table).then(|| one.into())
        }))
    }

    /// The name of an index, and its table.
    pub(super) async fn of_index(
        env: &Env,
        name: &TableName,
    ) -> Result<Option<(String, Self)>, Error> {
        let related = Self::related(env, name).await?;
        let index = related
            .iter()
            .find(|one| one.relationship == Relationship::Itself && matches!(one.kind, 'i' | 'I'));
        let table = related
            .iter()
            .find(|one| one.relationship == Relationship::TableOfIndex);
        Ok(match (index, table) {
            (Some(index), Some(table)) => Some((index.name.clone(), table.clone().into())),
            _ => None,
        })
    }

    async fn related(env: &Env, name: &TableName) -> Result<Vec<CatalogRelation>, Error> {
        if let Some(flaw) = name.flaw() {
            return Err(Error::config(flaw));
        }
        env.relations(&catalog::related_relations(name)).await
    }

    /// The direct partitions.
    pub(super) async fn partitions(&self, env: &Env) -> Result<Vec<Self>, Error> {
        let sql = catalog::partitions(self.oid);
        let all = env.relations(&sql).await?;
        Ok(all.into_iter().map(Self::from).collect())
    }

    /// The other sessions that hold or request a lock on the table.
    pub(super) async fn holders_and_waiters(&self, env: &Env) -> Result<Vec<Blocker>, Error> {
        let reply = env.ask(&catalog::holders_and_waiters(&[self.oid])).await?;
        let all =
            catalog::read_holders_and_waiters(&reply, |_| format!("{}.{}", self.schema, self.name));
        Ok(all.into_iter().map(|(_, blocker)| blocker).collect())
    }

    pub(super) fn full_name(&self) -> TableName {
        TableName::in_schema(&self.schema, &self.name)
    }

    /// A relation of that name in the same schema.
    pub(super) fn sibling(&self, name: &str) -> TableName {
        TableName::in_schema(&self.schema, name)
    }
}

impl From<CatalogRelation> for Table {
    fn from(relation: CatalogRelation) -> Self {
        Self {
            oid: relation.oid,
            schema: relation.schema,
            name: relation.name,
            kind: relation.kind,
        }
    }
}
