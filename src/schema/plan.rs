//! Predicts which relations a batch would lock, in which modes, and for which work, from its statements and the
//! catalogs.

use super::Env;
use super::ddl::{self, Action, CatalogCheck, Target};
use crate::error::{Error, ErrorKind};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, CatalogRelation, ColumnTypes, Relationship};
use crate::schema::statements::{LockedRelation, StatementLock, TableWork};

/// One lock that would be taken.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PlannedLock {
    pub(super) relation: CatalogRelation,
    pub(super) statement: &'static str,
    pub(super) on: LockedRelation,
    pub(super) mode: LockMode,
    pub(super) work: TableWork,
}

/// The prediction for a batch.
#[derive(Clone, Debug, Default)]
pub(super) struct LockPlan {
    /// In the order of the batch's text.
    pub(super) locks: Vec<PlannedLock>,
    /// The names of statements that rewrite or scan every table of the database.
    pub(super) database_wide: Vec<&'static str>,
    /// The text of statements whose locks are unknown.
    pub(super) unrecognized: Vec<String>,
}

impl LockPlan {
    /// Makes the prediction. It takes no locks.
    ///
    /// Cancel safety: only reads the catalogs.
    pub(super) async fn of(env: &Env, statements: &[ddl::Statement<'_>]) -> Result<Self, Error> {
        let mut plan = Self::default();
        if statements
            .iter()
            .all(|one| matches!(&one.actions, Some(actions) if actions.is_empty()))
        {
            return Ok(plan);
        }
        let major =
            catalog::read_major_version(&env.ask(catalog::VERSION).await?).ok_or_else(|| {
                Error::new(ErrorKind::Database).with_detail("the server does not say its version")
            })?;
        for statement in statements {
            let Some(actions) = &statement.actions else {
                plan.unrecognized.push(statement.text.to_owned());
                continue;
            };
            for action in actions {
                plan.add(env, action, major).await?;
            }
        }
        Ok(plan)
    }

    async fn add(&mut self, env: &Env, action: &Action, major: u32) -> Result<(), Error> {
        let related = match &action.target {
            Target::Relation(name) => env.relations(&catalog::related_relations(name)).await?,
            Target::Schema(name) => env.relations(&catalog::of_schema(name)).await?,
            Target::None => Vec::new(),
        };
        let mut others = Vec::new();
        for (role, name) in &action.others {
            let found = env.relations(&catalog::related_relations(name)).await?;
            let named = |one: &CatalogRelation| {
                matches!(one.relationship, Relationship::Itself | Relationship::Below)
            };
            others.extend(found.into_iter().filter(named).map(|one| (*role, one)));
        }
        let itself = related
            .iter()
            .find(|one| one.relationship == Relationship::Itself);
        if itself.is_none() && others.is_empty() {
            if action.target == Target::None && action.others.is_empty() {
                self.database_wide.push(action.name);
            }
            return Ok(());
        }
        let names = statement_names(env, action, itself, &related).await?;
        for lock in StatementLock::all()
            .filter(|lock| names.contains(&lock.statement()) && lock.applies_to(major))
        {
            for relation in relations_locked_by(lock, &related, &others) {
                self.locks.push(PlannedLock {
                    relation: relation.clone(),
                    statement: lock.statement(),
                    on: lock.on(),
                    mode: action.mode.unwrap_or(lock.mode()),
                    work: lock.work(),
                });
            }
        }
        Ok(())
    }

    /// Each relation once, with its strongest mode and the most work.
    pub(super) fn merged(&self) -> Vec<PlannedLock> {
        let mut merged: Vec<PlannedLock> = Vec::new();
        for lock in &self.locks {
            match merged
                .iter_mut()
                .find(|one| one.relation.oid == lock.relation.oid)
            {
                None => merged.push(lock.clone()),
                Some(one) => {
                    let work = one.work.max(lock.work);
                    if lock.mode > one.mode {
                        *one = lock.clone();
                    }
                    one.work = work;
                }
            }
        }
        merged
    }
}

/// The relations that have this role in the statement.
fn relations_locked_by<'a>(
    lock: &StatementLock,
    related: &'a [CatalogRelation],
    others: &'a [(LockedRelation, CatalogRelation)],
) -> Vec<&'a CatalogRelation> {
    let of = |relationship: Relationship| {
        related
            .iter()
            .filter(move |one| one.relationship == relationship)
    };
    let named: Vec<_> = (others.iter())
        .filter(|(role, _)| *role == lock.on())
        .map(|(_, one)| one)
        .collect();
    let is_index = of(Relationship::Itself).any(|one| matches!(one.kind, 'i' | 'I'));
    let of_partitions =
        lock.statement().contains(" PARTITION") || lock.statement().starts_with("CREATE INDEX");
    match lock.on() {
        LockedRelation::Table if is_index => of(Relationship::TableOfIndex).collect(),
        LockedRelation::Table if is_not_recursive(lock.statement()) => {
            of(Relationship::Itself).collect()
        }
        LockedRelation::Table | LockedRelation::View | LockedRelation::MaterializedView => {
            of(Relationship::Itself)
                .chain(of(Relationship::Below))
                .collect()
        }
        LockedRelation::Parent if of_partitions => of(Relationship::Itself).collect(),
        LockedRelation::Parent => named.into_iter().chain(of(Relationship::Parent)).collect(),
        LockedRelation::Partition if lock.statement().starts_with("DROP TABLE") => {
            of(Relationship::Itself).collect()
        }
        LockedRelation::Partition if of_partitions && !named.is_empty() => named,
        LockedRelation::Partition => of(Relationship::Below)
            .filter(|one| one.is_partition)
            .collect(),
        LockedRelation::DefaultPartition => {
            let is_new =
                |one: &&CatalogRelation| others.iter().all(|(_, other)| other.oid != one.oid);
            of(Relationship::Default).filter(is_new).collect()
        }
        LockedRelation::Child => of(Relationship::Below)
            .filter(|one| !one.is_partition)
            .collect(),
        LockedRelation::Index if is_index => of(Relationship::Itself)
            .chain(of(Relationship::Below))
            .collect(),
        LockedRelation::Index => of(Relationship::Index).collect(),
        LockedRelation::Referenced if !named.is_empty() => named,
        LockedRelation::Referenced => of(Relationship::Referenced).collect(),
        LockedRelation::Referencing => of(Relationship::Referencing).collect(),
        LockedRelation::Source => named,
        LockedRelation::Sequence => {
            let own = of(Relationship::Itself).filter(|one| one.kind == 'S');
            own.chain(of(Relationship::Sequence)).collect()
        }
        LockedRelation::PartitionIndex => Vec::new(),
    }
}

