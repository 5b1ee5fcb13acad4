//! Real guests under the real `bulkhead`, and attacks and faults from outside.
//!
//! ```text
//! machine-tests [--list] [--stock|--bare] [WORD]…
//! ```
//!
//! Cases of the group `stock` boot Debian's kernel and need hardware virtualization or the lab (`tools/lab`); those
//! of the group `bare` run bare-metal payloads, or none at all, on any machine with a /dev/kvm. `make machine` runs both.

mod balloon;
mod bare;
mod boot;
mod disk;
mod firmware;
mod guest_command;
mod hostile;
mod hotplug;
mod jail;
mod keyboard;
mod lifecycle;
mod limits;
mod load;
mod network;
mod pmem;
mod ports;
mod refusals;
mod restart;
mod serial;
mod shared;
mod vsock;
mod watchdog;

use std::process::ExitCode;

use bulkhead_tests::harness;

fn main() -> ExitCode {
    // Copied beside a supervisor, this is the program of its devices.
    if std::env::args().next().is_some_and(|title| title.starts_with("bulkhead-device[")) {
        limits::hostile_device();
        return ExitCode::FAILURE;
    }
    let groups = [
        boot::cases(),
        disk::cases(),
        firmware::cases(),
        lifecycle::cases(),
        jail::cases(),
        limits::cases(),
        load::cases(),
        bare::cases(),
        hostile::cases(),
        serial::cases(),
        refusals::cases(),
        hotplug::cases(),
        restart::cases(),
        keyboard::cases(),
        ports::cases(),
        vsock::cases(),
        network::cases(),
        pmem::cases(),
        shared::cases(),
        watchdog::cases(),
    ];
    let cases: Vec<_> = groups.into_iter().flatten().collect();
    if harness::run(&cases, std::env::args().skip(1)) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
