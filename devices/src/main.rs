//! `bulkhead-device TYPE`: one device in a process of its own.
//!
//! Under a supervisor: control channel on descriptor 3. With `--socket-path`: a service for any vhost-user front end.

use std::process::ExitCode;
use std::time::Duration;

use bulkhead_devices::serve::{self, ServeError};
use bulkhead_devices::standalone::{self, StandaloneError};
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::channel::message::{Descriptors, PROTOCOL, ToDevice};
use bulkhead_ipc::jail;
use bulkhead_ipc::log::{self, LogLevel};
use tracing::error;

/// How long the supervisor may take to send the start message.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Exit code for a command line that makes no sense.
const EXIT_USAGE: u8 = 2;

const USAGE: &str = "usage: bulkhead-device blk|rng|console|uart|flash|net
         under a supervisor, with the control channel on descriptor 3
       bulkhead-device blk --socket-path PATH --blk-file FILE [--read-only] [--serial TEXT] [--num-queues N] [--block-size 512|4096]
       bulkhead-device rng --socket-path PATH
       bulkhead-device console --socket-path PATH
       bulkhead-device net --socket-path PATH --tap NAME [--num-queues N] [--mac ADDRESS] [--mtu BYTES]
       bulkhead-device net --socket-path PATH --stream PATH [--mac ADDRESS] [--mtu BYTES]
         as a service for any vhost-user front end
       bulkhead-device --version";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    if kind == "--version" {
        // `bulkhead device upgrade` reads this.
        println!("bulkhead-device {} (control protocol {PROTOCOL})", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if kind.is_empty() || kind.starts_with('-') {
        eprintln!("{USAGE}");
        return ExitCode::from(EXIT_USAGE);
    }
    if rest.is_empty() { supervised(&kind) } else { alone(&kind, &rest) }
}

fn alone(kind: &str, arguments: &[String]) -> ExitCode {
    log::init(LogLevel::Info);
    match standalone::run(kind, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(StandaloneError::Usage(message)) => {
            eprintln!("bulkhead-device: {message}\n{USAGE}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(error) => {
            error!(%error, "the device cannot be served");
            ExitCode::FAILURE
        }
    }
}

fn supervised(kind: &str) -> ExitCode {
    log::init(LogLevel::Info);
    let channel = match jail::enter() {
        Ok(channel) => Channel::from_fd(channel),
        Err(error) => {
            error!(%error, "a device process must be started by its supervisor");
            eprintln!("{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match start(kind, &channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(%error, "the device has failed");
            ExitCode::FAILURE
        }
    }
}

fn start(kind: &str, channel: &Channel) -> Result<(), ServeError> {
    let (message, descriptors) = channel.recv::<ToDevice>(Some(START_LIMIT))?;
    let ToDevice::Start(start) = message else {
        serve::refuse(channel, "the first message was not the start message".to_owned())?;
        return Ok(());
    };
    log::init(start.log);
    jail::set_enforcement(start.enforcement);
    serve::run(kind, &start, Descriptors::from(descriptors), channel)
}
