//! `bulkhead-init`: the first process of a guest that `bulkhead run -- COMMAND` starts. It is put into the initial RAM file system
//! that is made for the run, and ends the machine with the command's exit status.
//!
//! What it is to do stands in `/bulkhead/plan`, records of `KEY=VALUE` that end with a zero byte:
//!
//! | key | value |
//! | --- | --- |
//! | `module` | a kernel module below `/bulkhead`, in the order of loading |
//! | `root` | tag of the directory that is the root, below an overlay |
//! | `mount` | `TAG:ro:PATH` or `TAG:rw:PATH`: a directory to be mounted there |
//! | `run` | `tmpfs`, where /run is to be empty |
//! | `hostname`, `cwd` | what they are |
//! | `net` | `INTERFACE ADDRESS/PREFIX [ROUTER]`: an interface that is to be up |
//! | `resolv` | what `/etc/resolv.conf` is to hold |
//! | `arg`, `env` | of the command, each in a record of its own |
//! | `raw` | the output is no terminal: its bytes are left as they are |
//! | `no-input` | there is no terminal to read |
//!
//! Contains unsafe code: loading modules, making the console the controlling terminal, writing to a port and powering off, which have
//! no safe interface here.

mod network;

use std::arch::asm;
use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sys::termios::{OutputFlags, SetArg, tcdrain, tcgetattr, tcsetattr};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The console of the guest.
const CONSOLE: &str = "/dev/hvc0";
/// The debug exit port.
const EXIT_PORT: u16 = 0xF4;
/// Exit status when the command could not even be tried, as `docker run` has it.
const NOT_STARTED: u8 = 125;
/// Who is asked for addresses (resolv.conf(5)).
const RESOLVER: &str = "/etc/resolv.conf";
/// Where the new root is put together.
const ROOT: &str = "/root";

/// The records of the plan.
struct Plan(Vec<(String, String)>);

impl Plan {
    fn read() -> Outcome<Self> {
        let text = fs::read("/bulkhead/plan")?;
        let records = text.split(|byte| *byte == 0).filter(|record| !record.is_empty());
        let pair = |record: &[u8]| {
            let text = String::from_utf8_lossy(record).into_owned();
            text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()))
        };
        Ok(Self(records.filter_map(pair).collect()))
    }

    fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(other, _)| other == key).map(|(_, value)| value.as_str())
    }

    fn one<'a>(&'a self, key: &'a str) -> Option<&'a str> {
        self.all(key).next()
    }
}

fn main() {
    let status = match run() {
        Ok(status) => status,
        Err(error) => {
            say(&format!("bulkhead: the guest could not start the command: {error}\r\n"));
            NOT_STARTED
        }
    };
    end(status);
}

/// To the console, or to the kernel's log where there is none.
fn say(text: &str) {
    let console = OpenOptions::new().write(true).open(CONSOLE);
    let place = console.or_else(|_| OpenOptions::new().write(true).open("/dev/kmsg"));
    if let Ok(mut place) = place {
        let _nobody_listens = place.write_all(text.as_bytes());
    }
}

