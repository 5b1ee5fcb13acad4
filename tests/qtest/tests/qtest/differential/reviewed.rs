//! Where this machine means to differ from QEMU 7.2, and why. Sections are those of the datasheets: 82441FX (290549), 82371SB
//! (290550), 82371AB (290562).

/// Bits of a configuration register that differ.
pub struct ConfigDifference {
    /// Device number × 8 + function.
    pub devfn: u64,
    /// The register's offset.
    pub register: u64,
    /// The bits that differ at some time.
    pub bits: u8,
}

/// Rows of one reason.
const fn row(devfn: u64, register: u64, bits: u8) -> ConfigDifference {
    ConfigDifference { devfn, register, bits }
}

/// After a reset.
pub const RESET: [ConfigDifference; 19] = [
    // Host bridge, PCICMD 3.2.4: bus master and memory are always on. QEMU's test marks this as broken in QEMU.
    row(0x00, 0x04, 0x06),
    // PCISTS 3.2.5: medium DEVSEL#, fast back-to-back.
    row(0x00, 0x06, 0x80),
    row(0x00, 0x07, 0x02),
    // DBC, DRAMC, DRAMT 3.2.13, 3.2.16, 3.2.17.
    row(0x00, 0x53, 0x80),
    row(0x00, 0x57, 0x09),
    row(0x00, 0x58, 0x10),
    // DRB0–7 3.2.19.
    row(0x00, 0x60, 0x01),
    row(0x00, 0x61, 0x01),
    row(0x00, 0x62, 0x01),
    row(0x00, 0x63, 0x01),
    row(0x00, 0x64, 0x01),
    row(0x00, 0x65, 0x01),
    row(0x00, 0x66, 0x01),
    row(0x00, 0x67, 0x01),
    // CLT 3.2.22.
    row(0x00, 0x71, 0x10),
    // PIIX3, PCICMD 290550 section 2.2.3: 0007, which QEMU sets only at power-on.
    row(0x08, 0x04, 0x07),
    // PIIX4 function 3: QEMU tells here, for its own firmware, which serial and parallel ports it has.
    row(0x0B, 0x5F, 0x10),
    row(0x0B, 0x63, 0x60),
    // SMBBA: QEMU puts the SMBus controller at B100 for its firmware; there is none here.
    row(0x0B, 0x91, 0xB1),
];

/// At any time, with random writes.
pub const WRITTEN: [ConfigDifference; 15] = [
    // Host bridge, PCICMD: SERR# and parity can be written, the rest is fixed; PCISTS.
    row(0x00, 0x04, 0x47),
    row(0x00, 0x05, 0x04),
    row(0x00, 0x06, 0x80),
    row(0x00, 0x07, 0x02),
    // There is no cache line size and no interrupt line; the latency timer has its upper five bits.
    row(0x00, 0x0C, 0xFF),
    row(0x00, 0x0D, 0xF8),
    row(0x00, 0x3C, 0xFF),
    // SMRAM 3.2.23: D_LCK stays until reset. QEMU does not implement the lock without SMM.
    row(0x00, 0x72, 0x10),
    // PIIX3: I/O, memory and bus master are fixed, special cycles and SERR# can be enabled; no cache line size, no interrupt line.
    row(0x08, 0x04, 0x0F),
    row(0x08, 0x05, 0x04),
    row(0x08, 0x0C, 0xFF),
    row(0x08, 0x3C, 0xFF),
    // PIIX4 function 3, PCICMD 290562 section 7.1.3: I/O alone; no cache line size.
    row(0x0B, 0x04, 0x06),
    row(0x0B, 0x05, 0x05),
    row(0x0B, 0x0C, 0xFF),
];

/// Items of fw_cfg (QEMU's `docs/specs/fw_cfg`), by key.
pub const FW_CFG: [(u64, &str); 1] = [(0x04, "nographic: this machine has no display adapter, and says so")];

/// Files of fw_cfg whose length differs, or that one of the two does not have.
pub const FW_CFG_FILES: [(&str, &str); 13] = [
    ("bios-geometry", "QEMU's is empty without IDE disks, which there are none of here"),
    ("bootorder", "made by the supervisor, which knows the disks"),
    ("etc/acpi/rsdp", "revision 2, with the XSDT's address; QEMU's is that of ACPI 1.0"),
    ("etc/acpi/tables", "padded to a smaller size than QEMU's: the tables are"),
    (
        "etc/e820",
        "RAM alone; QEMU reserves the hole of HyperTransport for its AMD model, which has nothing here",
    ),
    ("etc/smbios/smbios-anchor", "made by the supervisor, which knows the machine's identity"),
    ("etc/smbios/smbios-tables", "made by the supervisor, which knows the machine's identity"),
    ("etc/system-states", "made by the supervisor"),
    ("etc/table-loader", "padded to a smaller size than QEMU's: there are fewer tables"),
    ("etc/tpm/log", "there is no TPM"),
    ("etc/vmgenid_addr", "QEMU has a generation id only with -device vmgenid"),
    ("etc/vmgenid_guid", "QEMU has a generation id only with -device vmgenid"),
    ("genroms/kvmvapic.bin", "patches task-priority accesses of 32-bit Windows XP: KVM has no need of it"),
];
