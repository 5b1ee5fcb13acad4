//! Out of the directory that a process shares: with the calls and flags that its policy lets through.
//!
//! Others hold no directory. They try the same with what they hold.
//!
//! Contains unsafe code: a structure made of zeroes, which the kernel fills.

use super::*;

/// `O_PATH | O_NOFOLLOW | O_CLOEXEC`, and `O_NONBLOCK | O_CLOEXEC`: what the policy lets it open with.
const HOLD: i32 = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
const USE: i32 = libc::O_NONBLOCK | libc::O_CLOEXEC;
const STAYS: (i32, &str) = (libc::ENOENT, "at its root `..` stays");
const NO_FOLDER: (i32, &str) = (libc::ENOTDIR, "holds no folder");
const NOT_OPEN: (i32, &str) = (libc::EBADF, NOTHING_HELD);
const NO_RULE: (i32, &str) = (libc::EACCES, LANDLOCK);
/// The open pass tries in a child. `/proc/PID/fd` is root's from before the exec until somebody looks at it again: it opens to the
/// process itself in any case, and to a child of the same user only after that look.
const NOT_ITS_OWN: (i32, &str) = (libc::EACCES, "another process's descriptors");

/// The shared directory, or whatever could be one.
fn folders(held: &Held) -> Vec<RawFd> {
    held.shared.map_or_else(|| held.descriptors.clone(), |(root, _)| vec![root])
}

/// `/proc/self/fd`, or whatever could be it.
fn names(held: &Held) -> Vec<RawFd> {
    held.shared.map_or_else(|| held.descriptors.clone(), |(_, names)| vec![names])
}

fn open(folder: RawFd, path: &std::ffi::CStr, flags: i32) -> Result<u64> {
    let opened = call(libc::SYS_openat, [fd(folder), path.as_ptr() as u64, fd(flags), 0o600, 0, 0])?;
    Ok(opened.cast_unsigned())
}

fn close(number: u64) {
    let _closed = call(libc::SYS_close, [number, 0, 0, 0, 0, 0]);
}

/// Tries each path in each folder, with the flags of holding and of using.
fn open_any(folders: &[RawFd], paths: &[&std::ffi::CStr]) -> Result {
    any(folders, |folder| {
        any(paths, |path| any([USE, USE | libc::O_RDWR], |flags| open(*folder, path, flags).map(close)))
    })
}

fn absolute(held: &Held) -> Result {
    let paths = [
        c"/etc/passwd",
        c"/proc/self/maps",
        c"/proc/1/root/etc/passwd",
        c"/../etc/passwd",
        c"/sys/kernel",
        c"/dev/kvm",
    ];
    open_any(&[&folders(held)[..], &[libc::AT_FDCWD]].concat(), &paths)
}

fn upwards(held: &Held) -> Result {
    let paths = [
        c"../secret",
        c"inner/../../secret",
        c"inner/../../../../../../../../etc/passwd",
        c"../../../../../../etc/passwd",
        c"./.././../secret",
    ];
    open_any(&folders(held), &paths)
}

