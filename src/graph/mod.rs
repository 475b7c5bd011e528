//! The wait graph: backends, the locks that they hold and request, and which of them wait for which.
//!
//! Plain values, without I/O. A [`Snapshot`] is one sample of the server: the sessions that wait for a lock, their
//! blockers, and an [`Edge`] for each pair of them. A [`LockTree`] is the same as a forest to display.
//!
//! A value that the querying role may not see is `None` everywhere: *unknown*, never *idle* or *no session*.
//!
//! # Comparison with common queries
//!
//! Common queries for blocked sessions were run on one scene: a reader blocks an ALTER, and three more readers queue
//! behind that; a chain of two row locks; and a deadlock. These are eight pairs of waiter and blocker. The results
//! (test `comparison::what_queries_that_people_paste_show_of_a_scene`):
//!
//! | query | wrong pairs | missing pairs | remarks |
//! |---|---|---|---|
//! | [`Snapshot`] and [`LockTree`] | 0 | 0 | three edges are soft, and the deadlock is reported |
//! | `pg_locks` joined with itself on the object | 12 | 0 | ignores modes and queue order: readers block readers |
//! | the same, with holders only | 3 | 3 | blames the first reader; does not show that the ALTER blocks the other readers |
//! | recursive, over that join | 3 | 5 | misses the deadlock too: no root leads into a cycle |
//! | recursive, over `pg_blocking_pids` | 0 | 2 | misses the deadlock; does not distinguish holders from sessions that only queue |
//!
//! A recursive query has a row for every path to a session, and in a queue each session waits for all before it. Ten
//! sessions behind one exclusive lock give 1023 rows, and each further session doubles them (test
//! `comparison::a_recursive_query_over_a_queue_shows_every_way_through_it`). A snapshot has 55 edges, and a tree of
//! eleven nodes: the server only returns pairs, and the graph is built in this process.
//!
//! Medians measured with PostgreSQL 15 on the same machine (two cores; `cargo bench -p lockkeeper-benches --bench
//! graph`):
//!
//! | waiting sessions | pairs | the server's reply | tree from it | the self-join's reply |
//! |---|---:|---:|---:|---:|
//! | none | 0 | 2.8 ms | 0.0 ms | 0.5 ms |
//! | 50 behind 10 | 150 | 2.8 ms | 0.1 ms | 1.1 ms |
//! | 500 behind 50 | 2750 | 10.1 ms | 1.2 ms | 35.5 ms |
//! | 500 behind 1 | 125 250 | 43.4 ms | 9.8 ms | 176.2 ms |
//!
//! # JSON
//!
//! With the feature `serde`, [`Snapshot`], [`LockTree`], [`Backend`] and [`Edge`] are `Serialize`, and so is
//! [`AdvisoryLockEntry`](crate::AdvisoryLockEntry) ([`Health`](crate::Health#json) and [`SettingsReport`](crate::SettingsReport)
//! have documents of their own). In JSON, `null` means unknown or absent; times are RFC 3339 in UTC by the server's
//! clock, durations are milliseconds. Statements are without their literals. Fields may be added. If a field changes
//! its meaning or is removed, `version` is incremented.
//!
//! A snapshot or a tree:
//!
//! | field | what it is |
//! |---|---|
//! | `version` | 1 |
//! | `taken_at`, `took_ms` | when it was taken, and how long that took |
//! | `backends` | an array of all waiters and blockers |
//! | `waits` | an array: one for each lock request that was not granted |
//! | `roots` | the root blockers, as positions in `backends`, counted from 0, here and below |
//! | `cycles` | an array of wait cycles: `deadlock`, whether all its edges are hard, and its `backends` in order |
//! | `nodes` | of a tree only: an array in preorder |
//!
//! A backend, or a prepared transaction:
//!
//! | field | what it is |
//! |---|---|
//! | `pid`, `prepared` | the process id, or a prepared transaction's global identifier |
//! | `hidden`, `gone` | whether `null` means hidden from the role, or that it had ended |
//! | `backend_start`, `transaction_start` | times |
//! | `application_name`, `user`, `database`, `client`, `backend_type` | the session |
//! | `state`, `in_state_ms`, `wait_event_type`, `wait_event` | as in `pg_stat_activity` |
//! | `transaction_age_ms`, `statement_age_ms`, `connection_age_ms` | durations |
//! | `statement`, `query_id` | the running or last statement; the identifier is a string |
//! | `leader_pid` | of a parallel worker |
//!
//! A wait has the position of its `waiter`, and `blockers`, an array: `backend`, a position, `kind` (`hard`, `soft`),
//! and the `mode` that the blocker holds or, if soft, waits for. It also has these fields, which an edge has too:
//!
//! | field | what it is |
//! |---|---|
//! | `worker` | the process id of the parallel worker that waits |
//! | `mode_wanted`, `since`, `wait_age_ms` | as in `pg_locks.mode`; when the wait began, and how long ago |
//! | `locktype`, `object` | as in `pg_locks.locktype`; in words |
//! | `relation`, `ctid` | its `oid`, `schema`, `name`; of the row |
//! | `advisory_key` | a key: `namespace`, `name`, and `classid`, `objid`, `objsubid` as in `pg_locks` |
//!
//! A single edge has `waiter` and `blocker` by `pid` and `prepared`, `kind`, `mode_held` and `mode_queued`.
//!
//! An entry of the list of advisory locks has `version`, `advisory_key` and `mode`, `held`, `wait_age_ms`, `idle_ms`
//! (how long a holder has been idle outside of a transaction), `guarded`, and its whole `backend`.
//!
//! A node has its `backend`, its `depth`, counted from 0, and its parent `below`, as positions in `backends`; its first
//! `wait`, as a position in `waits`; how many sessions it `blocks`; whether it is `in_cycle`; and the process ids of
//! its `workers` that wait.
//!
//! # Examples
//!
//! The root blockers, and the deadlocks:
//!
//! ```no_run
//! # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
//! let snapshot = keeper.monitor().snapshot().await?;
//! for root in snapshot.roots() {
//!     println!("{root} blocks {}", snapshot.blocked_count(root.id()));
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
#[cfg(feature = "pictures")]
mod diagram;
mod digraph;
mod edge;
#[cfg(feature = "serde")]
pub(crate) mod json;
mod modes;
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

#[cfg(test)]
pub(crate) use backend::{RawStatement, Visibility};
#[cfg(test)]
pub(crate) use edge::Wait;

#[cfg(test)]
mod testing;
