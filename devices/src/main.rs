//! `bulkhead-device TYPE`: one device in a process of its own.
fn main() {}
