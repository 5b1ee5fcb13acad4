//! DSDT, the devices and their methods (ACPI 6.5, section 5.2.11.1 and chapter 6).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, LessThan, Method, Name,
    OpRegion, OpRegionSpace, Or, PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Zero,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::super::isa::PVPANIC_PORT;
use super::super::piix3::PIRQRC;
use super::super::piix4_pm::{APM_CONTROL, GPE0_BLOCK, PCI_HOTPLUG, PM_BLOCK_SIZE, S5_SLEEP_TYPE, SCI_IRQ};
use super::super::{SLOTS, irq::swizzle};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes, hotplug};

/// What differs between machines.
pub(super) struct Platform<'a> {
    /// The CPUs at the start, and the APIC ids of all that there may be.
    pub(super) cpus: u16,
    pub(super) apic_ids: &'a [u32],
    /// Where the PM register block is.
    pub(super) pm_block: u16,
    /// The window for BARs below 4 GiB, first address; the last is where the APICs begin.
    pub(super) low_window: u32,
    /// The window for 64-bit BARs, first and last address.
    pub(super) high_window: Option<(u64, u64)>,
    /// There is a UART at 3F8.
    pub(super) serial: bool,
    /// There is a keyboard.
    pub(super) keyboard: bool,
}

/// The last address of the window for BARs below 4 GiB.
const LOW_WINDOW_LAST: u32 = 0xFEBF_FFFF;
/// The IRQs that a PIRQ may be routed to: those that the MADT calls level triggered, but for the SCI's.
const LINK_IRQS: [u32; 3] = [5, 10, 11];
/// PIRQA–D: name of the link device, of its PIRQRC register, and the latter's full path.
const LINKS: [(&str, [u8; 4], &str); 4] = [
    ("LNKA", *b"PRQA", "\\_SB_.PCI0.ISA_.PRQA"),
    ("LNKB", *b"PRQB", "\\_SB_.PCI0.ISA_.PRQB"),
    ("LNKC", *b"PRQC", "\\_SB_.PCI0.ISA_.PRQC"),
    ("LNKD", *b"PRQD", "\\_SB_.PCI0.ISA_.PRQD"),
];
/// Where an extended interrupt descriptor has its first interrupt number (section 6.4.3.6).
const INTERRUPT_NUMBER_OFFSET: u8 = 5;
/// _STA: present, enabled, shown and working; the same but disabled; not there (section 6.3.7).
pub(super) const STA_PRESENT: u8 = 0x0F;
const STA_LINK_ON: u8 = 0x0B;
const STA_LINK_OFF: u8 = 0x09;

/// Bytes of AML, ready-made.
#[derive(Clone)]
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// An extended interrupt descriptor with a choice of interrupts: level triggered, active high, shared (section 6.4.3.6).
struct InterruptChoice<'a>(&'a [u32]);

impl Aml for InterruptChoice<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let count = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        sink.byte(0x89);
        sink.word(u16::from(count).saturating_mul(4).saturating_add(2));
        sink.byte(0b1001);
        sink.byte(count);
        for number in self.0.iter().take(count.into()) {
            sink.dword(*number);
        }
    }
}

pub(super) fn refs(children: &[Raw]) -> Vec<&dyn Aml> {
    children.iter().map(|child| child as &dyn Aml).collect()
}

/// The table.
pub(super) fn table(platform: &Platform<'_>) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bytes(&pci_root(platform)));
    table.append_slice(&bytes(&link_devices()));
    table.append_slice(&bytes(&cpus(platform)));
    let hot_plug = platform.apic_ids.len() > platform.cpus.into();
    table.append_slice(&bytes(&scope("\\_GPE", &hotplug::events(hot_plug))));
    table.append_slice(&bytes(&soft_off()));
    table.append_slice(&bytes(&generation()));
    table.as_slice().to_vec()
}

pub(super) fn named(name: &str, value: &dyn Aml) -> Raw {
    Raw(bytes(&Name::new(Path::new(name), value)))
}

fn scope(name: &str, children: &[Raw]) -> Raw {
    Raw(bytes(&Scope::new(Path::new(name), refs(children))))
}

fn scope_sb(children: &[Raw]) -> Raw {
    scope("\\_SB_", children)
}

pub(super) fn device(name: &str, children: &[Raw]) -> Raw {
    Raw(bytes(&Device::new(Path::new(name), refs(children))))
}

pub(super) fn ports(first: u16, length: u8) -> IO {
    IO::new(first, first, 1, length)
}

