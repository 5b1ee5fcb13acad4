//! Processors that come and go while the machine runs (`bulkhead resize`).

use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::ToCore;

use super::{EventLoop, Phase};
use crate::supervisor::api::Response;
use crate::supervisor::cli::LogLevel;

/// Which of the possible CPUs are plugged in.
#[derive(Debug)]
pub(super) struct Cpus {
    online: Vec<bool>,
    /// Who waits for the guest to let go of CPUs, down to what number, until when, and how long that is.
    waiting: Option<(u16, u16, Instant, Duration)>,
}

impl Cpus {
    /// The first `present` of so many.
    pub(super) fn new(possible: u32, present: u16) -> Self {
        Self { online: (0..possible).map(|index| index < present.into()).collect(), waiting: None }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.online.iter().filter(|online| **online).count()).unwrap_or(u16::MAX)
    }

    /// When the guest is late.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.map(|(_, _, until, _)| until)
    }

    fn find(&self, online: bool) -> impl DoubleEndedIterator<Item = u16> {
        let all = (0..).zip(self.online.clone());
        all.filter(move |(_, it)| *it == online).map(|(index, _)| index).collect::<Vec<_>>().into_iter()
    }

    fn set(&mut self, index: u16, online: bool) {
        if let Some(place) = self.online.get_mut(usize::from(index)) {
            *place = online;
        }
    }
}

impl EventLoop<'_> {
    /// Plugs CPUs in, or asks the guest to let go of some; then the client is answered when it did.
    pub(super) fn resize_cpus(
        &mut self,
        client: u16,
        count: u16,
        limit: Duration,
    ) -> Result<Option<Response>, String> {
        if self.phase != Phase::Running {
            return Err("CPUs can be added and removed while the machine runs, and it does not".to_owned());
        }
        if self.cpus.waiting.is_some() {
            return Err("the guest is still asked to let go of CPUs".to_owned());
        }
        let possible = self.cpus.online.len();
        if count == 0 || usize::from(count) > possible {
            return Err(format!("this machine can have 1 to {possible} CPUs: max= of --cpus says how many"));
        }
        let now = self.cpus.count();
        let more: Vec<u16> = self.cpus.find(false).take(count.saturating_sub(now).into()).collect();
        more.iter().for_each(|index| self.cpus.set(*index, true));
        let fewer: Vec<u16> = self.cpus.find(true).rev().take(now.saturating_sub(count).into()).collect();
        let none_leaves = fewer.is_empty();
        for (indices, insert) in [(more, true), (fewer, false)] {
            if !indices.is_empty() {
                self.tell_core(&ToCore::Cpus { indices, insert }, None);
            }
        }
        self.remember_cpus();
        if none_leaves {
            self.say(LogLevel::Info, &format!("the machine has {count} CPUs"));
            return Ok(Some(Response::Done));
        }
        self.cpus.waiting = Some((client, count, Instant::now() + limit, limit));
        Ok(None)
    }

    /// A machine that starts anew has as many as it has now.
    fn remember_cpus(&mut self) {
        self.resources.cpus = self.cpus.count();
    }

    /// The guest let go of a CPU.
    pub(super) fn cpu_removed(&mut self, index: u16) {
        self.cpus.set(index, false);
        self.remember_cpus();
        let count = self.cpus.count();
        self.say(LogLevel::Info, &format!("the guest let go of CPU {index}: the machine has {count}"));
        if let Some((client, wanted, ..)) = self.cpus.waiting
            && count <= wanted
        {
            self.answer_resize(client, &Response::Done);
        }
    }

    /// Says so when the guest does not let go of CPUs in time.
    pub(super) fn cpus_late(&mut self, now: Instant) {
        if let Some((client, wanted, until, limit)) = self.cpus.waiting
            && until <= now
        {
            let message = format!(
                "the guest did not go down to {wanted} CPUs within {} s: it has {}",
                limit.as_secs(),
                self.cpus.count()
            );
            self.answer_resize(client, &Response::Error { message });
        }
    }

    /// The machine has ended: what was to go is gone when it starts anew.
    pub(super) fn settle_cpus(&mut self) {
        if let Some((client, wanted, ..)) = self.cpus.waiting {
            self.resources.cpus = wanted;
            self.answer_resize(client, &Response::Done);
        }
    }

    fn answer_resize(&mut self, client: u16, response: &Response) {
        self.cpus.waiting = None;
        self.environment.server.respond(client, response, &self.environment.poller);
    }
}
