//! The host's end of a byte stream of the guest, whatever it is: a terminal, a pipe, a file, a socket, or nobody.
//!
//! A device starts with the descriptors that it was given, if any. A stream that is attached later takes their place until its
//! other end is closed; then they serve again.
//!
//! What the guest says is kept while nobody listens, the newest 64 KiB, and shown to the next who comes. A peer that does
//! not read holds the guest up for a second at most; after that the oldest bytes are dropped, and counted, until it reads
//! again.
//!
//! Descriptors may be shared with others (a terminal's with the user's shell), so their flags are left alone: each is asked by
//! poll(2) before it is used, and written in pieces that a ready one takes at once.
//!
//! | file | what |
//! | --- | --- |
//! | `backlog` | what the guest said and nobody took yet |
//! | `end` | one descriptor, and writing it without blocking |
//! | `peer` | who is at the other end now, both directions |
//! | `said` | what the guest said, passed on once |
//! | `typed` | what it sent and the guest has not got |
//! | `watch` | what epoll is asked to report |

mod backlog;
mod end;
mod peer;
mod said;
mod typed;
mod watch;

pub use backlog::{BURST, CAPACITY, HISTORY, PATIENCE};
pub use end::End;
pub use peer::{Ends, Peer};
pub use said::Said;
pub use typed::{KEPT, Typed};
