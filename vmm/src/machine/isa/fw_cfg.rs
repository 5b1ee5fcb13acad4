//! fw_cfg: how firmware asks the machine what it is. Ports 510 (selector), 511 (data), 514–51B (DMA).
//!
//! The interface is that of QEMU's `docs/specs/fw_cfg`, which firmware for this platform expects. One item can be written, by DMA.

use std::sync::{Mutex, OnceLock};

use bulkhead_ipc::memory::{Direction, GuestRam};

use super::super::sync::lock;
use super::{IsaDevice, PortRange};

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;

/// The well-known items.
mod key {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const ID: u16 = 0x01;
    pub(super) const RAM_SIZE: u16 = 0x03;
    pub(super) const NO_GRAPHIC: u16 = 0x04;
    pub(super) const NB_CPUS: u16 = 0x05;
    pub(super) const BOOT_MENU: u16 = 0x0E;
    pub(super) const MAX_CPUS: u16 = 0x0F;
    pub(super) const FILE_DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
    /// The bits of a selector that name an item; 15 is for other architectures, 14 asks to write.
    pub(super) const MASK: u16 = 0xBFFF;
}

/// ID: the traditional interface, and DMA.
const ID: u32 = 0b11;
/// What the DMA address register reads: "QEMU CFG".
const DMA_SIGNATURE: u64 = 0x5145_4D55_2043_4647;
/// The file that firmware writes the generation id's address to, and its length.
pub(in super::super) const GENERATION_ADDRESS: &str = "etc/vmgenid_addr";
const ADDRESS: usize = 8;
/// Longest name of a file, its final zero included.
const NAME: usize = 56;

/// DMA control: it failed, read, skip, select, write.
const CONTROL_ERROR: u32 = 1 << 0;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;
/// The most that one DMA request may ask for, in bytes: a vCPU that copies or clears gigabytes could not be paused meanwhile.
const MAX_TRANSFER: u32 = 64 << 20;
/// The length of a DMA request in guest memory: control, length, address, all big-endian.
const REQUEST: usize = 16;

/// A range of memory as told to firmware in `etc/e820`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct MemoryRange {
    pub(in super::super) address: u64,
    pub(in super::super) length: u64,
}

