//! What the log hears of failed requests: the first of each kind, then a count now and then.

use std::time::{Duration, Instant};

use tracing::error;

/// Time between two lines about the same kind of failure.
const INTERVAL: Duration = Duration::from_secs(30);
/// Kinds of failure that are told apart; more share the last.
const KINDS: usize = 8;

struct Kind {
    operation: &'static str,
    errno: i32,
    count: u64,
    logged: Instant,
}

/// Failures of one queue.
#[derive(Default)]
pub struct ErrorLog {
    kinds: Vec<Kind>,
}

impl ErrorLog {
    /// A request failed with `errno`; `outcome` is what the guest sees of it.
    pub fn failed(&mut self, operation: &'static str, errno: i32, outcome: &'static str) {
        let now = Instant::now();
        let full = self.kinds.len() >= KINDS;
        let known =
            self.kinds.iter_mut().find(|kind| full || (kind.operation == operation && kind.errno == errno));
        let count = match known {
            Some(kind) => {
                kind.count = kind.count.saturating_add(1);
                if now.saturating_duration_since(kind.logged) < INTERVAL {
                    return;
                }
                kind.logged = now;
                kind.count
            }
            None => {
                self.kinds.push(Kind { operation, errno, count: 1, logged: now });
                1
            }
        };
        let error = std::io::Error::from_raw_os_error(errno);
        error!(operation, %error, count, "the disk failed; {outcome}");
    }
}
