//! What epoll is asked to report about a stream's descriptors.

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use tracing::warn;

use super::end::End;

/// Makes the event by which the device's loop knows its stream.
pub type Tag = fn(EpollFlags) -> EpollEvent;

/// The descriptors that epoll knows. They stay open until it has forgotten them: others may hold the same open file, and epoll
/// goes on to report that one.
#[derive(Debug, Default)]
pub struct Watches {
    known: Vec<(End, EpollFlags)>,
}

impl Watches {
    /// Makes epoll know what is `wanted` and nothing else. Everything is edge-triggered: a hang-up is reported whether one asks
    /// for it or not, and would otherwise wake the loop for ever.
    pub fn set(&mut self, wanted: [Option<(&End, EpollFlags)>; 2], epoll: &Epoll, tag: Tag) {
        let same = |end: &End| wanted.iter().flatten().find(|(wanted, _)| wanted.is(end));
        self.known.retain(|(end, _)| {
            let keep = same(end).is_some();
            if !keep {
                // A regular file was never known.
                let _ = epoll.delete(end);
            }
            keep
        });
        for (end, flags) in wanted.into_iter().flatten() {
            let event = || tag(flags | EpollFlags::EPOLLET);
            let done = match self.known.iter_mut().find(|(known, _)| known.is(end)) {
                Some((_, known)) if *known == flags => continue,
                Some((_, known)) => {
                    *known = flags;
                    epoll.modify(end, &mut event())
                }
                None => {
                    self.known.push((end.clone(), flags));
                    epoll.add(end, event())
                }
            };
            match done {
                // A regular file cannot be watched, and need not be: it is always ready.
                Ok(()) | Err(Errno::EPERM | Errno::ENOENT) => {}
                Err(errno) => warn!(%errno, "a stream's peer cannot be watched"),
            }
        }
    }
}
