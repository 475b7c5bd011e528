//! Locked objects: `pg_locks.locktype` and its columns, with readable names.

use std::fmt;

use super::message;
use crate::key::LockKey;

/// The oids of catalogs, which never change (`src/include/catalog`).
const PG_TYPE: u32 = 1247;
const PG_DATABASE: u32 = 1262;

/// A locked object, with one variant for each `pg_locks.locktype`.
///
/// `Display` is one line: `relation public.users`, `row (0,9) of public.users`, `transaction 733`, `advisory lock
/// "invoice:42"`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockObject {
    /// A table, an index or another relation.
    Relation(Relation),
    /// The right to extend a relation.
    Extend(Relation),
    /// A page of a relation (index methods such as hash, and GIN's pending list).
    #[non_exhaustive]
    Page {
        /// The relation.
        relation: Relation,
        /// The page number.
        page: u32,
    },
    /// A row version. The first waiter for a row holds this lock while it waits for the transaction that locked the
    /// row.
    Tuple(RowId),
    /// The end of a transaction. Row locks, unique keys and `SELECT … FOR UPDATE` wait for it.
    Transaction(u32),
    /// The end of a virtual transaction, such as `3/15`. `CREATE INDEX CONCURRENTLY` waits for it.
    VirtualTransaction(Box<str>),
    /// The outcome of a running `INSERT … ON CONFLICT`.
    #[non_exhaustive]
    SpeculativeToken {
        /// The inserting transaction; `None` if the server does not tell.
        transaction: Option<u32>,
        /// Its number among that transaction's insertions.
        token: u32,
    },
    /// A database object that is not a relation: a schema, a type, a role, …
    #[non_exhaustive]
    Object {
        /// The system catalog that contains it.
        catalog: Relation,
        /// Its oid in that catalog.
        oid: u32,
        /// The column, or 0 for the whole object.
        column: u16,
        /// Its database, if that is another one than the querying role was connected to.
        database: Option<Box<str>>,
        /// The schema and the name of a type, if it is committed and in this database.
        name: Option<(Box<str>, Box<str>)>,
    },
    /// An advisory lock.
    #[non_exhaustive]
    Advisory {
        /// The key, with its name if this process knows it.
        key: LockKey,
        /// Its database, if that is another one than the querying role was connected to.
        database: Option<Box<str>>,
    },
    /// `pg_database.datfrozenxid` of a database, by name.
    FrozenId(Option<Box<str>>),
    /// A user lock, as advisory locks were called before PostgreSQL 8.2.
    Userlock(u32, u32, u16),
    /// A remote transaction that a subscription's parallel worker applies (16+).
    #[non_exhaustive]
    ApplyTransaction {
        /// The subscription's oid.
        subscription: u32,
        /// The remote transaction.
        transaction: u32,
    },
    /// An unknown kind of lock, by its `locktype` or its other columns.
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

/// A row version, identified by its `ctid`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowId {
    pub(crate) relation: Relation,
    pub(crate) page: u32,
    pub(crate) offset: u16,
}

impl LockObject {
    /// The kind of the lock as `pg_locks.locktype` spells it.
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

    /// The relation that it is, or is part of.
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

    /// The row version that it is.
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
    /// From a message of the server, without names.
    #[cfg(feature = "server-log")]
    pub(crate) fn from_nameless_tag(object: &message::LockTag) -> Self {
        Self::from_tag(object, Relation::nameless)
    }

    /// From a message of the server; `relation` looks up the name of a relation.
    pub(crate) fn from_tag(object: &message::LockTag, relation: impl Fn(u32) -> Relation) -> Self {
        use message::LockTag as Tag;
        match *object {
            Tag::Relation { relation: oid, .. } => Self::Relation(relation(oid)),
            Tag::Extension { relation: oid, .. } => Self::Extend(relation(oid)),
            Tag::FrozenIds { .. } => Self::FrozenId(None),
            Tag::Page {
                relation: oid,
                page,
                ..
            } => Self::Page {
                relation: relation(oid),
                page,
            },
            Tag::Tuple {
                relation: oid,
                page,
                offset,
                ..
            } => Self::Tuple(RowId {
                relation: relation(oid),
                page,
                offset,
            }),
            Tag::Transaction { xid } => Self::Transaction(xid),
            Tag::VirtualTransaction { backend, local } => {
                Self::VirtualTransaction(format!("{backend}/{local}").into())
            }
            Tag::SpeculativeToken { xid, token } => Self::SpeculativeToken {
                transaction: Some(xid),
                token,
            },
            Tag::Object { class, object, .. } => Self::Object {
                catalog: relation(class),
                oid: object,
                column: 0,
                database: None,
                name: None,
            },
            Tag::UserLock { fields: [a, b, c] } => {
                Self::Userlock(a, b, u16::try_from(c).unwrap_or(u16::MAX))
            }
            Tag::Advisory {
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
            Tag::RemoteTransaction {
                subscription, xid, ..
            } => Self::ApplyTransaction {
                subscription,
                transaction: xid,
            },
            // Its text is in the message, which is shown if it may be.
            Tag::Unknown { .. } => Self::Other("not understood".into()),
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

    /// The name of its schema; `None` if it is in another database, or was created by a transaction that has not
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

    getters! {
        /// The kind of the relation, as in `pg_class.relkind`: `r` for a table, `i` for an index, `p` for a partitioned
        /// table, …
        kind: Option<char>;

        /// Its database, if that is another one than the querying role was connected to.
        text database;
    }
}

impl RowId {
    getters! {
        /// The table that contains it.
        relation: &Relation;

        /// The page number.
        page: u32;

        /// Its number within the page, counted from 1.
        offset: u16;
    }

    /// Its `ctid`: `(0,9)`. `SELECT … WHERE ctid = '(0,9)'` returns the row until a later version of it is committed.
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
            // `PreCommit_Notify` in PostgreSQL's `src/backend/commands/async.c`.
            Self::Object {
                catalog, oid: 0, ..
            } if catalog.oid == PG_DATABASE => {
                f.write_str("the lock of NOTIFY, under which one transaction at a time commits")
            }
            Self::Object {
                catalog,
                name: Some((schema, name)),
                ..
            } if catalog.oid == PG_TYPE => {
                write!(f, "type {}.{}", Identifier(schema), Identifier(name))
            }
            Self::Object {
                catalog,
                oid,
                column,
                database,
                ..
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

/// `public.users`, or `relation 16384` if the name is unknown.
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

/// Quoted if SQL requires it, and on one line.
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
    fn display_is_one_line() {
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
                    name: None,
                },
                "object 2200 of pg_catalog.pg_namespace",
            ),
            (
                LockObject::Object {
                    catalog: Relation {
                        oid: PG_TYPE,
                        ..users()
                    },
                    oid: 16829,
                    column: 0,
                    database: None,
                    name: Some(("public".into(), "Mood".into())),
                },
                "type public.\"Mood\"",
            ),
            (
                LockObject::Object {
                    catalog: Relation {
                        oid: PG_DATABASE,
                        ..users()
                    },
                    oid: 0,
                    column: 0,
                    database: None,
                    name: None,
                },
                "the lock of NOTIFY, under which one transaction at a time commits",
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
    fn unusual_names_are_quoted_on_one_line() {
        let mut odd = users();
        odd.name = Some(("My \"Schema\"".into(), "a\nb".into()));
        assert_eq!(odd.to_string(), "\"My \"\"Schema\"\"\".\"a\u{fffd}b\"");
        odd.name = Some(("1a".into(), "a1$".into()));
        assert_eq!(odd.to_string(), "\"1a\".a1$");
    }
}
