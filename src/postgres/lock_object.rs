//! What a lock is on: `pg_locks.locktype` and its columns, with names for people.

use std::fmt;

use super::message;
use crate::key::LockKey;

/// What a lock is on, one variant for each `pg_locks.locktype`.
///
/// `Display` is one line for people: `relation public.users`, `row (0,9) of public.users`, `transaction 733`,
/// `advisory lock "invoice:42"`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockObject {
    /// A table, an index or another relation.
    Relation(Relation),
    /// The right to make a relation longer.
    Extend(Relation),
    /// A page of a relation (index methods such as hash, and GIN's pending list).
    #[non_exhaustive]
    Page {
        /// Of what.
        relation: Relation,
        /// The page's number.
        page: u32,
    },
    /// A row version, whose lock is held by the first in line while it waits for the transaction that has the row.
    Tuple(RowId),
    /// The end of a transaction: what row locks, unique keys and `SELECT … FOR UPDATE` wait for.
    Transaction(u32),
    /// The end of a virtual transaction, such as `3/15`: what `CREATE INDEX CONCURRENTLY` waits for.
    VirtualTransaction(Box<str>),
    /// The outcome of an `INSERT … ON CONFLICT` under way.
    #[non_exhaustive]
    SpeculativeToken {
        /// The transaction that inserts; `None` where the server does not say.
        transaction: Option<u32>,
        /// Its number among that transaction's insertions.
        token: u32,
    },
    /// A database object that is no relation: a schema, a type, a role, …
    #[non_exhaustive]
    Object {
        /// The system catalog it is in.
        catalog: Relation,
        /// Its oid there.
        oid: u32,
        /// The column, or 0 for the whole object.
        column: u16,
        /// The database it is in, where it is another one than the role that looked was connected to.
        database: Option<Box<str>>,
    },
    /// An advisory lock.
    #[non_exhaustive]
    Advisory {
        /// Its key, with its name where this process knows it.
        key: LockKey,
        /// The database it is in, where it is another one than the role that looked was connected to.
        database: Option<Box<str>>,
    },
    /// `pg_database.datfrozenxid` of a database, by name.
    FrozenId(Option<Box<str>>),
    /// A user lock: what advisory locks were called before PostgreSQL 8.2.
    Userlock(u32, u32, u16),
    /// A remote transaction that a subscription's parallel worker applies (16+).
    #[non_exhaustive]
    ApplyTransaction {
        /// The subscription's oid.
        subscription: u32,
        /// The remote transaction.
        transaction: u32,
    },
    /// A kind of lock this crate does not know, by its `locktype` or by what else was said of it.
    Other(Box<str>),
}

/// A table, an index or another relation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Relation {
    pub(crate) oid: u32,
    pub(crate) name: Option<(Box<str>, Box<str>)>,
    pub(crate) kind: Option<char>,
    pub(crate) database: Option<Box<str>>,
}

/// A version of a row, by where it is: what `ctid` shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowId {
    pub(crate) relation: Relation,
    pub(crate) page: u32,
    pub(crate) offset: u16,
}

impl LockObject {
    /// The kind of lock as `pg_locks.locktype` spells it.
    #[must_use]
    pub fn locktype(&self) -> &str {
        match self {
            Self::Relation(_) => "relation",
            Self::Extend(_) => "extend",
            Self::Page { .. } => "page",
            Self::Tuple(_) => "tuple",
            Self::Transaction(_) => "transactionid",
            Self::VirtualTransaction(_) => "virtualxid",
            Self::SpeculativeToken { .. } => "spectoken",
            Self::Object { .. } => "object",
            Self::Advisory { .. } => "advisory",
            Self::FrozenId(_) => "frozenid",
            Self::Userlock(..) => "userlock",
            Self::ApplyTransaction { .. } => "applytransaction",
            Self::Other(text) => text,
        }
    }

    /// The relation it is, or is in.
    #[must_use]
    pub fn relation(&self) -> Option<&Relation> {
        match self {
            Self::Relation(relation) | Self::Extend(relation) | Self::Page { relation, .. } => {
                Some(relation)
            }
            Self::Tuple(row) => Some(&row.relation),
            _ => None,
        }
    }

    /// The row version it is.
    #[must_use]
    pub fn row(&self) -> Option<&RowId> {
        match self {
            Self::Tuple(row) => Some(row),
            _ => None,
        }
    }

    /// The key of an advisory lock.
    #[must_use]
    pub fn advisory_key(&self) -> Option<&LockKey> {
        match self {
            Self::Advisory { key, .. } => Some(key),
            _ => None,
        }
    }
}

