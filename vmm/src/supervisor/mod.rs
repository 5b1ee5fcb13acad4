//! The supervisor: command line, configuration, launch, supervision, API.

pub mod cli;
pub mod config;
pub mod doctor;
pub mod exit_code;
pub mod logs;
pub mod resources;
pub mod terminal;
