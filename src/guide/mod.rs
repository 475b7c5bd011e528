//! Pages for reading: what to do about a compiler's message, and recipes. There is no code here.

#[doc = include_str!("compiler.md")]
pub mod compiler {}

#[doc = include_str!("recipes.md")]
pub mod recipes {}