/// An interrupt of an ISA device: edge triggered, active high, its own.
fn isa_interrupt(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

/// `\_SB.PCI0` with its windows, its interrupt routing and the ISA bridge.
fn pci_root(platform: &Platform<'_>) -> Raw {
    let mut children = vec![
        named("_HID", &EISAName::new("PNP0A03")),
        named("_UID", &Zero {}),
        root_resources(platform),
        interrupt_routing(),
        isa_bridge(platform),
    ];
    children.extend(hotplug::pci());
    scope_sb(&[device("PCI0", &children)])
}

fn root_resources(platform: &Platform<'_>) -> Raw {
    let buses = AddressSpace::new_bus_number(0_u16, 0xFF);
    let mechanism = IO::new(0xCF8, 0xCF8, 1, 8);
    let ports_below = AddressSpace::new_io(0_u16, 0xCF7, None);
    let ports_above = AddressSpace::new_io(0xD00_u16, 0xFFFF, None);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::new_memory(uncached, true, platform.low_window, LOW_WINDOW_LAST, None);
    let high = platform.high_window.map(|(first, last)| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
    });
    let mut children: Vec<&dyn Aml> = vec![&buses, &mechanism, &ports_below, &ports_above, &low];
    if let Some(high) = &high {
        children.push(high);
    }
    named("_CRS", &ResourceTemplate::new(children))
}

/// `_PRT` (section 6.2.13): each slot's pins to the link devices by the swizzle. Pin A of slot 1 is the PM function's, which
/// has its interrupt wired.
fn interrupt_routing() -> Raw {
    let mut table = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..4_u8 {
            let mut entry = PackageBuilder::new();
            entry.add_element(&(u32::from(slot) << 16 | 0xFFFF));
            entry.add_element(&pin);
            match LINKS.get(swizzle(slot.into(), pin.into())) {
                Some((link, ..)) if (slot, pin) != (1, 0) => {
                    entry.add_element(&Path::new(link));
                    entry.add_element(&Zero {});
                }
                _ => {
                    entry.add_element(&Zero {});
                    entry.add_element(&SCI_IRQ);
                }
            }
            table.add_element(&entry);
        }
    }
    named("_PRT", &table)
}

