//! Streams to a guest and back, through our vsock and through vhost-device-vsock, each with a guest of its own; and without a guest, which
//! takes most of the time, by a driver in this program.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use super::vsock_load::Load;
use super::{Contender, Figures, PATIENCE, named, print, turns};
use crate::guest::{Guest, Service};
use crate::ours::{RECONNECT, device};
use crate::traffic::{archive, dial, modules, text};
use crate::{DEVICE_VSOCK, QEMU};

/// MiB there and back in one run.
const SIZE: u32 = 16;
/// Questions of 64 bytes and their answers, one after the other, in one run.
const QUESTIONS: u32 = 2000;

/// A guest with a vsock that serves an echo at port 7000.
fn echoing(folder: &tempfile::TempDir, name: &str, service: &Service, uds: &Path) -> Result<Guest, String> {
    let options = device("c", service, "vhost-user-vsock-pci").into_iter();
    let mut options: Vec<String> = options.map(|option| option.replace(RECONNECT, "")).collect();
    options.extend(archive(&modules(folder.path())?));
    for port in [52, 53] {
        let listener = UnixListener::bind(format!("{}_{port}", uds.display())).map_err(text)?;
        // Connections to the second one stay.
        thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().flatten() {
                if port == 53 {
                    kept.push(stream);
                    continue;
                }
                thread::spawn(move || {
                    let mut from = stream.try_clone()?;
                    std::io::copy(&mut from, &mut stream)
                });
            }
        });
    }
    let mut guest = Guest::start(QEMU, folder, name, &options)?;
    guest.set_patience(PATIENCE);
    guest.boot()?;
    guest.run("tar -xf /dev/vda -C /tmp; for it in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do insmod /modules/$it.ko; done; /tmp/guest-vsock --streams 1 --kib 1 --half-close 0 >/tmp/said 2>&1 & \
        while ! grep -q 'streams ok' /tmp/said; do sleep 0.1; done")?;
    Ok(guest)
}

/// MiB a second there and back.
fn stream(uds: &Path) -> Result<f64, String> {
    let mut stream = dial(uds, 7000)?;
    let mut end = stream.try_clone().map_err(text)?;
    let bytes = vec![0x5A; usize::try_from(SIZE << 20).map_err(text)?];
    let mut back = vec![0; bytes.len()];
    let begin = Instant::now();
    let writer = thread::spawn(move || end.write_all(&bytes));
    stream.read_exact(&mut back).map_err(text)?;
    let rate = f64::from(SIZE) / begin.elapsed().as_secs_f64();
    writer.join().map_err(|_| "panicked")?.map_err(text)?;
    Ok(rate)
}

/// Questions a second.
fn questions(uds: &Path) -> Result<f64, String> {
    let mut stream = dial(uds, 7000)?;
    let begin = Instant::now();
    for _ in 0..QUESTIONS {
        let mut bytes = [0x5A; 64];
        stream.write_all(&bytes).map_err(text)?;
        stream.read_exact(&mut bytes).map_err(text)?;
    }
    Ok(f64::from(QUESTIONS) / begin.elapsed().as_secs_f64())
}

/// vhost-device-vsock with a driver.
fn theirs(folder: &Path) -> Result<(Service, Load), String> {
    // One that was ended leaves its sockets, and its driver those of the host's programs.
    let folder = tempfile::tempdir_in(folder).map_err(text)?.keep();
    let at = |name: &str| folder.join(name);
    let mut command = Command::new(DEVICE_VSOCK.path());
    command.args(["--guest-cid", "4", "--socket"]).arg(at("theirs.sock")).arg("--uds-path").arg(at("theirs"));
    let service = Service::other(command, at("theirs.sock"))?;
    let load = Load::new(&service.socket, 4, &at("theirs")).map_err(|error| format!("theirs: {error}"))?;
    Ok((service, load))
}

