//! Keys that users strike. They are kept until the keyboard's process says that a successor would know of them.

use std::collections::VecDeque;

use bulkhead_ipc::channel::message::{Key, ToDevice};

use super::EventLoop;
use crate::supervisor::api::{DeviceState, Response};
use crate::supervisor::config::KEYBOARD;
use crate::supervisor::keys::strokes;

/// Messages that may wait for a process: a user at a keyboard that does not serve is told so then.
const MOST_UNREAD: usize = 64;

/// Keys that no process has taken, with their numbers.
#[derive(Debug, Default)]
pub(super) struct Unread {
    last: u64,
    messages: VecDeque<(u64, Vec<Key>)>,
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
        let number = self.unread_keys.last.saturating_add(1);
        self.unread_keys.last = number;
        self.unread_keys.messages.push_back((number, keys.clone()));
        // One that is about to end does not take it: its successor gets it again.
        self.tell(KEYBOARD, &ToDevice::Keys { number, keys });
        Ok(Response::Done)
    }

    /// The process of the device `id` has taken keys, up to this number.
    pub(super) fn keys_taken(&mut self, id: &str, number: u64) {
        if id == KEYBOARD {
            self.unread_keys.messages.retain(|(unread, _)| *unread > number);
        }
    }

    /// A successor gets what nobody has taken.
    pub(super) fn strike_again(&self) {
        for (number, keys) in &self.unread_keys.messages {
            self.tell(KEYBOARD, &ToDevice::Keys { number: *number, keys: keys.clone() });
        }
    }
}
