//! Keys that users strike. They are kept until the keyboard's process says that a successor would know of them.

use std::collections::VecDeque;

use bulkhead_ipc::channel::message::{Key, ToDevice};

use super::EventLoop;
use crate::supervisor::api::{DeviceState, EventKind, Response};
use crate::supervisor::config::KEYBOARD;
use crate::supervisor::keys::strokes;
use crate::supervisor::process::{Process, State};

/// Messages that may wait for a process: a user at a keyboard that does not serve is told so then.
const MOST_UNREAD: usize = 64;

/// Keys that no process has taken, with their numbers.
#[derive(Debug, Default)]
pub(super) struct Unread {
    last: u64,
    messages: VecDeque<(u64, Vec<Key>)>,
    /// The process that was told of keys, and the number of the last that it was told of.
    told: Option<(i32, u64)>,
}

impl Unread {
    fn add(&mut self, keys: Vec<Key>) {
        self.last = self.last.saturating_add(1);
        self.messages.push_back((self.last, keys));
    }

    /// Tells the process `pid` what it was not told yet, in order: later keys wait for those that it has no room for. `send` says
    /// whether there was room.
    fn tell(&mut self, pid: i32, mut send: impl FnMut(&ToDevice) -> bool) {
        let told = self.told.filter(|(whom, _)| *whom == pid).map_or(0, |(_, number)| number);
        self.told = Some((pid, told));
        for (number, keys) in self.messages.iter().filter(|(number, _)| *number > told) {
            if !send(&ToDevice::Keys { number: *number, newest: self.last, keys: keys.clone() }) {
                return;
            }
            self.told = Some((pid, *number));
        }
    }

    /// Keys up to this number are taken. False: there are none of that number.
    fn taken(&mut self, number: u64) -> bool {
        if number > self.last {
            return false;
        }
        self.messages.retain(|(unread, _)| *unread > number);
        true
    }
}

impl EventLoop<'_> {
    /// A user strikes keys.
    pub(super) fn strike(&mut self, keys: &[String]) -> Result<Response, String> {
        let keys = strokes(keys)?;
        let keyboard =
            self.processes.iter().zip(&self.recoveries).find(|(process, _)| process.id == KEYBOARD);
        let (_, recovery) = keyboard.ok_or("this machine has no keyboard: start it with --keyboard")?;
        if recovery.state() == DeviceState::Failed || self.unread_keys.messages.len() >= MOST_UNREAD {
            return Err("the keyboard does not serve now".to_owned());
        }
        self.unread_keys.add(keys);
        // One that is about to end does not take it: its successor gets it again.
        self.send_keys();
        Ok(Response::Done)
    }

    /// The process of the device `id` has taken keys, up to this number.
    pub(super) fn keys_taken(&mut self, index: usize, id: &str, number: u64) {
        if id != KEYBOARD {
            return;
        }
        if self.unread_keys.taken(number) {
            self.send_keys();
        } else {
            let text = format!("{id} says that it took keys that nobody struck");
            self.condemn(index, EventKind::Failure, &text);
        }
    }

    /// Sends what no process has taken and this one was not told of.
    pub(super) fn send_keys(&mut self) {
        let alive = |process: &&Process| process.id == KEYBOARD && process.state != State::Ended;
        if let Some(process) = self.processes.iter().find(alive) {
            self.unread_keys.tell(process.jailed.pid(), |message| process.channel.send(message, &[]).is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that a process with room for `room` messages is told.
    fn told(unread: &mut Unread, pid: i32, mut room: usize) -> Vec<u64> {
        let mut numbers = Vec::new();
        unread.tell(pid, |message| {
            let ToDevice::Keys { number, newest, .. } = message else { panic!("{message:?}") };
            assert!(number <= newest);
            let sent = room > 0;
            if sent {
                (room, numbers) = (room - 1, [&numbers[..], &[*number]].concat());
            }
            sent
        });
        numbers
    }

    #[test]
    fn keys_that_a_process_has_no_room_for_come_before_those_after_them() {
        let mut unread = Unread::default();
        for _ in 0..4 {
            unread.add(Vec::new());
        }
        assert_eq!(told(&mut unread, 7, 2), [1, 2]);
        assert!(told(&mut unread, 7, 0).is_empty());
        assert!(unread.taken(2));
        unread.add(Vec::new());
        assert_eq!(told(&mut unread, 7, 9), [3, 4, 5]);
        assert!(told(&mut unread, 7, 9).is_empty(), "nothing twice");
        assert!(unread.taken(3));
        assert_eq!(told(&mut unread, 8, 9), [4, 5], "a successor gets what nobody took");
    }

    #[test]
    fn keys_that_nobody_struck_are_not_taken() {
        let mut unread = Unread::default();
        unread.add(Vec::new());
        assert!(!unread.taken(2));
        assert!(!unread.taken(u64::MAX));
        assert_eq!(unread.messages.len(), 1);
        assert!(unread.taken(1));
        assert!(unread.messages.is_empty());
    }
}
