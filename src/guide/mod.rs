//! Pages for reading: what to do about a compiler's message, recipes, and the names of spans and metrics. There is no code here.

#[doc = include_str!("compiler.md")]
pub mod compiler {}

#[doc = include_str!("numbers.md")]
pub mod numbers {}

#[doc = include_str!("recipes.md")]
pub mod recipes {}