/// Whether the statement does not recurse to partitions and inheritance children.
fn is_not_recursive(statement: &str) -> bool {
    matches!(
        statement,
        "ALTER TABLE … RENAME"
            | "ALTER TABLE … SET SCHEMA"
            | "ALTER TABLE … OWNER TO"
            | "ALTER TABLE … CLUSTER ON"
            | "ALTER TABLE … SET WITHOUT CLUSTER"
            | "CREATE TRIGGER"
            | "COMMENT ON TABLE"
            | "COMMENT ON COLUMN"
            | "CREATE INDEX CONCURRENTLY"
            | "DROP TABLE (inheritance child)"
    )
}

/// The names of an action in the table of statement locks, given the catalogs.
async fn statement_names(
    env: &Env,
    action: &Action,
    itself: Option<&CatalogRelation>,
    related: &[CatalogRelation],
) -> Result<Vec<&'static str>, Error> {
    let has =
        |relationship: Relationship| related.iter().any(|one| one.relationship == relationship);
    let (name, target) = match &action.target {
        Target::Relation(target) => (action.name, target),
        _ => return Ok(vec![action.name]),
    };
    let mut names = vec![name];
    match (name, &action.check) {
        ("CREATE INDEX", _) if itself.is_some_and(|one| one.kind == 'p') => {
            return Ok(vec!["CREATE INDEX (partitioned)"]);
        }
        ("DROP TABLE" | "DROP TABLE … CASCADE", _)
            if itself.is_some_and(|one| one.is_partition) =>
        {
            names.push("DROP TABLE (partition)");
            names.push("DROP TABLE");
        }
        ("DROP TABLE … CASCADE", _) => names.push("DROP TABLE"),
        ("ALTER TABLE … ATTACH PARTITION", _) => {
            if has(Relationship::Referenced) {
                names.push("ALTER TABLE … ATTACH PARTITION (foreign key)");
            }
            if has(Relationship::Referencing) {
                names.push("ALTER TABLE … ATTACH PARTITION (referred to)");
            }
        }
        ("ALTER TABLE … DETACH PARTITION", _) => {
            if has(Relationship::Referenced) {
                names.push("ALTER TABLE … DETACH PARTITION (foreign key)");
            }
            if has(Relationship::Referencing) {
                names.push("ALTER TABLE … DETACH PARTITION (referred to)");
            }
        }
        ("CREATE TABLE … PARTITION OF", _) if has(Relationship::Referenced) => {
            names.push("CREATE TABLE … PARTITION OF (foreign key)");
        }
        (_, CatalogCheck::NewColumn { ty, calls }) => {
            let sql = catalog::new_column(ty, calls);
            let (volatile, domain) = catalog::read_two(&env.ask(&sql).await?, "volatile", "domain");
            if volatile {
                names = vec!["ALTER TABLE … ADD COLUMN (volatile default)"];
            } else if domain {
                names = vec!["ALTER TABLE … ADD COLUMN (domain with a constraint)"];
            }
        }
        (_, CatalogCheck::NewType { column, ty, using }) => {
            let sql = catalog::new_type(target, column, ty);
            let types = catalog::read_types(&env.ask(&sql).await?);
            let keeps = !using && types.is_some_and(|types| keeps_bytes(types, ty));
            let sql = catalog::constraint(target, None, Some(column));
            let (foreign_key, key) = catalog::read_two(&env.ask(&sql).await?, "foreign_key", "key");
            if keeps {
                names = vec!["ALTER TABLE … ALTER COLUMN … TYPE (binary coercible)"];
            } else {
                if foreign_key {
                    names.push("ALTER TABLE … ALTER COLUMN … TYPE (foreign key)");
                }
                if key {
                    names.push("ALTER TABLE … ALTER COLUMN … TYPE (key)");
                }
            }
        }
        (_, CatalogCheck::NotNull { column }) => {
            let sql = catalog::not_null(target, column);
            let (defined, implied) = catalog::read_two(&env.ask(&sql).await?, "defined", "implied");
            if defined || implied {
                names = vec!["ALTER TABLE … ALTER COLUMN … SET NOT NULL (implied by a CHECK)"];
            }
        }
        (_, CatalogCheck::UsingIndex { index }) => {
            let sql = catalog::index_nullable(target, index);
            if catalog::read_two(&env.ask(&sql).await?, "nullable", "other").0 {
                names = vec!["ALTER TABLE … ADD PRIMARY KEY USING INDEX (nullable column)"];
            }
        }
        (_, CatalogCheck::Constraint { name: of, cascade }) => {
            let sql = catalog::constraint(target, Some(of), None);
            let (foreign_key, key) = catalog::read_two(&env.ask(&sql).await?, "foreign_key", "key");
            if foreign_key {
                names.push(match name {
                    "ALTER TABLE … VALIDATE CONSTRAINT" => {
                        "ALTER TABLE … VALIDATE CONSTRAINT (foreign key)"
                    }
                    _ => "ALTER TABLE … DROP CONSTRAINT (foreign key)",
                });
            }
            if key && *cascade {
                names.push("ALTER TABLE … DROP CONSTRAINT … CASCADE (key)");
            }
        }
        (_, CatalogCheck::DropColumn { column, cascade }) => {
            let sql = catalog::constraint(target, None, Some(column));
            let (foreign_key, key) = catalog::read_two(&env.ask(&sql).await?, "foreign_key", "key");
            if foreign_key {
                names.push("ALTER TABLE … DROP COLUMN (foreign key)");
            }
            if key && *cascade {
                names.push("ALTER TABLE … DROP COLUMN … CASCADE (key)");
            }
        }
        _ => {}
    }
    Ok(names)
}