/// Ends the machine.
fn end(status: u8) -> ! {
    if let Ok(console) = File::open(CONSOLE) {
        let _gone = tcdrain(&console);
    }
    // SAFETY: neither call takes memory.
    unsafe { libc::sync() };
    tell(status);
    loop {
        // SAFETY: as above; there is nothing to be lost.
        unsafe { libc::reboot(libc::RB_POWER_OFF) };
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// Writes to the debug exit port, whether or not the kernel has /dev/port: Debian's for clouds has none.
fn tell(status: u8) {
    let port = OpenOptions::new().write(true).open("/dev/port");
    let _told_below = port.and_then(|port| port.write_at(&[status], EXIT_PORT.into()));
    // SAFETY: the call takes no memory.
    if unsafe { libc::ioperm(EXIT_PORT.into(), 1, 1) } == 0 {
        // SAFETY: the port is this thread's, and what answers there ends the machine.
        unsafe {
            asm!("out dx, al", in("dx") EXIT_PORT, in("al") status, options(nomem, nostack, preserves_flags))
        };
    }
}

fn attach(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> Outcome<()> {
    fs::create_dir_all(target).map_err(|error| format!("{target}: {error}"))?;
    let data = (!data.is_empty()).then_some(data);
    mount(Some(source), target, Some(kind), flags, data)
        .map_err(|error| format!("cannot mount {source} ({kind}) on {target}: {error}").into())
}

fn run() -> Outcome<u8> {
    attach("dev", "/dev", "devtmpfs", MsFlags::empty(), "")?;
    let plan = Plan::read()?;
    for module in plan.all("module") {
        load(module).map_err(|error| format!("module {module}: {error}"))?;
    }
    set_up_root(&plan)?;
    enter_root()?;
    if let Some(name) = plan.one("hostname") {
        let _unimportant = nix::unistd::sethostname(name);
    }
    set_up_network(&plan);
    let status = command(&plan)?;
    Ok(match status.code() {
        Some(code) => u8::try_from(code).unwrap_or(u8::MAX),
        None => status.signal().and_then(|signal| u8::try_from(signal).ok()).map_or(u8::MAX, |it| 128 | it),
    })
}

fn load(name: &str) -> io::Result<()> {
    /// `MODULE_INIT_COMPRESSED_FILE` (finit_module(2)).
    const COMPRESSED: libc::c_int = 4;
    let file = File::open(Path::new("/bulkhead").join(name))?;
    let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED };
    // SAFETY: the parameters are a live C string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

/// The shared root below an overlay, with what a running system has in it.
fn set_up_root(plan: &Plan) -> Outcome<()> {
    let tag = plan.one("root").ok_or("the plan names no root")?;
    attach(tag, "/lower", "virtiofs", MsFlags::MS_RDONLY, "")?;
    attach("upper", "/upper", "tmpfs", MsFlags::empty(), "mode=755")?;
    for folder in ["/upper/files", "/upper/work"] {
        fs::create_dir(folder)?;
    }
    let overlay = "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
    attach("overlay", ROOT, "overlay", MsFlags::empty(), overlay)?;
    let at = |path: &str| format!("{ROOT}{path}");
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    attach("proc", &at("/proc"), "proc", safe | MsFlags::MS_NOEXEC, "")?;
    attach("sys", &at("/sys"), "sysfs", safe | MsFlags::MS_NOEXEC, "")?;
    attach("dev", &at("/dev"), "devtmpfs", MsFlags::MS_NOSUID, "")?;
    attach("devpts", &at("/dev/pts"), "devpts", MsFlags::MS_NOSUID, "ptmxmode=666,mode=620")?;
    attach("shm", &at("/dev/shm"), "tmpfs", safe, "mode=1777")?;
    if plan.one("run").is_some() {
        attach("run", &at("/run"), "tmpfs", safe, "mode=755")?;
    }
    // What is bound to the host's terminals and the like means nothing here.
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _there_already = std::os::unix::fs::symlink(target, at(&format!("/dev/{link}")));
    }
    for entry in plan.all("mount") {
        let mut parts = entry.splitn(3, ':');
        let (Some(tag), Some(mode), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let flags = if mode == "ro" { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        attach(tag, &at(path), "virtiofs", flags, "")?;
    }
    Ok(())
}

/// As switch_root(8): the initial file system cannot be left, only covered.
fn enter_root() -> Outcome<()> {
    std::env::set_current_dir(ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// A command without a network is better than none, so nothing ends here.
fn set_up_network(plan: &Plan) {
    // Many programs talk to themselves by 127.0.0.1.
    let _unimportant = network::up("lo");
    for entry in plan.all("net") {
        if let Err(error) = network::configure(entry) {
            say(&format!("bulkhead: the guest has no network by {entry}: {error}\r\n"));
        }
    }
    if let Some(text) = plan.one("resolv") {
        // Often a link to what the host's own resolver writes, which does not run here.
        let _none = fs::remove_file(RESOLVER);
        let written = fs::create_dir_all("/etc").and_then(|()| fs::write(RESOLVER, text));
        if let Err(error) = written {
            say(&format!("bulkhead: {RESOLVER}: {error}\r\n"));
        }
    }
}

/// Starts the command on the console and waits for it, and for whoever else ends.
fn command(plan: &Plan) -> Outcome<ExitStatus> {
    let mut arguments = plan.all("arg");
    let program = arguments.next().ok_or("the plan names no command")?;
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONSOLE)
        .map_err(|error| format!("{CONSOLE}: {error}"))?;
    if plan.one("raw").is_some() {
        let mut settings = tcgetattr(&console)?;
        settings.output_flags.remove(OutputFlags::OPOST);
        tcsetattr(&console, SetArg::TCSANOW, &settings)?;
    }
    let input = if plan.one("no-input").is_some() { Stdio::null() } else { console.try_clone()?.into() };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(plan.all("env").filter_map(|it| it.split_once('=')));
    command.current_dir(plan.one("cwd").unwrap_or("/"));
    command.stdin(input).stdout(console.try_clone()?).stderr(console.try_clone()?);
    let terminal = console.as_raw_fd();
    // SAFETY: between fork and exec two system calls, which take no memory.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            libc::ioctl(terminal, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let cwd = plan.one("cwd").unwrap_or("/");
            if !Path::new(cwd).is_dir() {
                return Err(format!("there is no directory '{cwd}' in the guest").into());
            }
            say(&format!("bulkhead: {program}: {error}\r\n"));
            let code = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
            return Ok(ExitStatus::from_raw(code << 8));
        }
    };
    let id = libc::pid_t::try_from(child.id())?;
    loop {
        let mut status = 0;
        // SAFETY: the kernel writes to a live integer.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == id {
            return Ok(ExitStatus::from_raw(status));
        }
        if ended < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Err("the command is gone".into());
        }
    }
}
