//! MC146818 real-time clock and CMOS RAM, ports 70 and 71.
//!
//! The time is the host's plus an offset that the guest sets by setting its clock. Alarm, periodic and update interrupts are
//! not raised; their registers can be written and read.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::host::Host;
use super::super::sync::lock;
use super::calendar::{DateTime, from_bcd, to_bcd};
use super::{IsaDevice, PortRange};

const INDEX: u16 = 0x70;
/// Bytes of CMOS RAM, the clock's registers included.
const SIZE: usize = 128;

/// The clock's registers and the places that PC firmware keeps in CMOS RAM.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0A;
    pub(super) const B: u8 = 0x0B;
    pub(super) const C: u8 = 0x0C;
    pub(super) const D: u8 = 0x0D;
    pub(super) const EQUIPMENT: u8 = 0x14;
    pub(super) const BASE_MEMORY: u8 = 0x15;
    pub(super) const EXTENDED_MEMORY: u8 = 0x17;
    pub(super) const EXTENDED_MEMORY_COPY: u8 = 0x30;
    pub(super) const MEMORY_ABOVE_16M: u8 = 0x34;
    pub(super) const MEMORY_ABOVE_4G: u8 = 0x5B;
    pub(super) const EXTRA_CPUS: u8 = 0x5F;
}

/// Where the century is, in BCD: a place that PC firmware chose and the FADT tells.
pub(in super::super) const CENTURY_REGISTER: u8 = 0x32;

/// Register A after power-on: 32,768 Hz time base, 1,024 Hz periodic rate.
const A_RESET: u8 = 0x26;
/// Register A: the time is about to change.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register B: updates are held off while the guest sets the time.
const B_SET: u8 = 1 << 7;
/// Register B: the interrupt enables and the square wave, cleared by RESET#.
const B_CLEARED_BY_RESET: u8 = 0x78;
/// Register B: binary instead of BCD; 24 hours instead of 12.
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Register C: the time changed since it was read.
const C_UPDATE: u8 = 1 << 4;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// Hours: afternoon, in 12-hour format.
const PM: u8 = 1 << 7;
/// Update-in-progress is set this long before the seconds change: 244 µs notice and 1,984 µs of update.
const UPDATE_MICROS: u32 = 2228;

struct State {
    index: u8,
    ram: [u8; SIZE],
    /// Guest time minus host time in seconds.
    offset: i64,
    /// The guest's second when register C was read last.
    seen: i64,
}

/// The clock.
pub(in super::super) struct Rtc {
    state: Mutex<State>,
    host: Arc<dyn Host>,
}

impl State {
    fn get(&self, register: u8) -> u8 {
        self.ram.get(usize::from(register)).copied().unwrap_or(0xFF)
    }

    fn put(&mut self, register: u8, value: u8) {
        if let Some(byte) = self.ram.get_mut(usize::from(register)) {
            *byte = value;
        }
    }

    fn put_u16(&mut self, register: u8, value: u64) {
        let [low, high] = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        self.put(register, low);
        self.put(register.wrapping_add(1), high);
    }

