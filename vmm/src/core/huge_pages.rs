//! The thread that turns guest RAM in use into huge pages while the machine runs.
//!
//! It looks often while the guest takes memory, as it does at boot, and ever more seldom when it does not.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::memory::{GuestRam, HugePages};

use super::CoreError;

/// The pause after a look that found something, and the first of those that grow.
const SHORTEST: Duration = Duration::from_millis(2);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(10);
/// A pause is at least this many times as long as the look before it.
const REST: u32 = 20;
const STACK: usize = 64 * 1024;

/// Starts the thread, unless the kernel cannot do it. It ends with the process.
///
/// # Errors
/// There is no thread to be had, or it cannot be sealed.
pub(super) fn watch(ram: &GuestRam) -> Result<(), CoreError> {
    let Some(pages) = HugePages::new(ram) else { return Ok(()) };
    let (sender, sealed) = mpsc::channel();
    thread::Builder::new()
        .name("huge-pages".to_owned())
        .stack_size(STACK)
        .spawn(move || run(pages, sender))
        .map_err(CoreError::system("clone3"))?;
    sealed.recv().unwrap_or(Ok(())).map_err(CoreError::Jail)
}

fn run(mut pages: HugePages, sealed: mpsc::Sender<Result<(), JailError>>) {
    let policy = jail::enter_thread(PolicyName::CoreHugePages);
    let failed = policy.is_err();
    let _ = sealed.send(policy);
    drop(sealed);
    if failed {
        return;
    }
    let mut pause = SHORTEST;
    loop {
        let start = Instant::now();
        let collapsed = pages.collapse_used();
        pause = if collapsed > 0 { SHORTEST } else { pause.saturating_mul(2).min(LONGEST) };
        thread::sleep(pause.max(start.elapsed().saturating_mul(REST)));
    }
}
