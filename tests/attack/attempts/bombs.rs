//! Taking more than its share: processes, memory, descriptors, disk.

use super::*;

/// More than any limit allows, and no more than the kernel promises without having it.
const MEMORY: u64 = 64 << 30;
/// At once.
const PIECE: u64 = 64 << 20;
/// More processes or descriptors than any limit allows.
const MANY: usize = 2500;

fn children(number: i64, arguments: [u64; 6]) -> Result {
    let mut outcome = Ok(());
    for _ in 0..MANY {
        match call(number, arguments) {
            Ok(0) => loop {
                // A child: waits to be killed.
                let _interrupted = call(libc::SYS_pause, [0; 6]);
            },
            Ok(_) => {}
            Err(errno) => {
                outcome = Err(errno);
                break;
            }
        }
    }
    if outcome != Err(crate::hostile::STOPPED) {
        let _gone = call(libc::SYS_kill, [u64::MAX, fd(libc::SIGKILL), 0, 0, 0, 0]);
    }
    outcome
}

fn fork(_: &Held) -> Result {
    children(libc::SYS_fork, [0; 6])
}

fn clone(_: &Held) -> Result {
    children(libc::SYS_clone, [fd(libc::SIGCHLD), 0, 0, 0, 0, 0])
}

fn clone3(_: &Held) -> Result {
    let mut arguments = [0_u64; 11];
    arguments[4] = fd(libc::SIGCHLD);
    children(libc::SYS_clone3, [address(&arguments), 88, 0, 0, 0, 0])
}

fn threads(_: &Held) -> Result {
    for _ in 0..MANY {
        let thread = std::thread::Builder::new().stack_size(16384);
        let spawned = thread.spawn(|| {
            loop {
                std::thread::park();
            }
        });
        if let Err(error) = spawned {
            return Err(error.raw_os_error().unwrap_or(libc::EAGAIN));
        }
    }
    Ok(())
}

fn map(flags: i32) -> Result {
    let mut pieces = Vec::new();
    let mut outcome = Ok(());
    for _ in 0..MEMORY / PIECE {
        match call(libc::SYS_mmap, [0, PIECE, 3, fd(flags), u64::MAX, 0]) {
            Ok(start) => pieces.push(start.cast_unsigned()),
            Err(errno) => {
                outcome = Err(errno);
                break;
            }
        }
    }
    for start in pieces {
        let _freed = call(libc::SYS_munmap, [start, PIECE, 0, 0, 0, 0]);
    }
    outcome
}

fn private_memory(_: &Held) -> Result {
    map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
}