/// Files that describe the machine as it is, each with its name.
pub(in super::super) type FirmwareTables = [(&'static str, Vec<u8>); 4];
/// Makes them.
pub(in super::super) type MakeTables = Box<dyn Fn() -> FirmwareTables + Send + Sync>;

/// The device.
pub(in super::super) struct FwCfg {
    state: Mutex<State>,
    ram: GuestRam,
    tables: OnceLock<MakeTables>,
}

#[derive(Default)]
struct State {
    items: Vec<(u16, Vec<u8>)>,
    files: Vec<(String, u16, usize)>,
    /// Keys of the files that are made when they are selected.
    tables: Vec<u16>,
    selected: u16,
    position: usize,
    dma_high: u32,
}

impl State {
    fn set_item(&mut self, key: u16, data: Vec<u8>) {
        self.items.retain(|(other, _)| *other != key);
        self.items.push((key, data));
    }

    fn file(&self, name: &str) -> Option<&(String, u16, usize)> {
        self.files.iter().find(|(other, ..)| other == name)
    }

    /// Gives a file other contents; its length stays, for firmware has been told it.
    fn replace_file(&mut self, name: &str, mut data: Vec<u8>) {
        if let Some(&(_, key, size)) = self.file(name) {
            data.resize(size, 0);
            self.set_item(key, data);
        }
    }

    /// What is left of the selected item.
    fn rest(&self) -> &[u8] {
        let item = self.items.iter().find(|(key, _)| *key == self.selected);
        item.and_then(|(_, data)| data.get(self.position..)).unwrap_or(&[])
    }

    fn select(&mut self, selector: u16) {
        self.selected = selector & key::MASK;
        self.position = 0;
    }

    fn advance(&mut self, count: usize) {
        self.position = self.position.saturating_add(count);
    }

    fn add_file(&mut self, name: &str, data: Vec<u8>) -> u16 {
        let count = u16::try_from(self.files.len()).unwrap_or(u16::MAX);
        let key = key::FIRST_FILE.saturating_add(count);
        self.files.push((name.to_owned(), key, data.len()));
        self.files.sort();
        self.set_item(key, data);
        let mut directory = u32::from(count).saturating_add(1).to_be_bytes().to_vec();
        for (name, key, size) in &self.files {
            directory.extend(u32::try_from(*size).unwrap_or(u32::MAX).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0, 0]);
            let mut bytes = [0; NAME];
            for (byte, character) in bytes.iter_mut().take(NAME - 1).zip(name.bytes()) {
                *byte = character;
            }
            directory.extend(bytes);
        }
        self.set_item(key::FILE_DIRECTORY, directory);
        key
    }
}

impl FwCfg {
    /// The device of a machine with so many CPUs at the start, these APIC ids of all, in ascending order, and these ranges of RAM.
    pub(in super::super) fn new(ram: GuestRam, cpus: u16, apic_ids: &[u32], memory: &[MemoryRange]) -> Self {
        let mut state = State::default();
        state.set_item(key::SIGNATURE, b"QEMU".to_vec());
        state.set_item(key::ID, ID.to_le_bytes().to_vec());
        let size = memory.iter().fold(0_u64, |sum, range| sum.saturating_add(range.length));
        state.set_item(key::RAM_SIZE, size.to_le_bytes().to_vec());
        state.set_item(key::NO_GRAPHIC, 1_u16.to_le_bytes().to_vec());
        state.set_item(key::NB_CPUS, cpus.to_le_bytes().to_vec());
        state.set_item(key::BOOT_MENU, 0_u16.to_le_bytes().to_vec());
        // Not a number of CPUs but one above the last APIC id.
        let apic_ids =
            apic_ids.last().map_or(0, |last| u16::try_from(*last).unwrap_or(u16::MAX).saturating_add(1));
        state.set_item(key::MAX_CPUS, apic_ids.to_le_bytes().to_vec());
        let mut e820 = Vec::new();
        for range in memory {
            e820.extend(range.address.to_le_bytes());
            e820.extend(range.length.to_le_bytes());
            // Type 1: RAM.
            e820.extend(1_u32.to_le_bytes());
        }
        state.add_file("etc/e820", e820);
        Self { state: Mutex::new(state), ram, tables: OnceLock::new() }
    }

    /// Adds files for firmware, and those that `tables` makes whenever firmware selects one of them. Called once, with the
    /// machine complete.
    pub(in super::super) fn add_files(&self, files: Vec<(String, Vec<u8>)>, tables: MakeTables) {
        let mut state = lock(&self.state);
        for (name, data) in files {
            state.add_file(&name, data);
        }
        for (name, data) in tables() {
            let key = state.add_file(name, data);
            state.tables.push(key);
        }
        state.add_file(GENERATION_ADDRESS, vec![0; ADDRESS]);
        let _ = self.tables.set(tables);
    }

    /// Where firmware has placed the generation id, once it has.
    pub(in super::super) fn generation_address(&self) -> Option<u64> {
        let state = lock(&self.state);
        let (_, file, _) = state.file(GENERATION_ADDRESS)?;
        let (_, bytes) = state.items.iter().find(|(key, _)| key == file)?;
        let address = u64::from_le_bytes(bytes.as_slice().try_into().ok()?);
        (address != 0).then_some(address)
    }

    /// Tells firmware to offer its boot menu.
    pub(in super::super) fn offer_boot_menu(&self) {
        lock(&self.state).set_item(key::BOOT_MENU, 1_u16.to_le_bytes().to_vec());
    }

    fn select(&self, state: &mut State, selector: u16) {
        state.select(selector);
        if let Some(make) = self.tables.get().filter(|_| state.tables.contains(&state.selected)) {
            make().into_iter().for_each(|(name, data)| state.replace_file(name, data));
        }
    }

    /// Carries out the DMA request at a guest-physical address and stores its outcome there.
    fn dma(&self, state: &mut State, address: u64) {
        let Ok(request) = self.ram.view(address, REQUEST as u64, Direction::ReadWrite) else { return };
        let mut bytes = [0; REQUEST];
        if request.read_bytes(0, &mut bytes).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, target @ ..] = bytes;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let ok = self.transfer(state, control, length, u64::from_be_bytes(target));
        let outcome = if ok { 0 } else { CONTROL_ERROR };
        // The request was readable and writable a moment ago, and RAM does not go away.
        let _ = request.write_bytes(0, &outcome.to_be_bytes());
    }

    fn transfer(&self, state: &mut State, control: u32, length: u32, target: u64) -> bool {
        if control & CONTROL_SELECT != 0 {
            self.select(state, u16::try_from(control >> 16).unwrap_or(0));
        }
        let Ok(count) = usize::try_from(length) else { return false };
        if length > MAX_TRANSFER && control & CONTROL_READ != 0 {
            return false;
        }
        if control & CONTROL_READ != 0 {
            let Ok(view) = self.ram.view(target, length.into(), Direction::Write) else { return false };
            let data = state.rest();
            let data = data.get(..count).unwrap_or(data);
            let copied = data.len() as u64;
            let zeros = u64::from(length).saturating_sub(copied);
            if view.write_bytes(0, data).is_err() || zeros > 0 && view.zero(copied, zeros).is_err() {
                return false;
            }
            state.advance(count);
        } else if control & CONTROL_WRITE != 0 {
            return self.store(state, count, target);
        } else if control & CONTROL_SKIP != 0 {
            state.advance(count);
        }
        true
    }

    /// Writes to the selected item: only the generation id's address can be, and only as a whole.
    fn store(&self, state: &mut State, count: usize, source: u64) -> bool {
        let key = state.file(GENERATION_ADDRESS).map(|(_, key, _)| *key);
        if (state.position, count) != (0, ADDRESS) || key != Some(state.selected) {
            return false;
        }
        let mut bytes = vec![0; ADDRESS];
        let view = self.ram.view(source, ADDRESS as u64, Direction::Read);
        let read = view.and_then(|view| view.read_bytes(0, &mut bytes)).is_ok();
        if read {
            state.advance(count);
            state.set_item(state.selected, bytes);
        }
        read
    }
}

