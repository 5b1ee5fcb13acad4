//! A forbidden system call between a thread's entry into its policy and the READY of its process.
//!
//! The listeners come with READY; until then the thread waits in the kernel and nobody hears of it. So a process that is not
//! READY after a while is looked into.

use std::time::{Duration, Instant};

use super::EventLoop;
use super::processes::describe_violation;
use crate::supervisor::api::EventKind;
use crate::supervisor::process::{Process, State};

/// How often. A launch takes a tenth of it.
pub(super) const INTERVAL: Duration = Duration::from_millis(250);

fn is_starting(process: &Process) -> bool {
    process.state == State::Starting
}

impl EventLoop<'_> {
    /// When to look next.
    pub(super) fn early_deadline(&self) -> Option<Instant> {
        self.processes.iter().any(is_starting).then_some(self.early_look)
    }

    /// Condemns what has broken its policy already.
    pub(super) fn look_early(&mut self, now: Instant) {
        if self.early_look > now {
            return;
        }
        self.early_look = now + INTERVAL;
        for index in 0..self.processes.len() {
            let Some(process) = self.processes.get(index).filter(|process| is_starting(process)) else {
                continue;
            };
            let role = process.role;
            if let Some(violation) = process.jailed.early_violation(|thread| role.policy_of(thread)) {
                let text = format!("{}, before it was READY", describe_violation(&process.id, &violation));
                self.condemn(index, EventKind::Violation, &text);
            }
        }
    }
}
