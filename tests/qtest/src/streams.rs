//! The byte streams to the qtest client and the QMP client.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// Where the other side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Standard input and output.
    Stdio,
    /// A socket that the other side listens on, as libqtest does.
    Connect(PathBuf),
    /// A socket to listen on, for one client.
    Listen(PathBuf),
}

impl Address {
    /// `stdio`, `unix:PATH` or `unix:PATH,server=on,wait=off`.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "stdio" {
            return Ok(Self::Stdio);
        }
        let rest = text.strip_prefix("unix:").ok_or(format!("'{text}': say unix:PATH or stdio"))?;
        let mut words = rest.split(',');
        let path = PathBuf::from(words.next().unwrap_or_default());
        let server = words.any(|word| word == "server" || word == "server=on");
        Ok(if server { Self::Listen(path) } else { Self::Connect(path) })
    }
}

/// A connection, or what waits for one.
pub enum Stream {
    /// Nobody is there yet.
    Listening(UnixListener),
    /// Somebody is.
    Connected { input: File, output: File, unread: Vec<u8> },
}

/// What there was to read.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A client came.
    Client,
    /// Bytes, kept in the stream until they are taken.
    Bytes,
    /// The other side closed the connection.
    End,
}

impl Stream {
    /// Connects or begins to listen.
    pub fn open(address: &Address) -> Result<Self, String> {
        let failed = |error: io::Error| format!("{address:?}: {error}");
        match address {
            Address::Stdio => {
                let input = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
                let output = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
                Ok(Self::connected(input, output))
            }
            Address::Connect(path) => {
                Self::of_socket(UnixStream::connect(path).map_err(failed)?).map_err(failed)
            }
            Address::Listen(path) => Ok(Self::Listening(UnixListener::bind(path).map_err(failed)?)),
        }
    }

    fn connected(input: OwnedFd, output: OwnedFd) -> Self {
        Self::Connected { input: input.into(), output: output.into(), unread: Vec::new() }
    }

    fn of_socket(socket: UnixStream) -> io::Result<Self> {
        let output = socket.try_clone()?;
        Ok(Self::connected(socket.into(), output.into()))
    }

    /// What to wait on until [`receive`](Self::receive) does not wait.
    pub fn readable(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listening(listener) => listener.as_fd(),
            Self::Connected { input, .. } => input.as_fd(),
        }
    }

    /// Takes a client or reads bytes.
    pub fn receive(&mut self) -> io::Result<Received> {
        match self {
            Self::Listening(listener) => {
                let (socket, _) = listener.accept()?;
                *self = Self::of_socket(socket)?;
                Ok(Received::Client)
            }
            Self::Connected { input, unread, .. } => {
                let mut buffer = [0; 1 << 16];
                let count = input.read(&mut buffer)?;
                unread.extend_from_slice(buffer.get(..count).unwrap_or_default());
                Ok(if count == 0 { Received::End } else { Received::Bytes })
            }
        }
    }

    /// Takes a whole line out of what was received, without its end.
    pub fn take_line(&mut self) -> Option<String> {
        let Self::Connected { unread, .. } = self else { return None };
        let end = unread.iter().position(|byte| *byte == b'\n')?;
        let rest = unread.split_off(end.saturating_add(1));
        let mut line = std::mem::replace(unread, rest);
        line.truncate(end);
        Some(String::from_utf8_lossy(&line).into_owned())
    }

    /// Takes everything that was received.
    pub fn take_all(&mut self) -> Vec<u8> {
        match self {
            Self::Connected { unread, .. } => std::mem::take(unread),
            Self::Listening(_) => Vec::new(),
        }
    }

    /// Sends text to whoever is there.
    pub fn send(&mut self, text: &str) -> io::Result<()> {
        match self {
            Self::Connected { output, .. } => output.write_all(text.as_bytes()),
            Self::Listening(_) => Ok(()),
        }
    }
}
