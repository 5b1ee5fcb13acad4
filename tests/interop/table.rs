//! `docs/interop.md`.

use std::fmt::Write;
use std::path::Path;

use crate::{Case, Outcome};

/// A case that was run.
pub struct Row {
    pub case: Case,
    pub version: Option<String>,
    pub result: Outcome,
}

const HEAD: &str = "# Interoperation

Made by `make interop`: our devices as vhost-user back ends under another monitor, and back ends of others under our core. Real programs
on both sides; a stock Debian kernel is the guest where a guest is meant, in QEMU's software emulation.

| ours | peer | version | what | result |
| --- | --- | --- | --- | --- |
";

const TAIL: &str = "
Known limits of the peers:

- QEMU 7.2 has no front end for a console device.
- `vhost-user-net-pci` of QEMU 7.2 needs `vectors=0`.
- A back end without INFLIGHT_SHMFD (qemu-storage-daemon) that dies can lose a request that it had finished out of order: after a
  reconnect the core takes up from the used ring, as QEMU does.
- vhost-user does not say of what type a back end is. The relay tells types apart by features and configuration space, so a back end that has
  neither (entropy, for one) passes for any type that needs neither.
";

/// Writes the table into the repository.
pub fn write(rows: &[Row]) {
    let mut text = HEAD.to_owned();
    for Row { case, version, result } in rows {
        let version = version.as_deref().unwrap_or("-");
        let result = match result {
            Ok(text) => text.clone(),
            Err(text) => format!("**{}**", text.lines().next().unwrap_or("failed")),
        };
        let result = result.replace('|', "\\|");
        let _infallible =
            writeln!(text, "| {} | {} | {version} | {} | {result} |", case.ours, case.peer.name, case.what);
    }
    text.push_str(TAIL);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/interop.md");
    std::fs::write(path, text).unwrap();
}
