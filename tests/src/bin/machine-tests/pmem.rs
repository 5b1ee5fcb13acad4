//! Persistent memory in stock guests: an image that two machines share, and one that is written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, exit};
use bulkhead_tests::pattern::{SECTOR, fill};

/// Bytes of the file in an image.
const CONTENT: usize = 4 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("stock", "two machines share persistent memory, and one writes and flushes", 120, shared),
        Case::new("bare", "persistent memory that cannot be is refused", 20, refused),
    ]
}

/// An ext4 image with blocks of 4 KiB, as DAX needs them, that holds a file and its checksum.
fn image(context: &Context, name: &str) -> Outcome<PathBuf> {
    let (folder, path) = (context.folder.join("content"), context.folder.join(name));
    let mut content = vec![0; CONTENT];
    fill(1, 0, &[1; CONTENT / SECTOR], &mut content);
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("from-host"), content));
    written.map_err(|error| format!("{}: {error}", folder.display()))?;
    let script = format!(
        "cd '{}' && sha256sum from-host >checksums && /sbin/mkfs.ext4 -q -F -b 4096 -d . '{}' 32M",
        folder.display(),
        path.display()
    );
    let status = Command::new("sh").args(["-c", &script]).status();
    ensure!(status.is_ok_and(|status| status.success()), "no image can be made");
    Ok(path)
}

/// The core has mapped the file, for this access, and holds no descriptor of it.
fn expect_mapped(running: &Running, path: &Path, access: &str) -> Outcome {
    let core = running.core()?;
    let maps = fs::read_to_string(core.file("maps")).map_err(|error| error.to_string())?;
    let name = path.display().to_string();
    let found = maps.lines().any(|line| line.contains(access) && line.ends_with(&name));
    ensure!(found, "{name} is not mapped {access}: {maps}");
    let held = core.descriptors()?.into_values().any(|link| link == name);
    ensure!(!held, "the core holds {name}");
    Ok(())
}

fn shared(context: &Context) -> Outcome {
    let (base, own) = (image(context, "shared.ext4")?, image(context, "own.ext4")?);
    let before = fs::read(&base).map_err(|error| error.to_string())?;
    let read = format!("path={},readonly=on", base.display());
    let write = format!("path={}", own.display());
    let start = |name: &str, words: &str, more: &[&str]| {
        let machine = Machine::stock(context, Kernel::Elf, "pmem")?.words(words).named(name);
        machine.arguments(&["--memory", "128M", "--pmem", &read]).arguments(more).start()
    };
    let mut reader = start("pmem-reader", "", &[])?;
    reader.wait_for("guest: shares", 1)?;
    ensure!(reader.guest("checksum").is_some_and(|it| it == "matches"), "the reader's checksum is wrong");
    let sectors = (before.len() / 512).to_string();
    ensure!(reader.guest("pmem0 sectors").is_some_and(|it| it == sectors), "it has another size");
    expect_mapped(&reader, &base, "r--s")?;
    let mut writer = start("pmem-writer", "bulkhead.write", &["--pmem", &write])?;
    writer.wait_for("guest: checksum matches", 1)?;
    expect_mapped(&writer, &own, "rw-s")?;
    writer.expect_exit(exit::SUCCESS)?;
    let said = |line: &str| writer.serial().iter().any(|it| it == line);
    ensure!(said("guest: flushed"), "the guest could not write and flush");
    ensure!(said("guest: wrote in vain"), "the guest did not write to what is read-only");
    ensure!(fs::read(&base).is_ok_and(|now| now == before), "the shared image has changed");
    let options = reader.guest("pmem0 options").unwrap_or_default();
    ensure!(options.contains("dax=always"), "mounted without DAX: {options}");
    let note = Command::new("/sbin/debugfs").args(["-R", "cat /note"]).arg(&own).output();
    let note = note.map_err(|error| format!("debugfs: {error}"))?.stdout;
    ensure!(note == b"from the guest\n", "the image holds {:?}", String::from_utf8_lossy(&note));
    Ok(())
}

fn refused(context: &Context) -> Outcome {
    let path = context.folder.join("odd");
    fs::write(&path, [0; 4096]).map_err(|error| error.to_string())?;
    let spec = format!("path={}", path.display());
    for (spec, words) in [
        (spec.as_str(), "truncate -s 2097152"),
        ("path=/dev/null", "a regular file is needed"),
        ("path=/nowhere", "no such file"),
        ("path=/nowhere,id=serial", "already belongs to another device"),
    ] {
        let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
        let mut running = machine.arguments(&["--memory", "64M", "--pmem", spec]).start()?;
        let code = running.wait()?.code();
        let said = running.messages().join("\n");
        ensure!(code != Some(0) && said.contains(words), "{spec}: {code:?}: {said}");
    }
    Ok(())
}
