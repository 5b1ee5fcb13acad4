//! MC146818 real-time clock and CMOS RAM, ports 70 and 71.
//!
//! The time is the host's plus an offset that the guest sets by setting its clock; its seconds begin with the host's until the
//! guest resets the divider. Events (a second ended, the alarm, the periodic rate) are found when somebody looks, or when the
//! deadline of the next one that the guest wants an interrupt for has come.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::host::Host;
use super::super::sync::lock;
use super::super::timers::{Timer, Timers};
use super::calendar::{DateTime, from_bcd, to_bcd};
use super::{IrqLine, IsaDevice, MemoryRange, PortRange};

const INDEX: u16 = 0x70;
/// Its interrupt.
pub(in super::super) const IRQ: u8 = 8;
/// Bytes of CMOS RAM, the clock's registers included.
const SIZE: usize = 128;

/// The clock's registers and the places that PC firmware keeps in CMOS RAM.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
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
/// Register C, since it was read: the time changed, the alarm's time came, a period ended; one of them is enabled in register
/// B, where the same bits enable them.
const C_UPDATE: u8 = 1 << 4;
const C_ALARM: u8 = 1 << 5;
const C_PERIODIC: u8 = 1 << 6;
const C_REQUEST: u8 = 1 << 7;
/// Register A: the divider runs from 32,768 Hz while bits 6–4 are at most this; above are its test modes and its reset.
const A_DIVIDER: u8 = 0x70;
const A_RUNS: u8 = 0x20;
/// An alarm register with these bits matches any value.
const ALARM_ANY: u8 = 0xC0;
/// The time base in Hz.
const HZ: u128 = 32_768;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// Hours: afternoon, in 12-hour format.
const PM: u8 = 1 << 7;
/// Update-in-progress is set this long before the seconds change. The update itself takes no time here.
const UPDATE_NANOS: i128 = 244_140;
/// A second, and the time from the end of a divider reset to the first update, in nanoseconds.
const SECOND: i128 = 1_000_000_000;
const AFTER_DIVIDER_RESET: i128 = SECOND / 2;

struct State {
    index: u8,
    ram: [u8; SIZE],
    /// Guest time minus host time in nanoseconds.
    offset: i128,
    /// Register C.
    flags: u8,
    /// The host's time up to which events were looked for.
    seen: Duration,
    /// When the last period ended, in ticks of the time base on the host's clock. The next one is counted from there, also
    /// when the guest has changed its length since.
    period_end: u128,
}

/// The clock.
pub(in super::super) struct Rtc {
    state: Mutex<State>,
    host: Arc<dyn Host>,
    timers: Arc<Timers>,
    line: IrqLine,
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

    /// The guest's time in nanoseconds since 1970.
    fn guest_nanos(&self, now: Duration) -> i128 {
        i128::try_from(now.as_nanos()).unwrap_or(i128::MAX).saturating_add(self.offset)
    }

    fn guest_seconds(&self, now: Duration) -> i64 {
        i64::try_from(self.guest_nanos(now).div_euclid(SECOND)).unwrap_or(i64::MAX)
    }

