//! Who waits for whom: backends, the locks they want and hold, and the graph these make.
//!
//! Plain values, without I/O. A [`Snapshot`] is what one look at the server gave: the sessions that wait for a lock,
//! those in their way, and an [`Edge`] for each pair of them. A [`LockTree`] is the same arranged for people.
//!
//! What the role that looked may not see is `None` everywhere: *unknown*, never *idle* or *nobody*.
//!
//! # Beside the queries that people paste
//!
//! On one scene (a reader in whose way an ALTER queues, and behind that one three more readers; a chain of two row locks;
//! a deadlock: eight pairs of waiter and blocker in all) this is what comes out (test
//! `comparison::what_queries_that_people_paste_show_of_a_scene`):
//!
//! | | pairs that are wrong | pairs that are missing | |
//! |---|---|---|---|
//! | [`Snapshot`] and [`LockTree`] | 0 | 0 | says of three that they are soft, and names the deadlock |
//! | `pg_locks` joined with itself on the object | 12 | 0 | modes and the order of the queue are ignored: readers block readers |
//! | the same, with holders only | 3 | 3 | blames the first reader; the ALTER that is in the way of the others is not shown as such |
//! | recursive, over that join | 3 | 5 | and not the deadlock: no root leads into a circle |
//! | recursive, over `pg_blocking_pids` | 0 | 2 | no deadlock; who holds the lock and who only queues is not told apart |
//!
//! A recursive query has a row for every way that leads down to a session, and in a queue each waits for all before it. With
//! ten sessions behind one exclusive lock these are 1023 rows, and twice as many with each further one (test
//! `comparison::a_recursive_query_over_a_queue_shows_every_way_through_it`). Here it is 55 edges and a tree of eleven nodes:
//! the server is asked for pairs only, and they are put together in this process.
//!
//! What that takes, measured with PostgreSQL 15 on the same machine (two cores; `cargo bench -p lockkeeper-benches --bench
//! graph`), medians:
//!
//! | sessions that wait | pairs | answer of the server | tree from it | the self-join's answer |
//! |---|---:|---:|---:|---:|
//! | nobody | 0 | 2.8 ms | 0.0 ms | 0.5 ms |
//! | 50 behind 10 | 150 | 2.8 ms | 0.1 ms | 1.1 ms |
//! | 500 behind 50 | 2750 | 10.1 ms | 1.2 ms | 35.5 ms |
//! | 500 behind 1 | 125 250 | 43.4 ms | 9.8 ms | 176.2 ms |
//!
//! # JSON
//!
//! With the feature `serde`, [`Snapshot`], [`LockTree`], [`Backend`] and [`Edge`] are `Serialize`, and so is
//! [`AdvisoryLockEntry`](crate::AdvisoryLockEntry) ([`Health`](crate::Health#json) and [`SettingsReport`](crate::SettingsReport) have
//! documents of their own). In JSON, `null` is what is not known, or not there; times are
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
#[cfg(feature = "pictures")]
mod picture;
mod render;
mod snapshot;
pub(crate) mod sql;
mod tree;

pub use crate::postgres::lock_object::{LockObject, Relation, RowId};
pub(crate) use assemble::{LockRow, assemble};
pub use backend::{Backend, BackendId};
pub use edge::{Edge, EdgeKind};
pub use snapshot::{Cycle, Snapshot};
pub use tree::{LockTree, TreeNode};

/// What rows of the server become, for the rooms that read them.
pub(crate) mod parts {
    pub(crate) use crate::graph::backend::{Sight, Verbatim};
    #[cfg(test)]
    pub(crate) use crate::graph::edge::Wait;
}

#[cfg(test)]
mod testing;
