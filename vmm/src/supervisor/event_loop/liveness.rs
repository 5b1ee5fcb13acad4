//! Which process hangs.
//!
//! A device that hangs while the guest waits for it is found by the core's deadlines. One that hangs unnoticed, for its queues and
//! its shadow page are read without it, is found by the heartbeat: it must answer on its control channel, and its answer says
//! whether the threads behind it go on with their queues. A device that was broken into can pretend to be well, and harms nobody
//! but its own guest by it. The core must answer too: nothing can take its place, so a core that does not ends the machine.

use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{Progress, ToCore, ToDevice};

use super::EventLoop;
use crate::supervisor::api::EventKind;
use crate::supervisor::cli::LogLevel;
use crate::supervisor::process::{Role, State};

/// A heartbeat so late says that the supervisor itself did not run: it was stopped, or the host was.
const LATE: Duration = Duration::from_secs(1);

/// What is known about the life of a process.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// Since when an answer to a ping is due.
    asked: Option<Instant>,
    /// Since when it does nothing about a queue.
    stalled: Option<Instant>,
    /// Since when it waits for the host, and whether that was said.
    waits: Option<(Instant, bool)>,
}

impl EventLoop<'_> {
    /// Asks the processes whether they are alive, and condemns those that did not answer.
    pub(super) fn beat(&mut self, now: Instant) {
        let Some(interval) = self.config.liveness.interval() else { return };
        let late = now.duration_since(self.heartbeat) > LATE;
        self.heartbeat = now + interval;
        for index in 0..self.recoveries.len() {
            let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
            else {
                continue;
            };
            if process.state != State::Ready || recovery.leaves() {
                continue;
            }
            let core = process.role == Role::Core;
            let liveness = &self.config.liveness;
            let limit = if core { liveness.core() } else { liveness.hang };
            match recovery.pulse.asked {
                None => {
                    recovery.pulse.asked = Some(now);
                    let _full_or_gone = if core {
                        process.channel.send(&ToCore::Ping, &[])
                    } else {
                        process.channel.send(&ToDevice::Ping, &[])
                    };
                }
                Some(_) if late => recovery.pulse = Pulse { asked: Some(now), ..Pulse::default() },
                Some(asked) if limit.is_some_and(|limit| now.duration_since(asked) >= limit) => {
                    self.hangs(index, limit.unwrap_or_default());
                }
                Some(_) => {}
            }
        }
    }

    fn hangs(&mut self, index: usize, limit: Duration) {
        // Its answer may be there, behind more events than are read at once.
        self.control(index, false);
        let asked = self.recoveries.get(index).is_some_and(|recovery| recovery.pulse.asked.is_some());
        if let (true, Some(process)) = (asked, self.processes.get(index)) {
            let text = format!("{} hangs: it did not answer within {} s", process.id, limit.as_secs());
            self.condemn(index, EventKind::Hang, &text);
        }
    }

    /// A process answered, and says how its queues do.
    pub(super) fn alive(&mut self, index: usize, progress: Progress) {
        let now = Instant::now();
        let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
        else {
            return;
        };
        let pulse = &mut recovery.pulse;
        pulse.asked = None;
        if !matches!(progress, Progress::Stalled { .. }) {
            pulse.stalled = None;
        }
        if !matches!(progress, Progress::WaitsForHost { .. }) && pulse.waits.take().is_some_and(|it| it.1) {
            let text = format!("{} goes on", process.id);
            self.environment.log.say(LogLevel::Info, &text);
        }
        let Some(limit) = self.config.liveness.stall else { return };
        let over = |since: Instant| now.duration_since(since) >= limit;
        let (id, seconds) = (&process.id, limit.as_secs());
        match progress {
            Progress::Fine => {}
            Progress::Stalled { queue } => {
                if over(*pulse.stalled.get_or_insert(now)) {
                    let text = format!(
                        "{id} hangs: it answers, but does nothing about the requests in queue {queue} for {seconds} s"
                    );
                    self.condemn(index, EventKind::Hang, &text);
                }
            }
            Progress::WaitsForHost { queue } => {
                let (since, said) = pulse.waits.get_or_insert((now, false));
                if over(*since) && !std::mem::replace(said, true) {
                    let text = format!(
                        "{id} waits for the host: no request in queue {queue} came to its end for {seconds} s"
                    );
                    self.say(LogLevel::Warn, &text);
                    self.note(EventKind::Waits, Some(index), |entry| entry.reason = Some(text));
                }
            }
        }
    }
}