impl LockObject {
    /// As a message of the server has it: without names.
    #[cfg(feature = "server-log")]
    pub(crate) fn from_message(object: &message::LockObject) -> Self {
        Self::of_message(object, Relation::nameless)
    }

    /// As a message of the server has it, with what is known of the relations.
    pub(crate) fn of_message(
        object: &message::LockObject,
        relation: impl Fn(u32) -> Relation,
    ) -> Self {
        use message::LockObject as Told;
        match *object {
            Told::Relation { relation: oid, .. } => Self::Relation(relation(oid)),
            Told::Extension { relation: oid, .. } => Self::Extend(relation(oid)),
            Told::FrozenIds { .. } => Self::FrozenId(None),
            Told::Page {
                relation: oid,
                page,
                ..
            } => Self::Page {
                relation: relation(oid),
                page,
            },
            Told::Tuple {
                relation: oid,
                page,
                offset,
                ..
            } => Self::Tuple(RowId {
                relation: relation(oid),
                page,
                offset,
            }),
            Told::Transaction { xid } => Self::Transaction(xid),
            Told::VirtualTransaction { backend, local } => {
                Self::VirtualTransaction(format!("{backend}/{local}").into())
            }
            Told::SpeculativeToken { xid, token } => Self::SpeculativeToken {
                transaction: Some(xid),
                token,
            },
            Told::Object { class, object, .. } => Self::Object {
                catalog: relation(class),
                oid: object,
                column: 0,
                database: None,
            },
            Told::UserLock { fields: [a, b, c] } => {
                Self::Userlock(a, b, u16::try_from(c).unwrap_or(u16::MAX))
            }
            Told::Advisory {
                classid,
                objid,
                objsubid,
                ..
            } => match LockKey::from_pg_locks(classid, objid, objsubid) {
                Some(key) => Self::Advisory {
                    key,
                    database: None,
                },
                None => Self::Other("advisory".into()),
            },
            Told::RemoteTransaction {
                subscription, xid, ..
            } => Self::ApplyTransaction {
                subscription,
                transaction: xid,
            },
            // Its text is in the message, where that may be shown.
            Told::Unknown { .. } => Self::Other("not understood".into()),
        }
    }
}

impl Relation {
    #[cfg(feature = "server-log")]
    fn nameless(oid: u32) -> Self {
        Self {
            oid,
            name: None,
            kind: None,
            database: None,
        }
    }

    /// Its oid (`pg_class.oid`).
    #[must_use]
    pub fn oid(&self) -> u32 {
        self.oid
    }

    /// The name of its schema; `None` where it is in another database, or was made by a transaction that has not
    /// committed.
    #[must_use]
    pub fn schema(&self) -> Option<&str> {
        self.name.as_ref().map(|(schema, _)| &**schema)
    }

    /// Its name in that schema; `None` as for [`schema`](Self::schema).
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_ref().map(|(_, name)| &**name)
    }

    /// What kind of relation it is, as `pg_class.relkind` says: `r` a table, `i` an index, `p` a partitioned table, …
    #[must_use]
    pub fn kind(&self) -> Option<char> {
        self.kind
    }

    /// The database it is in, where it is another one than the role that looked was connected to.
    #[must_use]
    pub fn database(&self) -> Option<&str> {
        self.database.as_deref()
    }
}

impl RowId {
    /// The table it is in.
    #[must_use]
    pub fn relation(&self) -> &Relation {
        &self.relation
    }

    /// The number of its page.
    #[must_use]
    pub fn page(&self) -> u32 {
        self.page
    }

    /// Its place in the page, counted from 1.
    #[must_use]
    pub fn offset(&self) -> u16 {
        self.offset
    }

    /// As `ctid` is written: `(0,9)`. `SELECT … WHERE ctid = '(0,9)'` shows the row as long as no later version of it
    /// is committed.
    #[must_use]
    pub fn ctid(&self) -> String {
        format!("({},{})", self.page, self.offset)
    }
}

impl fmt::Display for LockObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relation(relation) => write!(f, "relation {relation}"),
            Self::Extend(relation) => write!(f, "extension of {relation}"),
            Self::Page { relation, page } => write!(f, "page {page} of {relation}"),
            Self::Tuple(row) => row.fmt(f),
            Self::Transaction(xid) => write!(f, "transaction {xid}"),
            Self::VirtualTransaction(vxid) => {
                write!(f, "virtual transaction {}", vxid.escape_debug())
            }
            Self::SpeculativeToken { transaction, token } => {
                write!(f, "speculative token {token}")?;
                transaction.map_or(Ok(()), |xid| write!(f, " of transaction {xid}"))
            }
            Self::Object {
                catalog,
                oid,
                column,
                database,
            } => {
                write!(f, "object {oid} of {catalog}")?;
                if *column > 0 {
                    write!(f, ", column {column}")?;
                }
                in_database(f, database.as_deref())
            }
            Self::Advisory { key, database } => {
                write!(f, "advisory lock {key}")?;
                in_database(f, database.as_deref())
            }
            Self::FrozenId(database) => {
                f.write_str("datfrozenxid")?;
                in_database(f, database.as_deref())
            }
            Self::Userlock(first, second, third) => {
                write!(f, "user lock [{first},{second},{third}]")
            }
            Self::ApplyTransaction {
                subscription,
                transaction,
            } => write!(
                f,
                "remote transaction {transaction} of subscription {subscription}"
            ),
            Self::Other(text) => write!(f, "lock of type {text:?}"),
        }
    }
}

