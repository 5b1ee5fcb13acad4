//! The core's main thread: control messages, the machine's end, and what device processes say outside their data path.
//!
//! With a machine at work this thread sleeps: notifications and interrupts go by ioeventfd and irqfd past it.

use std::os::fd::{AsFd, BorrowedFd};

use bulkhead_ipc::channel::message::{FromCore, ToCore};
use bulkhead_ipc::channel::{Channel, ChannelError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::CoreError;
use super::assembly::Core;

/// Tokens of the loop's own descriptors; a device's events carry its index in the upper half.
const CONTROL: u64 = 0;
const END: u64 = 1;
const DEVICES: u64 = 1 << 32;
/// Events taken from the kernel at once.
const BATCH: usize = 16;
