//! `bulkhead`: the supervisor and its command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::supervisor::main().into()
}
