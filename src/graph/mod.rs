//! Who waits for whom: backends, the locks they want and hold, and the graph these make.
//!
//! Plain values, without I/O. A [`Snapshot`] is what one look at the server gave: the sessions that wait for a lock,
//! those in their way, and an [`Edge`] for each pair of them. A [`LockTree`] is the same arranged for people.
//!
//! What the role that looked may not see is `None` everywhere: *unknown*, never *idle* or *nobody*.
//!
//! # JSON
//!
//! With the feature `serde`, [`Snapshot`], [`LockTree`], [`Backend`] and [`Edge`] are `Serialize`, and so is
//! [`AdvisoryLockEntry`](crate::AdvisoryLockEntry). In JSON, `null` is what is not known, or not there; times are
//! RFC 3339 in UTC by the server's clock, durations are milliseconds. Statements are without their literals. Fields may be
//! added; where one changes its meaning or goes away, `version` goes up.
//!
//! A snapshot, and a tree:
//!
//! | field | what it is |
//! |---|---|
//! | `version` | 1 |
//! | `taken_at`, `took_ms` | when it was taken, and for how long |
//! | `backends` | an array of all who take part |
//! | `waits` | an array: one for each request for a lock that was not granted |
//! | `roots` | places in `backends`, counted from 0, here and below: who is in the way and waits for nobody |
//! | `cycles` | an array of circles: `deadlock`, whether all its edges are hard, and its `backends` in order |
//! | `nodes` | of a tree only: an array in the order in which it is drawn |
//!
//! A backend, or a prepared transaction:
//!
//! | field | what it is |
//! |---|---|
//! | `pid`, `prepared` | the process id, or a prepared transaction's global identifier |
//! | `hidden`, `gone` | whether `null` means hidden from the role, or that it had ended |
//! | `backend_start`, `transaction_start` | times |
//! | `application_name`, `user`, `database`, `client`, `backend_type` | who it is |
//! | `state`, `in_state_ms`, `wait_event_type`, `wait_event` | as in `pg_stat_activity` |
//! | `transaction_age_ms`, `statement_age_ms`, `connection_age_ms` | durations |
//! | `statement`, `query_id` | what it runs, or ran last; the identifier is a string |
//! | `leader_pid` | of a parallel worker |
//!
//! A wait has the place of its `waiter`, and `blockers`, an array of those in its way: `backend`, a place, `kind` (`hard`,
//! `soft`), and the `mode` it holds or, where it is soft, waits for. Besides, as an edge has it by itself:
//!
//! | field | what it is |
//! |---|---|
//! | `worker` | the parallel worker that waits, by its process id |
//! | `mode_wanted`, `since`, `wait_age_ms` | as in `pg_locks.mode`; since when, and for how long |
//! | `locktype`, `object` | as in `pg_locks.locktype`; in words |
//! | `relation`, `ctid` | its `oid`, `schema`, `name`; of the row |
//! | `advisory_key` | a key: `namespace`, `name`, and `classid`, `objid`, `objsubid` as in `pg_locks` |
//!
//! An edge by itself has `waiter` and `blocker` by `pid` and `prepared`, `kind`, `mode_held` and `mode_queued`.
//!
//! An entry of the list of advisory locks has `version`, `advisory_key` and `mode`, `held`, `wait_age_ms`, `idle_ms`, for how
//! long a holder has been idle outside of any transaction, `guarded`, and its `backend`, whole.
//!
//! A node has its `backend`, its `depth`, counted from 0, the one it stands `below`, places in `backends`; the first `wait` of
//! it, a place in `waits`; how many it `blocks`, whether it is `in_cycle`, and the process ids of the `workers` that wait in
//! its name.
//!
//! # Examples
//!
//! Whom to ask to finish, and what about:
//!
//! ```no_run
//! # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
//! let snapshot = keeper.monitor().snapshot().await?;
//! for root in snapshot.roots() {
//!     println!("{root} blocks {}", snapshot.blocked_by(root.id()));
//! }
//! for cycle in snapshot.cycles().iter().filter(|cycle| cycle.is_deadlock()) {
//!     for edge in cycle.edges() {
//!         println!("{edge}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod assemble;
mod backend;
mod edge;
#[cfg(feature = "serde")]
pub(crate) mod json;
mod modes;
mod net;
mod object;
mod picture;
mod render;
mod snapshot;
mod tree;

pub(crate) use assemble::{LockRow, assemble};
pub use backend::{Backend, BackendId};
pub use edge::{Edge, EdgeKind};
pub use object::{LockObject, Relation, RowId};
pub(crate) use render::Age;
pub use snapshot::{Cycle, Snapshot};
pub use tree::{LockTree, TreeNode};

/// What rows of the server become, for the rooms that read them.
pub(crate) mod parts {
    pub(crate) use crate::graph::backend::{Sight, Verbatim};
    #[cfg(test)]
    pub(crate) use crate::graph::edge::Wait;
    pub(crate) use crate::graph::render::Age;
}

#[cfg(test)]
mod testing;
