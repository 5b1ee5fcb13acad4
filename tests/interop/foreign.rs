//! Back ends of others under our core, on this host's KVM: firmware and a boot sector are the guest.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::guest::wait;
use crate::{Case, Outcome, Peer, STORAGE_DAEMON, program};

pub const CASES: &[Case] = &[
    Case {
        ours: "core",
        peer: STORAGE_DAEMON,
        what: "firmware boots from its disk, reads and writes",
        run: boot,
    },
    Case {
        ours: "core",
        peer: STORAGE_DAEMON,
        what: "ended and started anew while the guest reads",
        run: reconnect,
    },
];

/// Prints B, reads sector 1, writes it to sector 2, ends the machine.
const BOOT: &[u8] = &[
    0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xC0, // xor ax,ax; mov ds,ax; mov es,ax
    0xB8, 0x01, 0x02, 0xBB, 0x00, 0x7E, 0xB9, 0x02, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // read a sector
    0x72, 0x10, // jc end
    0xB8, 0x01, 0x03, 0xBB, 0x00, 0x7E, 0xB9, 0x03, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // write it
    0xB0, 0x00, // mov al,0
    0xBA, 0xF4, 0x00, 0xEE, // end: mov dx,0xF4; out dx,al
    0xF4, 0xEB, 0xFD, // hlt; jmp
];

/// Prints B, reads sector 1 and checks it, three thousand times; ends the machine with 0, or 1 when something was wrong.
const LOOP: &[u8] = &[
    0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xC0, // xor ax,ax; mov ds,ax; mov es,ax
    0xB0, b'B', 0xBA, 0x02, 0x04, 0xEE, // mov al,'B'; mov dx,0x402; out dx,al
    0xB0, b'\n', 0xEE, // mov al,10; out dx,al: whole lines are seen
    0xBD, 0xB8, 0x0B, // mov bp,3000
    0xC6, 0x06, 0x00, 0x7E, 0x00, // again: mov byte [0x7E00],0
    0xB8, 0x01, 0x02, 0xBB, 0x00, 0x7E, 0xB9, 0x02, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // read a sector
    0x72, 0x0E, // jc bad
    0x80, 0x3E, 0x00, 0x7E, b'Q', // cmp byte [0x7E00],'Q'
    0x75, 0x07, // jne bad
    0x4D, 0x75, 0xE1, // dec bp; jnz again
    0xB0, 0x00, 0xEB, 0x02, // mov al,0; jmp end
    0xB0, 0x01, // bad: mov al,1
    0xBA, 0xF4, 0x00, 0xEE, // end: mov dx,0xF4; out dx,al
    0xF4, 0xEB, 0xFD, // hlt; jmp
];

/// Serves the file `disk` of this folder at `socket` in it.
pub fn daemon(folder: &Path) -> Command {
    let path = |name: &str| folder.join(name).display().to_string();
    let mut command = Command::new(STORAGE_DAEMON.program);
    command.args(["--blockdev", &format!("driver=file,node-name=d,filename={}", path("disk"))]);
    command.args(["--export"]).arg(format!(
        "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={}",
        path("socket")
    ));
    command
}

struct Daemon(Child);

impl Daemon {
    fn start(folder: &Path) -> Result<Self, String> {
        let child = daemon(folder).stdin(Stdio::null()).spawn().map_err(|error| error.to_string())?;
        wait("the storage daemon", || Ok(folder.join("socket").exists()))?;
        Ok(Self(child))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn bootable(folder: &Path, code: &[u8]) {
    let mut image = vec![0; 1 << 20];
    image[..code.len()].copy_from_slice(code);
    image[510..512].copy_from_slice(&[0x55, 0xAA]);
    image[512..1024].fill(b'Q');
    fs::write(folder.join("disk"), image).unwrap();
}

fn machine(folder: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-sKILL", "100"]).arg(program("bulkhead"));
    command.args(["run", "--firmware", "seabios", "--memory", "64M", "--serial", "off", "--debug-exit"]);
    command.args(["--debug-port", "debug", "--disk", "vhost-user=socket"]).current_dir(folder);
    command.args(["--name", &format!("interop-{}", std::process::id())]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(folder.join("log")).unwrap());
    command
}

/// The exit code of a guest that wrote 0 to the debug exit port.
const GOOD: i32 = 1;

fn ended(folder: &Path, code: Option<i32>) -> Result<String, String> {
    let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
    if code == Some(GOOD) { Ok(log) } else { Err(format!("exit code {code:?}: {log}")) }
}

fn boot(_: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    bootable(folder.path(), BOOT);
    let _daemon = Daemon::start(folder.path())?;
    let status = machine(folder.path()).status().map_err(|error| error.to_string())?;
    ended(folder.path(), status.code())?;
    let disk = fs::read(folder.path().join("disk")).unwrap();
    if disk[1024..1536].iter().all(|byte| *byte == b'Q') {
        Ok("boots by SeaBIOS; a sector written is in the image".to_owned())
    } else {
        Err("the sector that the guest wrote is not in the image".to_owned())
    }
}

fn reconnect(_: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    bootable(folder.path(), LOOP);
    let mut daemon = Daemon::start(folder.path())?;
    let mut child = machine(folder.path()).spawn().map_err(|error| error.to_string())?;
    wait("the boot sector", || {
        let said = fs::read(folder.path().join("debug")).unwrap_or_default();
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("the machine has ended: {status}"));
        }
        // The last words of firmware before it.
        let said = String::from_utf8_lossy(&said);
        Ok(said.split_once("0000:7c00").is_some_and(|(_, after)| after.contains('B')))
    })?;
    for _ in 0..2 {
        drop(daemon);
        let _stale = fs::remove_file(folder.path().join("socket"));
        daemon = Daemon::start(folder.path())?;
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let log = ended(folder.path(), status.code())?;
    match log.matches("was replaced within").count() {
        0 => Err(format!("the guest was done before the back end ended: {log}")),
        times => Ok(format!("3000 reads, all right; connected again {times} times")),
    }
}