/// The PIIX3 with PIRQRC and the devices on its ISA bus.
fn isa_bridge(platform: &Platform<'_>) -> Raw {
    let region = OpRegion::new(Path::new("PIRQ"), OpRegionSpace::PCIConfig, &PIRQRC, &4_u8);
    let registers = Field::new(
        Path::new("PIRQ"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        LINKS.iter().map(|(_, register, _)| FieldEntry::Named(*register, 8)).collect(),
    );
    let mut children = vec![
        named("_ADR", &0x0001_0000_u32),
        Raw(bytes(&region)),
        Raw(bytes(&registers)),
        clock(),
        keyboard(platform.keyboard),
        panic_device(),
        motherboard_resources(platform.pm_block),
    ];
    if platform.serial {
        children.push(serial_port());
    }
    device("ISA_", &children)
}

fn clock() -> Raw {
    let resources = named("_CRS", &ResourceTemplate::new(vec![&ports(0x70, 2), &isa_interrupt(8)]));
    device("RTC_", &[named("_HID", &EISAName::new("PNP0B00")), resources])
}

/// The keyboard, plugged in or not.
fn keyboard(present: bool) -> Raw {
    let status = if present { STA_PRESENT } else { 0 };
    let resources =
        named("_CRS", &ResourceTemplate::new(vec![&ports(0x60, 1), &ports(0x64, 1), &isa_interrupt(1)]));
    device("KBD_", &[named("_HID", &EISAName::new("PNP0303")), named("_STA", &status), resources])
}

fn serial_port() -> Raw {
    let resources = named("_CRS", &ResourceTemplate::new(vec![&ports(0x3F8, 8), &isa_interrupt(4)]));
    let [uid, status] = [("_UID", 1), ("_STA", STA_PRESENT)].map(|(name, value)| named(name, &value));
    device("COM1", &[named("_HID", &EISAName::new("PNP0501")), uid, status, resources])
}

/// pvpanic: by its name drivers know what to do with the port.
fn panic_device() -> Raw {
    let resources = named("_CRS", &ResourceTemplate::new(vec![&ports(PVPANIC_PORT, 1)]));
    device("PEVT", &[named("_HID", &"QEMU0001"), named("_STA", &STA_PRESENT), resources])
}

/// Ports that belong to the chipset: the PM block, APM, GPE0, the registers of PCI hot-plug.
fn motherboard_resources(pm_block: u16) -> Raw {
    let pm = ports(pm_block, u8::try_from(PM_BLOCK_SIZE).unwrap_or(0));
    let apm = ports(APM_CONTROL, 2);
    let gpe0 = ports(GPE0_BLOCK.0, GPE0_BLOCK.1);
    let hotplug = ports(PCI_HOTPLUG.0, PCI_HOTPLUG.1);
    let resources = named("_CRS", &ResourceTemplate::new(vec![&pm, &apm, &gpe0, &hotplug]));
    device("MRES", &[named("_HID", &EISAName::new("PNP0C02")), named("_UID", &1_u8), resources])
}

/// `\_SB.LNKA`–`LNKD`: interrupt link devices over PIRQRC (section 6.2.13).
fn link_devices() -> Raw {
    let links: Vec<Raw> =
        (1_u8..).zip(LINKS).map(|(uid, (name, _, register))| link_device(uid, name, register)).collect();
    scope_sb(&links)
}

fn link_device(uid: u8, name: &str, register: &str) -> Raw {
    let pirqrc = Path::new(register);
    let possible = named("_PRS", &ResourceTemplate::new(vec![&InterruptChoice(&LINK_IRQS)]));

    let off = And::new(&Zero {}, &pirqrc, &0x80_u8);
    let (is_off, is_on) = (Return::new(&STA_LINK_OFF), Return::new(&STA_LINK_ON));
    let if_off = If::new(&off, vec![&is_off]);
    let status = Method::new(Path::new("_STA"), 0, false, vec![&if_off, &is_on]);

    let turn_off = Or::new(&pirqrc, &pirqrc, &0x80_u8);
    let disable = Method::new(Path::new("_DIS"), 0, false, vec![&turn_off]);

    let (buffer, number) = (Path::new("BUFF"), Path::new("INTN"));
    let template = named("BUFF", &ResourceTemplate::new(vec![&InterruptChoice(&[0])]));
    let field = CreateDWordField::new(&number, &buffer, &INTERRUPT_NUMBER_OFFSET);
    let is_on = LessThan::new(&pirqrc, &0x80_u8);
    let tell = Store::new(&number, &pirqrc);
    let if_on = If::new(&is_on, vec![&tell]);
    let answer = Return::new(&buffer);
    let current = Method::new(Path::new("_CRS"), 0, true, vec![&field, &if_on, &answer]);

    let chosen = CreateDWordField::new(&number, &Arg(0), &INTERRUPT_NUMBER_OFFSET);
    let route = Store::new(&pirqrc, &number);
    let set = Method::new(Path::new("_SRS"), 1, true, vec![&chosen, &route]);

    device(
        name,
        &[
            named("_HID", &EISAName::new("PNP0C0F")),
            named("_UID", &uid),
            possible,
            template,
            Raw(bytes(&status)),
            Raw(bytes(&disable)),
            Raw(bytes(&current)),
            Raw(bytes(&set)),
        ],
    )
}

/// The processors that the MADT lists (section 8.4), with what hot-plug needs where some of them may come later.
fn cpus(platform: &Platform<'_>) -> Raw {
    let hot_plug = platform.apic_ids.len() > platform.cpus.into();
    let cpu = |(index, apic_id): (u16, &u32)| {
        let mut children = vec![named("_HID", &"ACPI0007"), named("_UID", &index)];
        if hot_plug {
            children.extend(hotplug::cpu_methods(index, *apic_id));
        }
        device(&hotplug::cpu_name(index), &children)
    };
    let mut children = if hot_plug { hotplug::cpu_registers(platform.apic_ids.len()) } else { Vec::new() };
    children.extend((0..).zip(platform.apic_ids).map(cpu));
    scope_sb(&children)
}

/// What [`generation`] has where the address of the generation id belongs, so that a table's builder finds the place.
pub(super) const GENERATION_PLACE: [u8; 4] = *b"ADGI";

/// `\_SB.VGEN`: the address of the 128 bits that tell this run of the machine from others made from the same state
/// (Microsoft, "Virtual Machine Generation ID").
fn generation() -> Raw {
    let mut address = PackageBuilder::new();
    // The loader fills in 32 bits: no shorter form of the number.
    address.add_element(&Raw([&[0x0C], GENERATION_PLACE.as_slice()].concat()));
    address.add_element(&Zero {});
    let [cid, ddn] = ["_CID", "_DDN"].map(|name| named(name, &"VM_Gen_Counter"));
    scope_sb(&[device("VGEN", &[named("_HID", &"BULK0001"), cid, ddn, named("ADDR", &address)])])
}

/// `\_S5`: the sleep type of soft off (section 7.4.2).
fn soft_off() -> Raw {
    let mut package = PackageBuilder::new();
    for value in [S5_SLEEP_TYPE, S5_SLEEP_TYPE, 0, 0] {
        package.add_element(&value);
    }
    named("\\_S5_", &package)
}