// `src/include/catalog/pg_type.dat`.
const BPCHAR: u32 = 1042;
const VARCHAR: u32 = 1043;
const VARBIT: u32 = 1562;
const BIT: u32 = 1560;
const NUMERIC: u32 = 1700;
/// time, timestamp, timestamptz, timetz.
const TIMES: [u32; 4] = [1083, 1114, 1184, 1266];

/// Whether the stored values of a column stay unchanged under its new type, so that the server changes only the
/// catalogs (`ATColumnChangeRequiresRewrite` in `src/backend/commands/tablecmds.c`). In doubt `false`.
fn keeps_bytes(types: ColumnTypes, ty: &str) -> bool {
    let numbers = modifiers(ty);
    let ColumnTypes {
        old,
        old_modifier,
        new,
        is_binary,
    } = types;
    if old != new {
        // A length would have to be checked, and char and bit without a length have the length 1.
        return is_binary && numbers.is_empty() && new != BPCHAR && new != BIT;
    }
    match (new, numbers.as_slice()) {
        // The modifier is the length plus four (`src/backend/utils/adt/varchar.c`).
        (VARCHAR, [length]) => old_modifier >= 4 && *length >= old_modifier - 4,
        (BPCHAR, [length]) => *length == old_modifier - 4,
        (BPCHAR, []) => old_modifier == 5,
        (VARBIT, [length]) => old_modifier >= 0 && *length >= old_modifier,
        (BIT, [length]) => *length == old_modifier,
        (BIT, []) => old_modifier == 1,
        // `make_numeric_typmod` in `src/backend/utils/adt/numeric.c`.
        (NUMERIC, [precision, rest @ ..]) => {
            let scale = rest.first().copied().unwrap_or(0);
            let old = old_modifier - 4;
            old_modifier >= 4 && *precision >= (old >> 16) && scale == (old & 0x7ff)
        }
        (_, [precision]) if TIMES.contains(&new) => {
            *precision >= 6 || (old_modifier >= 0 && *precision >= old_modifier)
        }
        (_, []) => true,
        _ => false,
    }
}

