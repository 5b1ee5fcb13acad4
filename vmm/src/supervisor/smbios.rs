//! SMBIOS tables (DMTF DSP0134, version 2.8): what the machine says it is and what it has.
//!
//! They hold nothing that depends on the guest, so that the core is given them ready-made.

use super::config::MachineConfig;
use super::config::smbios::SmbiosSpec;

/// The entry point's length (section 5.2.1).
const ENTRY: usize = 31;
/// RAM below 4 GiB ends here at the latest, in bytes.
const LOW_RAM: u64 = 3 << 30;
/// Handles of the structures that others name.
const ARRAY: u16 = 0x1000;
/// Units.
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Fields that say: not given, or unknown, or that a wider field counts.
const NO_HANDLE: u16 = 0xFFFE;
const UNKNOWN: u16 = 0xFFFF;
const USE_EXTENDED_SIZE: u16 = 0x7FFF;
const USE_EXTENDED_CAPACITY: u32 = 0x8000_0000;

/// Entry point and structures.
#[derive(Debug, Default)]
pub struct Tables {
    structures: Vec<u8>,
    count: u16,
    longest: usize,
}

/// One structure while it is put together.
struct Structure {
    formatted: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Self { formatted: vec![kind, 0, low, high], strings: Vec::new(), count: 0 }
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.formatted.extend(bytes);
        self
    }

    fn word(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn dword(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn qword(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// The number of a text; 0 when it is empty (section 6.1.3).
    fn text(mut self, text: &str) -> Self {
        let mut number = 0;
        if !text.is_empty() {
            self.count += 1;
            number = self.count;
            self.strings.extend(text.bytes().chain([0]));
        }
        self.bytes(&[number])
    }
}

impl Tables {
    /// The structures of a machine. `own_bios`: no firmware describes itself.
    pub fn new(config: &MachineConfig, own_bios: bool) -> Self {
        let mut tables = Self::default();
        if own_bios {
            tables.add(bios());
        }
        let spec = &config.smbios;
        tables.add(system(spec));
        tables.add(chassis(spec));
        tables.add(processor(config.cpus));
        tables.add(memory_array(config.memory));
        tables.add(memory_device(config.memory));
        let low = config.memory.min(LOW_RAM);
        tables.add(mapped(0, 0, low));
        if config.memory > low {
            tables.add(mapped(1, 4 << 30, config.memory - low));
        }
        // No errors when it booted (section 7.33); then the end (section 7.45).
        tables.add(Structure::new(32, 0x2000).bytes(&[0; 7]));
        tables.add(Structure::new(127, 0x7F00));
        tables
    }

    fn add(&mut self, structure: Structure) {
        let Structure { mut formatted, mut strings, .. } = structure;
        let length = u8::try_from(formatted.len()).unwrap_or(u8::MAX);
        if let Some(field) = formatted.get_mut(1) {
            *field = length;
        }
        // Texts end with another zero; without any there are two.
        strings.extend(if strings.is_empty() { vec![0, 0] } else { vec![0] });
        self.longest = self.longest.max(formatted.len() + strings.len());
        self.structures.extend(formatted);
        self.structures.extend(strings);
        self.count += 1;
    }

    /// The structures alone.
    pub fn structures(&self) -> Vec<u8> {
        self.structures.clone()
    }

    /// The entry point for structures at this address; firmware that moves them corrects it.
    pub fn anchor(&self, address: u32) -> Vec<u8> {
        let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        let mut entry = b"_SM_\0\x1F\x02\x08".to_vec();
        entry.extend(word(self.longest));
        entry.extend([0; 6]);
        entry.extend(b"_DMI_\0");
        entry.extend(word(self.structures.len()));
        entry.extend(address.to_le_bytes());
        entry.extend(self.count.to_le_bytes());
        entry.push(0x28);
        // The inner sum first: the outer one counts it.
        for (at, first) in [(21, 16), (4, 0)] {
            let sum = entry.iter().skip(first).fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
            if let Some(field) = entry.get_mut(at) {
                *field = sum;
            }
        }
        entry
    }

    /// Both as they lie at `address` for a kernel that is started directly.
    pub fn placed(&self, address: u32) -> Vec<u8> {
        let start = ENTRY.next_multiple_of(16);
        let mut all = self.anchor(address.saturating_add(u32::try_from(start).unwrap_or(0)));
        all.resize(start, 0);
        all.extend(&self.structures);
        all
    }
}

/// Type 0, BIOS Information (section 7.1): no characteristics but that this is a virtual machine.
fn bios() -> Structure {
    Structure::new(0, 0)
        .text("Bulkhead")
        .text(env!("CARGO_PKG_VERSION"))
        .word(0xE800)
        .text("01/01/2026")
        .bytes(&[0])
        .qword(1 << 3)
        .bytes(&[0, 1 << 4, 0, 0, 0xFF, 0xFF])
}

/// Type 1, System Information (section 7.2).
fn system(spec: &SmbiosSpec) -> Structure {
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    let mut uuid = spec.uuid.0;
    // The first three fields are little-endian (section 7.2.1).
    for field in [0..4, 4..6, 6..8] {
        if let Some(field) = uuid.get_mut(field) {
            field.reverse();
        }
    }
    Structure::new(1, 0x100)
        .text(&or(&spec.manufacturer, "Bulkhead"))
        .text(&or(&spec.product, "Standard PC (i440FX + PIIX)"))
        .text(&or(&spec.version, env!("CARGO_PKG_VERSION")))
        .text(&spec.serial)
        .bytes(&uuid)
        // Woken by the power switch.
        .bytes(&[6])
        .text(&spec.sku)
        .text(&spec.family)
}

/// Type 3, System Enclosure (section 7.4): of kind "other", in a safe state.
fn chassis(spec: &SmbiosSpec) -> Structure {
    let maker = if spec.manufacturer.is_empty() { "Bulkhead" } else { &spec.manufacturer };
    Structure::new(3, 0x300)
        .text(maker)
        .bytes(&[1, 0, 0, 0, 3, 3, 3, 2])
        .dword(0)
        .bytes(&[0, 0, 0, 0])
        .text("")
}

/// Type 4, Processor Information (section 7.5): one socket with a core for each CPU.
fn processor(cpus: u16) -> Structure {
    // 255 and more are told as 255.
    let count = u8::try_from(cpus).unwrap_or(u8::MAX);
    Structure::new(4, 0x400)
        .text("CPU 0")
        // A central processor of another family; its CPUID says which.
        .bytes(&[3, 1])
        .text("Bulkhead")
        .qword(0)
        .text("")
        .bytes(&[0])
        .word(0)
        .word(0)
        .word(0)
        // Populated and enabled, socket of kind "other"; no cache is described.
        .bytes(&[0x41, 1])
        .word(UNKNOWN)
        .word(UNKNOWN)
        .word(UNKNOWN)
        .bytes(&[0, 0, 0, count, count, count])
        // 64-bit capable, multi-core.
        .word(if cpus > 1 { 0b1100 } else { 0b0100 })
        .word(1)
}

/// Type 16, Physical Memory Array (section 7.17).
fn memory_array(memory: u64) -> Structure {
    let kib = u32::try_from(memory.div_ceil(KIB)).ok().filter(|kib| *kib < USE_EXTENDED_CAPACITY);
    Structure::new(16, ARRAY)
        // Location "other", system memory, no error correction.
        .bytes(&[1, 3, 3])
        .dword(kib.unwrap_or(USE_EXTENDED_CAPACITY))
        .word(NO_HANDLE)
        .word(1)
        .qword(if kib.is_some() { 0 } else { memory })
}

/// Type 17, Memory Device (section 7.18).
fn memory_device(memory: u64) -> Structure {
    let mib = memory.div_ceil(MIB);
    let size = u16::try_from(mib).ok().filter(|mib| *mib < USE_EXTENDED_SIZE);
    Structure::new(17, 0x1100)
        .word(ARRAY)
        .word(NO_HANDLE)
        .word(UNKNOWN)
        .word(UNKNOWN)
        .word(size.unwrap_or(USE_EXTENDED_SIZE))
        // A DIMM, in no set.
        .bytes(&[9, 0])
        .text("DIMM 0")
        .text("")
        // RAM, of another kind; speed unknown.
        .bytes(&[7])
        .word(1 << 1)
        .word(0)
        .text("Bulkhead")
        .bytes(&[0, 0, 0, 0])
        .dword(if size.is_some() { 0 } else { u32::try_from(mib).unwrap_or(u32::MAX) })
        .bytes(&[0; 8])
}

/// Type 19, Memory Array Mapped Address (section 7.20).
fn mapped(index: u16, start: u64, size: u64) -> Structure {
    let end = start.saturating_add(size).saturating_sub(1);
    let narrow = |address: u64| u32::try_from(address / KIB).ok().filter(|kib| *kib != u32::MAX);
    let ends = narrow(start).zip(narrow(end));
    let (first, last) = ends.unwrap_or((u32::MAX, u32::MAX));
    let (wide_first, wide_last) = if ends.is_some() { (0, 0) } else { (start, end) };
    Structure::new(19, 0x1300 + index)
        .dword(first)
        .dword(last)
        .word(ARRAY)
        .bytes(&[1])
        .qword(wide_first)
        .qword(wide_last)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};
    use crate::supervisor::config::resolve;

    fn config(options: &str) -> MachineConfig {
        let arguments = ["bulkhead", "run", "--kernel", "k"].into_iter().chain(options.split_whitespace());
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Run(args) => resolve(*args).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Type, formatted area and texts of every structure, read as section 6.1 says.
    fn parse(mut rest: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, length, ..] = *rest {
            let (formatted, tail) = rest.split_at(length.into());
            let end = tail.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let texts =
                tail[..end].split(|byte| *byte == 0).map(|text| String::from_utf8(text.to_vec()).unwrap());
            found.push((kind, formatted.to_vec(), texts.filter(|text| !text.is_empty()).collect()));
            rest = &tail[end + 2..];
        }
        found
    }

    #[test]
    fn entry_point_leads_to_all_structures() {
        let placed = Tables::new(&config("--memory 4G --cpus 3"), true).placed(0xF_0000);
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((&placed[..4], sum(&placed[..31])), (&b"_SM_"[..], 0));
        assert_eq!((&placed[16..21], sum(&placed[16..31])), (&b"_DMI_"[..], 0));
        assert_eq!(placed[24..28], 0xF_0020_u32.to_le_bytes());
        let length = usize::from(u16::from_le_bytes([placed[22], placed[23]]));
        assert_eq!(placed.len(), 32 + length);
        let found = parse(&placed[32..]);
        let kinds: Vec<u8> = found.iter().map(|structure| structure.0).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 16, 17, 19, 19, 32, 127]);
        assert_eq!(usize::from(placed[28]), kinds.len());
        // Lengths of the formatted areas, from the tables of chapter 7.
        let lengths: Vec<usize> = found.iter().map(|structure| structure.1.len()).collect();
        assert_eq!(lengths, [0x18, 0x1B, 0x16, 0x2A, 0x17, 0x28, 0x1F, 0x1F, 0x0B, 4]);
        for (_, formatted, _) in &found {
            assert_eq!(usize::from(formatted[1]), formatted.len());
        }
        assert_eq!(found[3].1[0x23], 3, "cores");
        assert_eq!(found[5].1[0x0C..0x0E], 4096_u16.to_le_bytes(), "MiB");
        assert_eq!(found[7].1[4..8], (4_u32 << 20).to_le_bytes(), "KiB at 4 GiB");
    }

    #[test]
    fn the_system_is_what_the_user_says() {
        let options = "--smbios uuid=00112233-4455-6677-8899-aabbccddeeff,serial=S1,product=P";
        let found = parse(&Tables::new(&config(options), false).structures());
        let (kind, formatted, texts) = &found[0];
        assert_eq!(*kind, 1, "firmware brings its own type 0");
        assert_eq!(formatted[8..16], [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]);
        assert_eq!(formatted[16..24], [0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF]);
        assert_eq!(texts[usize::from(formatted[7]) - 1], "S1");
        assert_eq!(texts[usize::from(formatted[5]) - 1], "P");
        assert_eq!(formatted[0x19], 0, "no SKU");
    }

    #[test]
    fn large_memory_uses_the_wide_fields() {
        let found = parse(&Tables::new(&config("--memory 6144G"), false).structures());
        assert_eq!(found[3].1[7..11], USE_EXTENDED_CAPACITY.to_le_bytes());
        assert_eq!(found[3].1[15..23], (6144_u64 << 30).to_le_bytes());
        assert_eq!(found[4].1[0x1C..0x20], (6144_u32 << 10).to_le_bytes());
        assert_eq!(found[6].1[4..8], u32::MAX.to_le_bytes());
    }
}