    fn encode(&self, value: u8) -> u8 {
        if self.get(register::B) & B_BINARY != 0 { value } else { to_bcd(value) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.get(register::B) & B_BINARY != 0 { value } else { from_bcd(value) }
    }

    fn guest_seconds(&self, now: Duration) -> i64 {
        i64::try_from(now.as_secs()).unwrap_or(i64::MAX).saturating_add(self.offset)
    }

    /// Stores the time of `now` in the time registers, unless the guest is setting them.
    fn update(&mut self, now: Duration) {
        if self.get(register::B) & B_SET != 0 {
            return;
        }
        let time = DateTime::from_unix(self.guest_seconds(now));
        let hours = if self.get(register::B) & B_24_HOURS != 0 {
            self.encode(time.hour)
        } else {
            let twelve = match time.hour % 12 {
                0 => 12,
                hour => hour,
            };
            self.encode(twelve) | if time.hour >= 12 { PM } else { 0 }
        };
        self.put(register::SECONDS, self.encode(time.second));
        self.put(register::MINUTES, self.encode(time.minute));
        self.put(register::HOURS, hours);
        self.put(register::WEEKDAY, self.encode(time.weekday));
        self.put(register::DAY, self.encode(time.day));
        self.put(register::MONTH, self.encode(time.month));
        self.put(register::YEAR, self.encode(time.year_of_century()));
        self.put(CENTURY_REGISTER, to_bcd(time.century()));
    }

    /// Takes the time registers for the guest's time.
    fn adopt(&mut self, now: Duration) {
        let hours = self.get(register::HOURS);
        let hour = if self.get(register::B) & B_24_HOURS != 0 {
            self.decode(hours)
        } else {
            let twelve = self.decode(hours & !PM).checked_rem(12).unwrap_or(0);
            if hours & PM != 0 { twelve.saturating_add(12) } else { twelve }
        };
        let century = i64::from(from_bcd(self.get(CENTURY_REGISTER)));
        let year =
            century.saturating_mul(100).saturating_add(i64::from(self.decode(self.get(register::YEAR))));
        let date = (self.decode(self.get(register::MONTH)), self.decode(self.get(register::DAY)));
        let time = (hour, self.decode(self.get(register::MINUTES)), self.decode(self.get(register::SECONDS)));
        let seconds = DateTime::to_unix(year, date, time);
        let host = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        self.offset = seconds.saturating_sub(host);
        self.seen = seconds;
    }

    fn read(&mut self, now: Duration) -> u8 {
        match self.index {
            register::A => {
                let setting = self.get(register::B) & B_SET != 0;
                let close = now.subsec_micros() >= 1_000_000 - UPDATE_MICROS;
                self.get(register::A) | if close && !setting { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            register::C => {
                let second = self.guest_seconds(now);
                let updated = second != self.seen && self.get(register::B) & B_SET == 0;
                self.seen = second;
                if updated { C_UPDATE } else { 0 }
            }
            register::D => D_VALID,
            index => {
                self.update(now);
                self.get(index)
            }
        }
    }

    fn write(&mut self, value: u8, now: Duration) {
        match self.index {
            register::A => self.put(register::A, value & !A_UPDATE_IN_PROGRESS),
            register::B => {
                self.update(now);
                let was_setting = self.get(register::B) & B_SET != 0;
                self.put(register::B, value);
                if was_setting && value & B_SET == 0 {
                    self.adopt(now);
                }
            }
            register::C | register::D => {}
            register::SECONDS
            | register::MINUTES
            | register::HOURS
            | register::WEEKDAY
            | register::DAY
            | register::MONTH
            | register::YEAR
            | CENTURY_REGISTER => {
                self.update(now);
                let index = self.index;
                self.put(index, value);
                if self.get(register::B) & B_SET == 0 {
                    self.adopt(now);
                }
            }
            index => self.put(index, value),
        }
    }
}

impl Rtc {
    /// The clock of a machine with so much RAM (below and above 4 GiB, in bytes) and so many CPUs.
    pub(in super::super) fn new(host: Arc<dyn Host>, ram_below_4g: u64, ram_above_4g: u64, cpus: u8) -> Self {
        let mut state = State { index: 0, ram: [0; SIZE], offset: 0, seen: 0 };
        state.put(register::A, A_RESET);
        state.put(register::B, B_24_HOURS);
        // A coprocessor, no floppy drives.
        state.put(register::EQUIPMENT, 0x02);
        // In KiB: conventional memory, and memory from 1 MiB, as far as 16 bits go.
        state.put_u16(register::BASE_MEMORY, 640);
        let extended = ram_below_4g.saturating_sub(1 << 20) >> 10;
        state.put_u16(register::EXTENDED_MEMORY, extended);
        state.put_u16(register::EXTENDED_MEMORY_COPY, extended);
        // In units of 64 KiB: memory from 16 MiB below 4 GiB, and memory above 4 GiB.
        state.put_u16(register::MEMORY_ABOVE_16M, ram_below_4g.saturating_sub(16 << 20) >> 16);
        let [low, middle, high, ..] = (ram_above_4g >> 16).min(0x00FF_FFFF).to_le_bytes();
        for (register, byte) in (register::MEMORY_ABOVE_4G..).zip([low, middle, high]) {
            state.put(register, byte);
        }
        state.put(register::EXTRA_CPUS, cpus.saturating_sub(1));
        state.seen = state.guest_seconds(host.wall_clock());
        Self { state: Mutex::new(state), host }
    }
}

impl IsaDevice for Rtc {
    fn name(&self) -> &str {
        "RTC"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: INDEX, count: 2 }]
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        // The index register is write-only.
        let value = if port == INDEX { 0xFF } else { lock(&self.state).read(self.host.wall_clock()) };
        data.fill(value);
    }

    fn write(&self, port: u16, data: &[u8]) {
        let [value] = data else { return };
        let mut state = lock(&self.state);
        if port == INDEX {
            // Bit 7 masks NMIs.
            state.index = value & 0x7F;
        } else {
            state.write(*value, self.host.wall_clock());
        }
    }

    /// The battery keeps time and RAM; RESET# clears the interrupt enables.
    fn reset(&self) {
        let mut state = lock(&self.state);
        state.index = 0;
        let b = state.get(register::B) & !B_CLEARED_BY_RESET;
        state.put(register::B, b);
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::Recorder;
    use super::*;

    /// 2026-11-22 14:05:09.5 UTC, a Sunday.
    const NOW: Duration = Duration::from_millis(1_795_356_309_500);

    fn rtc() -> (Arc<Recorder>, Rtc) {
        let host = Recorder::new();
        host.set_wall_clock(NOW);
        let rtc = Rtc::new(host.clone(), 0xC000_0000, 0x1_4000_0000, 4);
        (host, rtc)
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        let mut data = [0];
        rtc.write(0x70, &[index]);
        rtc.read(0x71, &mut data);
        data[0]
    }

    fn put(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0x70, &[index]);
        rtc.write(0x71, &[value]);
    }

    const TIME: [u8; 8] = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];

