//! Images in formats: what qemu-img makes is served, what is served is what qemu-img reads, and bad ones are refused with a sentence.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    BackingImage, DeviceConfig, FdIndex, FromDevice, ImageFormat, ToDevice,
};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::vhost_user::frontend::BackendRequest;
use tempfile::TempDir;

use crate::blk::{
    DISCARD, FLUSH, IOERR, OK, RANDOM_DISK, READ, UNSUPP, WRITE, WRITE_ZEROES, move_randomly, range, request,
};
use crate::driver::{BUFFERS, Driver, EVENT_IDX, INDIRECT_DESC, PROGRAM, Service};
use crate::supervised::{LIMIT, Supervised, blk};

pub fn qemu_img(arguments: &[&str]) -> String {
    // A process that was killed a moment ago may still have the image locked: the kernel takes io_uring's files down after it.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let output = Command::new("qemu-img").args(arguments).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return text;
        }
        let locked = text.contains("Failed to lock") && Instant::now() < end;
        assert!(locked, "qemu-img {arguments:?}: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A qcow2 image in a folder.
pub fn image(size: u64, options: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let size = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend(options);
    arguments.extend([path.to_str().unwrap(), &size]);
    qemu_img(&arguments);
    (folder, path)
}

pub fn service(folder: TempDir, path: &Path, options: &[&str]) -> Service {
    let mut arguments = vec!["--blk-file", path.to_str().unwrap()];
    arguments.extend(options);
    Service::start("blk", folder, &arguments.into_iter().map(str::to_owned).collect::<Vec<_>>())
}

/// What a raw image of it would hold, and that nothing is wrong with it.
fn contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    qemu_img(&["check", "-q", "-U", path.to_str().unwrap()]);
    qemu_img(&["convert", "-U", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    fs::read(raw).unwrap()
}

#[test]
fn qcow2_over_a_backing_image_holds_what_was_written() {
    let (folder, path) = image(RANDOM_DISK, &[]);
    let base = folder.path().join("base");
    fs::write(&base, vec![5; RANDOM_DISK as usize]).unwrap();
    let backing = base.to_str().unwrap();
    qemu_img(&["rebase", "-u", "-b", backing, "-F", "raw", path.to_str().unwrap()]);
    let options = ["--format", "qcow2", "--backing", &format!("{backing}:raw"), "--num-queues", "2"];
    let mut service = service(folder, &path, &options);
    let expected = move_randomly(&service, 2, EVENT_IDX | INDIRECT_DESC, 10, 5);
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    assert!(contents(&path) == expected);
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 5), "the backing image was written");
}

#[test]
fn qcow2_gives_space_up_and_survives_a_kill_without_a_flush() {
    let (folder, path) = image(64 << 20, &[]);
    let mut service = service(folder, &path, &["--format", "qcow2"]);
    let mut driver = Driver::new(service.connect(), 1);
    driver.put(BUFFERS, &[7; 1 << 20]);
    for index in 0..8 {
        assert_eq!(request(&mut driver, WRITE, index * 2048, &[(BUFFERS, 1 << 20, false)]), OK);
    }
    driver.put(BUFFERS, &range(0, 4096, 0));
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 16, false)]), OK);
    driver.put(BUFFERS, &range(4096, 256, 0));
    assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &[(BUFFERS, 16, false)]), OK);
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    let disk = contents(&path);
    let expected = |at: usize| if ((2 << 20) + (128 << 10)..8 << 20).contains(&at) { 7 } else { 0 };
    assert!(disk.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
}

/// What the process answers to a wish for another size, the front end's channel open.
fn grow(process: &Supervised, bytes: u64) -> Result<u64, String> {
    process.channel.send(&ToDevice::DiskSize { bytes }, &[]).unwrap();
    match process.channel.recv::<FromDevice>(Some(LIMIT)) {
        Ok((FromDevice::DiskSize(size), _)) => size,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_lets_a_broken_image_grow_hears_that_the_disk_fails() {
    let (_folder, path) = image(64 << 20, &[]);
    let DeviceConfig::Blk(mut config) = blk(1) else { panic!("no disk") };
    config.options.format = ImageFormat::Qcow2;
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let given = OwnedFd::from(file.try_clone().unwrap());
    let mut process = Supervised::start("blk", DeviceConfig::Blk(config), &[&given], Enforcement::Supervised);
    let mut driver = process.driver(1);
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), OK);
    // No qcow2 image any more.
    file.write_all_at(&[0; 4], 0).unwrap();
    let refusal = grow(&process, 128 << 20).unwrap_err();
    assert!(refusal.starts_with("fails from here on: "), "{refusal}");
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), IOERR);
    process.stop();
}

