//! AML of hot-plug: what the handlers of GPE.1 (PCI), GPE.2 (CPUs) and GPE.5 (generation id) do with QEMU's registers (ACPI 6.5, sections 5.6.4 and 6.3).

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, And, Arg, BufferData, EISAName, Else, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, LessThan, Local, Method, MethodCall, Mutex, Notify, ONE, OpRegion, OpRegionSpace,
    Path, Release, ResourceTemplate, Return, Store, While, ZERO,
};

use super::super::piix4_pm::{CPU_HOTPLUG, PCI_HOTPLUG};
use super::super::{CHIPSET_SLOTS, SLOTS};
use super::bytes;
use super::dsdt::{Raw, STA_PRESENT, device, named, ports, refs};
use super::madt;

/// What a handler tells a driver: look at the device again, or let go of it.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// What it tells the driver of the generation id: that it is another one.
const CHANGED: u8 = 0x80;
/// The mutex of the CPU registers, and an `Acquire` that waits for ever.
const CPU_LOCK: &str = "\\_SB_.CPLK";
const FOR_EVER: u16 = 0xFFFF;
/// How many CPUs are tried one by one.
const FEW: usize = 8;

fn raw(object: &dyn Aml) -> Raw {
    Raw(bytes(object))
}

pub(super) fn method(name: &str, arguments: u8, body: &[Raw]) -> Raw {
    raw(&Method::new(Path::new(name), arguments, true, refs(body)))
}

fn set(name: &str, value: &dyn Aml) -> Raw {
    raw(&Store::new(&Path::new(name), value))
}

fn when(condition: &dyn Aml, body: &[Raw]) -> Raw {
    raw(&If::new(condition, refs(body)))
}

fn region(name: &str, (port, length): (u16, u8)) -> Raw {
    raw(&OpRegion::new(Path::new(name), OpRegionSpace::SystemIO, &port, &length))
}

fn fields(name: &str, access: FieldAccessType, entries: Vec<FieldEntry>) -> Raw {
    let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
    raw(&Field::new(Path::new(name), access, lock, update, entries))
}

/// For the scope of `\_SB.PCI0`: each slot that is not the chipset's can be ejected, and `PCNT` tells what happened.
pub(super) fn pci() -> Vec<Raw> {
    let registers = ["PCIU", "PCID", "B0EJ"].map(|name| FieldEntry::Named(name_of(name), 32));
    let mut objects =
        vec![region("PCST", PCI_HOTPLUG), fields("PCST", FieldAccessType::DWord, registers.to_vec())];
    let mut scan = vec![
        raw(&Store::new(&Local(0), &Path::new("PCIU"))),
        raw(&Store::new(&Local(1), &Path::new("PCID"))),
    ];
    for slot in CHIPSET_SLOTS..SLOTS {
        let (name, bit) = (format!("S{slot:02X}_"), 1_u32 << slot);
        let eject = method("_EJ0", 1, &[set("B0EJ", &bit)]);
        let address = u32::from(slot) << 16;
        objects.push(device(&name, &[named("_SUN", &slot), named("_ADR", &address), eject]));
        for (register, what) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            let told = raw(&Notify::new(&Path::new(&name), &what));
            scan.push(when(&And::new(&ZERO, &register, &bit), &[told]));
        }
    }
    objects.push(method("PCNT", 0, &scan));
    objects
}

/// For the scope of `\_GPE`: the handlers.
pub(super) fn events(cpus: bool) -> Vec<Raw> {
    let call = |name: &str| raw(&MethodCall::new(Path::new(name), Vec::new()));
    let mut handlers = vec![method("_E01", 0, &[call("\\_SB_.PCI0.PCNT")])];
    if cpus {
        handlers.push(method("_E02", 0, &[call("\\_SB_.CSCN")]));
    }
    handlers.push(method("_E05", 0, &[raw(&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED))]));
    handlers
}