    /// Stores the time of `now` in the time registers, unless they stand still.
    fn update(&mut self, now: Duration) {
        if !self.ticks() {
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

    /// Takes the time registers for the guest's time, so many nanoseconds after its second began.
    fn adopt(&mut self, now: Duration, fraction: i128) {
        let hour = self.decode_hour(self.get(register::HOURS));
        let century = i64::from(from_bcd(self.get(CENTURY_REGISTER)));
        let year =
            century.saturating_mul(100).saturating_add(i64::from(self.decode(self.get(register::YEAR))));
        let date = (self.decode(self.get(register::MONTH)), self.decode(self.get(register::DAY)));
        let time = (hour, self.decode(self.get(register::MINUTES)), self.decode(self.get(register::SECONDS)));
        let seconds = DateTime::to_unix(year, date, time);
        let guest = i128::from(seconds).saturating_mul(SECOND).saturating_add(fraction);
        self.offset = guest.saturating_sub(i128::try_from(now.as_nanos()).unwrap_or(i128::MAX));
    }

    fn decode_hour(&self, hours: u8) -> u8 {
        if self.get(register::B) & B_24_HOURS != 0 {
            return self.decode(hours);
        }
        let twelve = self.decode(hours & !PM).checked_rem(12).unwrap_or(0);
        if hours & PM != 0 { twelve.saturating_add(12) } else { twelve }
    }

    /// The length of a period in ticks of the time base; none while the divider or the rate is off.
    fn period(&self) -> Option<u128> {
        let a = self.get(register::A);
        let rate = match a & 0x0F {
            0 => return None,
            // The two fastest are those of rates 8 and 9.
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        (a & A_DIVIDER <= A_RUNS).then_some(1 << (rate - 1))
    }

    /// Whether the clock moves on.
    fn ticks(&self) -> bool {
        self.get(register::B) & B_SET == 0 && self.get(register::A) & A_DIVIDER <= A_RUNS
    }

    /// The first guest second from `second` on that matches the alarm registers; none when they hold no time.
    fn next_alarm(&self, second: i64) -> Option<i64> {
        let field = |register, limit: u8| {
            let raw = self.get(register);
            let value =
                if register == register::HOURS_ALARM { self.decode_hour(raw) } else { self.decode(raw) };
            match raw & ALARM_ANY == ALARM_ANY {
                true => Some(None),
                false => (value < limit).then_some(Some(i64::from(value))),
            }
        };
        let hour = field(register::HOURS_ALARM, 24)?;
        let minute = field(register::MINUTES_ALARM, 60)?;
        let seconds = field(register::SECONDS_ALARM, 60)?;
        let differs = |wanted: Option<i64>, value: i64| wanted.is_some_and(|wanted| wanted != value);
        let mut at = second;
        // At most 24 hours, 60 minutes and 60 seconds are passed over, each in one step.
        for _ in 0..200 {
            let step = if differs(hour, at.div_euclid(3600).rem_euclid(24)) {
                3600
            } else if differs(minute, at.div_euclid(60).rem_euclid(60)) {
                60
            } else if differs(seconds, at.rem_euclid(60)) {
                1
            } else {
                return Some(at);
            };
            at = at.div_euclid(step).saturating_add(1).saturating_mul(step);
        }
        None
    }

    /// Notes the events up to `now`. A host clock that was set back brings none.
    fn advance(&mut self, now: Duration) {
        let before = std::mem::replace(&mut self.seen, now);
        if now <= before {
            self.period_end = self.period_end.min(ticks(now));
            return;
        }
        let elapsed = ticks(now).saturating_sub(self.period_end);
        match self.period().map(|period| elapsed - elapsed.checked_rem(period).unwrap_or(0)) {
            Some(0) => {}
            Some(ended) => {
                self.flags |= C_PERIODIC;
                self.period_end = self.period_end.saturating_add(ended);
            }
            None => self.period_end = ticks(now),
        }
        let (from, to) = (self.guest_seconds(before), self.guest_seconds(now));
        if from != to && self.ticks() {
            self.flags |= C_UPDATE;
            if self.next_alarm(from.saturating_add(1)).is_some_and(|at| at <= to) {
                self.flags |= C_ALARM;
            }
        }
    }

    /// Whether the interrupt is requested.
    fn requests(&self) -> bool {
        self.flags & self.get(register::B) & (C_UPDATE | C_ALARM | C_PERIODIC) != 0
    }

    /// The host's time of the next event that requests an interrupt, unless one is requested already.
    fn deadline(&self, now: Duration) -> Option<Duration> {
        if self.requests() {
            return None;
        }
        let wanted = |event| self.get(register::B) & event != 0;
        let second = |guest: i64| {
            let host = i128::from(guest).saturating_mul(SECOND).saturating_sub(self.offset);
            u64::try_from(host).ok().map(Duration::from_nanos)
        };
        let next = self.guest_seconds(now).saturating_add(1);
        let periodic = self.period().filter(|_| wanted(C_PERIODIC)).and_then(|period| {
            let nanos = self.period_end.saturating_add(period).saturating_mul(1_000_000_000);
            Some(Duration::from_nanos(u64::try_from(nanos.div_ceil(HZ)).ok()?))
        });
        let update = (wanted(C_UPDATE) && self.ticks()).then(|| second(next)).flatten();
        let alarm = (wanted(C_ALARM) && self.ticks()).then(|| second(self.next_alarm(next)?)).flatten();
        [periodic, update, alarm].into_iter().flatten().min()
    }

    fn read(&mut self, now: Duration) -> u8 {
        match self.index {
            register::A => {
                let close = self.guest_nanos(now).rem_euclid(SECOND) >= SECOND - UPDATE_NANOS;
                self.get(register::A) | if close && self.ticks() { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            register::C => {
                let request = if self.requests() { C_REQUEST } else { 0 };
                std::mem::take(&mut self.flags) | request
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
            register::A => {
                self.update(now);
                let ran = self.get(register::A) & A_DIVIDER <= A_RUNS;
                self.put(register::A, value & !A_UPDATE_IN_PROGRESS);
                if !ran && value & A_DIVIDER <= A_RUNS {
                    self.adopt(now, AFTER_DIVIDER_RESET);
                }
            }
            register::B => {
                self.update(now);
                let ticked = self.ticks();
                self.put(register::B, value);
                if !ticked && self.ticks() {
                    self.adopt(now, self.guest_nanos(now).rem_euclid(SECOND));
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
                if self.ticks() {
                    self.adopt(now, self.guest_nanos(now).rem_euclid(SECOND));
                }
            }
            index => self.put(index, value),
        }
    }
}

/// A time in ticks of the time base.
fn ticks(time: Duration) -> u128 {
    time.as_nanos().saturating_mul(HZ) / 1_000_000_000
}

impl Rtc {
    /// The clock of a machine that is switched on.
    pub(in super::super) fn new(host: Arc<dyn Host>, timers: Arc<Timers>, line: IrqLine) -> Self {
        let seen = host.wall_clock();
        let mut state =
            State { index: 0, ram: [0; SIZE], offset: 0, flags: 0, seen, period_end: ticks(seen) };
        state.put(register::A, A_RESET);
        state.put(register::B, B_24_HOURS);
        // A coprocessor, no floppy drives.
        state.put(register::EQUIPMENT, 0x02);
        Self { state: Mutex::new(state), host, timers, line }
    }

    /// Says in CMOS RAM, where firmware looks, how much RAM and how many CPUs the machine has.
    pub(in super::super) fn describe(&self, memory: &[MemoryRange], cpus: u16) {
        let size = |above: bool| {
            let regions = memory.iter().filter(|range| (range.address >= 1 << 32) == above);
            regions.map(|range| range.length).fold(0, u64::saturating_add)
        };
        let mut state = lock(&self.state);
        // In KiB: conventional memory, and memory from 1 MiB, as far as 16 bits go.
        state.put_u16(register::BASE_MEMORY, 640);
        let extended = size(false).saturating_sub(1 << 20) >> 10;
        state.put_u16(register::EXTENDED_MEMORY, extended);
        state.put_u16(register::EXTENDED_MEMORY_COPY, extended);
        // In units of 64 KiB: memory from 16 MiB below 4 GiB, and memory above 4 GiB.
        state.put_u16(register::MEMORY_ABOVE_16M, size(false).saturating_sub(16 << 20) >> 16);
        let [low, middle, high, ..] = (size(true) >> 16).min(0x00FF_FFFF).to_le_bytes();
        for (register, byte) in (register::MEMORY_ABOVE_4G..).zip([low, middle, high]) {
            state.put(register, byte);
        }
        // None where 8 bits do not tell: then firmware asks fw_cfg.
        state.put(register::EXTRA_CPUS, u8::try_from(cpus).map_or(0, |cpus| cpus.saturating_sub(1)));
    }

    /// A deadline of the machine has come, this clock's perhaps.
    pub(in super::super) fn timer_expired(&self) {
        self.with_state(|_, _| ());
    }

    /// Does something with the state of this moment; line and deadline follow it.
    fn with_state<T>(&self, action: impl FnOnce(&mut State, Duration) -> T) -> T {
        let now = self.host.wall_clock();
        let mut state = lock(&self.state);
        state.advance(now);
        let result = action(&mut state, now);
        self.line.set(state.requests());
        let deadline =
            state.deadline(now).map(|at| self.host.monotonic().saturating_add(at.saturating_sub(now)));
        self.timers.set(Timer::Rtc, deadline);
        result
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
        let value = if port == INDEX { 0xFF } else { self.with_state(State::read) };
        data.fill(value);
    }

    fn write(&self, port: u16, data: &[u8]) {
        let [value] = data else { return };
        if port == INDEX {
            // Bit 7 masks NMIs, of which this machine has no source: neither SERR# nor IOCHK# is ever asserted.
            lock(&self.state).index = value & 0x7F;
        } else {
            self.with_state(|state, now| state.write(*value, now));
        }
    }

    /// The battery keeps time and RAM; RESET# clears the interrupt enables and what they enabled.
    fn reset(&self) {
        self.with_state(|state, _| {
            (state.index, state.flags) = (0, 0);
            let b = state.get(register::B) & !B_CLEARED_BY_RESET;
            state.put(register::B, b);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::irq::InterruptRouter;
    use super::super::super::testing::Recorder;
    use super::*;

    /// 2026-11-22 14:05:09.5 UTC, a Sunday.
    const NOW: Duration = Duration::from_millis(1_795_356_309_500);

    fn rtc() -> (Arc<Recorder>, Rtc) {
        let host = Recorder::new();
        host.set_wall_clock(NOW);
        let line = IrqLine::new(InterruptRouter::new(host.clone()), IRQ);
        let rtc = Rtc::new(host.clone(), Timers::new(host.clone()), line);
        let memory = [(0, 0xC000_0000), (1 << 32, 0x1_4000_0000)];
        rtc.describe(&memory.map(|(address, length)| MemoryRange { address, length }), 4);
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
        host.set_wall_clock(Duration::from_micros(999_755));
        assert_eq!(get(&rtc, register::A), A_RESET);
        host.set_wall_clock(Duration::from_micros(999_756));
        assert_eq!(get(&rtc, register::A), A_RESET | A_UPDATE_IN_PROGRESS);
    }

    #[test]
    fn the_first_second_after_a_divider_reset_takes_half_a_second() {
        let (host, rtc) = rtc();
        put(&rtc, register::A, 0x76);
        let held = get(&rtc, register::SECONDS);
        host.set_wall_clock(NOW + Duration::from_millis(7_250));
        assert_eq!(get(&rtc, register::SECONDS), held);
        put(&rtc, register::A, A_RESET);
        host.set_wall_clock(NOW + Duration::from_millis(7_749));
        assert_eq!(get(&rtc, register::SECONDS), held);
        host.set_wall_clock(NOW + Duration::from_millis(7_750));
        assert_eq!((held, get(&rtc, register::SECONDS)), (0x09, 0x10));
    }

    #[test]
    fn register_c_says_once_that_the_time_changed() {
        let (host, rtc) = rtc();
        assert_eq!(get(&rtc, register::C), 0);
        host.set_wall_clock(NOW + Duration::from_secs(1));
        assert_eq!(get(&rtc, register::C), C_UPDATE | C_PERIODIC);
        assert_eq!(get(&rtc, register::C), 0);
        assert_eq!(get(&rtc, register::D), D_VALID);
    }

    /// Runs the clock to the deadline that the host was given, and says how long that took.
    fn run(host: &Recorder, rtc: &Rtc) -> Option<Duration> {
        let after = host.take_timer()?.saturating_sub(host.monotonic());
        host.set_monotonic(host.monotonic() + after);
        host.set_wall_clock(host.wall_clock() + after);
        rtc.timers.expired();
        rtc.timer_expired();
        Some(after)
    }

    fn high(host: &Recorder) -> bool {
        host.recorded().irqs & 1 << IRQ != 0
    }

    #[test]
    fn update_interrupt_comes_with_each_second() {
        let (host, rtc) = rtc();
        assert_eq!(host.recorded().timer, None, "nothing is wanted, nobody is woken");
        put(&rtc, register::B, B_24_HOURS | C_UPDATE);
        for expected in [500, 1000, 1000] {
            assert!(!high(&host));
            assert_eq!(run(&host, &rtc), Some(Duration::from_millis(expected)));
            assert!(high(&host));
            assert_eq!(run(&host, &rtc), None, "no more until it is acknowledged");
            assert_eq!(get(&rtc, register::C) & !C_PERIODIC, C_REQUEST | C_UPDATE);
        }
        put(&rtc, register::B, B_24_HOURS | B_SET | C_UPDATE);
        assert_eq!(host.recorded().timer, None, "the clock stands");
    }

    #[test]
    fn periodic_interrupt_has_the_rate_of_register_a() {
        for (rate, nanos) in [(6, 976_563), (15, 500_000_000), (3, 122_071), (1, 3_906_250), (2, 7_812_500)] {
            let (host, rtc) = rtc();
            put(&rtc, register::A, 0x20 | rate);
            put(&rtc, register::B, B_24_HOURS | C_PERIODIC);
            // The first period has begun before.
            run(&host, &rtc).unwrap();
            assert_eq!(get(&rtc, register::C) & (C_REQUEST | C_PERIODIC), C_REQUEST | C_PERIODIC);
            let after = run(&host, &rtc).unwrap();
            assert!(
                after.abs_diff(Duration::from_nanos(nanos)) <= Duration::from_nanos(1),
                "{rate}: {after:?}"
            );
        }
        let (host, rtc) = rtc();
        put(&rtc, register::B, B_24_HOURS | C_PERIODIC);
        put(&rtc, register::A, 0x20);
        assert_eq!(host.recorded().timer, None, "rate 0 is off");
        put(&rtc, register::A, 0x76);
        assert_eq!(host.recorded().timer, None, "a divider that is held counts nothing");
    }

    #[test]
    fn alarm_comes_when_all_registers_match_or_do_not_care() {
        // It is 14:05:09.5.
        for (alarm, seconds) in [
            ([0x14, 0x05, 0x10], Some(1)),
            ([0x14, 0x05, 0x09], Some(86_400)),
            ([0xC0, 0x00, 0x00], Some(54 * 60 + 51)),
            ([0xFF, 0xFF, 0x30], Some(21)),
            ([0xFF, 0xFF, 0xFF], Some(1)),
            ([0x00, 0xC0, 0xC0], Some(9 * 3600 + 54 * 60 + 51)),
            ([0x25, 0x00, 0x00], None),
            ([0x00, 0x00, 0x60], None),
        ] {
            let (host, rtc) = rtc();
            for (register, value) in [register::HOURS_ALARM, register::MINUTES_ALARM, register::SECONDS_ALARM]
                .into_iter()
                .zip(alarm)
            {
                put(&rtc, register, value);
            }
            put(&rtc, register::B, B_24_HOURS | C_ALARM);
            let after = run(&host, &rtc);
            let expected = seconds.map(|seconds| Duration::from_millis(seconds * 1000 - 500));
            assert_eq!(after, expected, "{alarm:x?}");
            if after.is_some() {
                assert!(high(&host));
                assert_eq!(get(&rtc, register::C), C_REQUEST | C_ALARM | C_UPDATE | C_PERIODIC);
                assert!(!high(&host));
            }
        }
    }

    #[test]
    fn a_host_clock_that_is_set_back_brings_no_event_and_stops_none() {
        let (host, rtc) = rtc();
        put(&rtc, register::B, B_24_HOURS | C_UPDATE);
        host.set_wall_clock(NOW - Duration::from_secs(1000));
        rtc.timer_expired();
        assert!(!high(&host));
        assert_eq!(run(&host, &rtc), Some(Duration::from_millis(500)));
        assert!(high(&host));
    }

    #[test]
    fn memory_size_and_cpus_are_where_firmware_looks() {
        let (_, rtc) = rtc();
        let bytes: Vec<u8> = [0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D, 0x5F]
            .map(|index| get(&rtc, index))
            .to_vec();
        // 640 KiB; more than 16 bits of KiB; (3 GiB − 16 MiB) / 64 KiB; 5 GiB / 64 KiB; 4 CPUs.
        assert_eq!(bytes, [0x80, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0xBF, 0x00, 0x40, 0x01, 0x03]);
        for (cpus, extra) in [(1, 0), (255, 254), (256, 0), (4096, 0)] {
            rtc.describe(&[], cpus);
            assert_eq!(get(&rtc, register::EXTRA_CPUS), extra, "{cpus} CPUs");
        }
    }

    #[test]
    fn reset_keeps_cmos_and_clears_interrupt_enables() {
        let (host, rtc) = rtc();
        put(&rtc, 0x0F, 0x0A);
        put(&rtc, register::B, 0x72);
        host.set_wall_clock(NOW + Duration::from_secs(1));
        rtc.timer_expired();
        assert!(high(&host));
        rtc.reset();
        assert_eq!((get(&rtc, 0x0F), get(&rtc, register::B)), (0x0A, 0x02));
        assert!(!high(&host) && host.recorded().timer.is_none());
    }
}
