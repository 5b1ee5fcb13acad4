//! The supervisor: command line, configuration, launch, supervision, API.

pub mod api;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod event_loop;
pub mod exit_code;
pub mod launch;
pub mod logs;
pub mod poller;
pub mod process;
pub mod resources;
pub mod terminal;
