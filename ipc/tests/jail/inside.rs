//! What the jailed side does.
//!
//! Contains unsafe code: limits are read as the kernel has them.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::sync::mpsc;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::jail::{self, Enforcement, PolicyName};
use serde::{Deserialize, Serialize};

/// From the test to the jailed side.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Seal the process: this policy on a worker, `BlkMain` on the main thread.
    Seal(PolicyName, Enforcement),
    /// Put a worker under a policy of the set-up, nothing more.
    SetUp(PolicyName),
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
}

/// What a process sees in its jail.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inside {
    pub pid: i32,
    pub parent: i32,
    pub uid: u32,
    pub dumpable: i32,
    pub root_entries: usize,
    /// errno of an attempt to create a file, to reach the old root, to mount.
    pub create: i32,
    pub upwards: usize,
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
        root_entries: fs::read_dir("/").unwrap().count(),
        create: fs::write("/file", "x").unwrap_err().raw_os_error().unwrap(),
        upwards: fs::read_dir("/../../..").unwrap().count(),
        mount: nix::mount::mount(Some("none"), "/", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
            .unwrap_err() as i32,
        environment: std::env::vars_os().count(),
        umask: nix::sys::stat::umask(nix::sys::stat::Mode::empty()).bits(),
        session: nix::unistd::getsid(None).unwrap().as_raw(),
        ignored_signals: (1..=64).filter(ignored).collect(),
        limits: limits.into_iter().map(limit).collect(),
    }
}

fn serve(channel: &Channel) {
    let (to_worker, calls) = mpsc::channel::<(i64, [u64; 6])>();
    let (to_main, results) = mpsc::channel();
    let mut calls = Some(calls);
    while let Ok((ask, _)) = channel.recv::<Ask>(None) {
        match ask {
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
