//! The 16550A as the datasheet describes it (PC16550D), without a bit rate: a character that is written leaves at once if
//! the line has room. Sections in the comments are the datasheet's.

use super::fifo::{DEPTH, ReceiveFifo, TransmitFifo};
use super::registers::{Register, fcr, ier, iir, lcr, lsr, mcr, msr};

/// Where transmitted characters go.
pub trait Line {
    /// Whether another character can be taken now.
    fn has_room(&self) -> bool;
    /// Takes a character; called only after [`Line::has_room`] said yes.
    fn transmit(&mut self, byte: u8);
}

/// What the modem inputs show outside of loopback: the other end is there and ready.
const MODEM_INPUTS: u8 = msr::CTS | msr::DSR | msr::DCD;

/// Receiver trigger levels, section 8.4.
const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];

/// The chip.
#[derive(Debug)]
pub struct Uart16550 {
    receive: ReceiveFifo,
    transmit: TransmitFifo,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    dll: u8,
    dlm: u8,
    fifos: bool,
    trigger: usize,
    /// LSR bits 1 to 4.
    errors: u8,
    /// MSR bits 0 to 3.
    deltas: u8,
    /// THR empty interrupt latched.
    thr_empty: bool,
    /// Character timeout latched.
    timeout: bool,
    /// The interrupt output, behind OUT2.
    interrupt: bool,
    /// It has risen since [`Uart16550::take_edge`].
    edge: bool,
}

impl Default for Uart16550 {
    fn default() -> Self {
        let mut uart = Self {
            receive: ReceiveFifo::default(),
            transmit: TransmitFifo::default(),
            ier: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            dll: 0,
            dlm: 0,
            fifos: false,
            trigger: 1,
            errors: 0,
            deltas: 0,
            thr_empty: false,
            timeout: false,
            interrupt: false,
            edge: false,
        };
        uart.reset();
        uart
    }
}

impl Uart16550 {
    /// Master reset (table III): the divisor latch and the scratchpad keep what they hold.
    pub fn reset(&mut self) {
        self.receive.clear();
        self.transmit.clear();
        self.ier = 0;
        self.lcr = 0;
        self.mcr = 0;
        self.fifos = false;
        self.trigger = 1;
        self.errors = 0;
        self.deltas = 0;
        self.thr_empty = false;
        self.timeout = false;
        self.interrupt = false;
        self.edge = false;
    }

    /// Whether LCR's DLAB is set.
    pub fn dlab(&self) -> bool {
        self.lcr & lcr::DLAB != 0
    }

    /// Characters that wait in the transmitter for room on the line.
    pub fn transmitting(&self) -> usize {
        self.transmit.len()
    }

    /// Whether the chip is in loopback.
    pub fn loopback(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }

