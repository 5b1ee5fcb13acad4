//! `bulkhead-vmm`: the core process of one machine. The supervisor starts it in its jail; see `bulkhead run --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::core::main()
}
