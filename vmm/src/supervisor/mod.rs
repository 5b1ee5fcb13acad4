//! The supervisor: the program `bulkhead`.
//!
//! `cli` and `config` say what a machine is to be, `resources` opens what it needs from the host, `launch` creates its
//! processes, `event_loop` stays with them to the end. `api`, `ps`, `stop` and `console` are how a running machine is
//! reached; `doctor` says what the host offers.

pub mod api;
pub mod cli;
pub mod command;
pub mod config;
pub mod confinement;
pub mod console;
pub mod device;
pub mod doctor;
pub mod event_loop;
pub mod events;
pub mod exit_code;
mod firmware;
pub mod heap;
pub mod history;
pub mod keys;
pub mod launch;
pub mod logs;
pub mod notify;
pub mod poller;
pub mod process;
pub mod processor;
pub mod programs;
pub mod ps;
pub mod resources;
pub mod run;
pub mod security;
mod smbios;
pub mod stats;
pub mod stop;
pub mod terminal;
pub mod top;

use std::io::{self, Write};
use std::time::Instant;

use clap::Parser;

use api::client::ClientError;
use cli::{Cli, Command};
use exit_code::ExitCode;

/// The program: reads the command line, does what it says, prints the one error there may be.
pub fn main() -> ExitCode {
    let started = Instant::now();
    match Cli::parse().command {
        Command::Run(args) => match run::run(*args, started) {
            Ok(code) => code,
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Ps(args) => match ps::ps(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Stop(args) => match stop::stop(&args) {
            Ok(true) => ExitCode::Success,
            Ok(false) => {
                let text = format!(
                    "'{}' still runs; the guest may ignore the power button: `bulkhead stop --force {}` ends it",
                    args.name, args.name
                );
                fail(&text, ExitCode::NoMachine)
            }
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Console(args) => match console::console(&args) {
            Ok(code) => code,
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Device(args) => match device::device(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Resize(args) => match device::resize(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Resume(args) => match stop::resume(&args) {
            Ok(()) => ExitCode::Success,
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Sendkey(args) => match keys::send(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Balloon(args) => match device::balloon(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Events(args) => match events::events(&args) {
            Ok(()) => ExitCode::Success,
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Stats(args) => match stats::stats(&args) {
            Ok(text) => print(&text),
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Top(args) => match top::top(&args) {
            Ok(()) => ExitCode::Success,
            Err(error) => fail(&error, client_code(&error)),
        },
        Command::Doctor(args) => {
            let report = doctor::Report::new();
            print(&if args.json { report.json() } else { report.text() });
            if report.can_run() { ExitCode::Success } else { ExitCode::Host }
        }
    }
}

const fn client_code(error: &ClientError) -> ExitCode {
    match error {
        ClientError::Io(_) | ClientError::Answer(_) => ExitCode::Internal,
        _ => ExitCode::NoMachine,
    }
}

fn fail(error: &impl std::fmt::Display, code: ExitCode) -> ExitCode {
    terminal::restore();
    let _nobody_listens = writeln!(io::stderr(), "bulkhead: {error}");
    code
}

/// Prints to standard output; a closed pipe (`bulkhead ps | head`) is no error.
fn print(text: &str) -> ExitCode {
    let _nobody_listens = io::stdout().write_all(text.as_bytes());
    ExitCode::Success
}
