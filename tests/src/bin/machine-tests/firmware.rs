//! Machines that start as a PC does: firmware, a boot loader, and what that starts. And kernels of other kinds than Linux.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, Running, exit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::network::separate;
use crate::serial::{connect, read_until};

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare", "SeaBIOS shows its boot menu and boots the disk that is chosen", 90, boot_menu),
        Case::new(
            "bare",
            "SeaBIOS boots disks in the order that is given, after option ROMs",
            90,
            boot_order,
        ),
        Case::new("bare", "SeaBIOS starts iPXE from an option ROM that is found by its name", 60, ipxe),
        Case::new(
            "bare",
            "SeaBIOS boots iPXE from a network card's ROM, before a disk, and not one without",
            90,
            card,
        ),
        Case::new("bare", "SeaBIOS boots from function 7 of a slot", 90, functions),
        Case::new(
            "bare",
            "a multiboot kernel finds its command line and ends by the debug exit port",
            30,
            multiboot,
        ),
        Case::new("stock", "iPXE from a network card's ROM gets an address from passt", 120, dhcp),
        Case::new("stock", "SeaBIOS, GRUB and Debian from a partitioned disk", 240, grub),
        Case::new(
            "stock",
            "OVMF and Debian from an EFI system partition, with variables that stay",
            280,
            ovmf,
        )
        .with_lock_in_lab()
        .long_in_lab(),
        Case::new(
            "stock",
            "OVMF starts iPXE from a network card's ROM, which gets an address from passt",
            200,
            ovmf_ipxe,
        )
        .with_lock_in_lab()
        .long_in_lab(),
    ]
}

/// A disk whose boot sector prints a letter and ends the machine with this value at the debug exit port.
fn disk(context: &Context, letter: u8, value: u8) -> Outcome<PathBuf> {
    // mov dx, 3F8; mov al, LETTER; out dx, al; mov al, VALUE; out F4, al; hlt; jmp to the hlt
    let code = [0xBA, 0xF8, 0x03, 0xB0, letter, 0xEE, 0xB0, value, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD];
    // 2048 sectors: SeaBIOS boots nothing that is smaller than a cylinder.
    let mut sector = vec![0; 1 << 20];
    for (to, from) in sector.iter_mut().zip(code) {
        *to = from;
    }
    if let Some(signature) = sector.get_mut(510..512) {
        signature.copy_from_slice(&[0x55, 0xAA]);
    }
    let path = context.folder.join(format!("{}.img", char::from(letter)));
    fs::write(&path, sector).map_err(|error| error.to_string())?;
    Ok(path)
}

pub fn two_disks<'a>(context: &'a Context, arguments: &[&str]) -> Outcome<Machine<'a>> {
    let mut machine =
        Machine::firmware(context, "seabios")?.arguments(&["--debug-exit"]).arguments(arguments);
    for (letter, value) in [(b'a', 0x10), (b'b', 0x11)] {
        let target = format!("path={},id={}", disk(context, letter, value)?.display(), char::from(letter));
        machine = machine.arguments(&["--disk", &target]);
    }
    Ok(machine)
}

fn boot_menu(context: &Context) -> Outcome {
    let path = context.folder.join("serial.socket");
    let log = context.folder.join("firmware.log");
    let (serial, debug) = (format!("unix={}", path.display()), log.display().to_string());
    let machine = two_disks(context, &["--boot-menu", "--serial", &serial, "--debug-port", &debug])?;
    let mut running = machine.start()?;
    let mut port = connect(context, &path)?;
    let mut keys = port.try_clone().map_err(|error| error.to_string())?;
    let mut press = |key: &[u8]| keys.write_all(key).map_err(|error| error.to_string());
    read_until(&mut port, "Press ESC for boot menu")?;
    press(b"\x1b")?;
    let menu = read_until(&mut port, "2.")?;
    ensure!(menu.contains("Select boot device"), "the menu says '{menu}'");
    press(b"2")?;
    read_until(&mut port, "b")?;
    running.expect_exit(0x11 * 2 + 1)?;
    let said = fs::read_to_string(&log).map_err(|error| error.to_string())?;
    for word in
        ["QEMU fw_cfg DMA interface supported", "Moving pm_base to 0x600", "Copying SMBIOS", "(via xsdt)"]
    {
        ensure!(said.contains(word), "the debug port does not say '{word}'");
    }
    Ok(())
}

