//! Streams over vsock with verification, run inside the test guest (`tests/guests/tests/vsock`).
//!
//! ```text
//! guest-vsock [--streams N] [--kib N] [--half-close 0]
//! ```
//!
//! Serves an echo at port 7000 all the time. Connects so many times at once to port 52 of the host, which echoes: each
//! connection sends its bytes, ends its direction, and compares what comes back until the host's end. Then it holds a connection to
//! port 53 until that ends, which a restart of the device brings about, and does the first again. It ends when somebody
//! connects to port 7001. With `--half-close 0` it ends no direction, for a device that does not pass that on, and reads as many bytes as
//! it has sent.
//!
//! Contains unsafe code: what accept(2) returns is a bare number.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::pattern::{SECTOR, fill};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, socket,
};

const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const ECHO: u32 = 7000;
const END: u32 = 7001;
const HOST_ECHO: u32 = 52;
const HOST_IDLE: u32 = 53;

type Outcome<T = ()> = Result<T, String>;

fn said(what: &str) -> impl Fn(nix::Error) -> String {
    move |errno| format!("{what}: {errno}")
}

fn stream_socket() -> Outcome<OwnedFd> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    socket.map_err(said("socket"))
}

/// A stream socket of any family can be read, written and shut down as a Unix one.
fn dial(port: u32) -> Outcome<UnixStream> {
    let socket = stream_socket()?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port)).map_err(said("connect"))?;
    Ok(socket.into())
}

fn listener(port: u32) -> Outcome<OwnedFd> {
    let socket = stream_socket()?;
    bind(socket.as_raw_fd(), &VsockAddr::new(ANY, port)).map_err(said("bind"))?;
    listen(&socket, Backlog::MAXCONN).map_err(said("listen"))?;
    Ok(socket)
}

fn next(listener: &OwnedFd) -> Outcome<UnixStream> {
    let fd = accept(listener.as_raw_fd()).map_err(said("accept"))?;
    // SAFETY: accept just returned this descriptor, and nobody else has it.
    let fd: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    Ok(fd.into())
}

fn echo(mut stream: UnixStream) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

fn serve_echo() -> Outcome {
    let listener = listener(ECHO)?;
    thread::spawn(move || {
        while let Ok(stream) = next(&listener) {
            thread::spawn(move || echo(stream));
        }
    });
    Ok(())
}

/// Connects on a machine that may be slow: Linux gives up after two seconds.
fn dial_patiently(port: u32) -> Outcome<UnixStream> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match dial(port) {
            Err(error) if error.contains("ETIMEDOUT") && Instant::now() < end => {}
            other => return other,
        }
    }
}

/// One stream of `kib` KiB there and back.
fn exchange(number: u32, kib: usize, half_close: bool) -> Outcome {
    let mut stream = dial_patiently(HOST_ECHO)?;
    let mut bytes = vec![0; kib << 10];
    let sectors = vec![1; bytes.len() / SECTOR];
    fill(number.into(), 0, &sectors, &mut bytes);
    let mut writer = stream.try_clone().map_err(|error| error.to_string())?;
    let sent = bytes.clone();
    let end = move |writer: UnixStream| if half_close { writer.shutdown(Shutdown::Write) } else { Ok(()) };
    let writing = thread::spawn(move || writer.write_all(&sent).and_then(|()| end(writer)));
    let mut back = Vec::with_capacity(bytes.len());
    let most = if half_close { u64::MAX } else { bytes.len() as u64 };
    (&mut stream)
        .take(most)
        .read_to_end(&mut back)
        .map_err(|error| format!("read after {} bytes: {error}", back.len()))?;
    writing.join().map_err(|_| "panicked")?.map_err(|error| format!("write: {error}"))?;
    if back == bytes { Ok(()) } else { Err(format!("{} bytes came back, or others", back.len())) }
}

fn streams(count: u32, kib: usize, half_close: bool) -> Outcome {
    let begin = Instant::now();
    let threads: Vec<_> =
        (0..count).map(|number| thread::spawn(move || (number, exchange(number, kib, half_close)))).collect();
    for thread in threads {
        let (number, outcome) = thread.join().map_err(|_| "a stream panicked")?;
        outcome.map_err(|error| format!("stream {number}: {error}"))?;
    }
    println!("guest: vsock {count} streams ok in {} ms", begin.elapsed().as_millis());
    Ok(())
}

fn run() -> Outcome {
    let (mut count, mut kib, mut half_close) = (64, 256, true);
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        let number = arguments.next().and_then(|text| text.parse::<u32>().ok());
        let number = number.ok_or(format!("{word} needs a number"))?;
        match word.as_str() {
            "--streams" => count = number,
            "--kib" => kib = number as usize,
            "--half-close" => half_close = number != 0,
            _ => return Err(format!("unknown word {word}")),
        }
    }
    serve_echo()?;
    let end = listener(END)?;
    streams(count, kib, half_close)?;
    let refused = dial(9).err().ok_or("somebody listens at port 9 of the host")?;
    println!("guest: vsock port 9: {refused}");
    let mut idle = dial_patiently(HOST_IDLE)?;
    println!("guest: vsock waits");
    let ended = idle.read(&mut [0]);
    println!("guest: vsock connection ended: {ended:?}");
    let begin = Instant::now();
    while let Err(error) = streams(count, kib, half_close) {
        if begin.elapsed() > Duration::from_secs(30) {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(100));
    }
    next(&end)?;
    println!("guest: vsock done");
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("guest: vsock FAILED {sentence}");
            ExitCode::FAILURE
        }
    }
}
