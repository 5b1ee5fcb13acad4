//! Carries out requests on the machine.

use std::sync::Arc;

use bulkhead_vmm::machine::{Machine, PowerEvent, Space};

use crate::host::VirtualHost;
use crate::protocol::{Request, data_line};

/// The machine and what the test has asked of it.
pub struct Server {
    machine: Arc<Machine>,
    host: Arc<VirtualHost>,
    /// Interrupt lines are reported; set by the first interception.
    intercepting: Option<(String, bool)>,
}

impl Server {
    /// A server for a machine that has just been switched on.
    pub fn new(machine: Arc<Machine>, host: Arc<VirtualHost>) -> Self {
        Self { machine, host, intercepting: None }
    }

    /// Answers one line: reports of interrupt lines that it changed, then the reply.
    pub fn answer(&mut self, line: &str) -> String {
        let reply = match Request::parse(line) {
            Ok(request) => self.carry_out(request),
            Err(error) => format!("FAIL {error}\n"),
        };
        self.irq_lines() + &reply
    }

    /// The reports of interrupt lines that changed since the last call.
    pub fn irq_lines(&self) -> String {
        let edges = self.host.take_edges();
        if self.intercepting.is_none() {
            return String::new();
        }
        let word = |level| if level { "raise" } else { "lower" };
        edges.iter().map(|(line, level)| format!("IRQ {} {line}\n", word(*level))).collect()
    }

    /// What the guest's side did to the machine's power since the last call. Resets have been carried out.
    pub fn settle(&self) -> Vec<PowerEvent> {
        let events = self.host.take_power();
        if events.iter().any(|event| matches!(event, PowerEvent::Reset(_))) {
            self.machine.reset();
        }
        events
    }

    /// Resets the machine from outside.
    pub fn reset(&self) {
        self.machine.reset();
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.machine.press_power_button();
    }

    fn carry_out(&mut self, request: Request) -> String {
        let ok = || "OK\n".to_owned();
        match request {
            Request::In { port, size } => {
                format!("OK 0x{:04x}\n", self.read_value(Space::Port, port.into(), size))
            }
            Request::Out { port, data } => {
                self.machine.write(Space::Port, port.into(), &data);
                ok()
            }
            Request::Read { address, size } => {
                format!("OK 0x{:016x}\n", self.read_value(Space::Memory, address, size))
            }
            Request::ReadBytes { size: 0, .. } => "FAIL nothing to read\n".to_owned(),
            Request::ReadBytes { address, size, base64 } => {
                let mut data = vec![0; size];
                self.machine.read(Space::Memory, address, &mut data);
                data_line(&data, base64)
            }
            Request::Write { address, data } => {
                self.machine.write(Space::Memory, address, &data);
                ok()
            }
            Request::StepToNextTimer => self.clock(self.host.next_timer().unwrap_or(0)),
            Request::Step(nanoseconds) => self.clock(self.host.now().saturating_add(nanoseconds)),
            Request::SetClock(nanoseconds) => self.clock(nanoseconds),
            Request::Intercept { device, output } => self.intercept(device, output),
            Request::ForceIrq { device, line, level } => self.force(&device, line, level),
            Request::Endianness => "OK little\n".to_owned(),
        }
    }

    fn read_value(&self, space: Space, address: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        if let Some(data) = bytes.get_mut(..size) {
            self.machine.read(space, address, data);
        }
        u64::from_le_bytes(bytes)
    }

    /// Moves the clock to a moment, stopping at every timer on the way, and answers where it stands.
    fn clock(&self, to: u64) -> String {
        while let Some(timer) = self.host.next_timer().filter(|timer| *timer <= to) {
            self.host.advance_to(timer);
            if self.host.take_expired() {
                self.machine.timer_expired();
            }
        }
        self.host.advance_to(to);
        format!("OK {}\n", self.host.now())
    }

    /// The sixteen lines can be seen in one place: the outputs of the PIIX3, which are the inputs of the I/O APIC.
    fn intercept(&mut self, device: String, output: bool) -> String {
        let known = if output { "piix3" } else { "ioapic" };
        if !last_component(&device).eq_ignore_ascii_case(known) {
            return "FAIL Unknown device\n".to_owned();
        }
        let asked = (device, output);
        if *self.intercepting.get_or_insert_with(|| asked.clone()) == asked {
            "OK\n".to_owned()
        } else {
            "FAIL IRQ intercept already enabled\n".to_owned()
        }
    }

    fn force(&self, device: &str, line: u8, level: bool) -> String {
        if last_component(device) != "ioapic" || line > 15 {
            return "FAIL Unknown device\n".to_owned();
        }
        self.host.force(line, level);
        "OK\n".to_owned()
    }
}

fn last_component(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