/// The numbers between the parentheses of a type.
fn modifiers(ty: &str) -> Vec<i32> {
    let inside = ty
        .split_once('(')
        .and_then(|(_, rest)| rest.split_once(')'));
    let inside = inside.map_or("", |(inside, _)| inside);
    (inside.split(','))
        .filter_map(|number| number.trim().parse().ok())
        .collect()
}

impl CatalogRelation {
    /// The relation's name for messages.
    pub(super) fn label(&self) -> String {
        TableName::in_schema(&self.schema, &self.name).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(old: u32, old_modifier: i32, new: u32, is_binary: bool, ty: &str) -> bool {
        let types = ColumnTypes {
            old,
            old_modifier,
            new,
            is_binary,
        };
        keeps_bytes(types, ty)
    }

    #[test]
    fn type_changes_without_a_rewrite() {
        assert!(keeps(VARCHAR, 14, VARCHAR, false, "varchar(20)"));
        assert!(!keeps(VARCHAR, 24, VARCHAR, false, "varchar(10)"));
        assert!(keeps(VARCHAR, 14, VARCHAR, false, "character varying"));
        assert!(!keeps(VARCHAR, -1, VARCHAR, false, "varchar(10)"));
        assert!(keeps(VARCHAR, 14, 25, true, "text"));
        assert!(keeps(25, -1, VARCHAR, true, "varchar"));
        assert!(!keeps(25, -1, VARCHAR, true, "varchar(10)"));
        assert!(!keeps(23, -1, 20, false, "bigint"));
        assert!(keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(12, 2)"
        ));
        assert!(!keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(12, 3)"
        ));
        assert!(!keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric(8,2)"
        ));
        assert!(keeps(
            NUMERIC,
            ((10 << 16) | 2) + 4,
            NUMERIC,
            false,
            "numeric"
        ));
        assert!(!keeps(NUMERIC, -1, NUMERIC, false, "numeric(10,2)"));
        assert!(!keeps(BPCHAR, 14, BPCHAR, false, "char"));
        assert!(keeps(1184, 3, 1184, false, "timestamptz(6)"));
        assert!(!keeps(1184, -1, 1184, false, "timestamptz(0)"));
        assert!(!keeps(1114, -1, 1184, false, "timestamptz"));
    }
}
