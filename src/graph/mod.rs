//! Who waits for whom: backends, the locks they want and hold, and the graph these make.
//!
//! Plain values, without I/O. A [`Snapshot`] is what one look at the server gave: the sessions that wait for a lock,
//! those in their way, and an [`Edge`] for each pair of them. A [`LockTree`] is the same arranged for people.
//!
//! What the role that looked may not see is `None` everywhere: *unknown*, never *idle* or *nobody*.

mod backend;
mod edge;
mod object;

pub use backend::{Backend, BackendId};
pub use edge::{Edge, EdgeKind};
pub use object::{LockObject, Relation, RowId};
