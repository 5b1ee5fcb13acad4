//! A 16550A UART in a process of its own: registers from the core over vfio-user, characters from and to a descriptor.
//!
//! | file | what |
//! | --- | --- |
//! | `registers` | register map and bits |
//! | `fifo`, `model` | the chip, without a bit rate and without files |
//! | `device` | the chip behind the register protocol, with its shadow page and its interrupt |
//! | `schedule` | the process's scheduling policy |
//! | `event_loop` | the one thread of the process |

mod device;
mod event_loop;
mod fifo;
mod model;
mod registers;
mod schedule;

use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::shadow::ShadowPage;
use bulkhead_ipc::vfio_user::{Connection, ServerError};
use nix::errno::Errno;

use crate::stream::Ends;

pub use device::{REGION_PORTS, REGION_SHADOW, REGION_SIZE, UartDevice};
pub use event_loop::EventLoop;

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why a UART process ends.
#[derive(Debug, thiserror::Error)]
pub enum UartError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The core broke the register protocol, or went away in the middle of a message.
    #[error(transparent)]
    Registers(#[from] ServerError),
    /// A system call failed.
    #[error("{call}: {error}")]
    System {
        /// Name of the system call.
        call: &'static str,
        /// What it returned.
        error: Errno,
    },
}

/// A UART on the core's stream, its line on `ends`; it listens to the supervisor's `channel`. To be called before the process
/// is sealed; nothing is read from core or peer until [`EventLoop::run`].
///
/// # Errors
/// A system call fails.
pub fn open(socket: OwnedFd, ends: Ends, channel: &Channel) -> Result<EventLoop<'_>, UartError> {
    let shadow = ShadowPage::create()
        .inspect_err(|fault| tracing::warn!(%fault, "no shadow page; reads of the UART are slower"))
        .ok();
    let connection = Connection::new(socket, REPLY_DEADLINE)?;
    let events = EventLoop::new(connection, UartDevice::new(shadow, ends), channel)?;
    events.prefer_batches();
    Ok(events)
}

impl UartError {
    /// For `map_err` on a system call.
    fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |error| Self::System { call, error }
    }
}
