//! The terminal: raw while a guest has it, as it was before on every way out.
//!
//! The saved settings stand in a global so that the panic hook finds them: a panic aborts, and no destructor runs.
//! Nobody can restore the terminal when this process itself is killed with SIGKILL; `reset` or `stty sane` does.
//!
//! Contains unsafe code: TIOCGWINSZ fills a structure that the caller provides.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios, cfmakeraw, tcgetattr,
    tcsetattr,
};
use nix::unistd::{getpgrp, isatty, tcgetpgrp};

/// Settings to go back to, while standard input is raw.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Standard input in raw mode; dropping it restores the settings.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw: each key at once, no echo, no signals from keys. Output keeps its translation of
    /// newlines, for messages share the terminal. Reading never blocks.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        raw.output_flags.insert(OutputFlags::OPOST | OutputFlags::ONLCR);
        raw.input_flags.remove(InputFlags::IXON);
        raw.local_flags.remove(LocalFlags::ISIG);
        for (index, value) in [(SpecialCharacterIndices::VMIN, 0), (SpecialCharacterIndices::VTIME, 0)] {
            if let Some(slot) = raw.control_chars.get_mut(index as usize) {
                *slot = value;
            }
        }
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        if saved.is_none() {
            *saved = Some(before.into());
        }
        drop(saved);
        let this = Self(());
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(this)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal if it was made raw. Harmless at any time.
pub fn restore() {
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(before) = saved.take()
    {
        // When this fails the terminal is gone, and nothing is left to restore.
        let _gone = tcsetattr(io::stdin(), SetArg::TCSANOW, &Termios::from(before));
    }
}

/// Makes a panic restore the terminal before its message is printed.
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |information| {
        restore();
        print(information);
    }));
}

/// Whether standard input is a terminal that this process may read and change: a background job may not.
pub fn stdin_is_ours() -> bool {
    let stdin = io::stdin();
    isatty(&stdin) == Ok(true) && tcgetpgrp(&stdin) == Ok(getpgrp())
}

nix::ioctl_read_bad!(
    /// Reads the size of a terminal (`ioctl_tty(2)`).
    tiocgwinsz,
    libc::TIOCGWINSZ,
    libc::winsize
);

/// Columns and rows of a terminal, `None` when it is none or does not know.
pub fn size(terminal: impl AsFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is borrowed for the call, and TIOCGWINSZ writes one `winsize`, which `size` is.
    unsafe { tiocgwinsz(terminal.as_fd().as_raw_fd(), &raw mut size) }.ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// What the keys that end a session and their like mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Ctrl-A X (or Ctrl-] where that is enabled): leave.
    Leave,
    /// Ctrl-A H or Ctrl-A ?: help.
    Help,
}

/// Finds escape sequences in what is typed: Ctrl-A X, Ctrl-A H, Ctrl-A Ctrl-A.
#[derive(Debug, Default)]
pub struct Escapes {
    armed: bool,
    bracket: bool,
}

const CTRL_A: u8 = 1;
const CTRL_BRACKET: u8 = 0x1d;

impl Escapes {
    /// With `bracket`, Ctrl-] leaves too.
    pub const fn new(bracket: bool) -> Self {
        Self { armed: false, bracket }
    }

    /// Appends to `out` what is meant for the guest and returns the first command. What was typed after a command
    /// is dropped: for [`Key::Leave`] there is nobody to get it.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> Option<Key> {
        for byte in typed {
            if self.armed {
                self.armed = false;
                match byte {
                    b'x' | b'X' => return Some(Key::Leave),
                    b'h' | b'H' | b'?' => return Some(Key::Help),
                    &CTRL_A => out.push(CTRL_A),
                    // Not a command: the guest gets both keys.
                    _ => out.extend([CTRL_A, *byte]),
                }
            } else if *byte == CTRL_A {
                self.armed = true;
            } else if self.bracket && *byte == CTRL_BRACKET {
                return Some(Key::Leave);
            } else {
                out.push(*byte);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(escapes: &mut Escapes, typed: &[u8]) -> (Vec<u8>, Option<Key>) {
        let mut out = Vec::new();
        let key = escapes.filter(typed, &mut out);
        (out, key)
    }

    #[test]
    fn ctrl_c_belongs_to_the_guest() {
        assert_eq!(filter(&mut Escapes::new(false), b"ls\r\x03\x1d"), (b"ls\r\x03\x1d".to_vec(), None));
    }

    #[test]
    fn ctrl_a_x_leaves_even_when_typed_slowly() {
        let mut escapes = Escapes::new(false);
        assert_eq!(filter(&mut escapes, b"a\x01"), (b"a".to_vec(), None));
        assert_eq!(filter(&mut escapes, b"xb"), (vec![], Some(Key::Leave)));
    }

    #[test]
    fn ctrl_a_twice_sends_one() {
        assert_eq!(filter(&mut Escapes::new(false), b"\x01\x01x"), (b"\x01x".to_vec(), None));
    }

    #[test]
    fn ctrl_a_before_another_key_sends_both() {
        assert_eq!(filter(&mut Escapes::new(false), b"\x01e"), (b"\x01e".to_vec(), None));
    }

    #[test]
    fn ctrl_bracket_leaves_where_enabled() {
        assert_eq!(filter(&mut Escapes::new(true), b"a\x1db"), (b"a".to_vec(), Some(Key::Leave)));
    }
}
