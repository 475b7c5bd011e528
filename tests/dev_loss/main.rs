#![allow(warnings)]
#[path = "../it/environment.rs"]
mod environment;
#[path = "../it/session_guard/mod.rs"]
mod session_guard;
#[path = "../it/tidy.rs"]
mod tidy;
