//! Which relations a text would lock, how, and what it would do with them: its statements, put together with what the
//! catalogs say.

use super::ddl::{self, Action, Ask, Target};
use super::run::Context;
use crate::error::{Error, ErrorKind};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::sql::catalog::{self, Kin, Relation, Types};
use crate::schema::statements::{LockedRelation, StatementLock, TableWork};

/// One relation that would be locked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    pub(super) relation: Relation,
    pub(super) statement: &'static str,
    pub(super) on: LockedRelation,
    pub(super) mode: LockMode,
    pub(super) work: TableWork,
}

/// What is known of a text beforehand.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// In the order of the text.
    pub(super) locks: Vec<Planned>,
    /// Statements that rewrite or scan every table there is, by their names.
    pub(super) everything: Vec<&'static str>,
    /// Statements whose locks are not known.
    pub(super) unread: Vec<String>,
}

impl Plan {
    /// Reads the statements and asks the catalogs. Nothing is locked.
    ///
    /// Cancel safety: questions only.
    pub(super) async fn of(cx: &Context, statements: &[ddl::Statement<'_>]) -> Result<Self, Error> {
        let mut plan = Self::default();
        if statements
            .iter()
            .all(|one| matches!(&one.actions, Some(actions) if actions.is_empty()))
        {
            return Ok(plan);
        }
        let major = catalog::major(&cx.ask(catalog::VERSION).await?).ok_or_else(|| {
            Error::new(ErrorKind::Database).with_detail("the server does not say its version")
        })?;
        for statement in statements {
            let Some(actions) = &statement.actions else {
                plan.unread.push(statement.text.to_owned());
                continue;
            };
            for action in actions {
                plan.add(cx, action, major).await?;
            }
        }
        Ok(plan)
    }

    async fn add(&mut self, cx: &Context, action: &Action, major: u32) -> Result<(), Error> {
        let family = match &action.target {
            Target::Relation(name) => catalog::relations(&cx.ask(&catalog::family(name)).await?),
            Target::Schema(name) => catalog::relations(&cx.ask(&catalog::of_schema(name)).await?),
            Target::None => Vec::new(),
        };
        let mut others = Vec::new();
        for (role, name) in &action.others {
            let found = catalog::relations(&cx.ask(&catalog::family(name)).await?);
            let named = |one: &Relation| matches!(one.kin, Kin::Itself | Kin::Below);
            others.extend(found.into_iter().filter(named).map(|one| (*role, one)));
        }
        let itself = family.iter().find(|one| one.kin == Kin::Itself);
        if itself.is_none() && others.is_empty() {
            if action.target == Target::None && action.others.is_empty() {
                self.everything.push(action.name);
            }
            return Ok(());
        }
        let names = names(cx, action, itself, &family).await?;
        for lock in StatementLock::all()
            .filter(|lock| names.contains(&lock.statement()) && lock.applies_to(major))
        {
            for relation in locked(lock, &family, &others) {
                self.locks.push(Planned {
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

    /// Each relation once, with the strongest mode and the most work.
    pub(super) fn merged(&self) -> Vec<Planned> {
        let mut merged: Vec<Planned> = Vec::new();
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

/// The relations that have this part in a statement.
fn locked<'a>(
    lock: &StatementLock,
    family: &'a [Relation],
    others: &'a [(LockedRelation, Relation)],
) -> Vec<&'a Relation> {
    let of = |kin: Kin| family.iter().filter(move |one| one.kin == kin);
    let named: Vec<_> = (others.iter())
        .filter(|(role, _)| *role == lock.on())
        .map(|(_, one)| one)
        .collect();
    let is_index = of(Kin::Itself).any(|one| matches!(one.kind, 'i' | 'I'));
    let of_partitions =
        lock.statement().contains(" PARTITION") || lock.statement().starts_with("CREATE INDEX");
    match lock.on() {
        LockedRelation::Table if is_index => of(Kin::TableOfIndex).collect(),
        LockedRelation::Table if stays_at_the_table(lock.statement()) => of(Kin::Itself).collect(),
        LockedRelation::Table | LockedRelation::View | LockedRelation::MaterializedView => {
            of(Kin::Itself).chain(of(Kin::Below)).collect()
        }
        LockedRelation::Parent if of_partitions => of(Kin::Itself).collect(),
        LockedRelation::Parent => named.into_iter().chain(of(Kin::Parent)).collect(),
        LockedRelation::Partition if lock.statement().starts_with("DROP TABLE") => {
            of(Kin::Itself).collect()
        }
        LockedRelation::Partition if of_partitions && !named.is_empty() => named,
        LockedRelation::Partition => of(Kin::Below).filter(|one| one.is_partition).collect(),
        LockedRelation::DefaultPartition => {
            let is_new = |one: &&Relation| others.iter().all(|(_, other)| other.oid != one.oid);
            of(Kin::Default).filter(is_new).collect()
        }
        LockedRelation::Child => of(Kin::Below).filter(|one| !one.is_partition).collect(),
        LockedRelation::Index if is_index => of(Kin::Itself).chain(of(Kin::Below)).collect(),
        LockedRelation::Index => of(Kin::Index).collect(),
        LockedRelation::Referenced if !named.is_empty() => named,
        LockedRelation::Referenced => of(Kin::Referenced).collect(),
        LockedRelation::Referencing => of(Kin::Referencing).collect(),
        LockedRelation::Source => named,
        LockedRelation::Sequence => {
            let own = of(Kin::Itself).filter(|one| one.kind == 'S');
            own.chain(of(Kin::Sequence)).collect()
        }
        LockedRelation::PartitionIndex => Vec::new(),
    }
}

/// Statements that do not go down to partitions and children.
fn stays_at_the_table(statement: &str) -> bool {
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

/// The names in the table of what an action is, as the catalogs are.
async fn names(
    cx: &Context,
    action: &Action,
    itself: Option<&Relation>,
    family: &[Relation],
) -> Result<Vec<&'static str>, Error> {
    let has = |kin: Kin| family.iter().any(|one| one.kin == kin);
    let (name, target) = match &action.target {
        Target::Relation(target) => (action.name, target),
        _ => return Ok(vec![action.name]),
    };
    let mut names = vec![name];
    match (name, &action.ask) {
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
            if has(Kin::Referenced) {
                names.push("ALTER TABLE … ATTACH PARTITION (foreign key)");
            }
            if has(Kin::Referencing) {
                names.push("ALTER TABLE … ATTACH PARTITION (referred to)");
            }
        }
        ("ALTER TABLE … DETACH PARTITION", _) => {
            if has(Kin::Referenced) {
                names.push("ALTER TABLE … DETACH PARTITION (foreign key)");
            }
            if has(Kin::Referencing) {
                names.push("ALTER TABLE … DETACH PARTITION (referred to)");
            }
        }
        ("CREATE TABLE … PARTITION OF", _) if has(Kin::Referenced) => {
            names.push("CREATE TABLE … PARTITION OF (foreign key)");
        }
        (_, Ask::NewColumn { ty, calls }) => {
            let sql = catalog::new_column(ty, calls);
            let (volatile, domain) = catalog::two(&cx.ask(&sql).await?, "volatile", "domain");
            if volatile {
                names = vec!["ALTER TABLE … ADD COLUMN (volatile default)"];
            } else if domain {
                names = vec!["ALTER TABLE … ADD COLUMN (domain with a constraint)"];
            }
        }
        (_, Ask::NewType { column, ty, using }) => {
            let sql = catalog::new_type(target, column, ty);
            let types = catalog::types(&cx.ask(&sql).await?);
            let keeps = !using && types.is_some_and(|types| keeps_bytes(types, ty));
            let sql = catalog::constraint(target, None, Some(column));
            let (foreign_key, key) = catalog::two(&cx.ask(&sql).await?, "foreign_key", "key");
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
        (_, Ask::NotNull { column }) => {
            let sql = catalog::not_null(target, column);
            let (defined, implied) = catalog::two(&cx.ask(&sql).await?, "defined", "implied");
            if defined || implied {
                names = vec!["ALTER TABLE … ALTER COLUMN … SET NOT NULL (implied by a CHECK)"];
            }
        }
        (_, Ask::UsingIndex { index }) => {
            let sql = catalog::index_nullable(target, index);
            if catalog::two(&cx.ask(&sql).await?, "nullable", "other").0 {
                names = vec!["ALTER TABLE … ADD PRIMARY KEY USING INDEX (nullable column)"];
            }
        }
        (_, Ask::Constraint { name: of, cascade }) => {
            let sql = catalog::constraint(target, Some(of), None);
            let (foreign_key, key) = catalog::two(&cx.ask(&sql).await?, "foreign_key", "key");
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
        (_, Ask::DropColumn { column, cascade }) => {
            let sql = catalog::constraint(target, None, Some(column));
            let (foreign_key, key) = catalog::two(&cx.ask(&sql).await?, "foreign_key", "key");
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

/// Whether values of a column stay as they are under its new type, so that the server changes the catalogs only
/// (`ATColumnChangeRequiresRewrite` in `src/backend/commands/tablecmds.c`). In doubt they do not.
fn keeps_bytes(types: Types, ty: &str) -> bool {
    let numbers = modifiers(ty);
    let Types {
        old,
        old_modifier,
        new,
        is_binary,
    } = types;
    if old != new {
        // A length would have to be checked, and char and bit without one have the length 1.
        return is_binary && numbers.is_empty() && new != BPCHAR && new != BIT;
    }
    match (new, numbers.as_slice()) {
        // The length is four more than it says (`src/backend/utils/adt/varchar.c`).
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

impl Relation {
    /// As people write it.
    pub(super) fn label(&self) -> String {
        TableName::in_schema(&self.schema, &self.name).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(old: u32, old_modifier: i32, new: u32, is_binary: bool, ty: &str) -> bool {
        let types = Types {
            old,
            old_modifier,
            new,
            is_binary,
        };
        keeps_bytes(types, ty)
    }

    #[test]
    fn types_that_leave_the_bytes_alone() {
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
