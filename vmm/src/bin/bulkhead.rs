//! `bulkhead`: the supervisor and its command line.
fn main() {}
