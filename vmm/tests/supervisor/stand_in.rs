//! A core and devices that behave as their command line or id says.
//!
//! Contains unsafe code: one of the ways to misbehave is a crash.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::exit;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_ipc::channel::message::{
    Boot, CoreStart, Descriptors, DeviceConfig, DeviceStart, FromCore, FromDevice, Input, Left, MachineEnd,
    NetBackend, Progress, ToCore, ToDevice,
};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, PolicyName};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;

/// A disk that is to have this size says so, and again; one of another size keeps silent.
pub const SAID_TOO_OFTEN: u64 = 1 << 30;

struct Control {
    channel: Channel,
}

impl Control {
    fn new() -> Self {
        Self { channel: Channel::from_fd(jail::enter().unwrap()) }
    }

    /// Waits only with what every policy allows.
    fn recv<M: DeserializeOwned>(&self) -> (M, Vec<OwnedFd>) {
        loop {
            poll(&mut [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            match self.channel.recv(Some(Duration::ZERO)) {
                Ok(message) => return message,
                Err(ChannelError::Deadline) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn ready<M: serde::Serialize>(
        &self,
        main: PolicyName,
        fds: &[OwnedFd],
        ready: impl Fn(Vec<PolicyName>) -> M,
    ) {
        let mut expected: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        expected.push(self.channel.as_fd());
        let sealed = jail::seal(main, &expected).unwrap();
        self.channel.send(&ready(sealed.policies()), &sealed.descriptors()).unwrap();
    }
}

/// Sends what is no message, or not one that is due. Each process something else.
fn babble(control: &Control) {
    let send = |bytes: &[u8], fds: &[i32]| {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights: &[_] = if fds.is_empty() { &[] } else { &rights };
        let number = control.channel.as_fd().as_raw_fd();
        let _full = sendmsg::<()>(number, &[IoSlice::new(bytes)], rights, MsgFlags::MSG_DONTWAIT, None);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    let noise: Vec<u8> = (0..200_u32).map(|at| (at.wrapping_mul(now) >> 7).to_le_bytes()[0]).collect();
    match now / 1000 % 8 {
        0 => send(&noise[..usize::try_from(now % 200).unwrap()], &[]),
        1 => send(&[0xff; 4096], &[]),
        2 => send(&vec![0; 60_000], &[]),
        3 => drop(control.channel.send(&FromCore::Ended(MachineEnd::PowerOff), &[])),
        4 => drop(control.channel.send(&FromDevice::Ready { policies: vec![PolicyName::CoreMain] }, &[])),
        5 => send(&noise, &[0; 60]),
        6 => {
            for _ in 0..5000 {
                send(&[1], &[]);
            }
            send(&noise, &[]);
        }
        _ => drop(control.channel.send(&FromDevice::Failed("\u{1b}[2J".repeat(500)), &[])),
    }
}

/// Does what `word` says; false when it is no such word.
fn misbehave(word: &str) -> bool {
    match word {
        "crash" => {
            let nowhere = std::hint::black_box(std::ptr::null_mut::<u8>());
            // SAFETY: none; this is the crash.
            unsafe { nowhere.write_volatile(1) }
        }
        "panic" => panic!("as told"),
        "exit" => exit(9),
        "violate" => {
            // SAFETY: the call has no effect; the policy does not allow it.
            unsafe { libc::syscall(libc::SYS_sethostname, c"x".as_ptr(), 1) };
        }
        "flood" => {
            for number in 0..20_000 {
                let _full = writeln!(io::stderr(), "INFO stand-in: line {number} \u{1b}[31m");
            }
        }
        _ => return false,
    }
    true
}

pub fn core() {
    let control = Control::new();
    let (message, fds) = control.recv::<ToCore>();
    let ToCore::Start(start) = message else { panic!("{message:?}") };
    let CoreStart { boot, devices, .. } = start;
    let Boot::Kernel { cmdline, .. } = boot else { panic!("not a kernel") };
    jail::set_enforcement(start.enforcement);
    let words: Vec<&str> = cmdline.split_whitespace().collect();
    let at_stop = if words.contains(&"reset-at-stop") { MachineEnd::Reset } else { MachineEnd::PowerOff };
    if words.contains(&"silent") {
        loop {
            drop(control.recv::<ToCore>());
        }
    }
    control.ready(PolicyName::CoreMain, &fds, |policies| FromCore::Ready { policies });
    // The others become ready meanwhile; sleeping is not allowed.
    poll(&mut [], 150u8).unwrap();
    for word in words {
        let say = |message: FromCore| control.channel.send(&message, &[]).unwrap();
        match word {
            "poweroff" => say(FromCore::Ended(MachineEnd::PowerOff)),
            "reset" => say(FromCore::Ended(MachineEnd::Reset)),
            "panicked" => say(FromCore::Ended(MachineEnd::Panicked)),
            "failed" => say(FromCore::Ended(MachineEnd::Failed("KVM_RUN\u{1b}[2J".to_owned()))),
            "bad-kernel" => {
                let reason = "this is no kernel".to_owned();
                say(FromCore::Ended(MachineEnd::BadInput { input: Input::Kernel, reason }));
            }
            "device-failed" => {
                let id = devices.first().unwrap().id.clone();
                say(FromCore::DeviceFailed { id, reason: "no answer".to_owned() });
            }
            "wait" => drop(poll(&mut [], 1000u16)),
            word => drop(misbehave(word)),
        }
    }
    loop {
        match control.recv::<ToCore>() {
            (ToCore::Stop, _) => control.channel.send(&FromCore::Ended(at_stop.clone()), &[]).unwrap(),
            (ToCore::DeviceReplaced { id, .. }, fds) => {
                assert_eq!(fds.len(), 1);
                control.channel.send(&FromCore::DeviceReplaced { id }, &[]).unwrap();
            }
            (ToCore::Ping, _) => control.channel.send(&FromCore::Alive, &[]).unwrap(),
            (ToCore::DeviceGivenUp { id }, _) => eprintln!("INFO stand-in: {id} has no process"),
            _ => {}
        }
    }
}

/// How many processes of this disk there were before; the disk holds the number.
fn count_lives(kept: &mut Vec<OwnedFd>) -> u8 {
    let disk = File::from(kept.pop().unwrap());
    let mut lives = [0];
    disk.read_at(&mut lives, 0).unwrap();
    disk.write_at(&[lives[0] + 1], 0).unwrap();
    kept.push(disk.into());
    lives[0]
}

/// Takes what a device of this type is given; the policy of its main thread.
fn take(config: DeviceConfig, fds: &mut Descriptors, kept: &mut Vec<OwnedFd>) -> PolicyName {
    match config {
        DeviceConfig::Blk(blk) => {
            kept.push(fds.take(blk.disk).unwrap());
            PolicyName::BlkMain
        }
        DeviceConfig::Rng(rng) => {
            kept.push(fds.take(rng.source).unwrap());
            PolicyName::RngMain
        }
        DeviceConfig::Pmem(pmem) => {
            kept.push(fds.take(pmem.file).unwrap());
            PolicyName::PmemMain
        }
        DeviceConfig::Console(console) => {
            kept.extend(
                [console.input, console.output].into_iter().flatten().map(|fd| fds.take(fd).unwrap()),
            );
            drop(console.typed.map(|typed| fds.take(typed).unwrap()));
            PolicyName::ConsoleMain
        }
        DeviceConfig::Uart(uart) => {
            if let Some(output) = uart.output {
                let mut output = File::from(fds.take(output).unwrap());
                output.write_all(b"hello from the serial port\r\n").unwrap();
                kept.push(output.into());
            }
            kept.extend(uart.input.map(|input| fds.take(input).unwrap()));
            drop(uart.typed.map(|typed| fds.take(typed).unwrap()));
            PolicyName::UartMain
        }
        DeviceConfig::Flash(flash) => {
            kept.extend([flash.file, flash.memory].map(|fd| fds.take(fd).unwrap()));
            PolicyName::FlashMain
        }
        DeviceConfig::Watchdog(watchdog) => {
            kept.push(fds.take(watchdog.state).unwrap());
            PolicyName::WatchdogMain
        }
        DeviceConfig::Keyboard(keyboard) => {
            kept.push(fds.take(keyboard.state).unwrap());
            PolicyName::KeyboardMain
        }
        DeviceConfig::Vsock(vsock) => {
            kept.push(fds.take(vsock.connector).unwrap());
            PolicyName::VsockMain
        }
        DeviceConfig::Balloon(_) => PolicyName::BalloonMain,
        DeviceConfig::Ports(ports) => {
            let ends = ports.ports.iter().flat_map(|port| [port.input, port.output]);
            kept.extend(ends.chain([ports.state]).flatten().map(|fd| fds.take(fd).unwrap()));
            drop(ports.typed.map(|typed| fds.take(typed).unwrap()));
            PolicyName::ConsoleMain
        }
        DeviceConfig::Net(net) => {
            match net.backend {
                NetBackend::Tap { queues, positions, .. } => {
                    kept.extend(positions.into_iter().map(|fd| fds.take(fd).unwrap()));
                    kept.extend(queues.into_iter().map(|fd| fds.take(fd).unwrap()));
                }
                NetBackend::Stream(fd) | NetBackend::Datagrams(fd) => {
                    kept.extend(fd.map(|fd| fds.take(fd).unwrap()));
                }
            }
            drop(net.kept.map(|kept| fds.take(kept).unwrap()));
            PolicyName::NetMain
        }
        DeviceConfig::Relay(relay) => {
            kept.push(fds.take(relay.back_end).unwrap());
            PolicyName::RelayMain
        }
        DeviceConfig::Fs(fs) => {
            kept.push(fds.take(fs.table).unwrap());
            let (directory, descriptors) = jail::shared_directory().unwrap();
            kept.extend([directory, descriptors]);
            PolicyName::FsMain
        }
    }
}

pub fn device() {
    let control = Control::new();
    let (message, fds) = control.recv::<ToDevice>();
    let ToDevice::Start(start) = message else { panic!("{message:?}") };
    let DeviceStart { id, enforcement, config, socket, metrics, .. } = start;
    jail::set_enforcement(enforcement);
    let mut fds = Descriptors::from(fds);
    let mut kept = vec![fds.take(socket).unwrap()];
    // Only the mapping of it would be kept.
    drop(metrics.map(|metrics| fds.take(metrics).unwrap()));
    let policy = take(config, &mut fds, &mut kept);
    fds.finish().unwrap();
    if id == "early" || id == "counts" && matches!(count_lives(&mut kept), 1 | 2) {
        exit(5);
    }
    if id == "refuses" {
        control.channel.send(&FromDevice::Failed("bad disk".to_owned()), &[]).unwrap();
        exit(1);
    }
    control.ready(policy, &kept, |policies| FromDevice::Ready { policies });
    if id == "babbler" {
        poll(&mut [], 100u8).unwrap();
        babble(&control);
    }
    match id.strip_prefix("late-") {
        Some(word) => {
            // The machine runs by then.
            poll(&mut [], 500u16).unwrap();
            misbehave(word);
        }
        None => drop(misbehave(&id)),
    }
    serve(&control, &id);
}

fn serve(control: &Control, id: &str) {
    let (mut peers, mut lives) = (Vec::new(), 1_u32);
    loop {
        match control.recv::<ToDevice>() {
            (ToDevice::Stop, _) if id == "stubborn" => {}
            (ToDevice::Stop, _) => {
                let left = Left { output: lives.to_string().into_bytes() };
                control.channel.send(&FromDevice::Left(left), &[]).unwrap();
                exit(0)
            }
            (ToDevice::Take(left), _) => {
                lives = String::from_utf8(left.output).unwrap().parse::<u32>().unwrap() + 1;
                eprintln!("INFO stand-in: process {lives} of {id}");
            }
            (ToDevice::Ping, _) => {
                let progress = match id {
                    "stalls" => Progress::Stalled { queue: 1 },
                    "waits" => Progress::WaitsForHost { queue: 0 },
                    _ => Progress::Fine,
                };
                control.channel.send(&FromDevice::Alive(progress), &[]).unwrap();
            }
            (ToDevice::AttachWay(number), _) => eprintln!("INFO stand-in: way {number} of {id}"),
            (ToDevice::Attach, fds) => {
                let mut peer = File::from(fds.into_iter().next().unwrap());
                peer.write_all(format!("attached to {id}\r\n").as_bytes()).unwrap();
                peers.push(peer);
            }
            (ToDevice::Resize { columns, rows }, _) => {
                for peer in &mut peers {
                    let _gone = peer.write_all(format!("size {columns}x{rows}\r\n").as_bytes());
                }
            }
            (message @ (ToDevice::Start(_) | ToDevice::Balloon { .. } | ToDevice::AttachPort(_)), _) => {
                panic!("{message:?}")
            }
            (ToDevice::Link { up }, _) => eprintln!("INFO stand-in: link {up} of {id}"),
            (ToDevice::DiskSize { bytes }, _) => {
                eprintln!("INFO stand-in: {bytes} bytes for {id}");
                if bytes == SAID_TOO_OFTEN {
                    for _ in 0..5 {
                        control.channel.send(&FromDevice::DiskSize(Ok(bytes)), &[]).unwrap();
                    }
                    eprintln!("INFO stand-in: said it all for {id}");
                }
            }
            (ToDevice::Keys { number, keys, .. }, _) => {
                eprintln!("INFO stand-in: message {number} of {} strokes for {id}", keys.len());
                // Three keys at once: one that was broken into, and knows of keys that nobody struck.
                let taken = if keys.len() == 6 { number + 1000 } else { number };
                control.channel.send(&FromDevice::KeysTaken(taken), &[]).unwrap();
            }
        }
    }
}
