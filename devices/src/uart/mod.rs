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

use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, DeviceConfig, DeviceStart, FromDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::vfio_user::shadow::ShadowPage;
use bulkhead_ipc::vfio_user::{Connection, ServerError};
use nix::errno::Errno;

use crate::stream::Ends;

pub use device::{REGION_PORTS, REGION_SHADOW, UartDevice};
pub use event_loop::EventLoop;

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why a UART process ends.
#[derive(Debug, thiserror::Error)]
pub enum UartError {
    /// The start message is for another device type.
    #[error("the start message does not describe a UART")]
    NotAUart,
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The process could not be sealed.
    #[error(transparent)]
    Jail(#[from] JailError),
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

/// Serves the UART that the start message describes, until the supervisor says stop or the core closes its stream.
///
/// Seals the process under the policy `UartMain` before it reads from the core or the peer, then answers `Ready`.
///
/// # Errors
/// The start message is wrong, the process cannot be sealed, or the core breaks the register protocol.
pub fn run(start: DeviceStart, mut descriptors: Descriptors, channel: Channel) -> Result<(), UartError> {
    let DeviceConfig::Uart(config) = start.config else { return Err(UartError::NotAUart) };
    let socket = descriptors.take(start.socket)?;
    let input = config.input.map(|index| descriptors.take(index)).transpose()?;
    let output = config.output.map(|index| descriptors.take(index)).transpose()?;
    descriptors.finish()?;

    let shadow = ShadowPage::create()
        .inspect_err(|fault| tracing::warn!(%fault, "no shadow page; reads of the UART are slower"))
        .ok();
    let connection = Connection::new(socket, REPLY_DEADLINE)?;
    let device = UartDevice::new(shadow, Ends::new(input, output));
    let events = EventLoop::new(connection, device, channel)?;
    events.prefer_batches();
    let sealed = jail::seal(PolicyName::UartMain, &events.descriptors())?;
    let ready = FromDevice::Ready { policies: sealed.policies() };
    events.channel().send(&ready, &sealed.descriptors())?;
    drop(sealed);
    events.run()
}

impl UartError {
    /// For `map_err` on a system call.
    fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |error| Self::System { call, error }
    }
}
