//! `bulkhead device`: the devices of a machine that runs.

use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::api::client::{ClientError, Connection};
use super::api::{AddRequest, DeviceEntry, ProgramInfo, Request, Response};
use super::cli::{
    BalloonArgs, DeviceAddArgs, DeviceArgs, DeviceCommand, DeviceRemoveArgs, DeviceResizeArgs,
    DeviceUpgradeArgs, ResizeArgs,
};
use super::config::Size;
use super::exit_code::ExitCode;

/// How long a restart or upgrade may take: the old process finishes what is in flight first, on a slow disk maybe.
const REPLACE_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to add a device; and to end the process of one that the guest has let go of.
const ADD_DEADLINE: Duration = Duration::from_secs(20);
const REMOVE_SLACK: Duration = Duration::from_secs(20);
/// How long a program may take to say its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(5);
/// The longest text that is read as a version, in bytes.
const MAX_VERSION: u64 = 4096;

/// Why a command about devices failed.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The machine.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Persistent memory comes with the machine.
    #[error(
        "persistent memory has its place in the guest's address space from the start: say --pmem to `bulkhead run`, or add the file as a disk (--disk path=FILE)"
    )]
    Pmem,
    /// The new program cannot be opened or run.
    #[error("cannot run '{path}': {source}", path = path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not describe itself.
    #[error("'{path}' is no bulkhead-device: --version answers '{answer}'", path = path.display())]
    NoDevice {
        /// The program.
        path: PathBuf,
        /// What it said instead.
        answer: String,
    },
    /// It speaks another protocol.
    #[error(
        "'{path}' is version {version} and speaks control protocol {theirs}, the machine that runs speaks {ours}: restart the machine to upgrade it",
        path = path.display()
    )]
    Protocol {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: String,
        /// Its protocol.
        theirs: u32,
        /// That of the machine.
        ours: u32,
    },
}

impl DeviceError {
    /// The exit code for it.
    pub const fn exit_code(&self) -> ExitCode {
        match self {
            Self::Client(error) => super::client_code(error),
            Self::Pmem | Self::Program { .. } | Self::NoDevice { .. } | Self::Protocol { .. } => {
                ExitCode::Usage
            }
        }
    }
}

/// Does what the arguments say; the text is for standard output.
pub fn device(args: &DeviceArgs) -> Result<String, DeviceError> {
    match &args.command {
        DeviceCommand::List(args) => {
            let (devices, _) = devices(&Connection::to_name(&args.name)?)?;
            Ok(if args.json {
                let text = serde_json::to_string_pretty(&devices).unwrap_or_default();
                format!("{text}\n")
            } else {
                table(&devices)
            })
        }
        DeviceCommand::Add(args) => add(args),
        DeviceCommand::Remove(args) => {
            let DeviceRemoveArgs { name, device, force, timeout } = args;
            let request = Request::DeviceRemove { device: device.clone(), force: *force, timeout: *timeout };
            let limit = Duration::from_secs((*timeout).into()) + REMOVE_SLACK;
            done(&Connection::to_name(name)?, &request, None, limit)
        }
        DeviceCommand::Restart(args) => {
            let request = Request::DeviceRestart { device: args.device.clone() };
            replace(&Connection::to_name(&args.name)?, &request, None)
        }
        DeviceCommand::Upgrade(args) => upgrade(args),
        DeviceCommand::Link(args) => {
            let request = Request::DeviceLink { device: args.device.clone(), up: args.state == "up" };
            done(&Connection::to_name(&args.name)?, &request, None, ADD_DEADLINE)
        }
        DeviceCommand::Resize(args) => {
            let DeviceResizeArgs { name, device, size, shrink } = args;
            let size = size.map(|size| size.0);
            let request = Request::DeviceResize { device: device.clone(), size, shrink: *shrink };
            done(&Connection::to_name(name)?, &request, None, ADD_DEADLINE)
        }
    }
}

/// `bulkhead resize`: asks for another number of CPUs and waits until they are there, or gone.
pub fn resize(args: &ResizeArgs) -> Result<String, DeviceError> {
    let request = Request::Cpus { count: args.cpus, timeout: args.timeout };
    let limit = Duration::from_secs(args.timeout.into()) + REMOVE_SLACK;
    done(&Connection::to_name(&args.name)?, &request, None, limit)
}

/// `bulkhead balloon`: gives the balloon another size, and says what it has and what the guest says of its memory.
pub fn balloon(args: &BalloonArgs) -> Result<String, DeviceError> {
    let request = Request::Balloon { size: args.size.map(|size| size.0) };
    let balloon = match Connection::to_name(&args.name)?.ask(&request, None)? {
        Response::Balloon(balloon) => balloon,
        other => return Err(ClientError::Answer(format!("{other:?}")).into()),
    };
    if args.json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&balloon).unwrap_or_default()));
    }
    let mut text = format!("target {}\nactual {}\n", Size(balloon.target), Size(balloon.actual));
    for (name, value) in &balloon.statistics {
        let _infallible = writeln!(text, "{name} {value}");
    }
    Ok(text)
}

fn devices(connection: &Connection) -> Result<(Vec<DeviceEntry>, u32), ClientError> {
    match connection.ask(&Request::Devices, None)? {
        Response::Devices { devices, protocol } => Ok((devices, protocol)),
        other => Err(ClientError::Answer(format!("{other:?}"))),
    }
}

