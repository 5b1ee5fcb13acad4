//! The control queues of a console with ports (virtio 1.2, 5.3.6.2): what guest and host have told each other.
//!
//! Nothing waits in a list: what is to be said next follows from what was said. So the same few facts, in a file, are all that
//! a successor needs, and to repeat a message does no harm.

use serde::{Deserialize, Serialize};

/// Bytes of a message: id of the port (4), event (2), value (2), little-endian.
pub const MESSAGE: usize = 8;

/// VIRTIO_CONSOLE_DEVICE_READY: the driver is there; value 0: it is not.
const DEVICE_READY: u16 = 0;
/// VIRTIO_CONSOLE_PORT_ADD.
const PORT_ADD: u16 = 1;
/// VIRTIO_CONSOLE_PORT_READY: the driver has added the port; value 0: it cannot.
const PORT_READY: u16 = 3;
/// VIRTIO_CONSOLE_CONSOLE_PORT: the port is a console.
const CONSOLE_PORT: u16 = 4;
/// VIRTIO_CONSOLE_PORT_OPEN: an end of the port is open (1) or closed (0).
const PORT_OPEN: u16 = 6;
/// VIRTIO_CONSOLE_PORT_NAME: the name follows, without a terminator.
const PORT_NAME: u16 = 7;

/// What is known of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// PORT_ADD was said.
    added: bool,
    /// The driver has it.
    acknowledged: bool,
    /// CONSOLE_PORT was said, of a port that is one.
    told_console: bool,
    /// PORT_NAME was said.
    named: bool,
    /// The driver was told last that the host's end is open.
    told_open: bool,
    /// The guest's end is open.
    pub guest_open: bool,
    /// Bytes of the guest that a predecessor had taken and nobody has read.
    pub left: u32,
    /// Of the first request in the transmit queue: segment, and bytes of it that were taken already.
    pub sent: Option<(u32, u32)>,
}

/// What is known of the driver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// It has said DEVICE_READY.
    ready: bool,
    /// Port 1 first; there is no port 0.
    pub ports: Vec<PortState>,
}

/// Something to say about a port, by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// There is a port.
    Add(usize),
    /// It is a console.
    Console(usize),
    /// This is its name.
    Name(usize),
    /// The host's end is open, or closed.
    Open(usize, bool),
}

impl Event {
    /// The message, without the name that follows that of [`Event::Name`].
    pub fn encode(self) -> [u8; MESSAGE] {
        let (index, event, value) = match self {
            Self::Add(index) => (index, PORT_ADD, 1),
            Self::Console(index) => (index, CONSOLE_PORT, 1),
            Self::Name(index) => (index, PORT_NAME, 1),
            Self::Open(index, open) => (index, PORT_OPEN, u16::from(open)),
        };
        let id = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1);
        let [a, b, c, d] = id.to_le_bytes();
        let ([e, f], [g, h]) = (event.to_le_bytes(), value.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }
}

impl State {
    /// A driver that has said nothing yet.
    pub fn new(ports: usize) -> Self {
        Self { ready: false, ports: vec![PortState::default(); ports] }
    }

    /// The driver says something. What makes no sense is ignored, as drivers expect.
    pub fn hear(&mut self, message: [u8; MESSAGE]) {
        let [a, b, c, d, e, f, g, h] = message;
        let (id, event) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let yes = u16::from_le_bytes([g, h]) == 1;
        if event == DEVICE_READY {
            // A driver begins: nothing that another was told counts. Bytes for the host do.
            for port in &mut self.ports {
                *port = PortState { left: port.left, sent: port.sent, ..PortState::default() };
            }
            self.ready = yes;
            return;
        }
        let index = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        let Some(port) = index.and_then(|index| self.ports.get_mut(index)) else { return };
        match event {
            PORT_READY => port.acknowledged = yes,
            PORT_OPEN => port.guest_open = yes,
            _ => {}
        }
    }

