//! Each refusal that needs the host, by its sentence.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use tempfile::TempDir;

use super::*;
use crate::supervisor::config::disk_options::Backing;
use crate::supervisor::config::{DiskConfig, DiskOptions};
use crate::supervisor::config::{RestartPolicy, StreamTarget};
use bulkhead_ipc::channel::message::ImageFormat;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn image(folder: &TempDir, name: &str, size: u64) -> PathBuf {
    let path = folder.path().join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn disk(path: &Path, readonly: bool) -> DiskConfig {
    let (id, restart, options) = ("root".into(), RestartPolicy::Never, DiskOptions::default());
    DiskConfig { path: path.to_owned(), readonly, id, restart, addr: None, options }
}

fn refusal<T>(result: Result<T, ResourceError>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_missing_kernel_is_named() {
    let error = refusal(open_regular("kernel", Path::new("/nonexistent/vmlinuz")));
    assert_eq!(error, "kernel: cannot open '/nonexistent/vmlinuz': no such file");
    let error = refusal(open_regular("kernel", Path::new("/tmp")));
    assert_eq!(error, "kernel: '/tmp' is a directory; a regular file is needed");
}

#[test]
fn a_pipe_in_place_of_a_kernel_does_not_hang() {
    let folder = folder();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refusal(open_regular("kernel", &path)).contains("is a pipe"));
}

#[test]
fn no_file_is_in_a_chain_twice_or_writable_elsewhere() {
    let folder = folder();
    let (top, base) = (image(&folder, "top", 512), image(&folder, "base", 512));
    let over = |path: &Path, below: &[&PathBuf]| {
        let mut disk = disk(path, false);
        let layer = |path: &&PathBuf| Backing { path: (*path).clone(), format: ImageFormat::Raw };
        disk.options.backing = below.iter().map(layer).collect();
        disk
    };
    assert!(refusal(open_disk(&over(&top, &[&base, &base]), &[])).contains("already the image of disk root"));
    assert!(refusal(open_disk(&over(&top, &[&top]), &[])).contains("already the image of disk root"));
    let first = open_disk(&disk(&base, false), &[]).unwrap();
    assert!(refusal(open_disk(&over(&top, &[&base]), &[first])).contains("already the image of disk root"));
    let first = open_disk(&disk(&base, true), &[]).unwrap();
    let both = open_disk(&over(&top, &[&base]), &[first]).unwrap();
    assert_eq!(both.backing.len(), 1);
    assert!(refusal(open_disk(&disk(&base, false), &[])).contains("is locked"), "others may only read it");
}

#[test]
fn disks_that_cannot_be_one_are_refused() {
    let folder = folder();
    let error = refusal(open_disk(&disk(&folder.path().join("none"), false), &[]));
    assert!(error.starts_with("disk root: cannot open") && error.ends_with("no such file"), "{error}");
    assert!(refusal(open_disk(&disk(folder.path(), false), &[])).contains("is a directory; a disk image"));
    assert!(refusal(open_disk(&disk(folder.path(), true), &[])).contains("is a directory; a disk image"));
    assert!(refusal(open_disk(&disk(&image(&folder, "a", 513), false), &[])).contains("has 513 bytes"));
    assert!(refusal(open_disk(&disk(&image(&folder, "b", 0), false), &[])).contains("is empty"));
    assert!(refusal(open_disk(&disk(Path::new("/dev/null"), false), &[])).contains("a character device"));
}

#[test]
fn a_disk_is_locked_while_its_descriptor_lives_anywhere() {
    let folder = folder();
    let path = image(&folder, "a", 4096);
    let first = open_disk(&disk(&path, false), &[]).unwrap();
    let passed_on = first.file.try_clone().unwrap();
    drop(first);
    assert!(refusal(open_disk(&disk(&path, false), &[])).contains("locked by another machine"));
    assert!(refusal(open_disk(&disk(&path, true), &[])).contains("locked by another machine"));
    drop(passed_on);
    assert_eq!(open_disk(&disk(&path, false), &[]).unwrap().size, 4096);
}

#[test]
fn readers_share_a_disk() {
    let folder = folder();
    let path = image(&folder, "a", 4096);
    let _first = open_disk(&disk(&path, true), &[]).unwrap();
    let _second = open_disk(&disk(&path, true), &[]).unwrap();
    let error = refusal(open_disk(&disk(&path, false), &[]));
    assert!(error.contains("readonly=on"), "{error}");
}

#[test]
fn a_disk_gets_another_size_that_makes_sense() {
    let folder = folder();
    let path = image(&folder, "a", 1 << 20);
    let mut config = disk(&path, false);
    config.options.logical_block_size = 4096;
    let mut opened = open_disk(&config, &[]).unwrap();
    let said = |disk: &Disk, size, shrink| disk.new_size(size, shrink).unwrap_err().to_string();
    assert!(said(&opened, Some(0), true).contains("no bytes"));
    let text = said(&opened, Some((2 << 20) + 512), false);
    assert_eq!(
        text,
        "has blocks of 4096 bytes, and 2097664 is no multiple of that: 2097152 is the next smaller one"
    );
    assert!(said(&opened, Some(4096), false).contains("has 1M now, and what is beyond 4K"));
    assert_eq!(opened.new_size(Some(4096), true).unwrap(), 4096);
    assert_eq!(opened.new_size(Some(1 << 20), false).unwrap(), 1 << 20, "as it is");
    opened.set_size(2 << 20).unwrap();
    assert_eq!((fs::metadata(&path).unwrap().len(), opened.most_written()), (2 << 20, 2 << 20));
    assert!(opened.set_size(u64::MAX).is_err() && opened.size == 2 << 20, "it stays as it was");
    // From outside.
    File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
    assert_eq!(opened.new_size(None, false).unwrap(), 4 << 20);
    let said_of_image =
        |disk: &Disk, size, shrink| disk.new_image_size(size, shrink).unwrap_err().to_string();
    opened.options.format.0 = ImageFormat::Qcow2;
    assert_eq!(opened.new_image_size(Some(8 << 20), false).unwrap(), 8 << 20);
    assert!(said_of_image(&opened, Some(1 << 20), true).contains("qemu-img resize --shrink"));
    assert!(said_of_image(&opened, None, false).contains("name the new SIZE"));
    opened.options.format.0 = ImageFormat::Vmdk;
    assert!(said_of_image(&opened, Some(8 << 20), false).contains("qemu-img convert"));
    drop(opened);
    let opened = open_disk(&disk(&path, true), &[]).unwrap();
    assert!(said(&opened, Some(8 << 20), false).starts_with("is read-only"));
    assert_eq!(opened.new_size(None, false).unwrap(), 4 << 20);
}

#[test]
fn one_image_is_not_two_disks_of_a_machine() {
    let folder = folder();
    let path = image(&folder, "a", 4096);
    let first = [open_disk(&disk(&path, false), &[]).unwrap()];
    let error = refusal(open_disk(&DiskConfig { id: "data".into(), ..disk(&path, false) }, &first));
    assert!(error.contains("disk data") && error.contains("image of disk root"), "{error}");
}

#[test]
fn a_serial_file_that_cannot_be_written_is_named() {
    let error = refusal(Stream::open("serial", &StreamTarget::File("/nonexistent/log".into())));
    assert_eq!(error, "serial: cannot open '/nonexistent/log': no such file");
    let folder = folder();
    let error = refusal(Stream::open("serial", &StreamTarget::File(folder.path().to_owned())));
    assert!(error.starts_with("serial: cannot open"), "{error}");
    if !nix::unistd::geteuid().is_root() {
        let path = image(&folder, "log", 0);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        assert!(refusal(Stream::open("serial", &StreamTarget::File(path))).contains("permission denied"));
    }
}

#[test]
fn a_socket_goes_away_with_its_stream() {
    let folder = folder();
    let path = folder.path().join("s");
    let stream = Stream::open("serial", &StreamTarget::Unix(path.clone())).unwrap();
    assert!(path.exists());
    assert!(refusal(Stream::open("serial", &StreamTarget::Unix(path.clone()))).contains("in use"));
    drop(stream);
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_dead_machine_is_replaced_and_other_files_are_not() {
    let folder = folder();
    let path = folder.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed process leaves it behind");
    assert!(Stream::open("serial", &StreamTarget::Unix(path)).is_ok());
    let file = image(&folder, "precious", 1);
    assert!(refusal(Stream::open("serial", &StreamTarget::Unix(file.clone()))).contains("a regular file"));
    assert!(file.exists());
}

#[test]
fn a_pseudo_terminal_has_a_path() {
    let stream = Stream::open_serial("serial", &StreamTarget::Pty).unwrap().unwrap();
    assert!(stream.typed.is_some());
    assert!(stream.pty.unwrap().starts_with("/dev/pts"));
    // Those of named ports lie together.
    assert!(Stream::open("port", &StreamTarget::Pty).unwrap().unwrap().typed.is_none());
}
