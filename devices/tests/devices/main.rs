//! The device program at work: driven by our own front end and a small virtio driver, by hostile drivers, and by QEMU.

mod blk;
mod console;
mod driver;
mod hostile;
mod inflight;
mod messages;
mod qemu;
mod rng;
mod supervised;
