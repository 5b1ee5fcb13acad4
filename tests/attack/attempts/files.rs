//! Paths, programs, devices.

use super::*;

const PATH: &[(i32, &str)] = &[(libc::ENOENT, EMPTY_ROOT), (libc::EACCES, LANDLOCK)];
const CREATE: &[(i32, &str)] =
    &[(libc::EROFS, READ_ONLY), (libc::EACCES, LANDLOCK), (libc::EPERM, NO_CAPABILITY)];

fn open(path: &std::ffi::CStr, flags: i32) -> Result {
    call(libc::SYS_openat, [fd(libc::AT_FDCWD), path.as_ptr() as u64, fd(flags), 0o600, 0, 0]).map(drop)
}

fn read(held: &Held) -> Result {
    let _ = held;
    any([c"/etc/passwd", c"/proc/self/maps", c"/sys/kernel", c"/../../etc/passwd", c"/dev/null"], |path| {
        open(path, libc::O_RDONLY)
    })
}

fn openat2(_: &Held) -> Result {
    let how = [0_u64; 3];
    call(libc::SYS_openat2, [fd(libc::AT_FDCWD), address(c"/etc/passwd"), address(&how), 24, 0, 0]).map(drop)
}

fn devices(_: &Held) -> Result {
    any([c"/dev/kvm", c"/dev/mem", c"/dev/vda", c"/dev/sda", c"/dev/tty"], |path| open(path, libc::O_RDWR))
}

fn create(_: &Held) -> Result {
    open(c"/file", libc::O_RDWR | libc::O_CREAT)
}

fn temporary(_: &Held) -> Result {
    open(c"/", libc::O_RDWR | libc::O_TMPFILE)
}

/// From a descriptor that might be a directory.
fn above(held: &Held) -> Result {
    any(&held.descriptors, |number| {
        call(libc::SYS_openat, [fd(*number), address(c"../etc/passwd"), 0, 0, 0, 0]).map(drop)
    })
}

fn list(_: &Held) -> Result {
    let mut entries = [0_u8; 512];
    let root = call(libc::SYS_open, [address(c"/"), fd(libc::O_RDONLY | libc::O_DIRECTORY), 0, 0, 0, 0])?;
    let count =
        call(libc::SYS_getdents64, [root.cast_unsigned(), entries.as_mut_ptr() as u64, 512, 0, 0, 0])?;
    // "." and ".." take 24 bytes each.
    if count > 48 { Ok(()) } else { Err(libc::ENOENT) }
}

fn handle(held: &Held) -> Result {
    // struct file_handle: 8 bytes follow, of type 1.
    let handle = [8_u32, 1, 2, 0];
    any(&held.descriptors, |number| {
        call(libc::SYS_open_by_handle_at, [fd(*number), address(&handle), 0, 0, 0, 0]).map(drop)
    })
}

fn node(_: &Held) -> Result {
    call(libc::SYS_mknod, [address(c"/disk"), 0o060_600, 0x0800, 0, 0, 0]).map(drop)
}

fn program(_: &Held) -> Result {
    let arguments = [0_u64];
    any([c"/bin/sh", c"/proc/self/exe", c"/usr/bin/env"], |path| {
        call(libc::SYS_execve, [path.as_ptr() as u64, address(&arguments), address(&arguments), 0, 0, 0])
            .map(drop)
    })
}

fn descriptor_as_program(held: &Held) -> Result {
    let nothing = [0_u64];
    any(&held.descriptors, |number| {
        let arguments =
            [fd(*number), address(c""), address(&nothing), address(&nothing), fd(libc::AT_EMPTY_PATH), 0];
        match call(libc::SYS_execveat, arguments) {
            // It may be executed, only its content is no program yet.
            Err(libc::ENOEXEC) => Ok(()),
            other => other.map(drop),
        }
    })
}

fn chroot(_: &Held) -> Result {
    call(libc::SYS_chroot, [address(c"/"), 0, 0, 0, 0, 0]).map(drop)
}

pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        goal: "open files of the host for reading, by any path",
        calls: &["openat"],
        run: read,
        walls: PATH,
        gap: None,
    },
    Attempt { goal: "the same by openat2", calls: &["openat2"], run: openat2, walls: PATH, gap: None },
    Attempt { goal: "open devices of the host", calls: &["openat"], run: devices, walls: PATH, gap: None },
    Attempt { goal: "create a file", calls: &["openat"], run: create, walls: CREATE, gap: None },
    Attempt { goal: "create a nameless file", calls: &["openat"], run: temporary, walls: CREATE, gap: None },
    Attempt {
        goal: "climb out of a descriptor that it holds",
        calls: &["openat"],
        run: above,
        walls: &[(libc::ENOTDIR, "holds no folder"), (libc::EBADF, NOTHING_HELD)],
        gap: None,
    },
    Attempt {
        goal: "find entries in its root",
        calls: &["open"],
        run: list,
        walls: &[(libc::ENOENT, EMPTY_ROOT), (libc::EACCES, LANDLOCK)],
        gap: None,
    },
    Attempt {
        goal: "open a file by its handle",
        calls: &["open_by_handle_at"],
        run: handle,
        walls: &[(libc::EPERM, NO_CAPABILITY), (libc::ESTALE, EMPTY_ROOT), (libc::EBADF, NOTHING_HELD)],
        gap: None,
    },
    Attempt {
        goal: "make a device node",
        calls: &["mknod"],
        run: node,
        walls: &[(libc::EPERM, NO_CAPABILITY), (libc::EROFS, READ_ONLY), (libc::EACCES, LANDLOCK)],
        gap: None,
    },
    Attempt { goal: "execute a program by path", calls: &["execve"], run: program, walls: PATH, gap: None },
    Attempt {
        goal: "execute what a held descriptor refers to",
        calls: &["execveat"],
        run: descriptor_as_program,
        walls: &[(libc::EACCES, "nothing held is executable")],
        gap: Some("before Linux 6.3 guest RAM can be executed as a program"),
    },
    Attempt {
        goal: "chroot",
        calls: &["chroot"],
        run: chroot,
        walls: &[(libc::EPERM, NO_CAPABILITY), (libc::EACCES, LANDLOCK)],
        gap: None,
    },
];
