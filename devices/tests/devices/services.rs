//! The programs as services ("Backend program conventions" of the vhost-user protocol): sockets, ends, the jail.
//!
//! Contains unsafe code: a socket is put in its place between fork and exec.

use std::fs;
use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bulkhead_devices::standalone::TYPES;

use bulkhead_ipc::vhost_user::frontend::BackendRequest;

use crate::driver::{BUFFERS, Driver, PROGRAM, Service, connect, header};

const PATIENCE: Duration = Duration::from_secs(10);
/// `VHostUserBackendType` (docs/interop/vhost-user.json of QEMU): the types that a manifest can name.
const BACKEND_TYPES: &[&str] =
    &["balloon", "block", "console", "crypto", "fs", "gpu", "input", "net", "rng", "scsi", "vsock"];

/// A service that ends with its test.
struct Running(Child);

impl Deref for Running {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.kill();
        let _reaped = self.wait();
    }
}

fn ended(child: &mut Child) -> ExitStatus {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "the service does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rng(options: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("rng").args(options).stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Sees that somebody serves.
fn is_served(stream: UnixStream) -> Driver {
    let mut driver = Driver::new(stream, 1);
    assert_eq!(driver.run(0, &[(BUFFERS, 32, true)]), 32);
    driver
}

fn output(mut child: Child) -> String {
    ended(&mut child);
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

fn with_socket(options: &[&str]) -> (tempfile::TempDir, std::path::PathBuf, Running) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let child = rng(&["--socket-path", socket.to_str().unwrap()]).args(options).spawn().unwrap();
    (folder, socket, Running(child))
}

/// The child's end of a socket survives the exec as descriptor 3.
fn inherits(command: &mut Command, socket: OwnedFd) -> Running {
    // SAFETY: between fork and exec only dup2 is called, on a descriptor that lives until then.
    unsafe {
        command.pre_exec(move || {
            // dup2 to itself would leave the close-on-exec flag.
            let free = libc::dup(socket.as_raw_fd());
            if free < 0 || libc::dup2(free, 3) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            if libc::fcntl(3, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Running(command.spawn().unwrap())
}

#[test]
fn a_service_ends_with_its_front_end_and_leaves_no_file() {
    let (folder, socket, mut child) = with_socket(&[]);
    drop(is_served(connect(&socket)));
    assert!(ended(&mut child).success());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_persistent_service_takes_one_front_end_after_the_other_until_sigterm() {
    let (folder, socket, mut child) = with_socket(&["--persistent"]);
    for _ in 0..3 {
        drop(is_served(connect(&socket)));
    }
    // One that says nonsense, then others.
    connect(&socket).write_all(&[0xFF; 64]).unwrap();
    let waiting = connect(&socket);
    let next = connect(&socket);
    drop(is_served(waiting));
    let driver = is_served(next);
    let pid = i32::try_from(child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(ended(&mut child).success(), "also while somebody is served");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    drop(driver);
}

#[test]
fn an_inherited_socket_may_listen_or_be_connected() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = inherits(&mut rng(&["--fd", "3"]), theirs.into());
    drop(is_served(ours));
    assert!(ended(&mut child).success());

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = inherits(&mut rng(&["--fd=3", "--persistent"]), listener.into());
    for _ in 0..2 {
        drop(is_served(connect(&path)));
    }
    assert!(child.try_wait().unwrap().is_none());
    drop(child);
    assert!(path.exists(), "who made it removes it");
}

#[test]
fn systemd_starts_a_service_when_a_front_end_comes() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut manager = Command::new("systemd-socket-activate")
        .arg("--listen")
        .arg(&socket)
        .args([PROGRAM, "rng"])
        .stderr(Stdio::null())
        .spawn()
        .expect("systemd-socket-activate is missing: install Debian's package systemd");
    drop(is_served(connect(&socket)));
    assert!(ended(&mut manager).success());
}

#[test]
fn systemd_is_told_when_a_service_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let notify = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let socket = folder.path().join("socket");
    let mut child =
        rng(&["--socket-path", socket.to_str().unwrap()]).env("NOTIFY_SOCKET", &path).spawn().unwrap();
    let mut said = [0; 64];
    let count = notify.recv(&mut said).unwrap();
    assert_eq!(&said[..count], b"READY=1");
    drop(is_served(UnixStream::connect(&socket).unwrap()));
    assert!(ended(&mut child).success());
}

#[test]
fn a_front_end_that_reconnects_survives_a_killed_device() {
    let (_folder, socket, mut child) = with_socket(&["--persistent"]);
    let driver = is_served(connect(&socket));
    let device = device_of(&child);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(device), nix::sys::signal::Signal::SIGKILL).unwrap();
    drop(is_served(connect(&socket)));
    drop(driver);
    assert!(child.try_wait().unwrap().is_none());
    drop(child);
    // Without the option, and with an exit code that tells systemd to start it again.
    let (_folder, socket, mut child) = with_socket(&[]);
    let _driver = is_served(connect(&socket));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(device_of(&child)), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    assert_eq!(ended(&mut child).code(), Some(1));
}

/// The only child of a service.
fn device_of(service: &Child) -> i32 {
    let path = format!("/proc/{0}/task/{0}/children", service.id());
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn status<'a>(text: &'a str, field: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim()
}

#[test]
fn the_device_of_a_service_is_in_the_full_jail() {
    let (_folder, socket, child) = with_socket(&["--persistent"]);
    let _driver = is_served(connect(&socket));
    let pid = device_of(&child);
    let proc = format!("/proc/{pid}");
    let text = fs::read_to_string(format!("{proc}/status")).unwrap();
    for field in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(status(&text, field), "0000000000000000", "{field}");
    }
    assert_eq!(status(&text, "NoNewPrivs:"), "1");
    assert_eq!(status(&text, "Seccomp:"), "2");
    for task in fs::read_dir(format!("{proc}/task")).unwrap() {
        let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert_eq!(status(&text, "Seccomp:"), "2", "a thread without a policy");
    }
    assert!(!status(&text, "Uid:").split_whitespace().any(|uid| uid == "0"), "{}", status(&text, "Uid:"));
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    assert_eq!(fs::read_dir(format!("{proc}/root")).unwrap().count(), 0, "its root is not empty");
}

#[test]
fn a_disk_takes_the_size_of_its_file_at_sighup() {
    const SMALL: u64 = 1 << 20;
    let service = Service::disk(SMALL, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    let mut requests = driver.frontend.open_backend_requests().unwrap();
    let file = fs::File::options().write(true).open(service.disk_path()).unwrap();
    file.set_len(SMALL * 4).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(service.child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    assert!(matches!(requests.receive().unwrap(), BackendRequest::ConfigChange));
    let mut capacity = [0; 8];
    driver.frontend.get_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), SMALL * 4 / 512);
    // A write to the new end: the limit of what the process may write has grown, too.
    let (header_at, status_at) = (0xf0_0000, BUFFERS + 0x10_0000);
    driver.put(header_at, &header(1, SMALL * 4 / 512 - 1));
    driver.put(BUFFERS, &[7; 512]);
    driver.run(0, &[(header_at, 16, false), (BUFFERS, 512, false), (status_at, 1, true)]);
    assert_eq!(driver.get(status_at, 1), [0]);
    drop(driver);
    // Somebody new, and a signal that finds nobody.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let mut driver = Driver::new(service.connect(), 1);
    driver.frontend.get_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), SMALL * 4 / 512);
}

