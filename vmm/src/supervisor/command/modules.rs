//! The kernel modules that a guest needs before it has a root file system, in the order of loading.

use std::fs;
use std::path::Path;

/// The modules; what is built into a kernel is in none of its lists of dependencies.
const WANTED: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];
/// One more for a guest with a network card.
const NETWORK: &str = "virtio_net";

/// Paths, relative to the folder of modules, of what has to be loaded. Empty where the kernel has everything built in.
///
/// # Errors
/// `modules.dep` cannot be read: what is said of it.
pub fn to_load(folder: &Path, network: bool) -> Result<Vec<String>, String> {
    let list = folder.join("modules.dep");
    let text = fs::read_to_string(&list).map_err(|error| format!("'{}': {error}", list.display()))?;
    Ok(order(&text, network))
}

/// Reads `modules.dep` (modules.dep(5)): a module and what it needs, the nearest first.
fn order(text: &str, network: bool) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for wanted in WANTED.into_iter().chain(network.then_some(NETWORK)) {
        let line =
            text.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| name(file) == wanted);
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
    use super::*;

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
        let names: Vec<String> = order(text, false).iter().map(|file| name(file)).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "virtio_console", "fuse", "virtiofs"]);
        let names: Vec<String> = order(text, true).iter().skip(6).map(|file| name(file)).collect();
        assert_eq!(names, ["failover", "virtio_net"]);
        assert!(order("", true).is_empty());
    }
}
