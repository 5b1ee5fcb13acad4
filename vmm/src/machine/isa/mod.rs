//! The ISA bus below the PIIX3 and the devices on it.

mod bus;

pub use bus::{IrqLine, IsaDevice, PortRange};
