//! What this host offers.

pub mod kvm;
