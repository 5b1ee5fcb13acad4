//! What the jailed side does.
//!
//! Contains unsafe code: limits are read as the kernel has them, and memory is used up.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::jail::{self, Enforcement, PolicyName};
use nix::fcntl::{OFlag, openat};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

/// From the test to the jailed side.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Seal the process: this policy on a worker, `BlkMain` on the main thread.
    Seal(PolicyName, Enforcement),
    /// Put a worker under a policy of the set-up, nothing more.
    SetUp(PolicyName),
    /// Open `file` in the folder whose descriptor comes along to read and to write, open the folder, listen on a TCP port.
    LandlockedCalls,
    /// Try the shared directory, and what lies around it; `file` in another folder, whose descriptor comes along.
    SharedCalls,
    /// Try what lies beside a directory that was held then.
    BesideInner,
    /// Fork until it fails; how often that worked.
    Forks,
    /// Touch so many bytes of shared memory, and answer if that was survived.
    Memory(usize),
    /// Make a system call on the worker: number and arguments.
    Call(i64, [u64; 6]),
    Panic,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Inside(Inside),
    Ready(Vec<PolicyName>),
    /// Result of a call: value or negative errno.
    Returned(i64),
    /// errno of each of several calls; 0 where it worked.
    Errors(Vec<i32>),
}

/// What a process sees in its jail.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inside {
    pub pid: i32,
    pub parent: i32,
    pub uid: u32,
    pub dumpable: i32,
    /// errno of an attempt to list the root; 0 when it is empty, -1 when it is not.
    pub list: i32,
    /// errno of an attempt to create a file, to reach the old root, to mount.
    pub create: i32,
    pub upwards: i32,
    pub mount: i32,
    pub environment: usize,
    pub umask: u32,
    pub session: i32,
    pub ignored_signals: Vec<i32>,
    pub limits: BTreeMap<u32, u64>,
}

pub fn main(scenario: &str) {
    let channel = Channel::from_fd(jail::enter().expect("enter"));
    match scenario {
        "look" => channel.send(&Answer::Inside(look()), &[]).expect("send"),
        "serve" => {}
        _ => panic!("unknown scenario"),
    }
    serve(&channel);
}

fn look() -> Inside {
    let limits = [
        libc::RLIMIT_NOFILE,
        libc::RLIMIT_NPROC,
        libc::RLIMIT_FSIZE,
        libc::RLIMIT_CORE,
        libc::RLIMIT_DATA,
        libc::RLIMIT_MEMLOCK,
    ];
    let limit = |resource| {
        let mut limit = libc::rlimit64 { rlim_cur: 1, rlim_max: 2 };
        // SAFETY: the structure is live.
        unsafe { libc::getrlimit64(resource, &raw mut limit) };
        assert_eq!(limit.rlim_cur, limit.rlim_max);
        (resource, limit.rlim_cur)
    };
    // The runtime of the standard library ignores SIGPIPE itself.
    let ignored = |&signal: &i32| {
        let mut action: [u64; 4] = [0; 4];
        // SAFETY: 32 bytes are what the kernel writes.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0, action.as_mut_ptr(), 8) };
        action[0] == 1 && signal != libc::SIGPIPE
    };
    Inside {
        pid: nix::unistd::getpid().as_raw(),
        parent: nix::unistd::getppid().as_raw(),
        uid: nix::unistd::getuid().as_raw(),
        // SAFETY: no memory is involved.
        dumpable: unsafe { libc::prctl(libc::PR_GET_DUMPABLE) },
        list: list("/"),
        create: fs::write("/file", "x").unwrap_err().raw_os_error().unwrap(),
        upwards: list("/../../.."),
        mount: nix::mount::mount(Some("none"), "/", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
            .unwrap_err() as i32,
        environment: std::env::vars_os().count(),
        umask: nix::sys::stat::umask(nix::sys::stat::Mode::empty()).bits(),
        session: nix::unistd::getsid(None).unwrap().as_raw(),
        ignored_signals: (1..=64).filter(ignored).collect(),
        limits: limits.into_iter().map(limit).collect(),
    }
}

fn list(path: &str) -> i32 {
    match fs::read_dir(path) {
        Ok(entries) => -i32::from(entries.count() > 0),
        Err(error) => error.raw_os_error().unwrap(),
    }
}

/// What only Landlock refuses: the folder is the host's, and the network namespace is this process's own.
fn landlocked_calls(folder: &OwnedFd) -> Vec<i32> {
    let open =
        |name: &str, flags| openat(folder, name, flags, Mode::empty()).err().map_or(0, |errno| errno as i32);
    let tcp = std::net::TcpListener::bind("127.0.0.1:1080");
    let tcp = tcp.err().map_or(0, |error| error.raw_os_error().unwrap());
    vec![open("file", OFlag::O_RDONLY), open("file", OFlag::O_WRONLY), open(".", OFlag::O_DIRECTORY), tcp]
}

/// A directory below the shared one.
static INNER: std::sync::Mutex<Option<OwnedFd>> = std::sync::Mutex::new(None);

/// What lies beside the directory that is held, wherever that is now.
fn beside_inner() -> Vec<i32> {
    let inner = INNER.lock().expect("lock");
    let inner = inner.as_ref().expect("held before");
    let errno = |name: &str| {
        let opened = openat(inner, name, OFlag::O_RDONLY, Mode::empty());
        opened.err().map_or(0, |errno| errno as i32)
    };
    vec![errno("../file"), errno("../secret"), errno("../../secret")]
}

/// Everything with `O_NONBLOCK` and the like left out: what is asked is where names lead.
fn shared_calls(other: &OwnedFd) -> Vec<i32> {
    let (directory, descriptors) = jail::shared_directory().expect("a shared directory");
    let open = |folder: &OwnedFd, name: &str, flags| openat(folder, name, flags, Mode::empty());
    let errno = |result: nix::Result<OwnedFd>| result.err().map_or(0, |errno| errno as i32);
    let held = open(&directory, "file", OFlag::O_PATH).expect("hold the file");
    let inner = open(&directory, "inner", OFlag::O_PATH).expect("hold a directory");
    *INNER.lock().expect("lock") = Some(inner);
    let again = std::os::fd::AsRawFd::as_raw_fd(&held).to_string();
    // 1: what is above is another directory.
    let above = |folder: &OwnedFd| {
        let number = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map(|it| (it.st_dev, it.st_ino));
        let up = open(folder, "..", OFlag::O_PATH | OFlag::O_DIRECTORY).expect("hold what is above");
        i32::from(number(&up) != number(folder))
    };
    let device = nix::sys::stat::mknodat(
        &directory,
        "device",
        nix::sys::stat::SFlag::S_IFCHR,
        Mode::from_bits_retain(0o600),
        nix::sys::stat::makedev(1, 3),
    );
    vec![
        errno(open(&directory, "file", OFlag::O_RDONLY)),
        errno(open(&directory, "file", OFlag::O_RDWR)),
        errno(open(&descriptors, &again, OFlag::O_RDONLY)),
        errno(open(&directory, "../secret", OFlag::O_RDONLY)),
        errno(open(&directory, "link", OFlag::O_RDONLY)),
        above(&directory),
        above(&descriptors),
        errno(open(other, "secret", OFlag::O_RDONLY)),
        device.err().map_or(0, |errno| errno as i32),
    ]
}

fn forks() -> i64 {
    for count in 0..1000 {
        // SAFETY: the child makes one system call.
        match unsafe { nix::unistd::fork() } {
            Ok(nix::unistd::ForkResult::Child) => {
                nix::unistd::pause();
            }
            Ok(nix::unistd::ForkResult::Parent { .. }) => {}
            Err(_) => return count,
        }
    }
    1000
}

/// Shared memory counts neither as data nor as a file.
fn touch(bytes: usize) {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let length = std::num::NonZeroUsize::new(bytes).unwrap();
    // SAFETY: a new mapping, of which one byte in each page is written.
    unsafe {
        let memory = mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED).unwrap();
        for page in (0..bytes).step_by(4096) {
            memory.as_ptr().cast::<u8>().add(page).write_volatile(1);
        }
    }
}