    #[test]
    fn tells_the_time_in_bcd_and_24_hours() {
        let (_, rtc) = rtc();
        assert_eq!(TIME.map(|index| get(&rtc, index)), [0x20, 0x26, 0x11, 0x22, 0x01, 0x14, 0x05, 0x09]);
    }

    #[test]
    fn tells_the_time_in_binary_and_12_hours() {
        let (_, rtc) = rtc();
        put(&rtc, register::B, B_BINARY);
        assert_eq!(TIME.map(|index| get(&rtc, index)), [0x20, 26, 11, 22, 1, 2 | PM, 5, 9]);
    }

    #[test]
    fn a_set_clock_runs_on_from_what_the_guest_set() {
        let (host, rtc) = rtc();
        put(&rtc, register::B, B_24_HOURS | B_SET);
        for (index, value) in TIME.into_iter().zip([0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x58]) {
            put(&rtc, index, value);
        }
        host.set_wall_clock(NOW + Duration::from_secs(100));
        put(&rtc, register::B, B_24_HOURS);
        host.set_wall_clock(NOW + Duration::from_secs(102));
        assert_eq!(TIME.map(|index| get(&rtc, index)), [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn update_in_progress_shows_just_before_a_second_ends() {
        let (host, rtc) = rtc();
        assert_eq!(get(&rtc, register::A), A_RESET);
        host.set_wall_clock(Duration::from_micros(999_000));
        assert_eq!(get(&rtc, register::A), A_RESET | A_UPDATE_IN_PROGRESS);
    }

    #[test]
    fn register_c_says_once_that_the_time_changed() {
        let (host, rtc) = rtc();
        assert_eq!(get(&rtc, register::C), 0);
        host.set_wall_clock(NOW + Duration::from_secs(1));
        assert_eq!(get(&rtc, register::C), C_UPDATE);
        assert_eq!(get(&rtc, register::C), 0);
        assert_eq!(get(&rtc, register::D), D_VALID);
    }

    #[test]
    fn memory_size_and_cpus_are_where_firmware_looks() {
        let (_, rtc) = rtc();
        let bytes: Vec<u8> = [0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D, 0x5F]
            .map(|index| get(&rtc, index))
            .to_vec();
        // 640 KiB; more than 16 bits of KiB; (3 GiB − 16 MiB) / 64 KiB; 5 GiB / 64 KiB; 4 CPUs.
        assert_eq!(bytes, [0x80, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0xBF, 0x00, 0x40, 0x01, 0x03]);
    }

    #[test]
    fn reset_keeps_cmos_and_clears_interrupt_enables() {
        let (_, rtc) = rtc();
        put(&rtc, 0x0F, 0x0A);
        put(&rtc, register::B, 0x72);
        rtc.reset();
        assert_eq!((get(&rtc, 0x0F), get(&rtc, register::B)), (0x0A, 0x02));
    }
}
