//! What a monitor itself costs, measured on this machine's own KVM with a guest of a few instructions.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bulkhead_tests::harness::{Outcome, Places};

use crate::contenders::{Guest, Memory, bulkhead, qemu};
use crate::measure::{self, Stream};
use crate::table;

const LIMIT: Duration = Duration::from_secs(30);
const MEMORY: u32 = 256;

/// A firmware of 64 KiB whose reset vector (16 bytes below its end) writes one byte to the UART and halts: QEMU's own
/// would take longer than everything else.
fn tiny_rom() -> Vec<u8> {
    let code = [
        0xBA, 0xF8, 0x03, // mov dx, 0x3f8
        0xB0, b'!', // mov al, '!'
        0xEE, // out dx, al
        0xF4, // hlt
        0xEB, 0xFD, // jmp to the hlt
    ];
    let mut rom = vec![0xF4; 64 << 10];
    if let Some(vector) = rom.get_mut((64 << 10) - 16..).and_then(|end| end.get_mut(..code.len())) {
        vector.copy_from_slice(&code);
    }
    rom
}

struct Row {
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    stream: Stream,
    text: &'static str,
    limit: Option<f64>,
    values: Vec<f64>,
}

pub fn run(places: &Places, rounds: usize) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let rom = folder.path().join("rom");
    fs::write(&rom, tiny_rom()).map_err(|error| error.to_string())?;

    let mut rows = rows(places, folder.path(), &rom);
    for round in 1..=rounds {
        for row in &mut rows {
            // A start before the one that counts: the host may have let go of pages of a program that nobody ran for some seconds.
            drop(measure::until((row.command)(), row.stream, row.text, LIMIT)?);
            let started = measure::until((row.command)(), row.stream, row.text, LIMIT)?;
            eprintln!("round {round}: {} {:.2} ms", row.name, started.milliseconds);
            row.values.push(started.milliseconds);
        }
    }
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let median = table::median(&row.values);
            let verdict = row.limit.map_or(String::new(), |limit| table::verdict(median, limit));
            vec![row.name.into(), format!("{median:.1}"), table::spread(&row.values), verdict]
        })
        .collect();
    let title = format!("Start on this machine's own KVM ({MEMORY} MiB, 1 vCPU, median of {rounds})");
    table::print(&title, &["what", "ms", "range", "limit"], &rows);
    Ok(())
}

/// A new disk image for each machine: that of a killed one stays locked until the kernel has taken the process down, which
/// would be measured as part of the next start.
fn new_disk(folder: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let path = folder.join(format!("disk{}.img", NEXT.fetch_add(1, Ordering::Relaxed)));
    // Where it fails, the machine says that the image is missing.
    let _ = File::create(&path).and_then(|file| file.set_len(1 << 20));
    path
}

fn rows(places: &Places, folder: &Path, rom: &Path) -> Vec<Row> {
    let row = |name, command: Box<dyn Fn() -> Command>, stream, text, limit| Row {
        name,
        command,
        stream,
        text,
        limit,
        values: Vec::new(),
    };
    let ours = |with_devices: bool| -> Box<dyn Fn() -> Command> {
        let (places, folder) = (places.clone(), folder.to_path_buf());
        Box::new(move || {
            let disk = with_devices.then(|| new_disk(&folder));
            let guest = Guest { cmdline: "", memory: MEMORY, disk: disk.as_deref() };
            let mut command = bulkhead(&places, &guest);
            command.arg("--kernel").arg(places.payloads.join("first_byte.elf"));
            command
        })
    };
    let theirs = |machine: &'static str| -> Box<dyn Fn() -> Command> {
        let rom = rom.to_path_buf();
        Box::new(move || {
            // Not `host`: without VMX or SVM, KVM refuses some of the registers that QEMU would pass on.
            let mut command = qemu(machine, "qemu64", MEMORY, Memory::Private);
            command.arg("-bios").arg(&rom);
            command
        })
    };
    let ready = "READY=1";
    vec![
        row("Bulkhead, serial port: first serial byte", ours(false), Stream::Output, "!", Some(16.0)),
        row("Bulkhead, four devices: first serial byte", ours(true), Stream::Output, "!", Some(16.0)),
        row("Bulkhead, four devices: every process ready", ours(true), Stream::Manager, ready, Some(12.0)),
        row("QEMU microvm, tiny ROM: first serial byte", theirs("microvm"), Stream::Output, "!", None),
        row("QEMU pc, tiny ROM: first serial byte", theirs("pc"), Stream::Output, "!", None),
    ]
}
