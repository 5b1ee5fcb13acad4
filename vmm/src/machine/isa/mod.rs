//! The ISA bus below the PIIX3 and the devices on it.

mod bus;
mod calendar;
mod debug_port;
mod dma;
mod fw_cfg;
mod i8042;
mod port92;
mod pvpanic;
mod rtc;

pub(super) use bus::{IN_KERNEL_PORTS, IsaBus};
pub use bus::{IrqLine, IsaDevice, PortRange};
pub(super) use debug_port::DebugPort;
pub(super) use dma::Dma;
pub(super) use fw_cfg::{FwCfg, MemoryRange};
pub(super) use i8042::I8042;
pub(super) use port92::Port92;
pub(super) use pvpanic::{PORT as PVPANIC_PORT, PvPanic};
pub(super) use rtc::{CENTURY_REGISTER, IRQ as RTC_IRQ, Rtc};