#[test]
fn what_cannot_be_served_is_said_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0; 4096]).unwrap();
    fs::write(path("file"), "precious").unwrap();
    let _busy = UnixListener::bind(path("busy")).unwrap();
    let busy_disk = Service::disk(4096, &[]);
    drop(is_alive(&busy_disk));
    for (socket, options, word) in [
        ("s", vec!["--blk-file".to_owned(), text(&path("absent"))], "No such file"),
        (
            "s",
            vec!["--blk-file".to_owned(), text(&path("disk")), "--num-queues=65".to_owned()],
            "1 to 64 queues",
        ),
        (
            "s",
            vec!["--blk-file".to_owned(), text(&path("disk")), "--serial=123456789012345678901".to_owned()],
            "serial",
        ),
        ("s", vec!["--blk-file".to_owned(), text(&busy_disk.disk_path())], "locked by another"),
        ("s", vec![], "--blk-file is needed"),
        ("busy", vec!["--blk-file".to_owned(), text(&path("disk"))], "in use by another process"),
        ("file", vec!["--blk-file".to_owned(), text(&path("disk"))], "is no socket"),
        ("no/where", vec!["--blk-file".to_owned(), text(&path("disk"))], "No such file"),
    ] {
        let mut command = Command::new(PROGRAM);
        command.args(["blk", "--socket-path"]).arg(path(socket)).args(&options).stderr(Stdio::piped());
        let said = output(command.spawn().unwrap());
        assert!(said.contains(word), "{options:?}: {said}");
    }
    assert_eq!(fs::read(path("file")).unwrap(), b"precious");
}

