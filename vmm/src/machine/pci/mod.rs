//! PCI: functions, their configuration space and BARs, bus 0, interrupt pins (PCI Local Bus Specification 2.1 and 3.0).

mod bar;
mod bus;
mod config_space;
mod function;
mod intx;

pub use bar::{Bar, BarKind, ROM_BAR};
pub(super) use bus::PciBus;
pub use bus::SlotFunction;
pub use config_space::{
    CONFIG_SPACE_SIZE, Command, ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, Register, Written,
    header,
};
pub use function::{Doorbell, DoorbellId, PciFunction, Window};
pub use intx::{InterruptPin, Pin};