fn boot_order(context: &Context) -> Outcome {
    let log = context.folder.join("firmware.log");
    let (rom, debug) = (option_rom(context)?.display().to_string(), log.display().to_string());
    let of_device = format!("rng={rom}");
    let roms = ["--rng", "--option-rom", &rom, "--option-rom", &of_device, "--debug-port", &debug];
    let machine = two_disks(context, &["--boot-order", "b,a", "--serial", "off"])?.arguments(&roms);
    machine.start()?.expect_exit(0x11 * 2 + 1)?;
    let said = fs::read_to_string(&log).map_err(|error| error.to_string())?;
    // In slot 4, after the disks; and one that belongs to no device.
    for device in ["20", "0"] {
        let line = format!("option ROM of the device at {device:0>4}");
        ensure!(said.contains(&line), "the debug port does not say '{line}'");
    }
    Ok(())
}

fn ipxe(context: &Context) -> Outcome {
    let machine = Machine::firmware(context, "seabios")?.arguments(&["--option-rom", "pxe-virtio.rom"]);
    let mut running = machine.start()?;
    running.wait_for("iPXE (http://ipxe.org)", 1)?;
    let banner = running.serial().into_iter().find(|line| line.contains("ipxe.org")).unwrap_or_default();
    ensure!(banner.contains("PnP PMM"), "iPXE does not know this firmware: '{banner}'");
    Ok(())
}

/// A machine with a disk, and two cards that are tried before it; nobody is at the other end of their cables.
fn card(context: &Context) -> Outcome {
    let disk = format!("path={}", disk(context, b'a', 0x10)?.display());
    let socket = |name: &str| context.folder.join(name).display().to_string();
    let without = format!("socket={},rom=off", socket("a"));
    let with = format!("socket={},id=boot", socket("b"));
    let machine = Machine::firmware(context, "seabios")?.arguments(&["--debug-exit", "--disk", &disk]);
    let machine = machine.arguments(&["--net", &without, "--net", &with, "--boot-order", "net0,boot,disk0"]);
    let mut running = machine.start()?;
    running.wait_for("iPXE (http://ipxe.org) 00:04.0", 1)?;
    running.wait_for("Booting from ROM...", 1)?;
    let serial = running.serial();
    ensure!(
        !serial.iter().any(|line| line.contains("00:03.0")),
        "the card without a ROM has one: {serial:?}"
    );
    Ok(())
}

/// The hardware address of a card.
const MAC: &str = "52:54:00:ab:cd:ef";

/// The ROM has an image for each of the firmwares; OVMF has a driver of its own for the card, which gives way to this.
fn ovmf_ipxe(context: &Context) -> Outcome {
    separate()?;
    let machine = Machine::firmware(context, "ovmf")?.arguments(&["--net", &format!("user,mac={MAC}")]);
    let mut running = machine.arguments(&["--keyboard", "--boot-order", "net0"]).start()?;
    running.wait_for("iPXE", 1)?;
    running.wait_for("net0: 10.7.0.5/255.255.255.0 gw 10.7.0.1", 1)?;
    let serial = running.serial();
    let line = format!("Configuring (net0 {MAC})");
    ensure!(serial.iter().any(|said| said.contains(&line)), "iPXE does not say '{line}': {serial:?}");
    Ok(())
}

fn dhcp(context: &Context) -> Outcome {
    separate()?;
    let machine = Machine::firmware(context, "seabios")?.arguments(&["--net", &format!("user,mac={MAC}")]);
    let mut running = machine.start()?;
    running.wait_for("net0: 10.7.0.5/255.255.255.0 gw 10.7.0.1", 1)?;
    let serial = running.serial();
    for line in [format!("net0: {MAC} using virtio-net on 0000:00:02.0"), format!("Configuring (net0 {MAC})")]
    {
        ensure!(serial.iter().any(|said| said.contains(&line)), "iPXE does not say '{line}': {serial:?}");
    }
    Ok(())
}

/// The option ROM of the payloads with its checksum.
fn option_rom(context: &Context) -> Outcome<PathBuf> {
    let source = context.places.payloads.join("option_rom.bin");
    let mut rom = fs::read(&source).map_err(|error| format!("{}: {error}", source.display()))?;
    let sum = rom.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(last) = rom.last_mut() {
        *last = sum.wrapping_neg();
    }
    let path = context.folder.join("option.rom");
    fs::write(&path, rom).map_err(|error| error.to_string())?;
    Ok(path)
}