fn is_alive(service: &Service) -> UnixStream {
    service.connect()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_link_tells_management_software_what_it_can_do() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("dist/vhost-user");
    let mut types = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let manifest = fs::read_to_string(entry.unwrap().path()).unwrap();
        let binary = manifest.split("\"binary\": \"").nth(1).unwrap().split('"').next().unwrap();
        let kind = manifest.split("\"type\": \"").nth(1).unwrap().split('"').next().unwrap();
        let link = folder.path().join(Path::new(binary).file_name().unwrap());
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        let answer = Command::new(&link).args(["--print-capabilities", "--whatever"]).output().unwrap();
        assert!(answer.status.success(), "{binary}");
        let answer = String::from_utf8(answer.stdout).unwrap();
        assert!(answer.starts_with(&format!("{{\"type\": \"{kind}\", \"features\": [")), "{answer}");
        types.push(kind.to_owned());
    }
    for service in TYPES.iter().filter(|service| BACKEND_TYPES.contains(&service.backend_type)) {
        assert!(types.iter().any(|kind| kind == service.backend_type), "{} has no manifest", service.name);
    }
}

#[test]
fn the_units_are_hardened() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("dist/systemd");
    let mut services = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let unit = entry.unwrap().path();
        if unit.extension().is_some_and(|extension| extension == "service") {
            // The exposure, times ten; zero is best and a hundred worst.
            let mut command = Command::new("systemd-analyze");
            command.args(["security", "--no-pager", "--offline=true", "--threshold=19"]).arg(&unit);
            let answer =
                command.output().expect("systemd-analyze is missing: install Debian's package systemd");
            assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stdout));
            services += 1;
        }
        let text = fs::read_to_string(&unit).unwrap();
        assert!(unit.to_str().unwrap().contains("@."), "a template: {text}");
    }
    assert_eq!(services, TYPES.len());
}

#[test]
fn every_type_has_its_units() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("dist/systemd");
    for name in TYPES.iter().map(|service| service.name) {
        let unit = fs::read_to_string(folder.join(format!("bulkhead-{name}@.service"))).expect(name);
        assert!(unit.contains(&format!("\nExecStart=/usr/bin/bulkhead-device {name}")), "{name}");
        let socket = fs::read_to_string(folder.join(format!("bulkhead-{name}@.socket"))).expect(name);
        assert!(socket.contains(&format!("ListenStream=/run/bulkhead/{name}-%i\n")), "{name}");
        let answer = Command::new(PROGRAM).args([name, "--print-capabilities"]).output().unwrap();
        assert!(answer.status.success() && answer.stdout.starts_with(b"{\"type\": \""), "{name}");
    }
}

#[test]
fn a_type_that_cannot_be_a_service_says_why() {
    for (kind, word) in [("balloon", "QEMU has no vhost-user-balloon"), ("watchdog", "no virtio device")] {
        let output = Command::new(PROGRAM).args([kind, "--socket-path", "x"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(word), "{kind}: {said}");
    }
}
