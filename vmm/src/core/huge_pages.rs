//! The thread that turns guest RAM in use into huge pages while the machine runs.
//!
//! It looks often while the guest takes memory, as it does at boot, and ever more seldom when it does not.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::memory::{GuestRam, HugePages};

use super::CoreError;

/// The pause after a look that found something.
const SHORTEST: Duration = Duration::from_millis(2);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(10);
/// How many times longer than a pause nothing has been found.
const QUIET: u32 = 8;
/// A pause is at least this many times as long as the look before it.
const REST: u32 = 10;
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
    let mut last = Instant::now();
    loop {
        let start = Instant::now();
        if pages.collapse_used() > 0 {
            last = Instant::now();
        }
        let quiet = last.elapsed() / QUIET;
        thread::sleep(quiet.clamp(SHORTEST, LONGEST).max(start.elapsed().saturating_mul(REST)));
    }
}
