//! CPU hot-plug by ACPI, in QEMU's modern register layout at AF00 (QEMU, docs/specs/acpi_cpu_hotplug): a selector
//! chooses a CPU, and the handler of GPE.2 asks which CPUs came or are to go.

/// Where the registers lie, and their length in bytes.
pub(in super::super) const CPU_HOTPLUG: (u16, u8) = (0xAF00, 12);
/// The bit of GPE0 that tells of them.
pub(super) const GPE_CPU_HOTPLUG: u16 = 1 << 2;

/// Offsets: selector (32 bits), flags, command, data (32 bits).
const SELECTOR: u64 = 0;
const FLAGS: u64 = 4;
const COMMAND: u64 = 5;
const DATA: u64 = 8;
/// Flags: the CPU is there, it has just come, it is asked to go; written: let it go.
const ENABLED: u8 = 1 << 0;
const INSERTING: u8 = 1 << 1;
const REMOVING: u8 = 1 << 2;
const EJECT: u8 = 1 << 3;
/// Commands: look for a CPU with an event; tell the architecture's id of the selected one.
const NEXT_EVENT: u8 = 0;
const CPU_ID: u8 = 3;

/// The registers.
#[derive(Debug, Default)]
pub(super) struct CpuHotplug {
    selector: u32,
    command: u8,
    /// Of each possible CPU: its local APIC id and its flags.
    cpus: Vec<(u32, u8)>,
}

impl CpuHotplug {
    /// `apic_ids` of all possible CPUs, of which the first `present` are there.
    pub(super) fn new(apic_ids: &[u32], present: usize) -> Self {
        let cpus = apic_ids.iter().enumerate();
        let cpus = cpus.map(|(index, id)| (*id, if index < present { ENABLED } else { 0 })).collect();
        Self { cpus, ..Self::default() }
    }

    fn selected(&mut self) -> Option<&mut (u32, u8)> {
        usize::try_from(self.selector).ok().and_then(|index| self.cpus.get_mut(index))
    }

    /// The byte at `offset`. Everything reads zero while the selector names no CPU.
    pub(super) fn read(&mut self, offset: u64) -> u8 {
        let (selector, command) = (self.selector, self.command);
        let Some((id, flags)) = self.selected() else { return 0 };
        let data = match command {
            NEXT_EVENT => selector,
            CPU_ID => *id,
            _ => 0,
        };
        match offset {
            FLAGS => *flags,
            DATA.. => super::byte(&data.to_le_bytes(), offset.wrapping_sub(DATA)),
            // The upper half of an id is zero.
            _ => 0,
        }
    }

    /// Writes a register. Returns the index of a CPU that the guest lets go.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<u16> {
        if let (SELECTOR, [a, b, c, d]) = (offset, data) {
            self.selector = u32::from_le_bytes([*a, *b, *c, *d]);
            return None;
        }
        let selector = self.selector;
        let [value, ..] = *data else { return None };
        let (_, flags) = self.selected()?;
        match offset {
            FLAGS if value & INSERTING != 0 => *flags &= !INSERTING,
            FLAGS if value & REMOVING != 0 => *flags &= !REMOVING,
            // The boot processor stays.
            FLAGS if value & EJECT != 0 && *flags & ENABLED != 0 && selector != 0 => {
                *flags = 0;
                return u16::try_from(selector).ok();
            }
            COMMAND => {
                self.command = value;
                if value == NEXT_EVENT {
                    self.select_next_event();
                }
            }
            // What `_OST` reports through DATA is of interest to nobody.
            _ => {}
        }
        None
    }

    /// Selects the next CPU with an event, the selected one first. Without one nothing changes.
    fn select_next_event(&mut self) {
        let from = usize::try_from(self.selector).unwrap_or(0);
        let indices = (0..self.cpus.len()).cycle().skip(from).take(self.cpus.len());
        let has_event = |index: &usize| {
            self.cpus.get(*index).is_some_and(|(_, flags)| flags & (INSERTING | REMOVING) != 0)
        };
        if let Some(found) = indices.into_iter().find(has_event) {
            self.selector = u32::try_from(found).unwrap_or(0);
        }
    }

    /// A CPU comes. False when there is none such, or it is there.
    pub(super) fn insert(&mut self, index: u16) -> bool {
        let cpu = self.cpus.get_mut(usize::from(index)).filter(|(_, flags)| flags & ENABLED == 0);
        cpu.map(|(_, flags)| *flags = ENABLED | INSERTING).is_some()
    }

    /// The guest is asked to let a CPU go. False when it is not there, or is the boot processor.
    pub(super) fn request_removal(&mut self, index: u16) -> bool {
        let cpu = self.cpus.get_mut(usize::from(index));
        let cpu = cpu.filter(|(_, flags)| flags & ENABLED != 0 && index != 0);
        cpu.map(|(_, flags)| *flags |= REMOVING).is_some()
    }

    /// RST#: what is there stays, what was to be told is told no more. Returns the CPUs that were asked to go, which are gone now.
    pub(super) fn reset(&mut self) -> Vec<u16> {
        let mut gone = Vec::new();
        for (index, (_, flags)) in (0..).zip(&mut self.cpus) {
            if *flags & REMOVING != 0 {
                *flags = 0;
                gone.push(index);
            }
            *flags &= ENABLED;
        }
        (self.selector, self.command) = (0, NEXT_EVENT);
        gone
    }
}