fn replace(
    connection: &Connection,
    request: &Request,
    program: Option<&File>,
) -> Result<String, DeviceError> {
    done(connection, request, program, REPLACE_DEADLINE)
}

fn add(args: &DeviceAddArgs) -> Result<String, DeviceError> {
    let folder = std::env::current_dir().map_err(ClientError::from)?;
    if args.pmem.is_some() {
        return Err(DeviceError::Pmem);
    }
    let device = if !args.ports.is_empty() {
        AddRequest::Ports { specs: args.ports.clone(), folder }
    } else if let Some(spec) = args.disk.clone() {
        AddRequest::Disk { spec, folder }
    } else if let Some(spec) = args.net.clone() {
        AddRequest::Net { spec, folder }
    } else if let Some(spec) = args.vsock.clone() {
        AddRequest::Vsock { spec, folder }
    } else if let Some(spec) = args.vhost_user.clone() {
        AddRequest::VhostUser { spec, folder }
    } else if let Some(spec) = args.fs.clone() {
        AddRequest::Fs { spec, folder }
    } else if let Some(spec) = args.balloon.clone() {
        AddRequest::Balloon { spec }
    } else if let Some(spec) = args.rng.clone() {
        AddRequest::Rng { spec }
    } else {
        AddRequest::Console { spec: args.console.clone().unwrap_or_else(|| "attach".to_owned()) }
    };
    done(
        &Connection::to_name(&args.name)?,
        &Request::DeviceAdd { device, limits: args.limit.clone() },
        None,
        ADD_DEADLINE,
    )
}

fn done(
    connection: &Connection,
    request: &Request,
    descriptor: Option<&File>,
    limit: Duration,
) -> Result<String, DeviceError> {
    match connection.ask_within(request, descriptor.map(AsFd::as_fd), limit)? {
        Response::Done => Ok(String::new()),
        other => Err(ClientError::Answer(format!("{other:?}")).into()),
    }
}

fn upgrade(args: &DeviceUpgradeArgs) -> Result<String, DeviceError> {
    let path = match &args.program {
        Some(path) => path.clone(),
        None => {
            beside_this().map_err(|source| DeviceError::Program { path: "bulkhead-device".into(), source })?
        }
    };
    let failed = |source| DeviceError::Program { path: path.clone(), source };
    // What is checked is what is handed over, whatever happens to the path meanwhile.
    let file = File::open(&path).map_err(failed)?;
    let answer = ask_version(&file).map_err(failed)?;
    let program =
        parse_version(&answer).ok_or_else(|| DeviceError::NoDevice { path: path.clone(), answer })?;
    let connection = Connection::to_name(&args.name)?;
    let (_, ours) = devices(&connection)?;
    if program.protocol != ours {
        let ProgramInfo { version, protocol: theirs } = program;
        return Err(DeviceError::Protocol { path, version, theirs, ours });
    }
    replace(&connection, &Request::DeviceUpgrade { device: args.device.clone(), program }, Some(&file))
}

fn beside_this() -> io::Result<PathBuf> {
    let mut path = std::env::current_exe()?;
    path.set_file_name("bulkhead-device");
    Ok(path)
}

/// What the program answers to `--version`.
fn ask_version(program: &File) -> io::Result<String> {
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    let mut command = Command::new(Path::new(&path));
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let end = Instant::now() + VERSION_DEADLINE;
    while child.try_wait()?.is_none() {
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer to --version"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_VERSION).read_to_end(&mut answer)?;
    }
    Ok(String::from_utf8_lossy(&answer).trim().escape_debug().to_string())
}

/// Reads `bulkhead-device 1.2.3 (control protocol 1)`.
fn parse_version(answer: &str) -> Option<ProgramInfo> {
    let rest = answer.strip_prefix("bulkhead-device ")?;
    let (version, rest) = rest.split_once(" (control protocol ")?;
    Some(ProgramInfo { version: version.to_owned(), protocol: rest.strip_suffix(')')?.parse().ok()? })
}

fn table(devices: &[DeviceEntry]) -> String {
    let mut text = format!(
        "{:<16} {:<8} {:<11} {:>8} {:>8} {:<10} {:<8} {}\n",
        "DEVICE", "TYPE", "STATE", "PID", "RESTARTS", "POLICY", "VERSION", "LAST END"
    );
    for device in devices {
        let pid = device.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let _infallible = writeln!(
            text,
            "{:<16} {:<8} {:<11} {pid:>8} {:>8} {:<10} {:<8} {}",
            device.id,
            device.role.name(),
            device.state.name(),
            device.restarts,
            device.policy,
            device.version,
            device.last_end.as_deref().unwrap_or("-")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_names_the_protocol() {
        let info = parse_version("bulkhead-device 0.1.0 (control protocol 7)").unwrap();
        assert_eq!(info, ProgramInfo { version: "0.1.0".into(), protocol: 7 });
        for text in ["", "busybox 1.0", "bulkhead-device 0.1.0", "bulkhead-device 1 (control protocol x)"] {
            assert_eq!(parse_version(text), None, "{text}");
        }
    }
}
