//! A watchdog of the Intel 6300ESB in a process of its own: registers from the core over vfio-user, a word to the supervisor when it
//! has run out. What follows is the supervisor's affair; only an NMI is its own interrupt, where it was given one.
//!
//! | file | what |
//! | --- | --- |
//! | `i6300esb` | registers and counter |
//! | `device` | both behind the register protocol, with their state in a file for a successor |

mod device;
mod i6300esb;

pub use device::{REGION_SIZE, WatchdogDevice};
pub use i6300esb::{I6300Esb, Outcome};
