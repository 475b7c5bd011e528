//! Compares what `preflight` predicts with what the server then does, for every statement of a script.

mod figures;
mod observe;
mod run;
mod script;

pub use figures::Figures;
pub use run::{Fill, measure, measure_alone};
pub use script::statements;
