//! The jail as the supervisor and the host see it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_ipc::jail::{
    Enforcement, Exit, JailError, Layer, Limits, PANIC_EXIT_CODE, PolicyName, Step, ViolationListener,
    landlock_version,
};

use crate::inside::{Answer, Ask, Inside};
use crate::{Case, DEADLINE, Jailed, TITLE};

pub const CASES: &[Case] = &[
    ("sees an empty read-only root, no environment and its limits", inside),
    ("has seven namespaces of its own", namespaces),
    ("is not host root and has no capabilities", credentials),
    ("holds exactly the descriptors that it was given", descriptors),
    ("runs every thread under a filter after sealing", filters),
    ("has one read-only mount, no root entries, and its title", root_from_outside),
    ("ends with code 101 after a panic, in one line", panics),
    ("ends when its channel is closed", channel_closed),
    ("is killed and reaped when dropped", dropped),
    ("leaves nothing in its starter's memory once it runs, or has ended before", nothing_left),
    ("dies with its supervisor at any moment", dies_with_supervisor),
    ("reports the step that failed", failed_steps),
    ("asks for no more than the supervisor's own limits", clamped_limits),
    ("says which layer the host forbids", forbidden_namespaces),
];

fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{key}:"))).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

fn look() -> (Jailed, Inside) {
    let jailed = Jailed::start("look");
    let (answer, _) = jailed.channel.recv(Some(DEADLINE)).unwrap();
    let Answer::Inside(inside) = answer else { panic!("{answer:?}") };
    (jailed, inside)
}

fn sealed() -> (Jailed, Vec<OwnedFd>) {
    let jailed = Jailed::start("serve");
    jailed.channel.send(&Ask::Seal(PolicyName::BlkQueue, Enforcement::Supervised), &[]).unwrap();
    let (answer, listeners) = jailed.channel.recv::<Answer>(Some(DEADLINE)).unwrap();
    assert!(
        matches!(answer, Answer::Ready(policies) if policies == [PolicyName::BlkQueue, PolicyName::BlkMain])
    );
    assert_eq!(listeners.len(), 2);
    // An answer to one more question comes after the other side's copies were dropped.
    jailed.channel.send(&Ask::Call(libc::SYS_getpid, [0; 6]), &[]).unwrap();
    let answer = jailed.channel.recv(Some(DEADLINE));
    let violations = || {
        listeners.iter().map(|it| ViolationListener::new(PolicyName::BlkMain, it.try_clone().unwrap()).read())
    };
    assert!(
        matches!(answer, Ok((Answer::Returned(1), _))),
        "{:?} {:?}",
        answer,
        violations().collect::<Vec<_>>()
    );
    (jailed, listeners)
}

fn inside() {
    let (_jailed, inside) = look();
    assert_eq!((inside.pid, inside.parent, inside.session), (1, 0, 1));
    assert_ne!(inside.uid, 0);
    assert_eq!(inside.dumpable, 0);
    // What is there is looked at from outside; Landlock does not let the process itself list it.
    let listed = if landlock_version().is_ok() { libc::EACCES } else { 0 };
    assert_eq!((inside.list, inside.upwards), (listed, listed));
    assert_eq!(inside.create, libc::EROFS);
    assert_eq!(inside.mount, libc::EPERM);
    assert_eq!(inside.environment, 0);
    assert_eq!(inside.umask, 0o077);
    assert!(inside.ignored_signals.is_empty(), "{:?}", inside.ignored_signals);
    let limits = Limits::default();
    assert_eq!(inside.limits[&libc::RLIMIT_NOFILE], limits.descriptors);
    assert_eq!(inside.limits[&libc::RLIMIT_NPROC], limits.threads);
    assert_eq!(inside.limits[&libc::RLIMIT_FSIZE], 0);
    assert_eq!(inside.limits[&libc::RLIMIT_CORE], 0);
    assert_eq!(inside.limits[&libc::RLIMIT_MEMLOCK], 0);
    assert_eq!(Some(inside.limits[&libc::RLIMIT_DATA]), limits.data);
}

fn namespaces() {
    let (first, second) = (Jailed::start("serve"), Jailed::start("serve"));
    for name in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        let (ours, one, other) =
            (of("self"), of(&first.process.pid().to_string()), of(&second.process.pid().to_string()));
        assert!(ours != one && ours != other && one != other, "{name}: {ours:?} {one:?} {other:?}");
    }
}

fn nothing_left() {
    let maps = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    // What the allocator and the test need themselves is there after the first.
    let failing = || Jailed::try_start("serve", File::open("/dev/null").unwrap(), Limits::default()).unwrap();
    drop((Jailed::start("serve"), failing()));
    let before = maps();
    let running: Vec<_> = (0..20).map(|_| Jailed::start("serve")).collect();
    (0..20).for_each(|_| drop(failing()));
    assert!(maps() < before + 10, "{before} mappings before, {} after", maps());
    drop(running);
}