/// Device and number of a file.
fn identity(file: u64) -> Result<(u32, u32, u64)> {
    // SAFETY: plain data, for which zero is a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS
    call(libc::SYS_statx, [file, address(c""), 0x1900, 0x7FF, &raw mut found as u64, 0])?;
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

fn above(held: &Held) -> Result {
    any([folders(held), names(held)].concat(), |folder| {
        let mut up = open(folder, c"..", HOLD)?;
        for _ in 0..5 {
            let next = open(i32::try_from(up).unwrap_or(-1), c"..", HOLD)?;
            close(up);
            up = next;
        }
        let (above, own) = (identity(up)?, identity(fd(folder))?);
        close(up);
        if above == own { Err(libc::ENOENT) } else { Ok(()) }
    })
}

fn links(held: &Held) -> Result {
    open_any(&folders(held), &[c"absolute", c"relative", c"inner/deeper", c"proc", c"folder/secret"])
}

fn own_links(held: &Held) -> Result {
    let targets = [c"/etc/passwd", c"../secret", c"/proc/self/fd/6/../secret", c"/proc/1/cwd/../etc/passwd"];
    any(folders(held), |folder| {
        any(targets, |target| {
            let own = [fd(folder), address(c"own-link"), 0, 0, 0, 0];
            call(libc::SYS_symlinkat, [target.as_ptr() as u64, own[0], own[1], 0, 0, 0])?;
            let outcome = open_any(&[folder], &[c"own-link"]);
            call(libc::SYS_unlinkat, own)?;
            outcome
        })
    })
}

fn magic_links(held: &Held) -> Result {
    let root = held.shared.map_or(6, |(root, _)| root);
    let through = [format!("{root}/../secret\0"), format!("../fd/{root}/../../etc/passwd\0")];
    let through: Vec<&std::ffi::CStr> =
        through.iter().filter_map(|path| std::ffi::CStr::from_bytes_with_nul(path.as_bytes()).ok()).collect();
    let outwards =
        [c"../root/etc/passwd", c"../cwd/etc/passwd", c"../exe", c"../maps", c"../../1/maps", c"../mem"];
    open_any(&names(held), &[&through[..], &outwards].concat())
}

/// A second name in the directory for what it does not share: by path, and by each other descriptor.
fn bring_in(held: &Held) -> Result {
    let link = |from: [u64; 2], folder: RawFd| {
        // AT_SYMLINK_FOLLOW
        call(libc::SYS_linkat, [from[0], from[1], fd(folder), address(c"own-name"), 0x400, 0]).map(drop)
    };
    any(folders(held), |folder| {
        let outcome = any([c"/etc/passwd", c"/proc/self/exe", c"/dev/kvm"], |path| {
            link([fd(libc::AT_FDCWD), path.as_ptr() as u64], folder)
        });
        let Some((root, names)) = held.shared.filter(|_| outcome != Err(crate::hostile::STOPPED)) else {
            return outcome;
        };
        any(held.descriptors.iter().filter(|number| ![root, names].contains(number)), |number| {
            link([fd(names), address(format!("{number}\0").as_bytes())], folder)
        })
    })
}

fn move_in(held: &Held) -> Result {
    any(folders(held), |folder| {
        any(
            [(libc::AT_FDCWD, c"/etc/passwd"), (folder, c"../secret"), (folder, c"../../etc")],
            |(from, path)| {
                let to = [fd(folder), address(c"own-name"), 0, 0];
                call(libc::SYS_renameat2, [fd(from), path.as_ptr() as u64, to[0], to[1], to[2], to[3]])
                    .map(drop)
            },
        )
    })
}

/// By the calls that the policy allows on names.
fn change_beside(held: &Held) -> Result {
    let secret = address(c"../secret");
    any(folders(held), |folder| {
        let folder = fd(folder);
        any(
            [
                (libc::SYS_unlinkat, [folder, secret, 0, 0, 0, 0]),
                (libc::SYS_fchmodat, [folder, secret, 0o777, 0, 0, 0]),
                (libc::SYS_fchownat, [folder, secret, 0, 0, 0x1000, 0]),
                (libc::SYS_utimensat, [folder, secret, 0, 0, 0, 0]),
                (libc::SYS_openat, [folder, secret, fd(USE | libc::O_WRONLY | libc::O_TRUNC), 0, 0, 0]),
            ],
            |(number, arguments)| call(number, arguments).map(drop),
        )
    })
}

fn device(held: &Held) -> Result {
    any(folders(held), |folder| {
        any([(libc::S_IFCHR, 0x0101), (libc::S_IFBLK, 0x0800)], |(kind, number)| {
            let arguments = [fd(folder), address(c"own-device"), u64::from(kind | 0o666), number, 0, 0];
            call(libc::SYS_mknodat, arguments).map(drop)
        })
    })
}

fn use_device(held: &Held) -> Result {
    open_any(&folders(held), &[c"device"])
}

fn program(held: &Held) -> Result {
    let nothing = [0_u64];
    any(folders(held), |folder| {
        let arguments = [fd(folder), address(c"program"), address(&nothing), address(&nothing), 0, 0];
        call(libc::SYS_execveat, arguments).map(drop)
    })
}

fn climb_from_inside(held: &Held) -> Result {
    any(folders(held), |folder| {
        call(libc::SYS_fchdir, [fd(folder), 0, 0, 0, 0, 0])?;
        open_any(&[libc::AT_FDCWD], &[c"../secret", c"../../../../../etc/passwd"])
    })
}

fn mounts(held: &Held) -> Result {
    const OPEN_TREE: i64 = 428;
    const MOVE_MOUNT: i64 = 429;
    const MOUNT_SETATTR: i64 = 442;
    /// `AT_EMPTY_PATH`.
    const EMPTY: u64 = 0x1000;
    // struct mount_attr: clear MOUNT_ATTR_RDONLY, NOSUID, NODEV, NOEXEC.
    let attributes = [0_u64, 0xF, 0, 0];
    any(folders(held), |folder| {
        let (folder, nothing) = (fd(folder), address(c""));
        any(
            [
                (OPEN_TREE, [folder, nothing, EMPTY | 1, 0, 0, 0]),
                (MOVE_MOUNT, [folder, nothing, fd(libc::AT_FDCWD), address(c"/"), 4, 0]),
                (MOUNT_SETATTR, [folder, nothing, EMPTY, address(&attributes), 32, 0]),
            ],
            |(number, arguments)| call(number, arguments).map(drop),
        )
    })
}

/// The root of the file system that the directory is in, by its well-known number.
fn by_handle(held: &Held) -> Result {
    // struct file_handle: 8 bytes, FILEID_INO32_GEN: inode 2, any generation.
    let handle = [8_u32, 1, 2, 0];
    any(folders(held), |folder| {
        // One that is held only (O_PATH) names no file system: it is opened for use first, where that is possible.
        let folder = open(folder, c".", USE).unwrap_or(fd(folder));
        call(libc::SYS_open_by_handle_at, [folder, address(&handle), 0, 0, 0, 0]).map(drop)
    })
}

const fn attempt(
    goal: &'static str,
    calls: &'static [&'static str],
    run: fn(&Held) -> Result,
    walls: &'static [(i32, &'static str)],
) -> Attempt {
    Attempt { goal, calls, run, walls, gap: None }
}

