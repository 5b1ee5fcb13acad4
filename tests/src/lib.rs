//! Helpers that the whole-system tests share.

pub mod harness;
pub mod machine;
pub mod pattern;
pub mod processes;
