//! A function's configuration space: values, which bits the guest can write, and what they mean to the bus
//! (PCI Local Bus Specification 3.0, chapter 6).

use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};

use super::super::sync::lock;
use super::bar::{Bar, BarKind};
use super::intx::Pin;

/// Bytes in a function's configuration space.
pub const CONFIG_SPACE_SIZE: usize = 256;

/// Offsets in the header of type 0 (section 6.1).
pub mod header {
    /// Vendor ID, 16 bits.
    pub const VENDOR_ID: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE_ID: u16 = 0x02;
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision ID.
    pub const REVISION_ID: u16 = 0x08;
    /// Class code: programming interface, sub-class, base class.
    pub const CLASS: u16 = 0x09;
    /// Cache line size.
    pub const CACHE_LINE_SIZE: u16 = 0x0C;
    /// Latency timer.
    pub const LATENCY_TIMER: u16 = 0x0D;
    /// Header type; bit 7: several functions in this slot.
    pub const HEADER_TYPE: u16 = 0x0E;
    /// The first base address register.
    pub const BAR0: u16 = 0x10;
    /// The byte after the last base address register.
    pub const BARS_END: u16 = 0x28;
    /// Subsystem vendor ID, 16 bits.
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2C;
    /// Subsystem ID, 16 bits.
    pub const SUBSYSTEM_ID: u16 = 0x2E;
    /// Offset of the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line: written by firmware, read by drivers, without effect.
    pub const INTERRUPT_LINE: u16 = 0x3C;
    /// Interrupt pin: 0 none, 1 INTA# … 4 INTD#.
    pub const INTERRUPT_PIN: u16 = 0x3D;
}

/// The command register (section 6.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command(pub u16);

impl Command {
    /// The bit that lets a function decode I/O ports.
    pub const IO: u16 = 1 << 0;
    /// The bit that lets a function decode memory.
    pub const MEMORY: u16 = 1 << 1;
    /// The bit that lets a function be bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The bit that keeps a function from driving its INTx# pin.
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;

    /// Whether the function answers I/O accesses.
    #[must_use]
    pub const fn io(self) -> bool {
        self.0 & Self::IO != 0
    }
    /// Whether the function answers memory accesses.
    #[must_use]
    pub const fn memory(self) -> bool {
        self.0 & Self::MEMORY != 0
    }
    /// Whether the function may read and write memory and send messages.
    #[must_use]
    pub const fn bus_master(self) -> bool {
        self.0 & Self::BUS_MASTER != 0
    }
    /// Whether the function must not assert its INTx# pin.
    #[must_use]
    pub const fn interrupt_disable(self) -> bool {
        self.0 & Self::INTERRUPT_DISABLE != 0
    }
}

/// Who a function says that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class, programming interface: `0x06_00_00` is a host bridge.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A register, or several in a row, in a table as in a datasheet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Its offset in configuration space.
    pub offset: u16,
    /// Its bytes after reset; 0 where there are none.
    pub reset: &'static [u8],
    /// The bits that the guest can write; none where there are no bytes.
    pub writable: &'static [u8],
}

