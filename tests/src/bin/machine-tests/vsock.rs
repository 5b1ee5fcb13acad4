//! Streams between a stock guest and the host: under our core (one boot with the balloon's test), and with the same device under QEMU.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit};
use bulkhead_tests::pattern::{SECTOR, fill};

use crate::balloon::gives_memory_back;

/// Streams at a time in each direction, and the bytes of each there and back.
const STREAMS: u64 = 64;
const KIB: usize = 64;
/// The guest's ports (`guest-vsock`), and the host's.
const GUEST_ECHO: u32 = 7000;
const GUEST_END: u32 = 7001;
const HOST_ECHO: u32 = 52;
const HOST_IDLE: u32 = 53;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "stock",
            "a guest gives memory back to a balloon, and vsock has 64 streams each way",
            120,
            under_our_core,
        ),
        Case::new("bare", "vsock: 64 streams each way under QEMU", 60, under_qemu),
    ]
}

fn echo(mut stream: UnixStream) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(bytes.get(..count).unwrap_or_default()).is_err() {
            return;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read(&mut bytes);
}

/// Serves a port of the host.
fn serve(path: &Path, port: u32, each: impl Fn(UnixStream) + Send + 'static) -> Outcome {
    let path = format!("{}_{port}", path.display());
    let listener = UnixListener::bind(&path).map_err(|error| format!("{path}: {error}"))?;
    thread::spawn(move || listener.incoming().flatten().for_each(each));
    Ok(())
}

/// The echo of the host, and the connections that it only holds.
fn serve_all(path: &Path) -> Outcome<Receiver<UnixStream>> {
    serve(path, HOST_ECHO, |stream| drop(thread::spawn(move || echo(stream))))?;
    let (sender, held) = channel();
    serve(path, HOST_IDLE, move |stream| {
        let _ = sender.send(stream);
    })?;
    Ok(held)
}

/// Connects to a port of the guest.
fn dial(path: &Path, port: u32) -> Outcome<UnixStream> {
    let failed = |error: std::io::Error| format!("connection to port {port}: {error}");
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(failed)?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte).map_err(failed)?;
        line.extend(byte);
    }
    ensure!(line.starts_with(b"OK "), "the answer is {line:?}");
    Ok(stream)
}

/// One stream to the guest's echo and back, with its direction ended.
fn exchange(path: &Path, number: u64) -> Outcome {
    let mut bytes = vec![0; KIB << 10];
    fill(number, 0, &vec![2; bytes.len() / SECTOR], &mut bytes);
    let mut stream = dial(path, GUEST_ECHO)?;
    let mut writer = stream.try_clone().map_err(|error| error.to_string())?;
    let sent = bytes.clone();
    let writing =
        thread::spawn(move || writer.write_all(&sent).and_then(|()| writer.shutdown(Shutdown::Write)));
    let mut back = Vec::new();
    stream.read_to_end(&mut back).map_err(|error| format!("read: {error}"))?;
    writing.join().map_err(|_| "panicked")?.map_err(|error| format!("write: {error}"))?;
    ensure!(back == bytes, "stream {number}: {} bytes came back, or others", back.len());
    Ok(())
}

/// All streams to the guest at once.
fn streams(context: &Context, path: &Path) -> Outcome {
    let begin = Instant::now();
    let start = |number| {
        let path = path.to_owned();
        thread::spawn(move || exchange(&path, number))
    };
    let threads: Vec<_> = (0..STREAMS).map(start).collect();
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a stream panicked")?)?;
    context.log(&format!("{STREAMS} streams to the guest in {:?}", begin.elapsed()));
    Ok(())
}

fn options() -> String {
    format!("bulkhead.vsock=--streams,{STREAMS},--kib,{KIB}")
}

/// The guest has connected to all that it connects to; the host does, too. Returns the connection that is held.
fn both_ways(
    context: &Context,
    running: &mut Running,
    path: &Path,
    held: &Receiver<UnixStream>,
) -> Outcome<UnixStream> {
    running.wait_for("guest: vsock waits", 1)?;
    let told = running.serial();
    ensure!(told.iter().any(|line| line.contains("port 9: connect: ECONNRESET")), "port 9: {told:?}");
    streams(context, path)?;
    let refused = dial(path, 9).err().ok_or("port 9 of the guest answers")?;
    context.log(&refused);
    held.recv_timeout(Duration::from_secs(10)).map_err(|_| "the guest holds no connection".into())
}

fn under_our_core(context: &Context) -> Outcome {
    let path = context.folder.join("v");
    let held = serve_all(&path)?;
    let vsock = format!("cid=5,path={}", path.display());
    let machine = Machine::stock(context, Kernel::Elf, "balloon")?.words(&options());
    let mut running = machine.arguments(&["--vsock", &vsock, "--balloon", "--memory", "256M"]).start()?;
    gives_memory_back(context, &mut running)?;
    let mut stream = both_ways(context, &mut running, &path, &held)?;

    let restart = bulkhead(context).args(["device", "restart", &running.name, "vsock"]).status();
    ensure!(restart.is_ok_and(|status| status.success()), "the device cannot be restarted");
    ensure!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "the host's end of a connection is still open");
    running.wait_for("guest: vsock connection ended", 1)?;
    running.wait_for("streams ok", 2)?;
    streams(context, &path)?;
    dial(&path, GUEST_END)?;
    running.wait_for("guest: vsock status 0", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    let ended =
        running.serial().into_iter().find(|line| line.contains("connection ended")).unwrap_or_default();
    ensure!(ended.contains("ConnectionReset"), "the guest was not told: {ended}");
    ensure!(!path.exists(), "the socket is still there");
    Ok(())
}

/// The device process as a service.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn service(context: &Context, socket: &Path, path: &Path) -> Outcome<Service> {
    let mut command = Command::new(context.places.programs.join("bulkhead-device"));
    command.arg("vsock").arg("--socket-path").arg(socket).args(["--guest-cid", "5", "--uds-path"]).arg(path);
    let child = command.stderr(Stdio::null()).spawn().map_err(|error| format!("bulkhead-device: {error}"))?;
    context.remember(child.id());
    let end = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        ensure!(Instant::now() < end, "the service does not listen");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(Service(child))
}

fn under_qemu(context: &Context) -> Outcome {
    let [socket, path]: [PathBuf; 2] = ["s", "v"].map(|name| context.folder.join(name));
    let held = serve_all(&path)?;
    let _service = service(context, &socket, &path)?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-m",
        "256",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.args([
        "-object",
        "memory-backend-memfd,id=m,size=256M,share=on",
        "-machine",
        "pc,memory-backend=m",
    ]);
    command.arg("-kernel").arg(context.places.guest.join("bzImage"));
    command.arg("-initrd").arg(context.places.guest.join("initramfs"));
    command.arg("-append").arg(format!("console=ttyS0 quiet panic=1 bulkhead.test=vsock {}", options()));
    command.arg("-chardev").arg(format!("socket,id=c,path={}", socket.display()));
    command.args(["-device", "vhost-user-vsock-pci,chardev=c"]);
    let mut running = Machine::from_command(context, command).start()?;
    let stream = both_ways(context, &mut running, &path, &held)?;
    drop(stream);
    running.wait_for("guest: vsock connection ended: Ok(0)", 1)?;
    running.wait_for("streams ok", 2)?;
    dial(&path, GUEST_END)?;
    running.wait_for("guest: vsock status 0", 1)?;
    running.expect_exit(exit::SUCCESS)
}
