//! The core process of a machine (`bulkhead-vmm`) and its supervisor (`bulkhead`).
//!
//! Imports point downwards: `core` wires everything; `virtio`, `kvm` and `boot` know `machine`;
//! `machine` knows neither KVM nor files nor processes; `supervisor` shares nothing with the core but `bulkhead-ipc`.

pub mod boot;
pub mod core;
pub mod kvm;
pub mod machine;
pub mod supervisor;
pub mod virtio;
