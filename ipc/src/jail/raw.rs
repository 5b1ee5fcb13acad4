//! System calls without the C library, for a process that still shares its parent's memory: `errno` there is the parent's.
//!
//! Contains unsafe code: the `syscall` instruction.

use std::arch::asm;
use std::ffi::{c_int, c_long, c_uint, c_ulong};

/// What fits into a register.
pub(super) trait Word {
    /// As the kernel reads it.
    fn word(self) -> c_ulong;
}

impl Word for c_int {
    fn word(self) -> c_ulong {
        c_long::from(self).cast_unsigned()
    }
}

impl Word for c_uint {
    fn word(self) -> c_ulong {
        self.into()
    }
}

impl Word for c_long {
    fn word(self) -> c_ulong {
        self.cast_unsigned()
    }
}

impl Word for c_ulong {
    fn word(self) -> c_ulong {
        self
    }
}

impl Word for usize {
    fn word(self) -> c_ulong {
        self as c_ulong
    }
}

impl<T> Word for *const T {
    fn word(self) -> c_ulong {
        self.addr() as c_ulong
    }
}

impl<T> Word for *mut T {
    fn word(self) -> c_ulong {
        self.addr() as c_ulong
    }
}

/// `syscall!(NUMBER, argument…)`: the kernel's answer, errors as negative numbers.
macro_rules! syscall {
    ($number:expr $(, $argument:expr)* $(,)?) => {
        $crate::jail::raw::call($number, [$($crate::jail::raw::Word::word($argument)),*])
    };
}
pub(super) use syscall;

/// # Safety
/// Whatever the system call asks of its arguments, of which there are at most six.
pub(super) unsafe fn call<const N: usize>(number: c_long, arguments: [c_ulong; N]) -> c_long {
    const { assert!(N <= 6) };
    let mut six = [0; 6];
    for (place, argument) in six.iter_mut().zip(arguments) {
        *place = argument;
    }
    let [first, second, third, fourth, fifth, sixth] = six;
    let result;
    // SAFETY: the kernel's calling convention; the caller answers for what the call does.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            in("r8") fifth,
            in("r9") sixth,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_arguments_arrive_and_errors_are_negative() {
        // SAFETY: a private mapping of its own; then a length that fits nothing.
        let (mapped, refused) = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = |length: usize| {
                syscall!(libc::SYS_mmap, 0_usize, length, libc::PROT_READ, flags, -1, 0_usize)
            };
            (map(4096), map(0))
        };
        assert!(mapped > 0);
        assert_eq!(refused, c_long::from(-libc::EINVAL));
        // SAFETY: the page mapped above.
        assert_eq!(unsafe { syscall!(libc::SYS_munmap, mapped, 4096_usize) }, 0);
    }
}