/// A configuration space that cannot be built as asked. An error of the program, not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A register outside of the 256 bytes.
    #[error("configuration space has no room for {length} bytes at offset {offset:#x}")]
    OutOfRange {
        /// Its offset.
        offset: u16,
        /// Its length in bytes.
        length: usize,
    },
    /// A BAR number beyond 5, or one in use.
    #[error("base address register {0} does not exist or is taken")]
    BadBar(u8),
    /// A size that such a BAR cannot have.
    #[error("{size:#x} is not a size for a base address register of kind {kind:?}")]
    BadBarSize {
        /// The kind of BAR.
        kind: BarKind,
        /// The size asked for.
        size: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct BarDefinition {
    index: u8,
    kind: BarKind,
    size: u64,
}

type Bytes = [u8; CONFIG_SPACE_SIZE];

/// Builds a [`ConfigSpace`].
#[derive(Clone, Debug)]
pub struct ConfigSpaceBuilder {
    reset: Bytes,
    writable: Bytes,
    clear: Bytes,
    bars: Vec<BarDefinition>,
    next_capability: u16,
    last_link: u16,
}

impl ConfigSpaceBuilder {
    /// Starts with a header of type 0 with the usual writable bits: command (I/O, memory, bus master, parity, SERR#,
    /// interrupt disable), cache line size, latency timer and interrupt line.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let zero = [0; CONFIG_SPACE_SIZE];
        let mut this = Self {
            reset: zero,
            writable: zero,
            clear: zero,
            bars: Vec::new(),
            next_capability: 0x40,
            last_link: header::CAPABILITIES,
        };
        let class = identity.class << 8 | u32::from(identity.revision);
        put(&mut this.reset, header::VENDOR_ID, &identity.vendor.to_le_bytes());
        put(&mut this.reset, header::DEVICE_ID, &identity.device.to_le_bytes());
        put(&mut this.reset, header::REVISION_ID, &class.to_le_bytes());
        put(&mut this.reset, header::SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        put(&mut this.reset, header::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        put(&mut this.writable, header::COMMAND, &0x0547_u16.to_le_bytes());
        put(&mut this.clear, header::STATUS, &0xF900_u16.to_le_bytes());
        put(&mut this.writable, header::CACHE_LINE_SIZE, &[0xFF, 0xFF]);
        put(&mut this.writable, header::INTERRUPT_LINE, &[0xFF]);
        this
    }

    /// Defines a register: its bytes after reset and the bits that the guest can write.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`].
    pub fn register(&mut self, offset: u16, reset: &[u8], writable: &[u8]) -> Result<&mut Self, ConfigError> {
        let length = reset.len().max(writable.len());
        if usize::from(offset) + length > CONFIG_SPACE_SIZE {
            return Err(ConfigError::OutOfRange { offset, length });
        }
        put(&mut self.reset, offset, reset);
        put(&mut self.writable, offset, writable);
        Ok(self)
    }

    /// Defines a table of registers.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`].
    pub fn registers(&mut self, table: &[Register]) -> Result<&mut Self, ConfigError> {
        for register in table {
            self.register(register.offset, register.reset, register.writable)?;
        }
        Ok(self)
    }

    /// Defines which bits of a register are cleared by writing ones to them.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`].
    pub fn write_one_to_clear(&mut self, offset: u16, bits: &[u8]) -> Result<&mut Self, ConfigError> {
        if usize::from(offset) + bits.len() > CONFIG_SPACE_SIZE {
            return Err(ConfigError::OutOfRange { offset, length: bits.len() });
        }
        put(&mut self.clear, offset, bits);
        Ok(self)
    }

    /// Adds a base address register.
    ///
    /// # Errors
    /// [`ConfigError::BadBar`], [`ConfigError::BadBarSize`].
    pub fn bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<&mut Self, ConfigError> {
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let used = |bar: &BarDefinition, index: u8| {
            bar.index == index
                || (matches!(bar.kind, BarKind::Memory64 { .. }) && bar.index.checked_add(1) == Some(index))
        };
        let end = index.saturating_add(u8::from(wide));
        if end > 5 || self.bars.iter().any(|bar| used(bar, index) || used(bar, end)) {
            return Err(ConfigError::BadBar(index));
        }
        if !kind.allows(size) {
            return Err(ConfigError::BadBarSize { kind, size });
        }
        let mask = !(size - 1);
        let offset = header::BAR0 + 4 * u16::from(index);
        put(&mut self.reset, offset, &kind.flags().to_le_bytes());
        if wide {
            put(&mut self.writable, offset, &mask.to_le_bytes());
        } else {
            put(&mut self.writable, offset, &mask.to_le_bytes()[..4]);
        }
        self.bars.push(BarDefinition { index, kind, size });
        Ok(self)
    }

    /// Says which interrupt pin the function drives.
    pub fn interrupt_pin(&mut self, pin: Pin) -> &mut Self {
        put(&mut self.reset, header::INTERRUPT_PIN, &[pin as u8 + 1]);
        self
    }

    /// Appends a capability. `body` is what follows its ID and next pointer, `writable` the bits of `body` that the guest
    /// can write. Returns the capability's offset.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] when there is no room left.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let offset = self.next_capability;
        let length = body.len().max(writable.len()) + 2;
        let end = usize::from(offset) + length;
        let (Ok(link), Ok(next)) = (u8::try_from(offset), u16::try_from(end.next_multiple_of(4))) else {
            return Err(ConfigError::OutOfRange { offset, length });
        };
        if end > CONFIG_SPACE_SIZE {
            return Err(ConfigError::OutOfRange { offset, length });
        }
        put(&mut self.reset, self.last_link, &[link]);
        put(&mut self.reset, offset, &[id, 0]);
        put(&mut self.reset, offset + 2, body);
        put(&mut self.writable, offset + 2, writable);
        self.last_link = offset + 1;
        self.next_capability = next;
        // Status bit 4: there is a list of capabilities.
        if let Some(status) = self.reset.get_mut(usize::from(header::STATUS)) {
            *status |= 1 << 4;
        }
        Ok(offset)
    }

    /// Finishes the configuration space, which starts with its reset values.
    #[must_use]
    pub fn build(&self) -> ConfigSpace {
        let command = get(&self.reset, header::COMMAND);
        ConfigSpace {
            value: Mutex::new(self.reset),
            command: AtomicU16::new(u16::from_le_bytes(command)),
            layout: self.clone(),
        }
    }
}

/// What a write to configuration space changed, for the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The command register has another value now.
    pub command: bool,
    /// What the function decodes may have changed: BARs, or the enable bits of the command register.
    pub decode: bool,
}