/// A load by both, in turns. The other one falls silent now and then: then it is started anew, and so are the rounds.
fn both(
    sides: &mut [(Service, Load); 2],
    folder: &Path,
    rounds: usize,
    load: Driven,
) -> Result<Vec<Figures>, String> {
    const TRIES: usize = 5;
    let mut tries = 0;
    loop {
        let contenders = sides
            .each_ref()
            .map(|(service, _)| Contender { back_end: Some(service.child.id()), guest: None });
        let mut ours_failed = false;
        let figures = turns(rounds, &contenders, |turn| {
            let (_, driver) = sides.get_mut(turn).ok_or("no such turn")?;
            load(driver).map_err(|error| {
                ours_failed = turn == 0;
                format!("{}: {error}", if turn == 0 { "ours" } else { "theirs" })
            })
        });
        tries += 1;
        match figures {
            Err(error) if ours_failed || tries == TRIES => return Err(error),
            Err(_) => sides[1] = theirs(folder)?,
            done => return done,
        }
    }
}

/// A load that a driver carries out.
type Driven = fn(&mut Load) -> Result<f64, String>;

/// Both back ends, each with its driver.
pub fn by_driver(rounds: usize) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let uds = folder.path().join("ours");
    let options = ["--guest-cid", "3", "--uds-path", uds.to_str().unwrap_or_default()];
    let ours = Service::start(folder.path(), "vsock", "ours.sock", &options);
    let driver = Load::new(&ours.socket, 3, &uds).map_err(|error| format!("ours: {error}"))?;
    let mut sides = [(ours, driver), theirs(folder.path())?];
    for (what, unit, load) in [
        ("vsock, driver without a guest, a stream to it", "MiB/s", Load::down as Driven),
        ("vsock, driver without a guest, a stream from it", "MiB/s", Load::up),
        ("vsock, driver without a guest, packets of 64 bytes from it", "1/s", Load::packets),
        (
            "vsock, driver without a guest, 32 questions of 64 bytes at once and their answers",
            "1/s",
            Load::crowd,
        ),
        ("vsock, driver without a guest, a question of 64 bytes and its answer", "1/s", Load::questions),
    ] {
        let figures =
            both(&mut sides, folder.path(), rounds, load).map_err(|error| format!("{what}: {error}"))?;
        if let [ours, theirs] = figures.as_slice() {
            print(what, &named(DEVICE_VSOCK), unit, ours, theirs, 2.0);
        }
    }
    Ok(())
}

/// Both back ends, each with its guest.
pub fn by_guests(rounds: usize) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let at = |name: &str| folder.path().join(name);
    let uds = at("ours");
    let options = ["--guest-cid", "3", "--uds-path", uds.to_str().unwrap()];
    let ours = Service::start(folder.path(), "vsock", "ours.sock", &options);
    let mut other = Command::new(DEVICE_VSOCK.path());
    other.args(["--guest-cid", "4", "--socket"]).arg(at("theirs.sock")).arg("--uds-path").arg(at("theirs"));
    let theirs = Service::other(other, at("theirs.sock"))?;
    let one = echoing(&folder, "one", &ours, &uds).map_err(|error| format!("ours: {error}"))?;
    let two = echoing(&folder, "two", &theirs, &at("theirs")).map_err(|error| format!("theirs: {error}"))?;
    let contenders = [(&ours, &one), (&theirs, &two)]
        .map(|(service, guest)| Contender { back_end: Some(service.child.id()), guest: Some(guest.pid()) });
    let paths = [uds, at("theirs")];
    for (what, unit, load) in [
        ("vsock, stock guest, a stream to it and back", "MiB/s", stream as fn(&Path) -> Result<f64, String>),
        ("vsock, stock guest, a question of 64 bytes and its answer", "1/s", questions),
    ] {
        let figures = turns(rounds, &contenders, |turn| load(paths.get(turn).ok_or("no such turn")?))
            .map_err(|error| format!("{what}: {error}"))?;
        if let [ours, theirs] = figures.as_slice() {
            print(what, &named(DEVICE_VSOCK), unit, ours, theirs, 2.0);
        }
    }
    Ok(())
}