fn shared_memory(_: &Held) -> Result {
    map(libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
}

fn heap(_: &Held) -> Result {
    let end = call(libc::SYS_brk, [0; 6])?.cast_unsigned();
    let wanted = end.saturating_add(MEMORY);
    if call(libc::SYS_brk, [wanted, 0, 0, 0, 0, 0])?.cast_unsigned() >= wanted {
        Ok(())
    } else {
        Err(libc::ENOMEM)
    }
}

fn segments(_: &Held) -> Result {
    // IPC_PRIVATE, IPC_CREAT
    call(libc::SYS_shmget, [0, MEMORY, 0o1600, 0, 0, 0]).map(drop)
}

fn memfds(_: &Held) -> Result {
    let memfd = call(libc::SYS_memfd_create, [address(c"x"), 3, 0, 0, 0, 0])?.cast_unsigned();
    let outcome = call(libc::SYS_ftruncate, [memfd, 1 << 40, 0, 0, 0, 0]).map(drop);
    let _closed = call(libc::SYS_close, [memfd, 0, 0, 0, 0, 0]);
    outcome
}

fn locked_memory(_: &Held) -> Result {
    let page = call(libc::SYS_mmap, [0, PIECE, 3, 0x22, u64::MAX, 0])?.cast_unsigned();
    call(libc::SYS_mlock, [page, PIECE, 0, 0, 0, 0]).map(drop)
}

fn many(mut make: impl FnMut() -> Result<i64>) -> Result {
    let mut made = Vec::new();
    let mut outcome = Ok(());
    for _ in 0..MANY {
        match make() {
            Ok(number) => made.push(number.cast_unsigned()),
            Err(errno) => {
                outcome = Err(errno);
                break;
            }
        }
    }
    for number in made {
        let _closed = call(libc::SYS_close, [number, 0, 0, 0, 0, 0]);
    }
    outcome
}

fn duplicates(_: &Held) -> Result {
    // F_DUPFD_CLOEXEC
    many(|| call(libc::SYS_fcntl, [2, 1030, 0, 0, 0, 0]))
}

fn event_descriptors(_: &Held) -> Result {
    many(|| call(libc::SYS_eventfd2, [0; 6]))
}

fn message_queues(_: &Held) -> Result {
    // O_RDWR | O_CREAT
    call(libc::SYS_mq_open, [address(c"queue"), 0o102, 0o600, 0, 0, 0]).map(drop)
}

fn grow(held: &Held, number: i64, arguments: impl Fn(u64) -> [u64; 6]) -> Result {
    // The log's pipe is 1 and 2.
    let files = held.descriptors.iter().filter(|number| **number > 2);
    any(files, |file| call(number, arguments(fd(*file))).map(drop))
}

fn longer_files(held: &Held) -> Result {
    grow(held, libc::SYS_ftruncate, |file| [file, 1 << 40, 0, 0, 0, 0])
}

fn allocated_files(held: &Held) -> Result {
    grow(held, libc::SYS_fallocate, |file| [file, 0, 1 << 40, 1 << 30, 0, 0])
}

fn written_files(held: &Held) -> Result {
    grow(held, libc::SYS_pwrite64, |file| [file, address(c"x"), 1, 1 << 40, 0, 0])
}

const FILES: &[(i32, &str)] = &[
    (libc::EFBIG, "RLIMIT_FSIZE"),
    (libc::EPERM, "sealed"),
    (libc::EINVAL, "holds no file that grows"),
    (libc::EBADF, "holds no file that grows"),
    (libc::ESPIPE, "holds no file that grows"),
    (libc::ENODEV, "holds no file that grows"),
    (libc::EOPNOTSUPP, "holds no file that grows"),
];
const PROCESSES: &[(i32, &str)] = &[(libc::EAGAIN, "RLIMIT_NPROC, pids of the cgroup")];
const MEMORY_WALL: &[(i32, &str)] = &[(libc::ENOMEM, "RLIMIT_DATA")];
const DESCRIPTORS: &[(i32, &str)] = &[(libc::EMFILE, "RLIMIT_NOFILE")];
const CGROUP: Option<&str> = Some("the memory limit of the cgroup counts it, where the host has one");

pub const ATTEMPTS: &[Attempt] = &[
    Attempt { goal: "fork without end", calls: &["fork"], run: fork, walls: PROCESSES, gap: None },
    Attempt { goal: "the same by clone", calls: &["clone"], run: clone, walls: PROCESSES, gap: None },
    Attempt { goal: "the same by clone3", calls: &["clone3"], run: clone3, walls: PROCESSES, gap: None },
    Attempt {
        goal: "threads without end",
        calls: &["mmap", "clone3", "clone"],
        run: threads,
        walls: PROCESSES,
        gap: None,
    },
    Attempt {
        goal: "64 GiB of private memory",
        calls: &["mmap"],
        run: private_memory,
        walls: MEMORY_WALL,
        gap: None,
    },
    Attempt { goal: "64 GiB of heap", calls: &["brk"], run: heap, walls: MEMORY_WALL, gap: None },
    Attempt {
        goal: "64 GiB of shared memory",
        calls: &["mmap"],
        run: shared_memory,
        walls: &[(libc::ENOMEM, "RLIMIT_AS")],
        gap: CGROUP,
    },
    Attempt {
        goal: "64 GiB of System V memory",
        calls: &["shmget"],
        run: segments,
        walls: &[(libc::ENOMEM, HOST), (libc::EINVAL, HOST), (libc::ENOSYS, HOST)],
        gap: CGROUP,
    },
    Attempt {
        goal: "a memfd of 1 TiB",
        calls: &["memfd_create", "ftruncate"],
        run: memfds,
        walls: &[(libc::EFBIG, "RLIMIT_FSIZE")],
        gap: None,
    },
    Attempt {
        goal: "lock memory",
        calls: &["mlock"],
        run: locked_memory,
        walls: &[
            (libc::ENOMEM, "RLIMIT_MEMLOCK"),
            (libc::EPERM, "RLIMIT_MEMLOCK"),
            (libc::EAGAIN, "RLIMIT_MEMLOCK"),
        ],
        gap: None,
    },
    Attempt {
        goal: "all descriptors, by duplicates",
        calls: &["fcntl"],
        run: duplicates,
        walls: DESCRIPTORS,
        gap: None,
    },
    Attempt {
        goal: "all descriptors, by eventfds",
        calls: &["eventfd2"],
        run: event_descriptors,
        walls: DESCRIPTORS,
        gap: None,
    },
    Attempt {
        goal: "message queues",
        calls: &["mq_open"],
        run: message_queues,
        walls: &[(libc::EMFILE, "RLIMIT_MSGQUEUE"), (libc::ENOSYS, HOST), (libc::EACCES, LANDLOCK)],
        gap: None,
    },
    Attempt {
        goal: "make its files 1 TiB long",
        calls: &["ftruncate"],
        run: longer_files,
        walls: FILES,
        gap: None,
    },
    Attempt {
        goal: "allocate disk space for them",
        calls: &["fallocate"],
        run: allocated_files,
        walls: FILES,
        gap: None,
    },
    Attempt {
        goal: "write far behind their end",
        calls: &["pwrite64"],
        run: written_files,
        walls: FILES,
        gap: None,
    },
];
