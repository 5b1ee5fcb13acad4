//! Network cards in stock guests: a tap and passt at once, both ways, with a process that dies in between; and two machines that
//! a socket joins.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, exit};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Bytes that the guest downloads.
const FILE: usize = 4 << 20;

pub fn cases() -> Vec<Case> {
    let name = "network by a tap and by passt: ping, TCP both ways, DHCP, a port of the host, a process that is killed";
    vec![
        Case::new("stock", name, 300, tap_and_passt),
        Case::new(
            "stock",
            "two machines at one cable: a file each way, one is killed and comes back",
            120,
            cable,
        )
        .long_in_lab(),
    ]
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

pub fn run(program: &str, arguments: &str) -> Outcome {
    let output = Command::new(program).args(arguments.split(' ')).output().map_err(text)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments}: {error}");
    Ok(())
}

/// Answers requests for files: 404 for `/done` until it is.
fn serve(listener: &TcpListener, file: &[u8], done: &AtomicBool) {
    for stream in listener.incoming().flatten() {
        let mut stream = stream;
        let mut request = [0; 1024];
        let count = stream.read(&mut request).unwrap_or(0);
        let wants_done = request.get(..count).is_some_and(|bytes| bytes.starts_with(b"GET /done"));
        let (status, body) = match wants_done {
            true if !done.load(Ordering::Relaxed) => ("404 Not Found", &b""[..]),
            true => ("200 OK", &b"yes"[..]),
            false => ("200 OK", file),
        };
        let head = format!("HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        let _the_guest_says = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    }
}

/// The digest of a file, by the host's own program.
fn digest(context: &Context, name: &str, bytes: &[u8]) -> Outcome<String> {
    let path = context.folder.join(name);
    fs::write(&path, bytes).map_err(text)?;
    let output = Command::new("sha256sum").arg(&path).output().map_err(text)?;
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    line.split(' ').next().map(str::to_owned).ok_or_else(|| "no digest".to_owned())
}

fn fetch() -> Outcome<String> {
    let mut stream = TcpStream::connect("127.0.0.1:8080").map_err(text)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(text)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").map_err(text)?;
    let mut page = String::new();
    stream.read_to_string(&mut page).map_err(text)?;
    Ok(page)
}

/// Gives this thread and what it starts a network of their own: names and ports are nobody else's. From it passt takes the
/// guest's address: 10.7.0.5.
pub fn separate() -> Outcome {
    let _there_or_built_in = Command::new("modprobe").arg("tun").output();
    unshare(CloneFlags::CLONE_NEWNET).map_err(text)?;
    run("ip", "link set lo up")?;
    // passt takes the guest's addresses from the interface with the default route.
    run("ip", "tuntap add separate mode tap")?;
    run("ip", "addr add 10.7.0.5/24 dev separate")?;
    run("ip", "link set separate up")?;
    run("ip", "route add default via 10.7.0.1 dev separate")
}

fn tap_and_passt(context: &Context) -> Outcome {
    separate()?;
    run("ip", "tuntap add wire mode tap")?;
    run("ip", "addr add 10.9.0.1/24 dev wire")?;

    let mut file = vec![0; FILE];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut file)).map_err(text)?;
    let wanted = digest(context, "down", &file)?;
    let done = Arc::new(AtomicBool::new(false));
    let web = TcpListener::bind("0.0.0.0:8000").map_err(text)?;
    let sink = TcpListener::bind("0.0.0.0:8001").map_err(text)?;
    let served = Arc::clone(&done);
    thread::spawn(move || serve(&web, &file, &served));
    let upload = thread::spawn(move || {
        let mut bytes = Vec::new();
        sink.accept().and_then(|(mut stream, _)| stream.read_to_end(&mut bytes)).map(|_| bytes)
    });

    let machine = Machine::stock(context, Kernel::Elf, "network")?;
    let arguments = "--net tap=wire,mac=52:54:00:12:34:56,mtu=1400 --net user,hostfwd=tcp:127.0.0.1:8080:80";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let mut running = machine.arguments(&arguments).start()?;
    running.wait_for("guest: ok ping by the tap", 1)?;
    let card = running.processes().into_iter().find(|process| process.title().ends_with("/net0] net"));
    let card = card.ok_or("no process net0")?;
    kill(Pid::from_raw(i32::try_from(card.pid).map_err(text)?), Signal::SIGKILL).map_err(text)?;
    running.wait_for("guest: serves", 1)?;
    let page = fetch()?;
    ensure!(page.contains("a page of the guest"), "through the port of the host came {page:?}");
    done.store(true, Ordering::Relaxed);
    running.expect_exit(exit::SUCCESS)?;

    let serial = running.serial();
    let failed: Vec<_> = serial.iter().filter(|line| line.contains("FAILED")).collect();
    ensure!(failed.is_empty(), "{failed:?}");
    ensure!(serial.iter().any(|line| line.contains("ok DHCP")), "no DHCP");
    ensure!(
        running.guest("tap").as_deref() == Some("52:54:00:12:34:56 mtu 1400"),
        "{:?}",
        running.guest("tap")
    );
    for way in ["down", "passt"] {
        ensure!(
            running.guest(way).as_ref() == Some(&wanted),
            "{way}: {:?}, not {wanted}",
            running.guest(way)
        );
    }
    let sent = upload.join().map_err(|_| "the receiver panicked")?.map_err(text)?;
    let arrived = digest(context, "up", &sent)?;
    ensure!(
        running.guest("up").as_ref() == Some(&arrived),
        "{:?} was sent, {arrived} came",
        running.guest("up")
    );
    ensure!(
        running.messages().iter().any(|line| line.contains("net0 was replaced within")),
        "the process that was killed was not replaced"
    );
    Ok(())
}

/// The machine that listens goes on when the other one is killed, and knows the next one.
fn cable(context: &Context) -> Outcome {
    let socket = context.folder.join("cable");
    let end = |number: u8, words: &str| {
        let machine = Machine::stock(context, Kernel::Elf, "wire")?
            .named(&format!("cable{number}-{}", std::process::id()))
            .words(&format!("bulkhead.end={number} {words}"));
        machine.arguments(&["--memory", "128M", "--net", &format!("socket={}", socket.display())]).start()
    };
    let mut first = end(1, "")?;
    while !socket.exists() {
        ensure!(!context.left().is_zero(), "nobody listens: {:?}", first.messages());
        thread::sleep(Duration::from_millis(20));
    }
    let mut second = end(2, "bulkhead.stay")?;
    second.wait_for("guest: exchanged", 1)?;
    second.signal(Signal::SIGKILL)?;
    second.wait()?;
    let mut again = end(2, "")?;
    again.expect_exit(exit::SUCCESS)?;
    first.expect_exit(exit::SUCCESS)?;
    let own = first.guest("own").ok_or("the first machine has no file")?;
    let mut sent = Vec::new();
    for other in [&second, &again] {
        ensure!(other.guest("came").as_ref() == Some(&own), "{:?} came, not {own}", other.guest("came"));
        sent.push(format!("guest: came {}", other.guest("own").unwrap_or_default()));
    }
    let mut came = first.serial();
    came.retain(|line| line.starts_with("guest: came "));
    ensure!(came == sent, "{sent:?} were sent, {came:?} came");
    Ok(())
}
