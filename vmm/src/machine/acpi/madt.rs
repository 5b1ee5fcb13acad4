//! MADT, the interrupt controllers (ACPI 6.5, section 5.2.12).

use acpi_tables::sdt::Sdt;
use bulkhead_ipc::channel::message::FIRST_WIDE_APIC_ID;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const LOCAL_APIC: u32 = 0xFEE0_0000;
const IO_APIC: u32 = 0xFEC0_0000;
/// Flags: there are two 8259s as well.
const PCAT_COMPAT: u32 = 1;
/// Structure types.
const TYPE_LOCAL_APIC: u8 = 0;
const TYPE_IO_APIC: u8 = 1;
const TYPE_SOURCE_OVERRIDE: u8 = 2;
const TYPE_LOCAL_APIC_NMI: u8 = 4;
const TYPE_LOCAL_X2APIC: u8 = 9;
const TYPE_LOCAL_X2APIC_NMI: u8 = 10;
/// Local APIC flags: enabled; not yet, but it can come online.
const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 2;
/// MPS INTI flags: as the ISA bus has it (active high, edge).
const CONFORMS: u16 = 0;
/// MPS INTI flags: active high, level triggered.
const HIGH_LEVEL: u16 = 0b1101;
/// The timer comes in on pin 2 of the I/O APIC; the PIRQs' and the SCI's interrupts are level triggered.
const OVERRIDES: [(u8, u32, u16); 5] =
    [(0, 2, CONFORMS), (5, 5, HIGH_LEVEL), (9, 9, HIGH_LEVEL), (10, 10, HIGH_LEVEL), (11, 11, HIGH_LEVEL)];

/// The structure of a CPU.
pub(super) fn local_apic(index: u16, apic_id: u32, enabled: bool) -> Vec<u8> {
    let flags = if enabled { ENABLED } else { ONLINE_CAPABLE };
    if apic_id >= FIRST_WIDE_APIC_ID {
        let fields = [apic_id, flags, index.into()].map(u32::to_le_bytes);
        return [&[TYPE_LOCAL_X2APIC, 16, 0, 0], fields.as_flattened()].concat();
    }
    // Ids ascend, so that an index is no greater than its id.
    let [index, _] = index.to_le_bytes();
    let [id, ..] = apic_id.to_le_bytes();
    [&[TYPE_LOCAL_APIC, 8, index, id], flags.to_le_bytes().as_slice()].concat()
}

/// The table. The CPU with index n has the processor UID n; the first `cpus` are there.
pub(super) fn table(cpus: u16, apic_ids: &[u32]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for (index, apic_id) in (0..).zip(apic_ids) {
        body.extend(local_apic(index, *apic_id, index < cpus));
    }
    body.extend([TYPE_IO_APIC, 12, 0, 0]);
    body.extend(IO_APIC.to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    for (irq, gsi, flags) in OVERRIDES {
        body.extend([TYPE_SOURCE_OVERRIDE, 10, 0, irq]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    // NMI on LINT1 of every CPU.
    body.extend([TYPE_LOCAL_APIC_NMI, 6, 0xFF, 0, 0, 1]);
    if apic_ids.last() >= Some(&FIRST_WIDE_APIC_ID) {
        body.extend([TYPE_LOCAL_X2APIC_NMI, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
    }
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}
