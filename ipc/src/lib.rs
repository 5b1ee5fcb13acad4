//! All that crosses a process boundary of a Bulkhead machine.
//!
//! `vmm` and `devices` build on this crate and never on each other.

pub mod channel;
pub mod connector;
pub mod jail;
pub mod limit_group;
pub mod log;
pub mod memory;
pub mod metrics;
mod rights;
pub mod tap;
pub mod vfio_user;
pub mod vhost_user;
pub mod words;
