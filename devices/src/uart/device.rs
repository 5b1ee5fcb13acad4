//! The chip behind its register protocol: region 0 is its eight ports, region 1 the shadow page, interrupt 0 its
//! interrupt output.
//!
//! The client numbers the characters that it writes to THR, and the times that it reads RBR, each from 1 on; the number stands in the
//! offset above the port. A successor is told again what was not answered and what may not have been passed on, under the same numbers,
//! and carries out what its predecessor has not. An access without a number, 0, is always a new one.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_ipc::vfio_user::shadow::{SHADOW_SIZE, ShadowPage, ShadowState};
use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};

use super::fifo::DEPTH;
use super::model::{Line, Uart16550};
use super::registers::{PORTS, Register, lsr, msr};
use crate::registers::Interrupt;
use crate::stream::{BURST, Ends, Peer};

/// Index of the region that holds the ports.
pub const REGION_PORTS: u32 = 0;

/// Size of that region, in bytes: eight ports for each number of 48 bits.
pub const REGION_SIZE: u64 = PORTS << 48;
const NUMBER_SHIFT: u32 = PORTS.trailing_zeros();

/// A number that is so much lower than that of the last character is no repetition: the file that says so was a predecessor's, which
/// may have been broken into. The client repeats 64 KiB at the most.
const OLDEST: u64 = 1 << 17;

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
    /// What a predecessor left is known.
    begun: bool,
    /// Number of the character that was taken last, and of that which was said to be delivered.
    taken: u64,
    delivered: u64,
    /// How many of those taken were lost in the transmitter, behind others that still wait.
    lost: u64,
    published: u64,
    /// Characters of the line in the receiver.
    received: usize,
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

    /// Fetches characters from the line; false: none is there, or there is no room.
    pub fn fetch(&mut self) -> bool {
        self.settle_received();
        let (mut bytes, room) = ([0; DEPTH], self.receive_room().min(DEPTH));
        if room == 0 {
            return false;
        }
        let came = self.line.input(self.received, room, None);
        let count = came.len();
        let Some(place) = bytes.get_mut(..count) else { return false };
        place.copy_from_slice(came);
        if count > 0 {
            self.received = self.received.saturating_add(count);
            self.receive(place, count < room);
        }
        count > 0
    }

    /// What the guest has read, or thrown away, need not be kept for a successor any more.
    pub fn settle_received(&mut self) {
        let left = self.uart.received().min(self.received);
        self.line.taken(self.received.saturating_sub(left));
        self.received = left;
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
        self.transmit(false, Uart16550::pump);
        self.update();
    }

    /// The predecessor works no more: takes over what it left.
    fn begin(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            self.taken = self.line.begin_said();
        }
    }

    /// The client hears of the chip: characters may come to it.
    fn listen(&mut self) {
        if !std::mem::replace(&mut self.listening, true) {
            self.begin();
            while self.receive_low() && self.fetch() {}
        }
    }

    /// Whether a character was not taken before; then it is.
    fn take(&mut self, number: u64) -> bool {
        self.begin();
        let number = if number == 0 { self.taken.saturating_add(1) } else { number };
        let new = number > self.taken || self.taken.saturating_sub(number) >= OLDEST;
        if new {
            self.taken = number;
        }
        new
    }

    /// Does what may send characters, a `new` one among them, and notes which of them wait.
    fn transmit(&mut self, new: bool, act: impl FnOnce(&mut Uart16550, &mut Peer)) {
        let (held, waiting) = (self.uart.transmitting(), self.line.waiting());
        act(&mut self.uart, &mut self.line);
        let (holds, waits) = (self.uart.transmitting(), self.line.waiting());
        if held > 0 {
            // The newest have gone round in loopback, or were cleared, or overwritten.
            let there = holds.saturating_add(waits.saturating_sub(waiting));
            self.lost =
                self.lost.saturating_add(held.saturating_add(new.into()).saturating_sub(there) as u64);
        }
        if holds == 0 && waits == 0 {
            self.lost = 0;
        }
        self.line.set_newest(self.taken.saturating_sub(holds as u64).saturating_sub(self.lost));
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
        let waiting = self.line.waiting().saturating_add(self.uart.transmitting()) as u64;
        let delivered = self.taken.saturating_sub(waiting).saturating_sub(self.lost);
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
                Some(Region { size: REGION_SIZE, flags: RegionInfo::READ | RegionInfo::WRITE, file: None })
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
        self.listen();
        let number = offset >> NUMBER_SHIFT;
        // An 8-bit card: a wider access is as many cycles.
        for (byte, port) in data.iter_mut().zip(offset % PORTS..) {
            let register = Register::read_at(port, self.uart.dlab()).ok_or(AccessError::OutOfRange)?;
            if register != Register::Rbr {
                *byte = self.uart.read(register);
            } else if let Some(answer) = self.line.answered(number) {
                *byte = answer;
            } else {
                let before = self.uart.received();
                *byte = self.uart.read(register);
                let count = before.saturating_sub(self.uart.received());
                self.received = self.received.saturating_sub(count);
                self.line.answer(number, *byte, count);
            }
        }
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let number = offset >> NUMBER_SHIFT;
        for (byte, port) in data.iter().zip(offset % PORTS..) {
            let register = Register::written_at(port, self.uart.dlab()).ok_or(AccessError::OutOfRange)?;
            // What goes round in loopback has no number.
            let new = register == Register::Thr && !(self.uart.loopback() && number == 0);
            if !new || self.take(number) {
                self.transmit(new, |uart, line| uart.write(register, *byte, line));
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.transmit(false, |uart, _| uart.reset());
    }

    fn set_irq(&mut self, _index: u32, _start: u32, event: Option<OwnedFd>) -> Result<(), AccessError> {
        let connected = event.is_some();
        self.interrupt.connect(event)?;
        if connected {
            self.listen();
        }
        self.update();
        Ok(())
    }

    fn settle(&mut self, writes: u16) {
        self.writes = writes;
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_read_that_is_repeated_gets_the_same_character() {
        let (mut host, end) = UnixStream::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        host.write_all(b"ab").unwrap();
        let mut device = UartDevice::new(None, Ends::new(Some(end.into()), None));
        let mut read = |number: u64| {
            let mut byte = [0];
            device.read(REGION_PORTS, number << NUMBER_SHIFT, &mut byte).unwrap();
            byte[0]
        };
        // Without its FIFO the receiver holds one character: without a repetition nothing is left.
        assert_eq!([1, 1].map(&mut read), *b"aa");
        assert_eq!(read(2), 0);
    }
}
