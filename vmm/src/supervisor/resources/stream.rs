//! The host's side of a serial port or console.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use bulkhead_ipc::channel::message::TYPED;
use bulkhead_ipc::words;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use super::{ResourceError, append};
use crate::supervisor::config::StreamTarget;
use crate::supervisor::terminal;

/// What a serial port or console is connected to.
#[derive(Debug)]
pub struct Stream {
    /// What the device process reads.
    pub input: Option<OwnedFd>,
    /// What it writes.
    pub output: Option<OwnedFd>,
    /// The terminal of this process, whose keys the supervisor filters and passes on.
    pub keyboard: Option<Keyboard>,
    /// A socket whose connections are handed to the device.
    pub listener: Option<Listener>,
    /// Whether `bulkhead console` may connect.
    pub attachable: bool,
    /// Whether the output may be a regular file, which needs the right to write one.
    pub writes_file: bool,
    /// The path of the pseudo terminal, to be told to the user.
    pub pty: Option<PathBuf>,
    /// The other side of the pseudo terminal, held open so that the device does not see a hang-up before, between and
    /// after users of it.
    _pty_user: Option<OwnedFd>,
    /// What came for the guest and it has not got, which outlives the process of the device; none of named ports, which share one.
    pub typed: Option<File>,
    /// The output is a file that this machine has opened to append to it.
    pub own_file: bool,
}

/// The way of the keys from this terminal to the device process.
#[derive(Debug)]
pub struct Keyboard {
    to_device: UnixStream,
}

impl Keyboard {
    /// Passes keys on without ever waiting: what the guest does not read in time is lost, as on a serial line.
    pub fn type_keys(&self, keys: &[u8]) {
        if !keys.is_empty() {
            let _lost = (&self.to_device).write(keys);
        }
    }
}

impl Stream {
    const fn empty() -> Self {
        Self {
            input: None,
            output: None,
            keyboard: None,
            listener: None,
            attachable: false,
            writes_file: false,
            pty: None,
            _pty_user: None,
            typed: None,
            own_file: false,
        }
    }

    /// Opens the target; `None` when it is off.
    pub fn open(field: &'static str, target: &StreamTarget) -> Result<Option<Self>, ResourceError> {
        let host = |what: &str| {
            let what = format!("{field}: {what}");
            move |reason: io::Error| ResourceError::Host { what, reason }
        };
        Ok(Some(match target {
            StreamTarget::Off => return Ok(None),
            StreamTarget::Attach => Self { attachable: true, ..Self::empty() },
            StreamTarget::Stdio => Self::stdio().map_err(host("cannot use standard input and output"))?,
            StreamTarget::File(path) => {
                let output = Some(append(field, path)?);
                let own_file =
                    output.as_ref().is_some_and(|file| file.metadata().is_ok_and(|it| it.is_file()));
                Self { output: output.map(Into::into), writes_file: true, own_file, ..Self::empty() }
            }
            StreamTarget::Pty => Self::pty().map_err(host("cannot make a pseudo terminal"))?,
            StreamTarget::Unix(path) => {
                Self { listener: Some(Listener::bind(field, path)?), attachable: true, ..Self::empty() }
            }
        }))
    }

    /// As [`Self::open`], for a device of one stream: with memory for what is typed.
    pub fn open_alone(field: &'static str, target: &StreamTarget) -> Result<Option<Self>, ResourceError> {
        let Some(stream) = Self::open(field, target)? else { return Ok(None) };
        let failed =
            |reason| ResourceError::Host { what: format!("{field}: memory for what is typed"), reason };
        Ok(Some(Self { typed: Some(typed(1).map_err(failed)?), ..stream }))
    }

    /// As [`Self::open_alone`], for a serial port: with what it needs to pass on each byte of the guest once.
    pub fn open_serial(field: &'static str, target: &StreamTarget) -> Result<Option<Self>, ResourceError> {
        let Some(stream) = Self::open(field, target)? else { return Ok(None) };
        let failed = |reason| ResourceError::Host { what: format!("{field}: memory"), reason };
        Ok(Some(Self { typed: Some(typed(2).map_err(failed)?), ..stream }))
    }

