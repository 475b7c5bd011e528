//! Who waits for whom: backends, the locks they want and hold, and the graph these make.
//!
//! Plain values, without I/O. A [`Snapshot`] is what one look at the server gave: the sessions that wait for a lock,
//! those in their way, and an [`Edge`] for each pair of them. A [`LockTree`] is the same arranged for people.
//!
//! What the role that looked may not see is `None` everywhere: *unknown*, never *idle* or *nobody*.
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
