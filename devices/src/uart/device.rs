//! The chip behind its register protocol: region 0 is its eight ports, region 1 the shadow page, interrupt 0 its
//! interrupt output.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_ipc::vfio_user::shadow::{SHADOW_SIZE, ShadowPage, ShadowState};
use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};

use super::model::{Line, Uart16550};
use super::registers::{PORTS, Register, lsr, msr};
use crate::registers::Interrupt;
use crate::stream::{BURST, Ends, Peer};

/// Index of the region that holds the ports.
pub const REGION_PORTS: u32 = 0;

/// Index of the region that is the shadow page: its registers are LSR, IER and MSR, its stream register is THR.
pub const REGION_SHADOW: u32 = 1;

/// The UART as a process serves it.
#[derive(Debug, Default)]
pub struct UartDevice {
    uart: Uart16550,
    /// The other end of the line.
    pub line: Peer,
    shadow: Option<ShadowPage>,
    interrupt: Interrupt,
    /// The client has read a register or connected the interrupt.
    listening: bool,
    writes: u16,
    /// Characters written to THR, of which so many were said to be delivered.
    sent: u64,
    delivered: u64,
    published: u64,
}

impl UartDevice {
    /// A chip after its reset, and what its line leads to; without a shadow page every read is a round trip.
    pub fn new(shadow: Option<ShadowPage>, ends: Ends) -> Self {
        Self { shadow, line: Peer::new(ends), ..Self::default() }
    }

    /// Descriptors that the device holds.
    pub fn descriptors(&self) -> impl Iterator<Item = std::os::fd::BorrowedFd<'_>> {
        self.shadow.iter().map(AsFd::as_fd).chain(self.line.descriptors())
    }

    /// Characters that the receiver takes now. None before the client reads a register or connects the interrupt: the core does
    /// so when the settings that a predecessor had are written, and one of these clears the receiver.
    pub fn receive_room(&self) -> usize {
        if self.listening { self.uart.receive_room() } else { 0 }
    }

    /// Whether it is time to fetch more characters.
    pub fn receive_low(&self) -> bool {
        self.listening && self.uart.receive_low()
    }

    /// Characters arrive, no more than there is room for. `idle`: no more follow at once, so that what lies below the
    /// trigger level need not wait for the character timeout (the line between host and model has no bit rate).
    pub fn receive(&mut self, bytes: &[u8], idle: bool) {
        for byte in bytes {
            self.uart.receive(*byte);
        }
        if idle {
            self.uart.character_timeout();
        }
        self.update();
    }

    /// Takes the characters away that the guest has not read.
    pub fn take_received(&mut self) -> Vec<u8> {
        self.uart.take_received()
    }

    /// Whether a character timeout is running.
    pub fn timeout_armed(&self) -> bool {
        self.uart.timeout_armed()
    }

    /// Four character times have passed.
    pub fn character_timeout(&mut self) {
        self.uart.character_timeout();
        self.update();
    }

    /// The line may have room again.
    pub fn pump(&mut self) {
        self.uart.pump(&mut self.line);
        self.update();
    }

    /// Publishes what reads would bring, then signals an edge: whoever the interrupt wakes reads the new state.
    fn update(&mut self) {
        self.publish();
        // Without a descriptor the edge is kept for the one that comes.
        if self.interrupt.is_connected() && self.uart.take_edge() {
            self.interrupt.signal();
        }
    }

    /// Publishes how much of what the guest sent needs nobody's care any more.
    pub fn publish_delivered(&mut self) {
        let waiting = self.line.waiting().saturating_add(self.uart.transmitting());
        let delivered = self.sent.wrapping_sub(waiting as u64);
        if let Some(shadow) = &self.shadow
            && delivered != self.delivered
        {
            self.delivered = delivered;
            shadow.publish_delivered(delivered);
        }
    }

    fn publish(&mut self) {
        let Some(shadow) = &self.shadow else { return };
        let (line, modem) = (self.uart.lsr(), self.uart.msr());
        // Reading LSR clears its errors; and while THRE is clear a guest that polls had better wait for our answer.
        let line_valid = line & (lsr::ERRORS | lsr::FIFO_ERROR) == 0 && line & lsr::THRE != 0;
        let modem_valid = modem & (msr::DCTS | msr::DDSR | msr::TERI | msr::DDCD) == 0;
        let plain = !self.uart.dlab() && !self.uart.loopback();
        let credit = if plain && line & lsr::THRE != 0 { self.line.room().min(BURST) } else { 0 };
        let state = ShadowState {
            settled: self.writes,
            credit: u16::try_from(credit).unwrap_or(u16::MAX),
            registers: [line, self.uart.ier(), modem],
            valid: u8::from(line_valid) | u8::from(!self.uart.dlab()) << 1 | u8::from(modem_valid) << 2,
        };
        let word = state.pack();
        if word != self.published {
            self.published = word;
            shadow.publish(state);
        }
    }
}

impl Line for Peer {
    fn has_room(&self) -> bool {
        self.room() > 0
    }

    fn transmit(&mut self, byte: u8) {
        self.say(&[byte]);
    }
}

impl RegisterDevice for UartDevice {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 2, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        match index {
            REGION_PORTS => {
                Some(Region { size: PORTS, flags: RegionInfo::READ | RegionInfo::WRITE, file: None })
            }
            REGION_SHADOW => {
                let file = self.shadow.as_ref()?.as_fd();
                Some(Region { size: SHADOW_SIZE as u64, flags: 0, file: Some(file) })
            }
            _ => None,
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        u32::from(index == 0)
    }

    fn read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.listening = true;
        // An 8-bit card: a wider access is as many cycles.
        for (byte, port) in data.iter_mut().zip(offset..) {
            let register = Register::read_at(port, self.uart.dlab()).ok_or(AccessError::OutOfRange)?;
            *byte = self.uart.read(register);
        }
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        for (byte, port) in data.iter().zip(offset..) {
            let register = Register::written_at(port, self.uart.dlab()).ok_or(AccessError::OutOfRange)?;
            self.sent = self.sent.wrapping_add(u64::from(register == Register::Thr));
            self.uart.write(register, *byte, &mut self.line);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.uart.reset();
    }

    fn set_irq(&mut self, _index: u32, _start: u32, event: Option<OwnedFd>) -> Result<(), AccessError> {
        self.listening |= event.is_some();
        self.interrupt.connect(event)?;
        self.update();
        Ok(())
    }

    fn settle(&mut self, writes: u16) {
        self.writes = writes;
        self.update();
    }
}
