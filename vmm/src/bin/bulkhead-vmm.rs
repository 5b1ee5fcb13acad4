//! `bulkhead-vmm`: the core process.
fn main() {}
