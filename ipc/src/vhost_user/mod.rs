//! vhost-user, in both directions: what the `vhost` crate lacks is here, its message types are used.
//!
//! - [`backend`]: the daemon that serves a device to a front end;
//! - [`connection`]: framing, descriptors and deadlines, the same for both ends;
//! - [`message`]: message payloads, and their bytes;
//! - [`deadline`]: when a wait ends;
//! - [`frontend`]: the front end, which takes every reply as hostile input.
//!
//! The protocol is the "Vhost-user Protocol" document of QEMU (`docs/interop/vhost-user.rst`).

pub mod backend;
pub mod connection;
pub mod deadline;
pub mod frontend;
pub mod message;
