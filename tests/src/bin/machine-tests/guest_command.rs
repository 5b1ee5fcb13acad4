//! Scripts in a stock guest, as commands of `bulkhead run -- COMMAND`.

use std::fs;
use std::path::Path;

use bulkhead_tests::harness::{Context, Outcome};
use bulkhead_tests::machine::{Machine, bulkhead};

/// How a script in the guest ends that has come to its end.
const DONE: i32 = 42;

/// Runs a script in a guest that may write to the case's folder and begins there. It ends with [`DONE`].
pub(super) fn in_guest(context: &Context, arguments: &[String], script: &str) -> Outcome {
    // That of the test guest, whose modules lie beside it: the host may have none installed.
    let kernel = context.places.guest.join("kernel");
    command(context, &kernel, arguments, &format!("{script}\nexit {DONE}"))?.start()?.expect_exit(DONE)
}

/// The same for another end, with the kernel in a folder that `tools/unpack-kernel` made.
pub(super) fn command<'a>(
    context: &'a Context,
    kernel: &Path,
    arguments: &[String],
    script: &str,
) -> Outcome<Machine<'a>> {
    let release = kernel.join("release");
    let release = fs::read_to_string(&release)
        .map_err(|error| format!("{}: {error}: `make guest` or `tools/lab --prepare`", release.display()))?;
    let mut command = bulkhead(context);
    command.current_dir(&context.folder).args(["run", "--memory", "768M", "--rw", "."]).args(arguments);
    command.arg("--kernel").arg(kernel.join(format!("boot/vmlinuz-{}", release.trim())));
    command.args(["--", "sh", "-c", script]);
    Ok(Machine::from_command(context, command))
}