    /// Forgets what was typed: the machine starts anew.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reset(&self) -> io::Result<()> {
        self.typed.as_ref().map_or(Ok(()), forget)
    }

    fn stdio() -> io::Result<Self> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let writes_file = File::from(stdout.as_fd().try_clone_to_owned()?).metadata()?.is_file();
        // A terminal is opened anew for writing only: the device process shall neither read keys nor share the
        // flags of our descriptor, and must not wait where nobody reads. A redirected output is shared, for its
        // position in the file counts.
        let anew = libc::O_NOCTTY | libc::O_NONBLOCK;
        let output = match OpenOptions::new().write(true).custom_flags(anew).open("/proc/self/fd/1") {
            Ok(file) if stdout.is_terminal() => file.into(),
            _ => stdout.as_fd().try_clone_to_owned()?,
        };
        if !stdin.is_terminal() {
            let input = Some(stdin.as_fd().try_clone_to_owned()?);
            return Ok(Self { input, output: Some(output), writes_file, ..Self::empty() });
        }
        if !terminal::stdin_is_ours() {
            return Ok(Self { output: Some(output), writes_file, ..Self::empty() });
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok(Self {
            input: Some(theirs.into()),
            output: Some(output),
            keyboard: Some(Keyboard { to_device: ours }),
            writes_file,
            ..Self::empty()
        })
    }

    fn pty() -> io::Result<Self> {
        let OpenptyResult { master, slave } = openpty(None, None)?;
        let path = nix::unistd::ttyname(&slave)?;
        // The guest is the one who echoes.
        let mut settings = tcgetattr(&slave)?;
        cfmakeraw(&mut settings);
        tcsetattr(&slave, SetArg::TCSANOW, &settings)?;
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK;
        fcntl(&master, FcntlArg::F_SETFL(flags))?;
        for side in [&master, &slave] {
            fcntl(side, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        Ok(Self {
            input: Some(master.try_clone()?),
            output: Some(master),
            pty: Some(path),
            _pty_user: Some(slave),
            ..Self::empty()
        })
    }
}

/// Memory for what is typed at so many streams; whoever maps it is safe.
///
/// # Errors
/// The kernel has none.
pub fn typed(streams: u64) -> io::Result<File> {
    Ok(words::sealed(c"typed", streams.saturating_mul(TYPED))?.into())
}

/// Empties such memory.
///
/// # Errors
/// The kernel refuses.
pub fn forget(memory: &File) -> io::Result<()> {
    let length = usize::try_from(memory.metadata()?.len()).map_err(io::Error::other)?;
    memory.write_all_at(&vec![0; length], 0)
}

/// A listening Unix socket whose path goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds `path`. A socket that a dead process left there is replaced; anything else there is not touched.
    pub fn bind(field: &'static str, path: &Path) -> Result<Self, ResourceError> {
        let failed = |error: io::Error| super::open_error(field, path, &error);
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(field, path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        let listener = Self { socket, path: path.to_owned() };
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// Accepts one connection if there is one.
    ///
    /// # Errors
    /// There is none, or no descriptor for it.
    pub fn accept(&self) -> Result<UnixStream, Errno> {
        let accepted = self.socket.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        accepted.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    }
}

fn remove_stale(field: &'static str, path: &Path) -> Result<(), ResourceError> {
    let failed = |error: io::Error| super::open_error(field, path, &error);
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        let (path, field) = (path.to_owned(), field.to_owned());
        let wanted = "a path where nothing is, or a socket that nobody uses,";
        return Err(ResourceError::Kind { field, path, is: super::kind(&metadata), wanted });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        _ => Err(ResourceError::SocketInUse { field, path: path.to_owned() }),
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
