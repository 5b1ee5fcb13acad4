//! A PS/2 keyboard and its controller, in a process of their own: ports from the core over vfio-user, keys from the supervisor.
//!
//! | file | what |
//! | --- | --- |
//! | `keys` | the keyboard: commands and scan codes |
//! | `i8042` | the controller, ports 60 and 64 |
//! | `device` | both behind the register protocol, with their state in a file for a successor |

mod device;
mod i8042;
mod keys;

pub use device::{KeyboardDevice, REGION_SIZE};
pub use i8042::{I8042, Port};
