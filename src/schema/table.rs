//! A table as it was found.

use super::run::Context;
use crate::blocker::Blocker;
use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, Kin, Relation};

/// A table that is there, by its oid and its full name.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    /// `pg_class.relkind`.
    pub(super) kind: char,
}

impl Table {
    /// Finds it. A table that is not there is an error of the caller's.
    pub(super) async fn of(cx: &Context, name: &TableName) -> Result<Self, Error> {
        match Self::find(cx, name).await? {
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

    pub(super) async fn find(cx: &Context, name: &TableName) -> Result<Option<Self>, Error> {
        Ok(Self::family(cx, name).await?.into_iter().find_map(|one| {
            let is_table = matches!(one.kind, 'r' | 'p' | 'm' | 'f');
            (one.kin == Kin::Itself && is_table).then(|| one.into())
        }))
    }

    /// An index's name and its table.
    pub(super) async fn of_index(
        cx: &Context,
        name: &TableName,
    ) -> Result<Option<(String, Self)>, Error> {
        let family = Self::family(cx, name).await?;
        let index = family
            .iter()
            .find(|one| one.kin == Kin::Itself && matches!(one.kind, 'i' | 'I'));
        let table = family.iter().find(|one| one.kin == Kin::TableOfIndex);
        Ok(match (index, table) {
            (Some(index), Some(table)) => Some((index.name.clone(), table.clone().into())),
            _ => None,
        })
    }

    async fn family(cx: &Context, name: &TableName) -> Result<Vec<Relation>, Error> {
        if let Some(flaw) = name.flaw() {
            return Err(Error::config(flaw));
        }
        Ok(catalog::relations(&cx.ask(&catalog::family(name)).await?))
    }

    /// The partitions directly below.
    pub(super) async fn partitions(&self, cx: &Context) -> Result<Vec<Self>, Error> {
        let sql = catalog::partitions(self.oid);
        let all = catalog::relations(&cx.ask(&sql).await?);
        Ok(all.into_iter().map(Self::from).collect())
    }

    /// Everybody who has, or wants, a lock on it.
    pub(super) async fn holders(&self, cx: &Context) -> Result<Vec<Blocker>, Error> {
        let reply = cx.ask(&catalog::holders(&[self.oid])).await?;
        let who = catalog::who(&reply, |_| format!("{}.{}", self.schema, self.name));
        Ok(who.into_iter().map(|(_, blocker)| blocker).collect())
    }

    pub(super) fn full_name(&self) -> TableName {
        TableName::in_schema(&self.schema, &self.name)
    }

    /// Something of that name in the same schema.
    pub(super) fn sibling(&self, name: &str) -> TableName {
        TableName::in_schema(&self.schema, name)
    }
}

impl From<Relation> for Table {
    fn from(relation: Relation) -> Self {
        Self {
            oid: relation.oid,
            schema: relation.schema,
            name: relation.name,
            kind: relation.kind,
        }
    }
}