/// A function's configuration space. Shared: vCPUs read and write it, the device updates it.
#[derive(Debug)]
pub struct ConfigSpace {
    layout: ConfigSpaceBuilder,
    value: Mutex<Bytes>,
    /// A copy of the command register, for [`ConfigSpace::command`] on data paths.
    command: AtomicU16,
}

impl ConfigSpace {
    /// Reads as the guest does. Bytes beyond the configuration space read all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let value = lock(&self.value);
        let mut bytes = value.iter().skip(usize::from(offset));
        data.fill_with(|| bytes.next().copied().unwrap_or(0xFF));
    }

    /// Writes as the guest does: only writable bits, bits cleared by writing ones to them. Says what changed.
    pub fn write(&self, offset: u16, data: &[u8]) -> Written {
        let mut value = lock(&self.value);
        let before = get::<{ header::BARS_END as usize }>(&*value, 0);
        let layout = self.layout.writable.iter().zip(&self.layout.clear).skip(usize::from(offset));
        for ((byte, (writable, clear)), new) in
            value.iter_mut().skip(usize::from(offset)).zip(layout).zip(data)
        {
            *byte = (*byte & !writable | new & writable) & !(new & clear);
        }
        let after = get::<{ header::BARS_END as usize }>(&*value, 0);
        let old = u16::from_le_bytes(get(&before, header::COMMAND));
        let new = u16::from_le_bytes(get(&after, header::COMMAND));
        self.command.store(new, Ordering::Release);
        let bars = usize::from(header::BAR0);
        let enables = Command::IO | Command::MEMORY;
        Written {
            command: old != new,
            decode: (old ^ new) & enables != 0 || before.iter().skip(bars).ne(after.iter().skip(bars)),
        }
    }

    /// The register at `offset`, 8 bits. Beyond the end all ones.
    #[must_use]
    pub fn get_u8(&self, offset: u16) -> u8 {
        let mut data = [0];
        self.read(offset, &mut data);
        u8::from_le_bytes(data)
    }

    /// The register at `offset`, 16 bits. Beyond the end all ones.
    #[must_use]
    pub fn get_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The register at `offset`, 32 bits. Beyond the end all ones.
    #[must_use]
    pub fn get_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Changes bytes from the device's side, whatever the guest may write there. Not for the command register and the BARs.
    pub fn set(&self, offset: u16, data: &[u8]) {
        put(&mut *lock(&self.value), offset, data);
    }

    /// The command register. Cheap enough for data paths: one atomic load.
    #[must_use]
    pub fn command(&self) -> Command {
        Command(self.command.load(Ordering::Acquire))
    }

    /// The base address registers as they stand, whether they are decoded or not.
    #[must_use]
    pub fn bars(&self) -> Vec<Bar> {
        let value = lock(&self.value);
        let bar = |definition: &BarDefinition| {
            let offset = header::BAR0 + 4 * u16::from(definition.index);
            let raw = match definition.kind {
                BarKind::Memory64 { .. } => u64::from_le_bytes(get(&*value, offset)),
                BarKind::Io | BarKind::Memory32 => u64::from(u32::from_le_bytes(get(&*value, offset))),
            };
            let address = raw & !definition.size.wrapping_sub(1);
            Bar { index: definition.index, kind: definition.kind, address, size: definition.size }
        };
        self.layout.bars.iter().map(bar).collect()
    }

    /// The interrupt pin that the function drives.
    #[must_use]
    pub fn interrupt_pin(&self) -> Option<Pin> {
        Pin::from_register(self.get_u8(header::INTERRUPT_PIN))
    }

    /// Whether the header says that the slot has several functions.
    #[must_use]
    pub fn is_multifunction(&self) -> bool {
        self.get_u8(header::HEADER_TYPE) & 0x80 != 0
    }

    /// Restores every register to its reset value.
    pub fn reset(&self) {
        let mut value = lock(&self.value);
        *value = self.layout.reset;
        self.command.store(u16::from_le_bytes(get(&*value, header::COMMAND)), Ordering::Release);
    }

    /// The bits of the byte at `offset` that the guest can write, and those that it clears by writing ones to them.
    #[must_use]
    pub fn writable(&self, offset: u16) -> (u8, u8) {
        let byte = |bytes: &Bytes| bytes.get(usize::from(offset)).copied().unwrap_or(0);
        (byte(&self.layout.writable), byte(&self.layout.clear))
    }
}

