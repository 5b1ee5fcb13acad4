//! `bulkhead run`.

use std::io::{self, Write};
use std::time::Instant;

use thiserror::Error;

use super::api::server::{Server, ServerError};
use super::cli::{LogLevel, RunArgs};
use super::command::{self, CommandError};
use super::config::{self, ConfigError, MachineConfig};
use super::doctor::kvm::KvmError;
use super::event_loop::{End, Environment, EventLoop, signals};
use super::exit_code::ExitCode;
use super::launch::LaunchError;
use super::logs::Log;
use super::resources::{ResourceError, Resources, open_debug_port, open_log};
use super::terminal;

/// Why a machine was not started, or its supervision failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// A command without configuration.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// What was asked for makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host's side is not as it should be.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The API socket.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A process could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// epoll, signalfd …
    #[error("the supervisor failed: {0}")]
    Io(#[from] io::Error),
}

impl RunError {
    /// The exit code for it.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Resource(ResourceError::Kvm(KvmError::Cpus { .. } | KvmError::ApicIds { .. })) => {
                ExitCode::Usage
            }
            Self::Resource(ResourceError::Kvm(_) | ResourceError::Confinement(_)) => ExitCode::Host,
            Self::Resource(ResourceError::Program { .. } | ResourceError::Host { .. })
            | Self::Server(ServerError::Io(_))
            | Self::Io(_) => ExitCode::Internal,
            Self::Command(_)
            | Self::Config(_)
            | Self::Resource(_)
            | Self::Server(ServerError::NameInUse(_)) => ExitCode::Usage,
            Self::Launch(LaunchError::Jail { source, .. }) if source.missing_layer().is_some() => {
                ExitCode::Host
            }
            Self::Launch(LaunchError::BackEnd { .. } | LaunchError::Processor(_)) => ExitCode::Usage,
            Self::Launch(_) => ExitCode::Internal,
        }
    }
}

/// Starts a machine and stays until it has ended.
pub fn run(mut args: RunArgs, started: Instant) -> Result<ExitCode, RunError> {
    // Before anything is opened: from here on a signal is an event, and every way out closes what was opened.
    signals().thread_block().map_err(io::Error::from)?;
    terminal::restore_on_panic();
    let command = command::prepare(&mut args)?;
    if let Some(command) = command.as_ref().filter(|command| command.verbose || command.dry_run) {
        let _nobody_listens = io::stderr().write_all(command.words.as_bytes());
        if command.dry_run {
            return Ok(ExitCode::Success);
        }
    }
    let config = config::resolve(args)?;
    let log_file = config.log.file.as_deref().map(open_log).transpose()?;
    let debug_port = config.debug_port.as_deref().map(open_debug_port).transpose()?;
    let log =
        Log::new(&config.name, config.log.level, config.log.format, log_file).with_debug_port(debug_port);
    let server = Server::bind(&config.name)?;
    let mut resources = Resources::open(&config)?;
    let mut environment = Environment::new(server, log)?;
    environment.watch(&resources)?;
    if let Some(warning) = command.as_ref().and_then(|command| command.warning.as_deref()) {
        environment.log.say(LogLevel::Warn, warning);
    }
    announce(&config, &resources, &mut environment.log);
    loop {
        let end = EventLoop::launch(&config, &mut resources, &mut environment, started)?.run()?;
        if end.restarts(&config) {
            continue;
        }
        if command.is_none() {
            return Ok(end.exit_code());
        }
        let (code, complaint) = end_of_command(end);
        if let Some(complaint) = complaint {
            environment.log.say(LogLevel::Error, complaint);
        }
        return Ok(code);
    }
}

/// The exit code when the machine was a command's, and what is wrong.
fn end_of_command(end: End) -> (ExitCode, Option<&'static str>) {
    match end {
        // The status of the command, as it is.
        End::DebugExit(status) => (ExitCode::Guest(status), None),
        // Whether the command succeeded nobody knows, so it has not.
        End::PowerOff | End::Reset => {
            (ExitCode::Untold, Some("the guest has ended without telling the exit status of the command"))
        }
        end => (end.exit_code(), None),
    }
}

/// What a user wants to know before the guest speaks.
fn announce(config: &MachineConfig, resources: &Resources, log: &mut Log) {
    if let Some(added) = config.cmdline_added {
        log.say(
            LogLevel::Info,
            &format!("kernel command line: {added} was added, for no console= was given"),
        );
    }
    for warning in [resources.confinement.warning(), config.irq_affinity_warning()].into_iter().flatten() {
        log.say(LogLevel::Warn, &warning);
    }
    for (field, stream) in [(config::SERIAL, &resources.serial), (config::CONSOLE, &resources.console)] {
        if let Some(path) = stream.as_ref().and_then(|stream| stream.pty.as_ref()) {
            log.say(LogLevel::Info, &format!("{field}: pseudo terminal {}", path.display()));
        }
    }
    for port in resources.ports.iter().flat_map(|ports| &ports.ports) {
        if let Some(path) = &port.stream.pty {
            log.say(LogLevel::Info, &format!("port {}: pseudo terminal {}", port.name, path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_succeeds_only_when_its_status_says_so() {
        let code = |end| end_of_command(end).0.number();
        assert_eq!([0, 1, 255].map(|status| code(End::DebugExit(status))), [0, 1, 255]);
        assert_eq!([End::PowerOff, End::Reset].map(code), [125, 125]);
        assert_eq!(code(End::Panicked), ExitCode::GuestPanic.number());
    }
}