/// `public.users`, or `relation 16384` where there is no name.
impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some((schema, name)) => write!(f, "{}.{}", Identifier(schema), Identifier(name))?,
            None => write!(f, "{}", self.oid)?,
        }
        in_database(f, self.database.as_deref())
    }
}

/// `row (0,9) of public.users`
impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "row ({},{}) of {}",
            self.page, self.offset, self.relation
        )
    }
}

fn in_database(f: &mut fmt::Formatter<'_>, database: Option<&str>) -> fmt::Result {
    database.map_or(Ok(()), |database| {
        write!(f, " in database {}", Identifier(database))
    })
}

/// Quoted where SQL would need it, and on one line.
struct Identifier<'a>(&'a str);

impl fmt::Display for Identifier<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = self.0.chars().enumerate().all(|(at, c)| {
            matches!(c, 'a'..='z' | '_') || (at > 0 && matches!(c, '0'..='9' | '$'))
        });
        if plain && !self.0.is_empty() {
            return f.write_str(self.0);
        }
        let escaped: String = self
            .0
            .chars()
            .flat_map(|c| {
                let control = c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
                let shown = if control { '\u{fffd}' } else { c };
                [Some('"').filter(|_| c == '"'), Some(shown)].into_iter().flatten()
            })
            .collect();
        write!(f, "\"{escaped}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Relation {
        Relation {
            oid: 16384,
            name: Some(("public".into(), "users".into())),
            kind: Some('r'),
            database: None,
        }
    }

    fn nameless() -> Relation {
        Relation {
            name: None,
            kind: None,
            database: Some("other".into()),
            ..users()
        }
    }

    #[test]
    fn one_line_for_people() {
        let row = RowId {
            relation: users(),
            page: 0,
            offset: 9,
        };
        for (object, expected) in [
            (LockObject::Relation(users()), "relation public.users"),
            (
                LockObject::Relation(nameless()),
                "relation 16384 in database other",
            ),
            (LockObject::Extend(users()), "extension of public.users"),
            (
                LockObject::Page {
                    relation: users(),
                    page: 3,
                },
                "page 3 of public.users",
            ),
            (LockObject::Tuple(row), "row (0,9) of public.users"),
            (LockObject::Transaction(733), "transaction 733"),
            (
                LockObject::VirtualTransaction("3/15".into()),
                "virtual transaction 3/15",
            ),
            (
                LockObject::SpeculativeToken {
                    transaction: Some(733),
                    token: 2,
                },
                "speculative token 2 of transaction 733",
            ),
            (
                LockObject::Object {
                    catalog: Relation {
                        name: Some(("pg_catalog".into(), "pg_namespace".into())),
                        ..users()
                    },
                    oid: 2200,
                    column: 0,
                    database: None,
                },
                "object 2200 of pg_catalog.pg_namespace",
            ),
            (
                LockObject::Advisory {
                    key: "invoice:42".into(),
                    database: None,
                },
                "advisory lock \"invoice:42\"",
            ),
            (
                LockObject::Advisory {
                    key: (1, 2).into(),
                    database: Some("Other".into()),
                },
                "advisory lock (1, 2) in database \"Other\"",
            ),
            (LockObject::Userlock(1, 2, 3), "user lock [1,2,3]"),
            (LockObject::Other("new".into()), "lock of type \"new\""),
        ] {
            assert_eq!(object.to_string(), expected);
            assert!(!object.locktype().is_empty());
        }
    }

    #[test]
    fn odd_names_are_quoted_and_stay_on_one_line() {
        let mut odd = users();
        odd.name = Some(("My \"Schema\"".into(), "a\nb".into()));
        assert_eq!(odd.to_string(), "\"My \"\"Schema\"\"\".\"a\u{fffd}b\"");
        odd.name = Some(("1a".into(), "a1$".into()));
        assert_eq!(odd.to_string(), "\"1a\".a1$");
    }
}
