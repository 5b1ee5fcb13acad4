//! What follows when the guest's watchdog has run out. Its process only says that it has: a hostile one can do to the machine no
//! more than its guest could.

use std::time::Instant;

use bulkhead_ipc::channel::message::ToCore;

use super::{End, EventLoop};
use crate::supervisor::api::{EventKind, Response};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::watchdog::WatchdogAction;

impl EventLoop<'_> {
    /// The process of this index says that the watchdog has run out.
    pub(super) fn watchdog_expired(&mut self, index: usize) {
        let id = self.id_of(index);
        let watchdog = self.resources.watchdog.as_mut().filter(|watchdog| watchdog.id == id);
        let Some(watchdog) = watchdog.filter(|_| self.end.is_none()) else { return };
        let (action, news) = (watchdog.action, watchdog.is_news(Instant::now()));
        watchdog.expired = action == WatchdogAction::Reset;
        let text = format!("the watchdog {id} has run out: {action}");
        if news {
            self.note(EventKind::Watchdog, Some(index), |entry| entry.reason = Some(action.to_string()));
            self.say(if action == WatchdogAction::None { LogLevel::Debug } else { LogLevel::Warn }, &text);
        }
        match action {
            WatchdogAction::Reset => self.ends_in_order(End::Watchdog { restart: true }, &text),
            WatchdogAction::Poweroff => self.ends_in_order(End::Watchdog { restart: false }, &text),
            WatchdogAction::Shutdown => self.tell_core(&ToCore::Stop, None),
            WatchdogAction::Pause => {
                self.paused = true;
                self.tell_core(&ToCore::Pause, None);
            }
            // Its process has done the one already.
            WatchdogAction::InjectNmi | WatchdogAction::Debug | WatchdogAction::None => {}
        }
    }

    /// A user lets a machine go on.
    pub(super) fn resume(&mut self) -> Result<Response, String> {
        if !std::mem::take(&mut self.paused) {
            return Err("this machine is not paused: it runs".to_owned());
        }
        self.tell_core(&ToCore::Resume, None);
        self.say(LogLevel::Info, "the machine goes on");
        Ok(Response::Done)
    }
}
