//! The core process.
