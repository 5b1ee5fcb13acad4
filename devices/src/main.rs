//! `bulkhead-device TYPE`: one device in a process of its own.
//!
//! Under a supervisor: control channel on descriptor 3. With options, or a socket from systemd: a service for any vhost-user
//! front end. A link to this program that is called `vhost-user-TYPE` is the service of that type.

use std::process::ExitCode;
use std::time::Duration;

use bulkhead_devices::serve::{self, ServeError};
use bulkhead_devices::standalone::{self, ServiceType, StandaloneError, TYPES, arguments, capabilities};
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::channel::message::{Descriptors, PROTOCOL, ToDevice};
use bulkhead_ipc::jail;
use bulkhead_ipc::log::{self, LogLevel};
use tracing::error;

/// How long the supervisor may take to send the start message.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Exit code for a command line that makes no sense.
const EXIT_USAGE: u8 = 2;

const USAGE: &str = "usage: bulkhead-device TYPE
         under a supervisor, with the control channel on descriptor 3
       bulkhead-device TYPE --socket-path PATH|--fd N [OPTION…]
         as a service for any vhost-user front end
       bulkhead-device TYPE --help | --print-capabilities
       bulkhead-device --version";

fn usage() -> String {
    let names: Vec<&str> = TYPES.iter().map(|service| service.name).collect();
    format!("{USAGE}\ntypes that can be services: {}", names.join(", "))
}

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let title = arguments.next().unwrap_or_default();
    let linked = capabilities::type_of_link(&title);
    let kind = match linked {
        Some(service) => service.name.to_owned(),
        None => arguments.next().unwrap_or_default(),
    };
    let rest: Vec<String> = arguments.collect();
    if kind == "--version" {
        // `bulkhead device upgrade` reads this.
        println!("bulkhead-device {} (control protocol {PROTOCOL})", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if kind == "--help" || kind == "-h" {
        println!("{}", usage());
        return ExitCode::SUCCESS;
    }
    if kind.is_empty() || kind.starts_with('-') {
        eprintln!("{}", usage());
        return ExitCode::from(EXIT_USAGE);
    }
    if linked.is_none() && rest.is_empty() && std::env::var_os("LISTEN_FDS").is_none() {
        return supervised(&kind);
    }
    match standalone::find(&kind) {
        Some(service) => alone(service, rest),
        None => {
            let reason = standalone::why_not(&kind).map(|reason| format!(": {reason}")).unwrap_or_default();
            eprintln!("bulkhead-device: there is no service {kind:?}{reason}\n{}", usage());
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn alone(service: &'static ServiceType, arguments: Vec<String>) -> ExitCode {
    let asks = |words: &[&str]| arguments.iter().any(|argument| words.contains(&argument.as_str()));
    if asks(&["--print-capabilities"]) {
        println!("{}", capabilities::capabilities(service));
        return ExitCode::SUCCESS;
    }
    if asks(&["--help", "-h"]) {
        print!("{}", arguments::help(service));
        return ExitCode::SUCCESS;
    }
    log::init(LogLevel::Info);
    match standalone::run(service, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(StandaloneError::Usage(message)) => {
            eprintln!("bulkhead-device: {message}\n\n{}", arguments::help(service));
            ExitCode::from(EXIT_USAGE)
        }
        Err(error) => {
            error!(%error, "the service ends");
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
            eprintln!("{}", usage());
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
