//! The device program at work: driven by our own front end and a small virtio driver, by hostile drivers, and by QEMU.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss
)]

mod attached;
mod balloon;
mod blk;
mod console;
mod driver;
mod formats;
mod hostile;
mod inflight;
mod limit_group;
mod malformed;
mod messages;
mod net;
mod options;
mod pmem;
mod ports;
mod power_cut;
mod qemu;
mod rates;
mod relay;
mod rng;
mod services;
mod storm;
mod storm_fs;
mod storm_net;
mod storm_passt;
mod storm_queues;
mod storm_registers;
mod storm_serial;
mod storm_typed;
mod supervised;
mod vsock;
