//! A serial port's process that has turned hostile.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_ipc::vfio_user::Command;
use bulkhead_ipc::vfio_user::wire::{DeviceInfo, Header, Kind, RegionInfo, Version};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::nonsense::{Frame, Random};

const PATIENCE: Duration = Duration::from_secs(10);
/// Message ID, command, size, flags, error.
const FIELDS: &[(usize, usize)] = &[(0, 2), (2, 2), (4, 4), (8, 4), (12, 4)];

/// The next command that is to be answered, with its payload; `None` at the end.
fn command(stream: &mut UnixStream) -> Result<Option<(Header, Vec<u8>)>, String> {
    loop {
        let mut header = [0; 16];
        match stream.read_exact(&mut header) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let patience = stream.read_timeout().map_err(|error| error.to_string())?;
                let short = patience.is_some_and(|patience| patience < PATIENCE);
                return if short {
                    Ok(None)
                } else {
                    Err("the core says nothing for ten seconds".to_owned())
                };
            }
            Err(_) => return Ok(None),
            Ok(()) => {}
        }
        let header = Header::decode(&header).map_err(|error| format!("the core sent nonsense: {error}"))?;
        let mut payload = vec![0; header.payload_size()];
        if stream.read_exact(&mut payload).is_err() {
            return Ok(None);
        }
        if header.kind != Kind::Posted {
            return Ok(Some((header, payload)));
        }
    }
}

/// The right answer.
fn frame(header: Header, payload: &[u8]) -> Option<Frame> {
    let (reply, descriptors) = answer(header.command, payload)?;
    let size = u32::try_from(16 + reply.len()).unwrap_or(0);
    let mut bytes = Header { size, kind: Kind::Reply, ..header }.encode().to_vec();
    bytes.extend(reply);
    Some(Frame { bytes, descriptors, fields: FIELDS, size: (2, true) })
}

/// Serves well until the interrupt is connected, the last step of a connection.
pub fn serve(mut stream: UnixStream) -> Result<(), String> {
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    while let Some((header, payload)) = command(&mut stream)? {
        if let Some(frame) = frame(header, &payload) {
            frame.send(stream.as_fd());
        }
        if header.command == Command::DeviceSetIrqs.number() {
            return Ok(());
        }
    }
    Err("a good device is not served".to_owned())
}

/// Plays one connection until it ends. Returns the number of messages sent, or what the core must not have allowed.
pub fn play(mut stream: UnixStream, random: &mut Random) -> Result<u64, String> {
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    let mut good = random.below(9);
    let mut sent = 0;
    while let Some((header, payload)) = command(&mut stream)? {
        let Some(mut frame) = frame(header, &payload) else { return Ok(sent) };
        if good > 0 {
            good -= 1;
            sent += frame.send(stream.as_fd());
        } else {
            // The core may be waiting for more of a message: a few times it has to notice by itself that nothing comes.
            let patience = Duration::from_millis(if random.one_in(800) { 1100 } else { 2 });
            stream.set_read_timeout(Some(patience)).map_err(|error| error.to_string())?;
            frame.spoil(random);
            match frame.misbehave(stream.as_fd(), random) {
                0 => return Ok(sent),
                count => sent += count,
            }
        }
        if header.command == Command::DeviceSetIrqs.number() {
            // Nobody asks any more: what else is said finds nobody who waits for it.
            for _ in 0..random.below(20) {
                frame.spoil(random);
                sent += frame.send(stream.as_fd());
            }
            return Ok(sent);
        }
    }
    Ok(sent)
}

/// The payload of the right answer, with its descriptors.
fn answer(command: u16, payload: &[u8]) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let none = |bytes: &[u8]| Some((bytes.to_vec(), Vec::new()));
    match Command::from_number(command)? {
        Command::Version => none(&Version { major: 0, minor: 0 }.encode()),
        Command::DeviceGetInfo => {
            let (argsz, flags) = (16, DeviceInfo::RESET);
            none(&DeviceInfo { argsz, flags, num_regions: 2, num_irqs: 1 }.encode())
        }
        Command::DeviceGetRegionInfo => {
            let asked = RegionInfo::decode(payload).ok()?;
            let access = RegionInfo::READ | RegionInfo::WRITE;
            if asked.index == 0 {
                return none(
                    &RegionInfo { argsz: 32, flags: access, index: 0, size: 8 << 48, ..asked }.encode(),
                );
            }
            let page = memfd_create(c"page", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).ok()?;
            nix::unistd::ftruncate(&page, 4096).ok()?;
            fcntl(&page, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).ok()?;
            // Lies in it from the start: how much was written, how much was passed on.
            nix::sys::uio::pwrite(&page, &[0xa5; 64], 0).ok()?;
            let info = RegionInfo { flags: access | RegionInfo::MMAP, size: 4096, ..asked };
            Some((info.encode().to_vec(), vec![page]))
        }
        Command::DeviceSetIrqs | Command::DeviceReset => none(&[]),
        Command::RegionRead | Command::RegionWrite | Command::DeviceGetIrqInfo => {
            let mut reply = payload.get(..16)?.to_vec();
            let count = if command == Command::RegionRead.number() { 1 } else { 0 };
            reply.resize(16 + count, 0);
            none(&reply)
        }
    }
}