#[test]
fn qcow2_grows_while_it_is_in_use() {
    const SMALL: u64 = 64 << 20;
    const LARGE: u64 = 3 << 29;
    let (folder, path) = image(SMALL, &[]);
    let DeviceConfig::Blk(mut config) = blk(1) else { panic!("no disk") };
    config.options.format = ImageFormat::Qcow2;
    let file = || OwnedFd::from(File::options().read(true).write(true).open(&path).unwrap());
    let start =
        || Supervised::start("blk", DeviceConfig::Blk(config.clone()), &[&file()], Enforcement::Supervised);
    let mut process = start();
    let mut driver = process.driver(1);
    let mut requests = driver.frontend.open_backend_requests().unwrap();
    let capacity = |driver: &mut Driver| {
        let mut capacity = [0; 8];
        driver.frontend.get_config(0, &mut capacity).unwrap();
        u64::from_le_bytes(capacity) * 512
    };
    driver.put(BUFFERS, &[7; 4096]);
    assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 4096, false)]), OK);
    assert_eq!(request(&mut driver, WRITE, SMALL / 512, &[(BUFFERS, 4096, false)]), IOERR, "the end");
    for (bytes, word) in [(SMALL / 2, "only grows"), (LARGE + 100, "blocks of 512"), (1 << 60, "more than")] {
        let refusal = grow(&process, bytes).unwrap_err();
        assert!(refusal.contains(word), "{bytes}: {refusal}");
        assert_eq!(capacity(&mut driver), SMALL);
    }
    assert_eq!(grow(&process, LARGE), Ok(LARGE));
    assert!(matches!(requests.receive().unwrap(), BackendRequest::ConfigChange));
    assert_eq!(capacity(&mut driver), LARGE);
    assert_eq!(request(&mut driver, WRITE, LARGE / 512 - 8, &[(BUFFERS, 4096, false)]), OK);
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS + 4096, 4096, true)]), OK);
    assert_eq!(driver.get(BUFFERS + 4096, 4096), [7; 4096]);
    process.kill();
    qemu_img(&["check", "-q", path.to_str().unwrap()]);
    let raw = folder.path().join("raw");
    qemu_img(&["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    let raw = File::open(raw).unwrap();
    assert_eq!(raw.metadata().unwrap().len(), LARGE);
    for (at, expected) in [(0, 7), (4096, 0), (SMALL, 0), (LARGE - 8192, 0), (LARGE - 4096, 7)] {
        let mut bytes = [1; 4096];
        raw.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, [expected; 4096], "at {at}");
    }
    // A successor has the new size.
    let mut successor = start();
    assert_eq!(capacity(&mut successor.driver(1)), LARGE);
    successor.stop();
}

#[test]
fn the_end_of_a_backing_image_does_not_appear_in_one_that_grows() {
    let (folder, path) = image(1 << 20, &[]);
    let base = folder.path().join("base");
    fs::write(&base, vec![5; 2 << 20]).unwrap();
    qemu_img(&["rebase", "-u", "-b", base.to_str().unwrap(), "-F", "raw", path.to_str().unwrap()]);
    let DeviceConfig::Blk(mut config) = blk(1) else { panic!("no disk") };
    config.options.format = ImageFormat::Qcow2;
    config.options.backing = vec![BackingImage { file: FdIndex(2), format: ImageFormat::Raw }];
    let files = [&path, &base]
        .map(|path| OwnedFd::from(File::options().read(true).write(*path != base).open(path).unwrap()));
    let resources = [&files[0], &files[1]];
    let mut process =
        Supervised::start("blk", DeviceConfig::Blk(config), &resources, Enforcement::Supervised);
    let mut driver = process.driver(1);
    let refusal = grow(&process, 4 << 20).unwrap_err();
    assert!(refusal.contains("longer than it"), "{refusal}");
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), OK);
    assert_eq!(driver.get(BUFFERS, 4096), [5; 4096]);
    process.stop();
}

#[test]
fn a_vmdk_image_is_served_from_its_extent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vmdk");
    let made = ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path.to_str().unwrap(), "4M"];
    qemu_img(&made);
    let extent = folder.path().join("disk-flat.vmdk");
    let options = ["--format", "vmdk", "--read-only", "--data", extent.to_str().unwrap()];
    assert!(refusal(&path, &options[..2]).contains("the disk must be read-only"));
    assert!(refusal(&path, &options[..3]).contains("disk-flat.vmdk"));
    File::options().write(true).open(&extent).unwrap().write_all_at(&[3; 512], 512).unwrap();
    let service = service(folder, &path, &options);
    let mut driver = Driver::new(service.connect(), 1);
    assert_eq!(request(&mut driver, READ, 1, &[(BUFFERS, 512, true)]), OK);
    assert_eq!(driver.get(BUFFERS, 512), [3; 512]);
    assert_eq!(request(&mut driver, READ, 8192, &[(BUFFERS, 512, true)]), IOERR);
}

