//! Waits for the qtest client, the QMP client and signals, one after the other in one thread.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::Instant;

use bulkhead_vmm::machine::PowerEvent;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use crate::arguments::{Options, PanicAction};
use crate::qmp::{Effect, Qmp};
use crate::server::Server;
use crate::streams::{Received, Stream};

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

/// All that the program waits for.
pub struct EventLoop {
    signals: SignalFd,
    qtest: Stream,
    monitor: Option<Stream>,
    qmp: Qmp,
    log: Option<File>,
    started: Instant,
}

fn sentence(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl EventLoop {
    /// Blocks the signals that end the program, connects, and greets the QMP client.
    pub fn open(options: &Options) -> Result<Self, String> {
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
        signals.thread_block().map_err(sentence)?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(sentence)?;
        let log = options.log.as_deref().map(File::create).transpose();
        let qtest = Stream::open(&options.qtest)?;
        let mut monitor = options.monitor.as_ref().map(Stream::open).transpose()?;
        if let Some(monitor @ Stream::Connected { .. }) = &mut monitor {
            monitor.send(&Qmp::greeting()).map_err(sentence)?;
        }
        Ok(Self {
            signals,
            qtest,
            monitor,
            qmp: Qmp::new(options.stopped),
            log: log.map_err(|error| format!("-qtest-log: {error}"))?,
            started: Instant::now(),
        })
    }

    /// Serves until a signal, `quit`, a power-off or the end of the qtest connection.
    pub fn run(mut self, server: &mut Server, options: &Options) -> Result<(), String> {
        loop {
            let (signalled, qtest, monitor) = self.wait()?;
            if signalled {
                self.tell("SHUTDOWN", Some(json!({ "guest": false, "reason": "host-signal" })));
                return Ok(());
            }
            if qtest && self.serve_qtest(server, options)? == Next::End {
                return Ok(());
            }
            if monitor && self.serve_monitor(server, options)? == Next::End {
                return Ok(());
            }
        }
    }

    /// Which of signals, qtest and monitor have something to say.
    fn wait(&self) -> Result<(bool, bool, bool), String> {
        let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![wanted(self.signals.as_fd()), wanted(self.qtest.readable())];
        fds.extend(self.monitor.as_ref().map(|stream| wanted(stream.readable())));
        poll(&mut fds, PollTimeout::NONE).map_err(sentence)?;
        let ready = |index: usize| fds.get(index).and_then(PollFd::any).unwrap_or(false);
        Ok((ready(0), ready(1), ready(2)))
    }

    fn serve_qtest(&mut self, server: &mut Server, options: &Options) -> Result<Next, String> {
        if self.qtest.receive().map_err(sentence)? == Received::End {
            return Ok(Next::End);
        }
        while let Some(line) = self.qtest.take_line() {
            self.note('R', &line);
            let answer = server.answer(&line);
            let next = self.follow_power(server, options);
            // A reset may have moved interrupt lines.
            let text = server.irq_lines() + &answer;
            self.note('S', text.trim_end());
            if self.qtest.send(&text).is_err() || next == Next::End {
                return Ok(Next::End);
            }
        }
        Ok(Next::GoOn)
    }

    fn serve_monitor(&mut self, server: &mut Server, options: &Options) -> Result<Next, String> {
        let Some(monitor) = &mut self.monitor else { return Ok(Next::GoOn) };
        match monitor.receive().map_err(sentence)? {
            Received::Client => monitor.send(&Qmp::greeting()).map_err(sentence)?,
            Received::End => self.monitor = None,
            Received::Bytes => {
                let (replies, effects) = self.qmp.receive(&monitor.take_all());
                monitor.send(&replies).map_err(sentence)?;
                for effect in effects {
                    if self.carry_out(&effect, server, options) == Next::End {
                        return Ok(Next::End);
                    }
                }
                self.qtest.send(&server.irq_lines()).map_err(sentence)?;
            }
        }
        Ok(Next::GoOn)
    }

    fn carry_out(&mut self, effect: &Effect, server: &mut Server, options: &Options) -> Next {
        match effect {
            Effect::Quit => {
                self.tell("SHUTDOWN", Some(json!({ "guest": false, "reason": "host-qmp-quit" })));
                return Next::End;
            }
            Effect::Reset if options.end_at_reset => return self.shut_down("host-qmp-system-reset", options),
            Effect::Reset => {
                server.reset();
                self.tell("RESET", Some(json!({ "guest": false, "reason": "host-qmp-system-reset" })));
            }
            Effect::PowerButton => {
                server.press_power_button();
                self.tell("POWERDOWN", None);
            }
        }
        Next::GoOn
    }

    /// Tells the QMP client what the guest's side did to the machine's power.
    fn follow_power(&mut self, server: &Server, options: &Options) -> Next {
        for event in server.settle() {
            let next = match event {
                // There is no debug exit port here.
                PowerEvent::PowerOff | PowerEvent::DebugExit(_) => self.shut_down("guest-shutdown", options),
                PowerEvent::Reset(_) if options.end_at_reset => self.shut_down("guest-reset", options),
                PowerEvent::Reset(_) => {
                    self.tell("RESET", Some(json!({ "guest": true, "reason": "guest-reset" })));
                    Next::GoOn
                }
                PowerEvent::Panicked => self.panicked(options),
            };
            if next == Next::End {
                return Next::End;
            }
        }
        Next::GoOn
    }

    fn shut_down(&mut self, reason: &str, options: &Options) -> Next {
        self.tell("SHUTDOWN", Some(json!({ "guest": reason.starts_with("guest"), "reason": reason })));
        if options.end_at_shutdown {
            return Next::End;
        }
        self.qmp.set_status("shutdown");
        Next::GoOn
    }

    fn panicked(&mut self, options: &Options) -> Next {
        let action = match options.on_panic {
            PanicAction::Run => "run",
            PanicAction::Pause => "pause",
            PanicAction::Shutdown => "poweroff",
        };
        self.tell("GUEST_PANICKED", Some(json!({ "action": action })));
        match options.on_panic {
            PanicAction::Run => Next::GoOn,
            PanicAction::Pause => {
                self.qmp.set_status("guest-panicked");
                Next::GoOn
            }
            PanicAction::Shutdown => self.shut_down("guest-panic", options),
        }
    }

    /// Sends an event; a client that has gone hears nothing.
    fn tell(&mut self, name: &str, data: Option<serde_json::Value>) {
        let text = self.qmp.event(name, data);
        if let Some(monitor) = &mut self.monitor {
            let _ = monitor.send(&text);
        }
    }

    /// Writes a line to the log; one that cannot be written is lost.
    fn note(&mut self, direction: char, line: &str) {
        if let Some(log) = &mut self.log {
            let _ = writeln!(log, "[{direction} +{:.06}] {line}", self.started.elapsed().as_secs_f64());
        }
    }
}