/// Stores as much of `data` as there is room for.
fn put(bytes: &mut [u8], offset: u16, data: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(usize::from(offset)).zip(data) {
        *byte = *new;
    }
}

/// The `N` bytes at `offset`; zeros beyond the end.
fn get<const N: usize>(bytes: &[u8], offset: u16) -> [u8; N] {
    let mut data = [0; N];
    for (to, from) in data.iter_mut().zip(bytes.iter().skip(usize::from(offset))) {
        *to = *from;
    }
    data
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn builder() -> ConfigSpaceBuilder {
        ConfigSpaceBuilder::new(Identity { vendor: 0x1AF4, device: 0x1042, ..Identity::default() })
    }

    #[test]
    fn capabilities_are_a_list_from_offset_40() {
        let mut builder = builder();
        assert_eq!(builder.capability(0x09, &[0; 14], &[]), Ok(0x40));
        assert_eq!(builder.capability(0x11, &[3, 0, 0, 0, 0], &[0, 0xC0]), Ok(0x50));
        let config = builder.build();
        assert_eq!(config.get_u16(header::STATUS) & 0x10, 0x10);
        assert_eq!(config.get_u8(header::CAPABILITIES), 0x40);
        assert_eq!((config.get_u16(0x40), config.get_u16(0x50)), (0x5009, 0x0011));
        config.write(0x52, &[0xFF, 0xFF]);
        assert_eq!(config.get_u16(0x52), 0xC003);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut builder = builder();
        assert!(builder.register(0xFF, &[0, 0], &[]).is_err());
        assert!(builder.capability(0x09, &[0; 200], &[]).is_err());
        assert_eq!(
            builder.bar(5, BarKind::Memory64 { prefetchable: false }, 16).err(),
            Some(ConfigError::BadBar(5))
        );
        builder.bar(1, BarKind::Memory64 { prefetchable: false }, 16).unwrap();
        for taken in [1, 2] {
            assert_eq!(builder.bar(taken, BarKind::Io, 16).err(), Some(ConfigError::BadBar(taken)));
        }
        assert_eq!(
            builder.bar(0, BarKind::Memory64 { prefetchable: false }, 16).err(),
            Some(ConfigError::BadBar(0))
        );
        for (kind, size) in
            [(BarKind::Io, 512), (BarKind::Io, 2), (BarKind::Memory32, 24), (BarKind::Memory32, 8)]
        {
            assert_eq!(builder.bar(0, kind, size).err(), Some(ConfigError::BadBarSize { kind, size }));
        }
    }

    #[test]
    fn status_bits_are_cleared_by_ones() {
        let config = builder().build();
        config.set(header::STATUS, &[0x10, 0xF9]);
        config.write(header::STATUS, &[0xFF, 0x81]);
        assert_eq!(config.get_u16(header::STATUS), 0x7810);
    }

    #[test]
    fn writes_say_what_they_changed() {
        let mut builder = builder();
        builder.bar(0, BarKind::Memory32, 0x1000).unwrap();
        let config = builder.build();
        let written = |command, decode| Written { command, decode };
        assert_eq!(config.write(header::COMMAND, &[0x04]), written(true, false));
        assert_eq!(config.write(header::COMMAND, &[0x06]), written(true, true));
        assert_eq!(config.write(header::COMMAND, &[0x06]), written(false, false));
        assert_eq!(config.write(header::BAR0, &[0xFF, 0x0F]), written(false, false));
        assert_eq!(config.write(header::BAR0, &[0xFF, 0x1F]), written(false, true));
        assert_eq!(config.bars().first().map(|bar| bar.address), Some(0x1000));
    }

    proptest! {
        #[test]
        fn guests_change_writable_bits_only(
            writes in proptest::collection::vec((0_u16..300, proptest::collection::vec(any::<u8>(), 0..9)), 0..50)
        ) {
            let mut builder = builder();
            builder.bar(0, BarKind::Memory64 { prefetchable: true }, 1 << 20).unwrap();
            builder.bar(4, BarKind::Io, 32).unwrap();
            let (config, fresh) = (builder.build(), builder.build());
            for (offset, data) in &writes {
                config.write(*offset, data);
            }
            for offset in 0..256 {
                let (writable, _) = config.writable(offset);
                prop_assert_eq!((config.get_u8(offset) ^ fresh.get_u8(offset)) & !writable, 0);
            }
            prop_assert_eq!(config.command().0, config.get_u16(header::COMMAND));
            config.reset();
            for offset in 0..256 {
                prop_assert_eq!(config.get_u8(offset), fresh.get_u8(offset));
            }
        }
    }
}
