//! The device models of Bulkhead: one module for each type; `bulkhead-device` runs one of them in its own process.

pub mod uart;