/// For the scope of `\_SB`: the CPU registers, and what the CPUs' own methods call.
pub(super) fn cpu_registers(count: usize) -> Vec<Raw> {
    use FieldEntry::{Named, Reserved};
    let bits = ["CPEN", "CINS", "CRMV", "CEJ0"].map(|name| Named(name_of(name), 1));
    let mut bytes = vec![Reserved(32)];
    bytes.extend(bits);
    bytes.extend([Reserved(4), Named(name_of("CCMD"), 8)]);
    let dwords = vec![Named(name_of("CSEL"), 32), Reserved(32), Named(name_of("CDAT"), 32)];
    let (port, length) = CPU_HOTPLUG;
    let resources = named("_CRS", &ResourceTemplate::new(vec![&ports(port, length)]));
    let block = device(
        "PRES",
        &[named("_HID", &EISAName::new("PNP0A06")), named("_UID", &"CPU hot-plug registers"), resources],
    );
    vec![
        block,
        raw(&Mutex::new(Path::new("CPLK"), 0)),
        region("PRST", CPU_HOTPLUG),
        fields("PRST", FieldAccessType::Byte, bytes),
        fields("PRST", FieldAccessType::DWord, dwords),
        locked(
            "CSTA",
            1,
            Some(&Local(0)),
            &[
                set("CSEL", &Arg(0)),
                raw(&Store::new(&Local(0), &ZERO)),
                when(&Equal::new(&Path::new("CPEN"), &ONE), &[raw(&Store::new(&Local(0), &STA_PRESENT))]),
            ],
        ),
        locked("CEJ_", 1, None, &[set("CSEL", &Arg(0)), set("CEJ0", &ONE)]),
        method("CTFY", 2, &notifications(0..u16::try_from(count).unwrap_or(u16::MAX))),
        cpu_scan(),
    ]
}

/// A method that holds the mutex of the CPU registers.
fn locked(name: &str, arguments: u8, result: Option<&dyn Aml>, body: &[Raw]) -> Raw {
    let mut all = vec![raw(&Acquire::new(Path::new(CPU_LOCK), FOR_EVER))];
    all.extend(body.iter().cloned());
    all.push(raw(&Release::new(Path::new(CPU_LOCK))));
    all.extend(result.map(|result| raw(&Return::new(result))));
    method(name, arguments, &all)
}

/// Notifies the CPU whose index is the first argument of the second argument. The CPUs are halved until few are left to try:
/// each comparison is interpreted.
fn notifications(cpus: Range<u16>) -> Vec<Raw> {
    if cpus.len() > FEW {
        let middle = cpus.start.midpoint(cpus.end);
        let below = when(&LessThan::new(&Arg(0), &middle), &notifications(cpus.start..middle));
        return vec![below, raw(&Else::new(refs(&notifications(middle..cpus.end))))];
    }
    let notify = |index: u16| {
        let told = raw(&Notify::new(&Path::new(&cpu_name(index)), &Arg(1)));
        when(&Equal::new(&Arg(0), &index), &[told])
    };
    cpus.map(notify).collect()
}

/// Tells every event that waits, and clears it.
fn cpu_scan() -> Raw {
    let found = |flag: &str, what: u8| {
        let selected = Path::new("CDAT");
        let arguments: Vec<&dyn Aml> = vec![&selected, &what];
        let body = [
            raw(&MethodCall::new(Path::new("CTFY"), arguments)),
            set(flag, &ONE),
            raw(&Store::new(&Local(0), &ONE)),
        ];
        when(&Equal::new(&Path::new(flag), &ONE), &body)
    };
    let body = [
        raw(&Store::new(&Local(0), &ZERO)),
        set("CCMD", &ZERO),
        found("CINS", DEVICE_CHECK),
        found("CRMV", EJECT_REQUEST),
    ];
    let more = Equal::new(&Local(0), &ONE);
    let again = While::new(&more, refs(&body));
    // The selector may name no CPU: then nothing else is heard.
    let start = [set("CSEL", &ZERO), raw(&Store::new(&Local(0), &ONE)), raw(&again)];
    locked("CSCN", 0, None, &start)
}

/// What a CPU that may come and go has beyond its names: `_STA`, `_MAT` and `_EJ0` (the boot processor stays).
pub(super) fn cpu_methods(index: u16, apic_id: u32) -> Vec<Raw> {
    let argument: Vec<&dyn Aml> = vec![&index];
    let status = raw(&MethodCall::new(Path::new("CSTA"), argument.clone()));
    let entry = madt::local_apic(index, apic_id, true);
    let mut methods =
        vec![method("_STA", 0, &[raw(&Return::new(&status))]), named("_MAT", &BufferData::new(entry))];
    if index != 0 {
        methods.push(method("_EJ0", 1, &[raw(&MethodCall::new(Path::new("CEJ_"), argument))]));
    }
    methods
}

/// The name of a CPU's object.
pub(super) fn cpu_name(index: u16) -> String {
    format!("C{index:03X}")
}

/// Four characters as a field list has them.
fn name_of(name: &str) -> [u8; 4] {
    let mut bytes = [b'_'; 4];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    bytes
}
