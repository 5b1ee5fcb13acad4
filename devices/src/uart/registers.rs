//! Register map and bits of the 16550A, named as in the PC16550D datasheet (National Semiconductor, 1995), section 8.

/// The registers (table II of the datasheet). Which one an offset means depends on direction and on LCR's DLAB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// Receiver buffer, read only.
    Rbr,
    /// Transmitter holding, write only.
    Thr,
    /// Interrupt enable.
    Ier,
    /// Interrupt identification, read only.
    Iir,
    /// FIFO control, write only.
    Fcr,
    /// Line control.
    Lcr,
    /// Modem control.
    Mcr,
    /// Line status.
    Lsr,
    /// Modem status.
    Msr,
    /// Scratchpad.
    Scr,
    /// Divisor latch, least significant byte.
    Dll,
    /// Divisor latch, most significant byte.
    Dlm,
}

/// Number of ports that the chip decodes.
pub const PORTS: u64 = 8;

impl Register {
    /// The register that a read of `offset` (0 to 7) reaches.
    pub fn read_at(offset: u64, dlab: bool) -> Option<Self> {
        Some(match offset {
            0 if dlab => Self::Dll,
            0 => Self::Rbr,
            1 if dlab => Self::Dlm,
            1 => Self::Ier,
            2 => Self::Iir,
            _ => return Self::both_at(offset),
        })
    }

    /// The register that a write to `offset` (0 to 7) reaches.
    pub fn written_at(offset: u64, dlab: bool) -> Option<Self> {
        Some(match offset {
            0 if dlab => Self::Dll,
            0 => Self::Thr,
            1 if dlab => Self::Dlm,
            1 => Self::Ier,
            2 => Self::Fcr,
            _ => return Self::both_at(offset),
        })
    }

    fn both_at(offset: u64) -> Option<Self> {
        Some(match offset {
            3 => Self::Lcr,
            4 => Self::Mcr,
            5 => Self::Lsr,
            6 => Self::Msr,
            7 => Self::Scr,
            _ => return None,
        })
    }
}

/// Interrupt enable register, section 8.6.
pub mod ier {
    /// Received data available, and character timeout.
    pub const ERBFI: u8 = 1 << 0;
    /// Transmitter holding register empty.
    pub const ETBEI: u8 = 1 << 1;
    /// Receiver line status.
    pub const ELSI: u8 = 1 << 2;
    /// Modem status.
    pub const EDSSI: u8 = 1 << 3;
    /// Bits that exist.
    pub const MASK: u8 = 0x0f;
}

/// Interrupt identification register, section 8.5 and table IV.
pub mod iir {
    /// No interrupt pending.
    pub const NONE: u8 = 0x01;
    /// Receiver line status, first priority.
    pub const LINE_STATUS: u8 = 0x06;
    /// Received data available, second priority.
    pub const DATA_AVAILABLE: u8 = 0x04;
    /// Character timeout, second priority.
    pub const TIMEOUT: u8 = 0x0c;
    /// Transmitter holding register empty, third priority.
    pub const THR_EMPTY: u8 = 0x02;
    /// Modem status, fourth priority.
    pub const MODEM_STATUS: u8 = 0x00;
    /// Set while the FIFOs are enabled.
    pub const FIFOS_ENABLED: u8 = 0xc0;
}

/// FIFO control register, section 8.4.
pub mod fcr {
    /// Enables both FIFOs; the other bits are programmed only together with it.
    pub const ENABLE: u8 = 1 << 0;
    /// Clears the receiver FIFO.
    pub const RESET_RECEIVER: u8 = 1 << 1;
    /// Clears the transmitter FIFO.
    pub const RESET_TRANSMITTER: u8 = 1 << 2;
    /// Where the receiver trigger level begins.
    pub const TRIGGER_SHIFT: u8 = 6;
}

/// Line control register, section 8.1.
pub mod lcr {
    /// Set break.
    pub const BREAK: u8 = 1 << 6;
    /// Divisor latch access.
    pub const DLAB: u8 = 1 << 7;
}

/// Modem control register, section 8.7.
pub mod mcr {
    /// Data terminal ready.
    pub const DTR: u8 = 1 << 0;
    /// Request to send.
    pub const RTS: u8 = 1 << 1;
    /// Auxiliary output 1.
    pub const OUT1: u8 = 1 << 2;
    /// Auxiliary output 2: on a PC it connects the interrupt output to the bus.
    pub const OUT2: u8 = 1 << 3;
    /// Loopback.
    pub const LOOP: u8 = 1 << 4;
    /// Bits that exist.
    pub const MASK: u8 = 0x1f;
}

/// Line status register, section 8.3.
pub mod lsr {
    /// Data ready.
    pub const DR: u8 = 1 << 0;
    /// Overrun error.
    pub const OE: u8 = 1 << 1;
    /// Parity error.
    pub const PE: u8 = 1 << 2;
    /// Framing error.
    pub const FE: u8 = 1 << 3;
    /// Break interrupt.
    pub const BI: u8 = 1 << 4;
    /// Transmitter holding register (or FIFO) empty.
    pub const THRE: u8 = 1 << 5;
    /// Transmitter empty.
    pub const TEMT: u8 = 1 << 6;
    /// At least one error in the receiver FIFO.
    pub const FIFO_ERROR: u8 = 1 << 7;
    /// The bits that reading clears and that make a line status interrupt.
    pub const ERRORS: u8 = OE | PE | FE | BI;
}

/// Modem status register, section 8.8.
pub mod msr {
    /// CTS has changed.
    pub const DCTS: u8 = 1 << 0;
    /// DSR has changed.
    pub const DDSR: u8 = 1 << 1;
    /// RI has gone from on to off.
    pub const TERI: u8 = 1 << 2;
    /// DCD has changed.
    pub const DDCD: u8 = 1 << 3;
    /// Clear to send.
    pub const CTS: u8 = 1 << 4;
    /// Data set ready.
    pub const DSR: u8 = 1 << 5;
    /// Ring indicator.
    pub const RI: u8 = 1 << 6;
    /// Data carrier detect.
    pub const DCD: u8 = 1 << 7;
}