fn credentials() {
    let (jailed, _listeners) = sealed();
    let pid = jailed.process.pid();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    let root = nix::unistd::geteuid().is_root();
    let (uid, gid) = if root {
        (65534, 65534)
    } else {
        (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
    };
    assert_eq!(status(pid, "Uid"), [uid.to_string().as_str(); 4].join("\t"));
    assert_eq!(status(pid, "Gid"), [gid.to_string().as_str(); 4].join("\t"));
    if root {
        assert_eq!(status(pid, "Groups"), "");
    }
    // Of a process that is not dumpable, proc(5) gives these files to root.
    assert_eq!(fs::metadata(format!("/proc/{pid}/maps")).unwrap().uid(), 0);
    // The supervisor's own user still reads what `bulkhead ps` shows.
    assert!(fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().contains("[stack]"));
    assert!(fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap().contains("Pss:"));
}

fn descriptors() {
    let (jailed, _listeners) = sealed();
    let folder = match fs::read_dir(format!("/proc/{}/fd", jailed.process.pid())) {
        Ok(folder) => folder,
        // A folder of root's: an ordinary supervisor may not list it.
        Err(_) if !nix::unistd::geteuid().is_root() => return,
        Err(error) => panic!("{error}"),
    };
    let mut numbers: Vec<(i32, String)> = folder
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let target = fs::read_link(entry.path()).unwrap().to_string_lossy().into_owned();
            (entry.file_name().to_string_lossy().parse().unwrap(), target)
        })
        .collect();
    numbers.sort();
    let kinds: Vec<&str> = numbers.iter().map(|(_, target)| target.split(':').next().unwrap()).collect();
    assert_eq!(kinds, ["/dev/null", "pipe", "pipe", "socket"], "{numbers:?}");
    assert_eq!(numbers.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

fn filters() {
    let (jailed, _listeners) = sealed();
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", jailed.process.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2\n") && status.contains("Seccomp_filters:\t1\n"), "{status}");
        threads += 1;
    }
    assert_eq!(threads, 2);
}

fn root_from_outside() {
    let (jailed, _listeners) = sealed();
    let pid = jailed.process.pid();
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let options = mounts.split(' ').nth(5).unwrap();
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(options.split(',').any(|it| it == option), "{options}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    assert_eq!(fs::read(format!("/proc/{pid}/cmdline")).unwrap(), format!("{TITLE}\0serve\0").as_bytes());
}

fn panics() {
    let mut jailed = Jailed::start("serve");
    jailed.channel.send(&Ask::Seal(PolicyName::RngQueue, Enforcement::Standalone), &[]).unwrap();
    jailed.channel.recv::<Answer>(Some(DEADLINE)).unwrap();
    jailed.channel.send(&Ask::Panic, &[]).unwrap();
    assert_eq!(jailed.process.wait().unwrap(), Exit::Code(PANIC_EXIT_CODE));
    let log = jailed.log();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("panicked at") && log.contains("as asked?for"), "{log}");
}

fn channel_closed() {
    let (Jailed { mut process, channel, log: _log }, _listeners) = sealed();
    drop(channel);
    assert_eq!(process.wait().unwrap(), Exit::Code(0));
}

fn dropped() {
    let (jailed, _listeners) = sealed();
    let pid = jailed.process.pid();
    drop(jailed);
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

/// Starts a process, tells its number before the jail is complete, and waits to be killed.
pub fn supervisor_to_kill() {
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let jailed = Jailed::try_start("serve", program, Limits::default()).unwrap();
    println!("{}", jailed.process.pid());
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(30));
}

fn dies_with_supervisor() {
    for round in 0..40_u64 {
        let mut supervisor = Command::new(std::env::current_exe().unwrap())
            .arg("--supervisor-to-kill")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(supervisor.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid: i32 = line.trim().parse().unwrap();
        // The last rounds meet the running program, the first ones every stage before it.
        std::thread::sleep(Duration::from_micros(if round < 35 { round * 100 } else { 100_000 }));
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        let end = Instant::now() + Duration::from_secs(1);
        // Gone, or a zombie of whoever inherits orphans here.
        let alive =
            || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
        while alive() {
            assert!(Instant::now() < end, "round {round}: process {pid} outlived its supervisor");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn failed_steps() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "no program").unwrap();
    for (mode, errno) in [(0o644, libc::EACCES), (0o755, libc::ENOEXEC)] {
        fs::set_permissions(&text, fs::Permissions::from_mode(mode)).unwrap();
        let mut jailed = Jailed::try_start("look", File::open(&text).unwrap(), Limits::default()).unwrap();
        match jailed.process.confirm(DEADLINE) {
            Err(JailError::Step { step: Step::Execute, errno: found }) => assert_eq!(found as i32, errno),
            other => panic!("{other:?}"),
        }
    }
}

fn clamped_limits() {
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let limits = Limits { locked: u64::MAX, descriptors: u64::MAX, ..Limits::default() };
    let mut jailed = Jailed::try_start("look", program, limits).unwrap();
    jailed.process.confirm(DEADLINE).unwrap();
}

fn forbidden_namespaces() {
    let child = Command::new(std::env::current_exe().unwrap()).arg("--without-namespaces").status().unwrap();
    assert!(child.success());
}

/// Runs in a user namespace whose own setting forbids further ones.
pub fn without_namespaces() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).unwrap();
    fs::write("/proc/sys/user/max_user_namespaces", "0").unwrap();
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let Err(error) = Jailed::try_start("look", program, Limits::default()) else { panic!("started") };
    assert_eq!(error.missing_layer(), Some(Layer::Namespaces), "{error}");
    assert!(error.to_string().contains("/proc/sys/user/max_user_namespaces says 0"), "{error}");
}
