//! What happened to the processes of a machine, as far back as memory is spent on it.

use std::collections::VecDeque;

use super::api::{EventEntry, EventKind};
use super::logs::lines::escape;
use super::logs::time;

/// Events that are kept.
const KEPT: usize = 512;
/// The longest reason, in characters.
const MAX_REASON: usize = 500;
/// The length of the events in one packet, in bytes: some room below [`super::api::MAX_PACKET`].
const PACKET: usize = 48 << 10;

/// The newest events, oldest first.
#[derive(Debug, Default)]
pub struct History {
    events: VecDeque<EventEntry>,
    sequence: u64,
}

impl History {
    /// Notes an event that `fill` describes further; returns it.
    pub fn note(&mut self, event: EventKind, fill: impl FnOnce(&mut EventEntry)) -> EventEntry {
        self.sequence = self.sequence.saturating_add(1);
        let mut entry = EventEntry {
            sequence: self.sequence,
            time: time::now(),
            event,
            process: None,
            pid: None,
            reason: None,
            exit_code: None,
            signal: None,
            pause_ms: None,
            took_us: None,
        };
        fill(&mut entry);
        entry.reason =
            entry.reason.map(|reason| escape(reason.as_bytes()).chars().take(MAX_REASON).collect());
        if self.events.len() >= KEPT {
            self.events.pop_front();
        }
        self.events.push_back(entry.clone());
        entry
    }

    /// The events in portions that fit a packet each; at least one portion.
    pub fn packets(&self) -> Vec<Vec<EventEntry>> {
        let (mut packets, mut packet, mut length) = (Vec::new(), Vec::new(), 0_usize);
        for event in &self.events {
            let more = serde_json::to_string(event).map_or(0, |text| text.len().saturating_add(1));
            if length.saturating_add(more) > PACKET {
                packets.push(std::mem::take(&mut packet));
                length = 0;
            }
            length = length.saturating_add(more);
            packet.push(event.clone());
        }
        packets.push(packet);
        packets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::api::{MAX_PACKET, Response};

    #[test]
    fn the_newest_are_kept_and_every_packet_fits() {
        let mut history = History::default();
        assert_eq!(history.packets(), [vec![]]);
        for _ in 0..KEPT + 10 {
            // What needs the most bytes in JSON.
            history.note(EventKind::Death, |entry| entry.reason = Some("\u{1b}\"\u{10348}".repeat(1000)));
        }
        let packets = history.packets();
        assert!(packets.len() > 1);
        let sequence: Vec<u64> = packets.iter().flatten().map(|event| event.sequence).collect();
        assert_eq!(sequence, (11..=KEPT as u64 + 10).collect::<Vec<_>>());
        for events in packets {
            let text = serde_json::to_vec(&Response::Events { events, more: true }).unwrap();
            assert!(text.len() < MAX_PACKET, "{}", text.len());
        }
    }
}