pub const ATTEMPTS: &[Attempt] = &[
    attempt(
        "open the host's files by absolute paths, as shared files are opened",
        &["openat"],
        absolute,
        &[(libc::ENOENT, EMPTY_ROOT), NO_RULE],
    ),
    attempt("climb out by `..`", &["openat"], upwards, &[STAYS, NO_FOLDER, NOT_OPEN]),
    attempt("take hold of what lies above", &["openat"], above, &[STAYS, NO_FOLDER, NOT_OPEN, NOT_ITS_OWN]),
    attempt(
        "follow links that lie there and lead out",
        &["openat"],
        links,
        &[(libc::ENOENT, "they lead into the empty root, or stay"), NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "make links that lead out, and follow them",
        &["symlinkat"],
        own_links,
        &[(libc::ENOENT, "they lead into the empty root, or stay"), NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "leave through `/proc/self/fd`, to `root`, `cwd`, `exe`, other processes",
        &["openat"],
        magic_links,
        &[STAYS, NO_FOLDER, NOT_OPEN, NOT_ITS_OWN],
    ),
    attempt(
        "give what is not shared another name in the directory (hard link)",
        &["linkat"],
        bring_in,
        &[(libc::EXDEV, "another mount"), (libc::ENOENT, EMPTY_ROOT), NO_RULE, NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "move what is not shared into the directory",
        &["renameat2"],
        move_in,
        &[(libc::EXDEV, "another mount"), STAYS, NO_RULE, NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "remove, change or cut what lies beside the directory",
        &["unlinkat"],
        change_beside,
        &[STAYS, NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "make a device in it",
        &["mknodat"],
        device,
        &[(libc::EPERM, NO_CAPABILITY), NO_RULE, NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "use a device that lies in it",
        &["openat"],
        use_device,
        &[
            (libc::EACCES, "a mount without devices"),
            (libc::ENOENT, "only root can have put one there"),
            NO_FOLDER,
            NOT_OPEN,
        ],
    ),
    attempt(
        "execute a program that lies in it",
        &["execveat"],
        program,
        &[(libc::EACCES, "a mount without execution"), NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "make it its working directory and climb from there",
        &["fchdir"],
        climb_from_inside,
        &[STAYS, NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "mount it elsewhere, or with other flags",
        &["open_tree"],
        mounts,
        &[(libc::EPERM, NO_CAPABILITY), NO_FOLDER, NOT_OPEN],
    ),
    attempt(
        "open a file of its file system by handle",
        &["openat", "open_by_handle_at"],
        by_handle,
        &[
            (libc::EPERM, NO_CAPABILITY),
            (libc::ESTALE, "no such file"),
            (libc::EOPNOTSUPP, "no handles there"),
            NO_FOLDER,
            NOT_OPEN,
        ],
    ),
];