fn serve(channel: &Channel) {
    let (to_worker, calls) = mpsc::channel::<(i64, [u64; 6])>();
    let (to_main, results) = mpsc::channel();
    let mut calls = Some(calls);
    while let Ok((ask, descriptors)) = channel.recv::<Ask>(None) {
        match ask {
            Ask::LandlockedCalls => {
                let answer = Answer::Errors(landlocked_calls(&descriptors[0]));
                channel.send(&answer, &[]).unwrap();
            }
            Ask::SharedCalls => {
                let answer = Answer::Errors(shared_calls(&descriptors[0]));
                channel.send(&answer, &[]).unwrap();
            }
            Ask::BesideInner => channel.send(&Answer::Errors(beside_inner()), &[]).unwrap(),
            Ask::Forks => channel.send(&Answer::Returned(forks()), &[]).unwrap(),
            Ask::Memory(bytes) => {
                touch(bytes);
                channel.send(&Answer::Returned(0), &[]).unwrap();
            }
            Ask::Panic => panic!("as asked\nfor"),
            Ask::Call(number, arguments) => {
                to_worker.send((number, arguments)).unwrap();
                channel.send(&Answer::Returned(results.recv().unwrap()), &[]).unwrap();
            }
            Ask::SetUp(policy) => {
                let (calls, to_main) = (calls.take().unwrap(), to_main.clone());
                std::thread::spawn(move || {
                    jail::enter_setup(policy).expect("enter_setup");
                    for (number, arguments) in calls {
                        to_main.send(call(number, arguments)).unwrap();
                    }
                });
                channel.send(&Answer::Ready(Vec::new()), &[]).unwrap();
            }
            Ask::Seal(policy, enforcement) => {
                jail::set_enforcement(enforcement);
                let (calls, to_main) = (calls.take().unwrap(), to_main.clone());
                let (entered, has_entered) = mpsc::channel();
                std::thread::spawn(move || {
                    if policy.file().contains("core-") {
                        jail::enter_setup(PolicyName::CoreSetup).expect("enter_setup");
                    }
                    jail::enter_thread(policy).expect("enter_thread");
                    entered.send(()).unwrap();
                    for (number, arguments) in calls {
                        to_main.send(call(number, arguments)).unwrap();
                    }
                });
                has_entered.recv().unwrap();
                let sealed = jail::seal(PolicyName::BlkMain, &[channel.as_fd()]).expect("seal");
                channel.send(&Answer::Ready(sealed.policies()), &sealed.descriptors()).unwrap();
            }
        }
    }
}

fn call(number: i64, [a, b, c, d, e, f]: [u64; 6]) -> i64 {
    // SAFETY: not provable: the test chooses calls that do no harm to this process or end it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { -i64::from(nix::errno::Errno::last_raw()) } else { result }
}
