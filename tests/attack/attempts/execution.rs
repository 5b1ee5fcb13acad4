//! Ways to run code that was not in the program.

use super::*;

const WRITABLE_CODE: Option<&str> = Some("Linux has no other wall against it here");

fn executable_memory(_: &Held) -> Result {
    call(libc::SYS_mmap, [0, 4096, 7, 0x22, u64::MAX, 0]).map(drop)
}

fn executable_shared(held: &Held) -> Result {
    any(&held.descriptors, |number| call(libc::SYS_mmap, [0, 4096, 5, 1, fd(*number), 0]).map(drop))
}

fn made_executable(_: &Held) -> Result {
    let page = call(libc::SYS_mmap, [0, 4096, 3, 0x22, u64::MAX, 0])?.cast_unsigned();
    call(libc::SYS_mprotect, [page, 4096, 5, 0, 0, 0]).map(drop)
}

fn with_key(_: &Held) -> Result {
    let page = call(libc::SYS_mmap, [0, 4096, 3, 0x22, u64::MAX, 0])?.cast_unsigned();
    call(libc::SYS_pkey_mprotect, [page, 4096, 5, u64::MAX, 0, 0]).map(drop)
}

/// Code and stack of the program itself: could be written over once they are writable.
fn writable_code(_: &Held) -> Result {
    let code = writable_code as fn(&Held) -> Result as usize as u64 & !4095;
    call(libc::SYS_mprotect, [code, 4096, 7, 0, 0, 0]).map(drop)
}

fn personality(_: &Held) -> Result {
    // READ_IMPLIES_EXEC
    call(libc::SYS_personality, [0x0040_0000, 0, 0, 0, 0, 0]).map(drop)
}

/// A memfd with a program in it. Without an interpreter it is not executed, but that it may be shows.
fn memfd_program(_: &Held) -> Result {
    let memfd = call(libc::SYS_memfd_create, [address(c"x"), 1, 0, 0, 0, 0])?.cast_unsigned();
    call(libc::SYS_write, [memfd, address(c"#!/nothing\n"), 11, 0, 0, 0])?;
    let nothing = [0_u64];
    let arguments = [memfd, address(c""), address(&nothing), address(&nothing), fd(libc::AT_EMPTY_PATH), 0];
    match call(libc::SYS_execveat, arguments) {
        Err(libc::ENOENT | libc::ENOEXEC) => Ok(()),
        other => other.map(drop),
    }
}

fn other_table(_: &Held) -> Result {
    // x32: getpid of the other table of system calls.
    call(0x4000_0000 | libc::SYS_getpid, [0; 6]).map(drop)
}

pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        goal: "map writable and executable memory",
        calls: &["mmap"],
        run: executable_memory,
        walls: &[],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "map a held descriptor executable",
        calls: &["mmap"],
        run: executable_shared,
        walls: &[
            (libc::EACCES, "opened without execution"),
            (libc::ENODEV, "cannot be mapped"),
            (libc::EPERM, "no execution"),
            (libc::EBADF, NOTHING_HELD),
        ],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "make memory executable",
        calls: &["mprotect"],
        run: made_executable,
        walls: &[],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "the same with a protection key",
        calls: &["pkey_mprotect"],
        run: with_key,
        walls: &[(libc::ENOSYS, HOST)],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "make its own code writable",
        calls: &["mprotect"],
        run: writable_code,
        walls: &[],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "make all memory executable (personality)",
        calls: &["personality"],
        run: personality,
        walls: &[],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "execute a memfd",
        calls: &["memfd_create", "execveat"],
        run: memfd_program,
        walls: &[(libc::EFBIG, "RLIMIT_FSIZE"), (libc::EACCES, HOST), (libc::EPERM, HOST)],
        gap: WRITABLE_CODE,
    },
    Attempt {
        goal: "system calls of another table (x32)",
        calls: &["unknown"],
        run: other_table,
        walls: &[(libc::ENOSYS, HOST)],
        gap: Some("where the host's kernel has x32"),
    },
];
