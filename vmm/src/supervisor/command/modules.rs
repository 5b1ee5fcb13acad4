//! The kernel modules that a guest gets before it has a root file system, in the order of loading: those that lead to the root, and the
//! drivers of its devices, which nothing in it would load.

use std::fs;
use std::path::Path;

use super::super::cli::RunArgs;

/// What leads to the root; what is built into a kernel is in none of its lists of dependencies.
const WANTED: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];

/// Paths, relative to the folder of modules, of what has to be loaded. Empty where the kernel has everything built in.
///
/// # Errors
/// `modules.dep` cannot be read: what is said of it.
pub fn to_load(folder: &Path, args: &RunArgs) -> Result<Vec<String>, String> {
    let list = folder.join("modules.dep");
    let text = fs::read_to_string(&list).map_err(|error| format!("'{}': {error}", list.display()))?;
    Ok(order(&text, &drivers(args)))
}

/// The drivers of what was asked for.
fn drivers(args: &RunArgs) -> Vec<&'static str> {
    let asked = [
        (args.nets.iter().any(|net| !net.none), "virtio_net"),
        (!args.disks.is_empty(), "virtio_blk"),
        (args.rng.is_some(), "virtio_rng"),
        (args.vsock.is_some(), "vmw_vsock_virtio_transport"),
        (args.balloon.is_some(), "virtio_balloon"),
        (!args.pmems.is_empty(), "virtio_pmem"),
        (!args.pmems.is_empty(), "nd_pmem"),
        (args.watchdog.is_some(), "i6300esb"),
    ];
    asked.into_iter().filter_map(|(asked, driver)| asked.then_some(driver)).collect()
}

/// Reads `modules.dep` (modules.dep(5)): a module and what it needs, the nearest first.
fn order(text: &str, drivers: &[&str]) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for wanted in WANTED.iter().chain(drivers) {
        let line =
            text.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| name(file) == *wanted);
        let Some((file, needs)) = line else { continue };
        let needs = needs.split_whitespace().rev();
        for file in needs.chain(std::iter::once(file)) {
            if !files.iter().any(|other| other == file) {
                files.push(file.to_owned());
            }
        }
    }
    files
}

/// A module's name: its file's without folder and endings, `-` as `_`.
fn name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let text = "\
kernel/fs/fuse/fuse.ko.xz:
kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/char/virtio-console.ko.xz:
kernel/drivers/char/virtio_console_other.ko.xz:
kernel/net/core/failover.ko.xz:
kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/failover.ko.xz
";
        let names: Vec<String> = order(text, &[]).iter().map(|file| name(file)).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "virtio_console", "fuse", "virtiofs"]);
        let names: Vec<String> = order(text, &["virtio_net"]).iter().skip(6).map(|file| name(file)).collect();
        assert_eq!(names, ["failover", "virtio_net"]);
        assert!(order("", &["virtio_net"]).is_empty());
    }

    #[test]
    fn each_device_that_was_asked_for_has_its_driver() {
        let of = |words: &str| {
            let words = ["bulkhead", "run"].into_iter().chain(words.split_whitespace()).chain(["--", "true"]);
            match Cli::try_parse_from(words).unwrap().command {
                Command::Run(args) => drivers(&args),
                other => panic!("{other:?}"),
            }
        };
        assert!(of("--net none").is_empty());
        assert_eq!(of("--disk path=a --net user"), ["virtio_net", "virtio_blk"]);
        let others = of("--rng --vsock cid=3,path=v --balloon --pmem path=p --watchdog");
        let expected = ["virtio_rng", "vmw_vsock_virtio_transport", "virtio_balloon"];
        assert_eq!(others, [&expected[..], &["virtio_pmem", "nd_pmem", "i6300esb"]].concat());
    }
}