impl IsaDevice for FwCfg {
    fn name(&self) -> &str {
        "fw_cfg"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: SELECTOR, count: 2 }, PortRange { first: DMA_HIGH, count: 8 }]
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = port.checked_sub(DMA_HIGH) {
            let signature = DMA_SIGNATURE.to_be_bytes().into_iter().skip(offset.into());
            for (to, from) in data.iter_mut().zip(signature) {
                *to = from;
            }
        } else if port == DATA {
            let mut state = lock(&self.state);
            for (to, from) in data.iter_mut().zip(state.rest()) {
                *to = *from;
            }
            state.advance(data.len());
        }
    }

    fn write(&self, port: u16, data: &[u8]) {
        let mut state = lock(&self.state);
        match (port, data) {
            (SELECTOR, [low, high]) => self.select(&mut state, u16::from_le_bytes([*low, *high])),
            (DMA_HIGH, [a, b, c, d]) => state.dma_high = u32::from_be_bytes([*a, *b, *c, *d]),
            (DMA_LOW, [a, b, c, d]) => {
                let high = u64::from(std::mem::take(&mut state.dma_high)) << 32;
                self.dma(&mut state, high | u64::from(u32::from_be_bytes([*a, *b, *c, *d])));
            }
            _ => {}
        }
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.select(0);
        state.dma_high = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> (GuestRam, FwCfg) {
        let ram = GuestRam::create(1 << 20).unwrap();
        let memory = [MemoryRange { address: 0, length: 1 << 20 }];
        (ram.clone(), FwCfg::new(ram, 2, &[0, 1, 6], &memory))
    }

    fn read(device: &FwCfg, key: u16, count: usize) -> Vec<u8> {
        device.write(SELECTOR, &key.to_le_bytes());
        let mut bytes = vec![0; count];
        for byte in bytes.chunks_mut(1) {
            device.read(DATA, byte);
        }
        bytes
    }

    fn dma(device: &FwCfg, ram: &GuestRam, control: u32, length: u32, target: u64) -> u32 {
        let view = ram.view(0x1000, REQUEST as u64, Direction::ReadWrite).unwrap();
        view.write(0, control.to_be()).unwrap();
        view.write(4, length.to_be()).unwrap();
        view.write(8, target.to_be()).unwrap();
        device.write(DMA_HIGH, &0_u32.to_be_bytes());
        device.write(DMA_LOW, &0x1000_u32.to_be_bytes());
        u32::from_be(view.read(0).unwrap())
    }

    #[test]
    fn items_read_byte_by_byte_and_end_in_zeros() {
        let (_, device) = device();
        assert_eq!(read(&device, key::SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(read(&device, key::ID, 4), [3, 0, 0, 0]);
        assert_eq!(read(&device, key::NB_CPUS, 2), [2, 0]);
        assert_eq!(read(&device, key::MAX_CPUS, 2), [7, 0]);
        assert_eq!(read(&device, 0x4242, 2), [0, 0]);
    }

    #[test]
    fn directory_leads_to_e820() {
        let (_, device) = device();
        let directory = read(&device, key::FILE_DIRECTORY, 68);
        assert_eq!(directory[..12], [0, 0, 0, 1, 0, 0, 0, 20, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..21], b"etc/e820\0");
        let e820 = read(&device, 0x20, 20);
        assert_eq!(e820, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn dma_selects_reads_skips_and_fills_with_zeros() {
        let (ram, device) = device();
        let target = ram.view(0x2000, 8, Direction::ReadWrite).unwrap();
        target.write(0, u64::MAX).unwrap();
        let select = u32::from(key::SIGNATURE) << 16 | CONTROL_SELECT;
        assert_eq!(dma(&device, &ram, select | CONTROL_SKIP, 1, 0), 0);
        assert_eq!(dma(&device, &ram, CONTROL_READ, 6, 0x2000), 0);
        let mut bytes = [0; 8];
        target.read_bytes(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"EMU\0\0\0\xFF\xFF");
    }

    #[test]
    fn dma_outside_of_ram_and_writes_fail() {
        let (ram, device) = device();
        assert_eq!(dma(&device, &ram, CONTROL_READ, 6, 0xF_FFFE), CONTROL_ERROR);
        assert_eq!(dma(&device, &ram, CONTROL_READ, u32::MAX, u64::MAX), CONTROL_ERROR);
        assert_eq!(dma(&device, &ram, CONTROL_WRITE, 1, 0), CONTROL_ERROR);
        // Far more than any item, although there would be room.
        let large = GuestRam::create(u64::from(MAX_TRANSFER) + (1 << 20)).unwrap();
        let cfg = FwCfg::new(large.clone(), 1, &[0], &[]);
        assert_eq!(dma(&cfg, &large, CONTROL_READ, MAX_TRANSFER + 1, 0x2000), CONTROL_ERROR);
        // The request itself outside of RAM: nothing happens.
        device.write(DMA_HIGH, &u32::MAX.to_be_bytes());
        device.write(DMA_LOW, &u32::MAX.to_be_bytes());
    }

    #[test]
    fn requests_that_leave_ram_or_ask_for_4_gib_end_at_once() {
        let (ram, device) = device();
        let untouched = |ram: &GuestRam| ram.dirty_pages().pages().count();
        // The request itself: across the end of RAM, at its end, far behind, at the end of all addresses.
        let clean = untouched(&ram);
        for request in [0xF_FFF1_u64, 0x10_0000, 0xFEE0_0000, 1 << 40, u64::MAX - 15, u64::MAX] {
            let [high, low] = [request >> 32, request & 0xFFFF_FFFF].map(|half| u32::try_from(half).unwrap());
            device.write(DMA_HIGH, &high.to_be_bytes());
            device.write(DMA_LOW, &low.to_be_bytes());
            assert_eq!(untouched(&ram), clean, "{request:#x}");
        }
        // The last that is whole.
        let view = ram.view(0xF_FFF0, REQUEST as u64, Direction::ReadWrite).unwrap();
        view.write(0, CONTROL_WRITE.to_be()).unwrap();
        device.write(DMA_LOW, &0xF_FFF0_u32.to_be_bytes());
        assert_eq!(u32::from_be(view.read(0).unwrap()), CONTROL_ERROR);
        // Its data: nothing is copied or cleared before the end of RAM is found out.
        let target = ram.view(0x2000, 8, Direction::ReadWrite).unwrap();
        target.write(0, u64::MAX).unwrap();
        let select = u32::from(key::SIGNATURE) << 16 | CONTROL_SELECT;
        for (length, address) in [(u32::MAX, 0x2000), (u32::MAX, 0), (0xF_E001, 0x2000), (8, u64::MAX - 3)] {
            for control in [CONTROL_READ, CONTROL_WRITE, CONTROL_READ | CONTROL_WRITE] {
                assert_eq!(
                    dma(&device, &ram, select | control, length, address),
                    CONTROL_ERROR,
                    "{length:#x}"
                );
                assert_eq!(target.read::<u64>(0).unwrap(), u64::MAX);
            }
        }
        // What is skipped is not touched, however much: the item has ended.
        for _ in 0..3 {
            assert_eq!(dma(&device, &ram, CONTROL_SKIP, u32::MAX, u64::MAX), 0);
        }
        assert_eq!(dma(&device, &ram, CONTROL_READ, 8, 0x2000), 0);
        assert_eq!(target.read::<u64>(0).unwrap(), 0);
    }

    #[test]
    fn dma_onto_its_own_request_is_carried_out_once() {
        let (ram, device) = device();
        let select = u32::from(key::SIGNATURE) << 16 | CONTROL_SELECT;
        assert_eq!(dma(&device, &ram, select | CONTROL_READ, 8, 0x1002), 0);
        let mut bytes = [0xFF; REQUEST];
        ram.view(0x1000, REQUEST as u64, Direction::Read).unwrap().read_bytes(0, &mut bytes).unwrap();
        // The outcome comes last, and what was written is no new request.
        assert_eq!(bytes, *b"\0\0\0\0MU\0\0\0\0\0\0\0\0\x10\x02");
        assert_eq!(dma(&device, &ram, CONTROL_READ, 4, 0x2000), 0);
    }

    #[test]
    fn dma_address_reads_as_signature() {
        let (_, device) = device();
        let mut bytes = [0; 4];
        device.read(DMA_HIGH, &mut bytes);
        assert_eq!(&bytes, b"QEMU");
        device.read(DMA_LOW, &mut bytes);
        assert_eq!(&bytes, b" CFG");
    }
}