    /// Reads a register, with the side effects that reading it has.
    pub fn read(&mut self, register: Register) -> u8 {
        match register {
            Register::Rbr => self.read_rbr(),
            Register::Ier => self.ier,
            Register::Iir => self.read_iir(),
            Register::Lcr => self.lcr,
            Register::Mcr => self.mcr,
            Register::Lsr => self.read_lsr(),
            Register::Msr => self.read_msr(),
            Register::Scr => self.scr,
            Register::Dll => self.dll,
            Register::Dlm => self.dlm,
            // Write only; no offset reads them.
            Register::Thr | Register::Fcr => 0,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, register: Register, value: u8, line: &mut impl Line) {
        match register {
            Register::Thr => self.write_thr(value, line),
            Register::Ier => self.write_ier(value),
            Register::Fcr => self.write_fcr(value),
            Register::Lcr => self.write_lcr(value),
            Register::Mcr => self.write_mcr(value, line),
            Register::Scr => self.scr = value,
            Register::Dll => self.dll = value,
            Register::Dlm => self.dlm = value,
            // Read only. Writing LSR is for factory tests (section 8.3), writing MSR is not described.
            Register::Lsr | Register::Msr | Register::Rbr | Register::Iir => {}
        }
    }

    /// LSR as it stands, without the side effects of a read.
    pub fn lsr(&self) -> u8 {
        let ready = if self.receive.is_empty() { 0 } else { lsr::DR };
        let empty = if self.transmit.is_empty() { lsr::THRE | lsr::TEMT } else { 0 };
        let fifo = if self.fifos && (self.receive.has_errors() || self.errors & !lsr::OE != 0) {
            lsr::FIFO_ERROR
        } else {
            0
        };
        ready | self.errors | empty | fifo
    }

    /// MSR as it stands, without the side effects of a read.
    pub fn msr(&self) -> u8 {
        self.modem_lines(self.mcr) | self.deltas
    }

    /// IER as it stands.
    pub fn ier(&self) -> u8 {
        self.ier
    }

    /// Characters that the receiver takes from outside without an overrun; none in loopback, where its input is disconnected.
    pub fn receive_room(&self) -> usize {
        if self.loopback() { 0 } else { self.depth().saturating_sub(self.receive.len()) }
    }

    /// Whether the receiver is at most half full: a good moment to fetch more.
    pub fn receive_low(&self) -> bool {
        !self.loopback() && self.receive.len().saturating_mul(2) <= self.depth()
    }

    /// Characters from outside that the guest has not read.
    pub fn received(&self) -> usize {
        self.receive.came_from_outside()
    }

    /// A character arrives from outside.
    pub fn receive(&mut self, byte: u8) {
        if !self.loopback() {
            self.arrive(byte, None);
        }
    }

    /// Whether a character timeout can still come: there are characters, fewer than the trigger level.
    pub fn timeout_armed(&self) -> bool {
        self.fifos && !self.timeout && !self.receive.is_empty() && self.receive.len() < self.trigger
    }

    /// Nothing has arrived and nothing was read for four character times (section 8.10).
    pub fn character_timeout(&mut self) {
        if self.timeout_armed() {
            self.timeout = true;
            self.update_interrupt();
        }
    }

    /// The line has room again: sends what waits.
    pub fn pump(&mut self, line: &mut impl Line) {
        if self.transmit.is_empty() {
            return;
        }
        self.drain(line);
        self.update_interrupt();
    }

    /// Whether the interrupt output has risen since the last call and is still high: the edge that an ISA bus sees.
    pub fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge) && self.interrupt
    }

    fn depth(&self) -> usize {
        if self.fifos { DEPTH } else { 1 }
    }

    /// A character arrives: by the loopback with these errors, or from outside.
    fn arrive(&mut self, byte: u8, errors: Option<u8>) {
        if self.receive.push(byte, errors, self.depth()) {
            // A new character restarts the timeout (section 8.10).
            self.timeout = false;
            if self.receive.len() == 1 {
                self.errors |= self.receive.reveal_errors();
            }
        } else {
            self.errors |= lsr::OE;
        }
        self.update_interrupt();
    }

    fn read_rbr(&mut self) -> u8 {
        let byte = self.receive.pop().unwrap_or(0);
        self.timeout = false;
        self.errors |= self.receive.reveal_errors();
        self.update_interrupt();
        byte
    }

    fn read_iir(&mut self) -> u8 {
        let source = self.highest_priority();
        if source == iir::THR_EMPTY {
            self.thr_empty = false;
            self.update_interrupt();
        }
        if self.fifos { source | iir::FIFOS_ENABLED } else { source }
    }

    fn read_lsr(&mut self) -> u8 {
        let value = self.lsr();
        self.errors = 0;
        self.update_interrupt();
        value
    }

    fn read_msr(&mut self) -> u8 {
        let value = self.msr();
        self.deltas = 0;
        self.update_interrupt();
        value
    }

    fn write_thr(&mut self, byte: u8, line: &mut impl Line) {
        // Writing THR takes the interrupt back (section 8.5, table IV) …
        self.thr_empty = false;
        self.update_interrupt();
        self.transmit.push(byte, self.depth());
        // … and an instant later the transmitter is empty again, if the line has room.
        self.drain(line);
        self.update_interrupt();
    }

    fn drain(&mut self, line: &mut impl Line) {
        while self.loopback() || line.has_room() {
            let Some(byte) = self.transmit.pop() else { break };
            if self.loopback() {
                self.arrive(byte, Some(0));
            } else {
                line.transmit(byte);
            }
        }
        if self.transmit.is_empty() {
            self.thr_empty = true;
        }
    }

    fn write_ier(&mut self, value: u8) {
        let enabled = !self.ier & value;
        self.ier = value & ier::MASK;
        // Enabling the interrupt while the transmitter is empty raises it at once; drivers start transmission so.
        if enabled & ier::ETBEI != 0 && self.transmit.is_empty() {
            self.thr_empty = true;
        }
        self.update_interrupt();
    }

    fn write_fcr(&mut self, value: u8) {
        let enable = value & fcr::ENABLE != 0;
        let changed = enable != self.fifos;
        if changed || value & fcr::RESET_RECEIVER != 0 {
            self.receive.clear();
            self.timeout = false;
        }
        if (changed || value & fcr::RESET_TRANSMITTER != 0) && !self.transmit.is_empty() {
            self.transmit.clear();
            self.thr_empty = true;
        }
        self.fifos = enable;
        if enable {
            let level = usize::from(value >> fcr::TRIGGER_SHIFT);
            self.trigger = TRIGGER_LEVELS.get(level).copied().unwrap_or(1);
            // The timeout belongs to what lies below the trigger.
            self.timeout &= self.receive.len() < self.trigger;
        } else {
            self.trigger = 1;
        }
        self.update_interrupt();
    }

    fn write_lcr(&mut self, value: u8) {
        let breaking = value & !self.lcr & lcr::BREAK != 0;
        self.lcr = value;
        // The serial output goes to the spacing state; in loopback the receiver sees a break (sections 8.1, 8.7).
        if breaking && self.loopback() {
            self.arrive(0, Some(lsr::BI | lsr::FE));
        }
    }

    fn write_mcr(&mut self, value: u8, line: &mut impl Line) {
        let before = self.modem_lines(self.mcr);
        self.mcr = value & mcr::MASK;
        let after = self.modem_lines(self.mcr);
        let changed = before ^ after;
        for (input, delta) in [(msr::CTS, msr::DCTS), (msr::DSR, msr::DDSR), (msr::DCD, msr::DDCD)] {
            if changed & input != 0 {
                self.deltas |= delta;
            }
        }
        if before & !after & msr::RI != 0 {
            self.deltas |= msr::TERI;
        }
        // What waited for the line goes round in loopback.
        self.pump(line);
        self.update_interrupt();
    }

    /// MSR bits 4 to 7: in loopback they show the modem control outputs (section 8.7).
    fn modem_lines(&self, mcr: u8) -> u8 {
        if mcr & mcr::LOOP == 0 {
            return MODEM_INPUTS;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(output, _)| mcr & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }

    /// Source of the pending interrupt, section 8.5, table IV.
    fn highest_priority(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        let available = self.receive.len() >= self.trigger && !self.receive.is_empty();
        if enabled(ier::ELSI) && self.errors != 0 {
            iir::LINE_STATUS
        } else if enabled(ier::ERBFI) && available {
            iir::DATA_AVAILABLE
        } else if enabled(ier::ERBFI) && self.timeout {
            iir::TIMEOUT
        } else if enabled(ier::ETBEI) && self.thr_empty {
            iir::THR_EMPTY
        } else if enabled(ier::EDSSI) && self.deltas != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// On a PC OUT2 connects the interrupt output to the bus, and in loopback OUT2 is forced off (section 8.7).
    fn update_interrupt(&mut self) {
        let connected = self.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        let interrupt = connected && self.highest_priority() != iir::NONE;
        self.edge |= interrupt && !self.interrupt;
        self.interrupt = interrupt;
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