/// What the program says when it refuses an image.
fn refusal(path: &Path, options: &[&str]) -> String {
    let mut child = Command::new(PROGRAM)
        .args(["blk", "--socket-path", path.with_extension("socket").to_str().unwrap()])
        .args(["--blk-file", path.to_str().unwrap()])
        .args(options)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(!child.wait().unwrap().success(), "{options:?} was accepted");
    text
}

#[test]
fn an_image_that_names_other_files_gets_none_that_the_user_did_not_name() {
    let (folder, path) = image(1 << 20, &[]);
    let file = path.to_str().unwrap();
    qemu_img(&["rebase", "-u", "-b", "/etc/shadow", "-F", "raw", file]);
    let text = refusal(&path, &["--format", "qcow2"]);
    assert!(
        text.contains("it needs the backing image \\\"/etc/shadow\\\"") && text.contains("backing=FILE:raw"),
        "{text}"
    );
    // It backs itself: nothing follows the name.
    qemu_img(&["rebase", "-u", "-b", file, "-F", "qcow2", file]);
    let text = refusal(&path, &["--format", "qcow2", "--read-only", "--backing", &format!("{file}:qcow2")]);
    assert!(text.contains("backing image 1: it needs the backing image"), "{text}");
    qemu_img(&["rebase", "-u", "-b", "", file]);
    let base = folder.path().join("base");
    fs::write(&base, [0; 512]).unwrap();
    let text = refusal(&path, &["--format", "qcow2", "--backing", &format!("{}:raw", base.display())]);
    assert!(text.contains("it names no backing image"), "{text}");
    let other = folder.path().join("other");
    let data = format!("data_file={},data_file_raw=on", folder.path().join("data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, other.to_str().unwrap(), "1M"]);
    let text = refusal(&other, &["--format", "qcow2"]);
    assert!(text.contains("say data=FILE"), "{text}");
}

#[test]
fn images_that_are_broken_are_refused_or_fail_and_harm_nobody() {
    let (folder, path) = image(64 << 20, &[]);
    let whole = fs::read(&path).unwrap();
    let raw = folder.path().join("raw");
    fs::write(&raw, [0; 4096]).unwrap();
    assert!(refusal(&raw, &["--format", "qcow2"]).contains("the image cannot be opened"));
    assert!(refusal(&raw, &["--format", "vmdk", "--read-only"]).contains("the image cannot be opened"));
    assert!(refusal(&raw, &["--format", "vhdx"]).contains("is none of raw, qcow2, vmdk"));
    let broken = folder.path().join("broken");
    for (at, bytes, kept) in [
        (0, &[][..], 60),                             // truncated header
        (0, b"QFI\xfb\0\0\0\x09", whole.len()),       // version 9
        (20, &[0, 0, 0, 63], whole.len()),            // cluster bits
        (40, &[0xff; 8], whole.len()),                // L1 table far away
        (36, &[0x7f, 0xff, 0xff, 0xff], whole.len()), // L1 table enormous
        (48, &[0xff; 8], whole.len()),                // refcount table far away
        (72, &[0xff; 8], whole.len()),                // unknown incompatible features
        (100, &[0xff; 4], whole.len()),               // header length
    ] {
        let mut image = whole.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image.truncate(kept);
        File::create(&broken).unwrap().write_all(&image).unwrap();
        let text = refusal(&broken, &["--format", "qcow2"]);
        assert!(text.contains("the image cannot be opened"), "byte {at}: {text}");
    }
}

#[test]
fn an_image_that_becomes_corrupt_or_shorter_fails_requests_and_nothing_else() {
    let (folder, path) = image(64 << 20, &[]);
    let mut service = service(folder, &path, &["--format", "qcow2"]);
    {
        let mut driver = Driver::new(service.connect(), 1);
        driver.put(BUFFERS, &[7; 1 << 20]);
        assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 1 << 20, false)]), OK);
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
    }
    // The L2 table is garbage: offsets that are not aligned and lie anywhere.
    let disk = File::options().write(true).open(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    let entry = u64::from_be_bytes(bytes[l1 as usize..][..8].try_into().unwrap());
    let l2 = entry & 0x00ff_ffff_ffff_fe00;
    disk.write_all_at(&[0xee; 4096], l2).unwrap();
    let mut driver = Driver::new(service.connect(), 1);
    let status = request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]);
    assert!(status == IOERR || status == UNSUPP, "{status}");
    disk.set_len(4096).unwrap();
    let _ = request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]);
    let _ = request(&mut driver, WRITE, 65536, &[(BUFFERS, 4096, false)]);
    assert!(service.is_alive());
}