    /// What is to be said next. `present`: somebody is at the host's end of this port; `console`: it is a console.
    pub fn next(&self, present: impl Fn(usize) -> bool, console: impl Fn(usize) -> bool) -> Option<Event> {
        if !self.ready {
            return None;
        }
        // All ports first: a driver may look for one as soon as it has another.
        if let Some(index) = self.ports.iter().position(|port| !port.added) {
            return Some(Event::Add(index));
        }
        let mut ports = self.ports.iter().enumerate().filter(|(_, port)| port.acknowledged);
        ports.find_map(|(index, port)| {
            let open = present(index);
            if !port.told_console && console(index) {
                Some(Event::Console(index))
            } else if !port.named {
                Some(Event::Name(index))
            } else if port.told_open != open {
                Some(Event::Open(index, open))
            } else {
                None
            }
        })
    }

    /// It was said.
    pub fn said(&mut self, event: Event) {
        let (Event::Add(index) | Event::Console(index) | Event::Name(index) | Event::Open(index, _)) = event;
        let Some(port) = self.ports.get_mut(index) else { return };
        match event {
            Event::Add(_) => port.added = true,
            Event::Console(_) => port.told_console = true,
            Event::Name(_) => port.named = true,
            Event::Open(_, open) => port.told_open = open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: u32, event: u16, value: u16) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[..4].copy_from_slice(&id.to_le_bytes());
        bytes[4..6].copy_from_slice(&event.to_le_bytes());
        bytes[6..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    fn all(state: &mut State, present: [bool; 2]) -> Vec<Event> {
        let mut said = Vec::new();
        while let Some(event) = state.next(|index| present[index], |_| false) {
            state.said(event);
            said.push(event);
        }
        said
    }

    #[test]
    fn a_driver_hears_of_ports_then_names_then_who_is_there() {
        let mut state = State::new(2);
        assert_eq!(all(&mut state, [true; 2]), [], "nobody listens");
        state.hear(message(u32::MAX, DEVICE_READY, 1));
        assert_eq!(all(&mut state, [true, false]), [Event::Add(0), Event::Add(1)]);
        state.hear(message(2, PORT_READY, 1));
        assert_eq!(all(&mut state, [true, false]), [Event::Name(1)]);
        state.hear(message(1, PORT_READY, 1));
        assert_eq!(all(&mut state, [true, false]), [Event::Name(0), Event::Open(0, true)]);
        assert_eq!(all(&mut state, [false, true]), [Event::Open(0, false), Event::Open(1, true)]);
        assert_eq!(Event::Open(1, true).encode(), message(2, PORT_OPEN, 1));
    }

    #[test]
    fn another_driver_hears_everything_again() {
        let mut state = State::new(1);
        state.hear(message(0, DEVICE_READY, 1));
        state.hear(message(1, PORT_READY, 1));
        state.hear(message(1, PORT_OPEN, 1));
        assert_eq!(all(&mut state, [true; 2]).len(), 3);
        assert!(state.ports[0].guest_open);
        state.hear(message(0, DEVICE_READY, 1));
        assert!(!state.ports[0].guest_open);
        assert_eq!(all(&mut state, [true; 2]), [Event::Add(0)]);
    }

    #[test]
    fn a_driver_hears_that_a_port_is_a_console_before_its_name() {
        let mut state = State::new(2);
        state.hear(message(0, DEVICE_READY, 1));
        let mut next = || {
            let event = state.next(|_| false, |index| index == 1)?;
            state.said(event);
            // As a driver does.
            if let Event::Add(index) = event {
                state.hear(message(u32::try_from(index).unwrap() + 1, PORT_READY, 1));
            }
            Some(event)
        };
        let said: Vec<_> = std::iter::from_fn(&mut next).collect();
        assert_eq!(said, [Event::Add(0), Event::Add(1), Event::Name(0), Event::Console(1), Event::Name(1)]);
        assert_eq!(Event::Console(1).encode(), message(2, CONSOLE_PORT, 1));
    }

    #[test]
    fn nonsense_changes_nothing() {
        let mut state = State::new(1);
        for (id, event) in [(0, PORT_OPEN), (2, PORT_OPEN), (u32::MAX, PORT_READY), (1, 99), (1, PORT_ADD)] {
            state.hear(message(id, event, 1));
        }
        assert_eq!(state, State::new(1));
    }
}
