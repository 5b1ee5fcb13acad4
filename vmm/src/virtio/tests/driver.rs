//! A driver: finds the register blocks through the capabilities and talks to them.

use std::sync::Arc;

use super::super::VirtioPci;
use crate::machine::PciFunction;
use crate::machine::pci::{Command, header};

pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub const DEVICE_FEATURE: u64 = 0x04;
pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub const DRIVER_FEATURE: u64 = 0x0C;
pub const CONFIG_VECTOR: u64 = 0x10;
pub const NUM_QUEUES: u64 = 0x12;
pub const STATUS: u64 = 0x14;
pub const GENERATION: u64 = 0x15;
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const QUEUE_VECTOR: u64 = 0x1A;
pub const QUEUE_ENABLE: u64 = 0x1C;
pub const QUEUE_NOTIFY_OFF: u64 = 0x1E;
pub const QUEUE_DESC: u64 = 0x20;
pub const QUEUE_DRIVER: u64 = 0x28;
pub const QUEUE_DEVICE: u64 = 0x30;

/// A register block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    pub bar: u8,
    pub offset: u64,
    pub length: u32,
}

pub struct Driver {
    pub device: Arc<VirtioPci>,
    pub common: Block,
    pub notify: Block,
    pub multiplier: u32,
    pub isr: Block,
    pub config: Block,
    /// Offset of the PCI configuration access capability.
    pub window: u16,
    /// Offset of the MSI-X capability.
    pub msix: u16,
    pub table: Block,
    pub pba: Block,
}

impl Driver {
    /// Walks the capability list.
    pub fn new(device: Arc<VirtioPci>) -> Self {
        let mut this = Self {
            common: Block::default(),
            notify: Block::default(),
            multiplier: 0,
            isr: Block::default(),
            config: Block::default(),
            window: 0,
            msix: 0,
            table: Block::default(),
            pba: Block::default(),
            device,
        };
        let mut offset = u16::from(this.config_u8(header::CAPABILITIES));
        while offset != 0 {
            let block = Block {
                bar: this.config_u8(offset + 4),
                offset: this.config_u32(offset + 8).into(),
                length: this.config_u32(offset + 12),
            };
            match (this.config_u8(offset), this.config_u8(offset + 3)) {
                (0x09, 1) => this.common = block,
                (0x09, 2) => {
                    this.notify = block;
                    this.multiplier = this.config_u32(offset + 16);
                }
                (0x09, 3) => this.isr = block,
                (0x09, 4) => this.config = block,
                (0x09, 5) => this.window = offset,
                (0x11, _) => {
                    this.msix = offset;
                    let place = |word: u32, length| Block {
                        bar: u8::try_from(word & 7).unwrap(),
                        offset: u64::from(word & !7),
                        length,
                    };
                    this.table = place(this.config_u32(offset + 4), 0);
                    this.pba = place(this.config_u32(offset + 8), 0);
                }
                other => panic!("capability {other:?}"),
            }
            offset = this.config_u8(offset + 1).into();
        }
        this
    }

    /// Reads configuration space the way the bus does.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.device.config_will_read(offset, data.len());
        self.device.config().read(offset, data);
    }

    /// Writes configuration space the way the bus does.
    pub fn config_write(&self, offset: u16, data: &[u8]) {
        let written = self.device.config().write(offset, data);
        self.device.config_written(offset, data.len());
        if written.command {
            self.device.command_changed(self.device.config().command());
        }
    }

    pub fn config_u8(&self, offset: u16) -> u8 {
        let mut data = [0];
        self.config_read(offset, &mut data);
        data[0]
    }

    pub fn config_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn bus_master(&self, on: bool) {
        let command = Command::MEMORY | if on { Command::BUS_MASTER } else { 0 };
        self.config_write(header::COMMAND, &command.to_le_bytes());
    }

    pub fn get<const N: usize>(&self, block: Block, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.bar_read(block.bar, block.offset + offset, &mut data);
        data
    }

    pub fn put(&self, block: Block, offset: u64, data: &[u8]) {
        self.device.bar_write(block.bar, block.offset + offset, data);
    }

    pub fn get16(&self, register: u64) -> u16 {
        u16::from_le_bytes(self.get(self.common, register))
    }

    pub fn get32(&self, register: u64) -> u32 {
        u32::from_le_bytes(self.get(self.common, register))
    }

    pub fn put16(&self, register: u64, value: u16) {
        self.put(self.common, register, &value.to_le_bytes());
    }

    pub fn put32(&self, register: u64, value: u32) {
        self.put(self.common, register, &value.to_le_bytes());
    }

    /// A 64-bit register, low half first as Linux does.
    pub fn put64(&self, register: u64, value: u64) {
        self.put32(register, u32::try_from(value & 0xFFFF_FFFF).unwrap());
        self.put32(register + 4, u32::try_from(value >> 32).unwrap());
    }

    pub fn status(&self) -> u8 {
        let [status] = self.get(self.common, STATUS);
        status
    }

    pub fn set_status(&self, status: u8) {
        self.put(self.common, STATUS, &[status]);
    }

    pub fn device_features(&self) -> u64 {
        let mut features = 0;
        for select in [0, 1] {
            self.put32(DEVICE_FEATURE_SELECT, select);
            features |= u64::from(self.get32(DEVICE_FEATURE)) << (32 * select);
        }
        features
    }

    pub fn accept(&self, features: u64) {
        for select in [0, 1] {
            self.put32(DRIVER_FEATURE_SELECT, select);
            self.put32(DRIVER_FEATURE, u32::try_from(features >> (32 * select) & 0xFFFF_FFFF).unwrap());
        }
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(11);
        self.status() == 11
    }

    /// Sets up a queue with its rings at `base`.
    pub fn queue(&self, index: u16, size: u16, base: u64) {
        self.put16(QUEUE_SELECT, index);
        self.put16(QUEUE_SIZE, size);
        self.put64(QUEUE_DESC, base);
        self.put64(QUEUE_DRIVER, base + 0x1000);
        self.put64(QUEUE_DEVICE, base + 0x2000);
        self.put16(QUEUE_ENABLE, 1);
    }

    /// Everything up to DRIVER_OK, with queues 0 and 1.
    pub fn start(&self) {
        self.bus_master(true);
        assert!(self.negotiate(self.device_features()));
        self.queue(0, 256, 0x1_0000);
        self.queue(1, 128, 0x2_0000);
        self.set_status(15);
    }

    pub fn notify(&self, queue: u16) {
        let offset = u64::from(queue) * u64::from(self.multiplier);
        self.put(self.notify, offset, &queue.to_le_bytes());
    }

    /// Writes an MSI-X table entry.
    pub fn vector(&self, vector: u16, address: u64, data: u32, masked: bool) {
        let entry = u64::from(vector) * 16;
        self.put(self.table, entry, &u32::try_from(address & 0xFFFF_FFFF).unwrap().to_le_bytes());
        self.put(self.table, entry + 4, &u32::try_from(address >> 32).unwrap().to_le_bytes());
        self.put(self.table, entry + 8, &data.to_le_bytes());
        self.put(self.table, entry + 12, &u32::from(masked).to_le_bytes());
    }

    /// Writes message control: enable, function mask.
    pub fn msix_control(&self, enable: bool, masked: bool) {
        let control = u16::from(enable) << 15 | u16::from(masked) << 14;
        self.config_write(self.msix + 2, &control.to_le_bytes());
    }

    /// The first 32 pending bits.
    pub fn pending(&self) -> u32 {
        u32::from_le_bytes(self.get(self.pba, 0))
    }
}
