//! `bulkhead console`: this terminal on a console or serial port of a machine.
//!
//! The machine hands one end of a socket pair to the device process; what is typed and shown passes through no other.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::api::client::{ClientError, Connection};
use super::api::{Request, Response, packet};
use super::cli::ConsoleArgs;
use super::exit_code::ExitCode;
use super::terminal::{self, Escapes, Key, RawTerminal};

/// Connects and stays until the user leaves, the machine ends, or somebody else takes the console.
pub fn console(args: &ConsoleArgs) -> Result<ExitCode, ClientError> {
    terminal::restore_on_panic();
    let mask: SigSet =
        [Signal::SIGWINCH, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT].into_iter().collect();
    mask.thread_block().map_err(io::Error::from)?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
    let signals = signals.map_err(io::Error::from)?;
    let connection = Connection::to_name(&args.name)?;
    let (stream, theirs) = UnixStream::pair()?;
    let request = Request::Attach { device: args.device.clone(), size: terminal::size(io::stdin()) };
    let device = match connection.ask(&request, Some(theirs.as_fd()))? {
        Response::Attached { device } => device,
        other => return Err(ClientError::Answer(format!("{other:?}"))),
    };
    drop(theirs);
    let raw = terminal::stdin_is_ours().then(RawTerminal::enter).transpose()?;
    if raw.is_some() {
        eprintln!("connected to {device} of {}; leave with Ctrl-] or Ctrl-A X", args.name);
    }
    // What is typed must not wait for a guest that does not read: a full socket drops keys.
    let session = Session { connection, stream, signals, escapes: Escapes::new(true), raw: raw.is_some() };
    let ended = session.run()?;
    drop(raw);
    eprintln!("{}", ended.1);
    Ok(ended.0)
}

struct Session {
    connection: Connection,
    stream: UnixStream,
    signals: SignalFd,
    escapes: Escapes,
    raw: bool,
}

impl Session {
    fn run(mut self) -> io::Result<(ExitCode, String)> {
        let stdin = io::stdin();
        let mut typing = true;
        loop {
            let (keys, shown, end, signal) = {
                let wanted = if typing { PollFlags::POLLIN } else { PollFlags::empty() };
                let mut fds = [
                    PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.connection.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stdin.as_fd(), wanted),
                ];
                // Standard input that has ended reports a hang-up for ever: it is left out then.
                let count = if typing { 4 } else { 3 };
                match poll(fds.get_mut(..count).unwrap_or(&mut []), PollTimeout::NONE) {
                    Ok(_) => {}
                    Err(Errno::EINTR) => continue,
                    Err(error) => return Err(error.into()),
                }
                let ready = fds.map(|fd| fd.any().unwrap_or(false));
                (typing && ready[3], ready[0], ready[1], ready[2])
            };
            if shown && !self.show()? {
                return Ok((ExitCode::Success, "the machine closed the connection".to_owned()));
            }
            if end && packet::receive(self.connection.as_fd()).map_or(true, |(bytes, _)| bytes.is_empty()) {
                while self.show()? {}
                return Ok((
                    ExitCode::Success,
                    "the machine ended, or another terminal took over".to_owned(),
                ));
            }
            if signal && let Some(number) = self.signal() {
                return Ok((ExitCode::Signal(number), "disconnected by a signal".to_owned()));
            }
            if keys {
                match self.type_keys(&stdin)? {
                    Typed::Leave => return Ok((ExitCode::Success, "disconnected".to_owned())),
                    Typed::End => typing = false,
                    Typed::Keys => {}
                }
            }
        }
    }

    /// Shows what came. False at the end, and when nothing is there.
    fn show(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        self.stream.set_nonblocking(true)?;
        let count = match self.stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut stdout = io::stdout().lock();
        stdout.write_all(buffer.get(..count).unwrap_or(&[]))?;
        stdout.flush()?;
        Ok(count > 0)
    }

    fn type_keys(&mut self, stdin: &io::Stdin) -> io::Result<Typed> {
        let mut buffer = [0; 256];
        // Not through the buffer of the standard library: what lay there would not wake the loop.
        let count = nix::unistd::read(stdin, &mut buffer)?;
        if count == 0 && !self.raw {
            return Ok(Typed::End);
        }
        let mut keys = Vec::with_capacity(count);
        let typed = buffer.get(..count).unwrap_or(&[]);
        if self.raw {
            let command = self.escapes.filter(typed, &mut keys);
            if command == Some(Key::Leave) {
                return Ok(Typed::Leave);
            }
        } else {
            keys.extend_from_slice(typed);
        }
        // Redirected input waits for the guest; a person's keys do not.
        self.stream.set_nonblocking(self.raw)?;
        match self.stream.write_all(&keys) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(Typed::Keys),
        }
    }

    /// The number of a signal that ends the session.
    fn signal(&mut self) -> Option<u8> {
        while let Ok(Some(information)) = self.signals.read_signal() {
            if information.ssi_signo != Signal::SIGWINCH as u32 {
                return u8::try_from(information.ssi_signo).ok();
            }
            if let Some((columns, rows)) = terminal::size(io::stdin()) {
                // The answer is read and dropped by the loop.
                let request = Request::Resize { columns, rows };
                let bytes = serde_json::to_vec(&request).unwrap_or_default();
                let _gone = packet::send(self.connection.as_fd(), &bytes, None);
            }
        }
        None
    }
}

enum Typed {
    Keys,
    Leave,
    End,
}
