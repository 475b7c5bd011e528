//! Through PgBouncer: what works in transaction mode works in full, and what cannot work is refused, never shared.

mod other_modes;
mod refused_session_locks;
mod transaction_mode;
