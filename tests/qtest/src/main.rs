//! The machine tree without KVM, behind the qtest protocol of QEMU.
//!
//! It is the tree that `bulkhead-vmm` runs, linked and not copied, with real guest RAM and a clock that only the test moves.
//! What KVM answers in the kernel (8259s, I/O APIC, 8254, port 61) is not there: interrupts are seen where they leave the
//! tree. The command line and the sockets follow what libqtest expects of the program that it starts.

mod arguments;
mod event_loop;
mod host;
mod protocol;
mod qmp;
mod server;
mod streams;

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_ipc::memory::GuestRam;
use bulkhead_vmm::boot::load_firmware;
use bulkhead_vmm::machine::{Machine, MachineConfig};

use arguments::Options;
use event_loop::EventLoop;
use host::VirtualHost;
use server::Server;

/// Guest-physical addresses have as many bits as QEMU's default CPU model has.
const ADDRESS_BITS: u8 = 40;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|word| word == "-version" || word == "--version") {
        println!("Bulkhead qtest {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("bulkhead-qtest: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<(), String> {
    let options = Options::parse(words)?;
    for warning in &options.warnings {
        eprintln!("bulkhead-qtest: warning: {warning}");
    }
    let ram = GuestRam::create(options.memory).map_err(|error| error.to_string())?;
    let host = Arc::new(VirtualHost::new(options.wall_clock));
    let mut config = MachineConfig::new(options.cpus, ADDRESS_BITS);
    if let Some(path) = &options.firmware {
        let file = File::open(path).map_err(|error| format!("cannot open '{}': {error}", path.display()))?;
        let rom = load_firmware(&file).map_err(|error| format!("'{}': {error}", path.display()))?;
        config.firmware = vec![rom];
    }
    let machine = Machine::new(config, ram, host.clone()).map_err(|error| error.to_string())?;
    machine.serve_firmware(options.files.clone(), options.boot_menu);
    EventLoop::open(&options)?.run(&mut Server::new(machine, host), &options)
}