fn functions(context: &Context) -> Outcome {
    let disk = |letter: u8, value, address| -> Outcome<String> {
        Ok(format!(
            "path={},id={},addr={address}",
            disk(context, letter, value)?.display(),
            char::from(letter)
        ))
    };
    let (first, second) = (disk(b'a', 0x10, "1f")?, disk(b'b', 0x11, "1f.7")?);
    let machine = Machine::firmware(context, "seabios")?.arguments(&["--debug-exit", "--serial", "off"]);
    let machine = machine.arguments(&["--disk", &first, "--disk", &second, "--boot-order", "b"]);
    machine.start()?.expect_exit(0x11 * 2 + 1)
}

fn multiboot(context: &Context) -> Outcome {
    let machine = Machine::bare(context, &context.places.payloads.join("multiboot.elf"))?;
    let mut running =
        machine.words("told by the loader").arguments(&["--memory", "64M", "--debug-exit"]).start()?;
    running.wait_for("told by the loader", 1)?;
    running.expect_exit(0x21 * 2 + 1)
}

/// What the guest's test `firmware` says of every machine that firmware started.
fn expect_described(running: &Running) -> Outcome {
    for (key, value) in
        [("dmi product_serial", "S42"), ("dmi product_uuid", UUID), ("dmi sys_vendor", "Bulkhead")]
    {
        let said = running.guest(key).unwrap_or_default();
        ensure!(said == value, "the guest reads {key} '{said}'");
    }
    let lines = running.serial();
    for device in ["BULK0001", "QEMU0001", "PNP0501", "PNP0A03"] {
        let line = format!("guest: acpi {device}");
        ensure!(lines.contains(&line), "the guest's ACPI has no {device}");
    }
    Ok(())
}

fn grub(context: &Context) -> Outcome {
    let smbios = format!("serial=S42,uuid={UUID}");
    let machine = Machine::firmware(context, "seabios")?.boot_disk("bios.img")?;
    let mut running = machine.arguments(&["--rng", "--smbios", &smbios]).start()?;
    running.wait_for("GRUB loads the kernel", 1)?;
    running.wait_for("guest: done firmware", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    expect_described(&running)?;
    let vendor = running.guest("dmi bios_vendor").unwrap_or_default();
    ensure!(vendor == "SeaBIOS", "the firmware is '{vendor}'");
    Ok(())
}

fn ovmf(context: &Context) -> Outcome {
    let variables = context.folder.join("variables.fd").display().to_string();
    let smbios = format!("serial=S42,uuid={UUID}");
    for (run, kept) in [("first", "kept 0"), ("second", "kept 8")] {
        let machine = Machine::firmware(context, "ovmf")?.boot_disk("efi.img")?.named(&format!("ovmf-{run}"));
        // Without a keyboard it waits for one, a million times.
        let options = ["--keyboard", "--firmware-vars", &variables, "--smbios", &smbios];
        let restart = ["--restart", "firmware-vars=always"];
        let mut running = machine.arguments(&options).arguments(&restart).start()?;
        if run == "first" {
            // While OVMF writes its first variables, and while the guest writes its own.
            running.wait_for("BdsDxe", 1)?;
            kill_flash(&running)?;
            for number in 1..8 {
                running.wait_for(&format!("guest: variable {number} is written"), 1)?;
                kill_flash(&running)?;
            }
        }
        running.wait_for("GRUB loads the kernel", 1)?;
        running.wait_for("guest: done firmware", 1)?;
        running.expect_exit(exit::SUCCESS)?;
        expect_described(&running)?;
        let said = running.guest("variables").unwrap_or_default();
        ensure!(said == kept, "the {run} run says of its variables '{said}'");
    }
    Ok(())
}

/// Kills the process of the variables.
fn kill_flash(running: &Running) -> Outcome {
    let processes = running.processes();
    let flash = processes.iter().find(|process| process.title().contains("/firmware-vars]"));
    let pid = flash.ok_or("there is no process for firmware's variables")?.pid;
    let pid = i32::try_from(pid).map_err(|error| error.to_string())?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| error.to_string())?;
    // The supervisor has to notice.
    thread::sleep(Duration::from_millis(100));
    Ok(())
}
