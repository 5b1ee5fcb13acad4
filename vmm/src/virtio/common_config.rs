//! The common configuration (section 4.1.4.3): `struct virtio_pci_common_cfg` up to `queue_device`.
//!
//! A driver accesses fields with their own width, the 64-bit ones in halves too. Here any width works: a read takes
//! bytes out of the image of all fields, a write is laid over the fields that it touches.

use super::capabilities::COMMON_SIZE;
use super::device::{State, VirtioPci};
use super::queues::{NO_VECTOR, Queue};
use super::status;

const SIZE: usize = 0x38;
const _: () = assert!(SIZE as u64 == COMMON_SIZE);

/// Fields; the 64-bit ones as halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
}

/// Offset, width, field.
const FIELDS: [(usize, usize, Field); 19] = [
    (0x00, 4, Field::DeviceFeatureSelect),
    (0x04, 4, Field::DeviceFeature),
    (0x08, 4, Field::DriverFeatureSelect),
    (0x0C, 4, Field::DriverFeature),
    (0x10, 2, Field::ConfigMsixVector),
    (0x12, 2, Field::NumQueues),
    (0x14, 1, Field::DeviceStatus),
    (0x15, 1, Field::ConfigGeneration),
    (0x16, 2, Field::QueueSelect),
    (0x18, 2, Field::QueueSize),
    (0x1A, 2, Field::QueueMsixVector),
    (0x1C, 2, Field::QueueEnable),
    (0x1E, 2, Field::QueueNotifyOff),
    (0x20, 4, Field::QueueDescLow),
    (0x24, 4, Field::QueueDescHigh),
    (0x28, 4, Field::QueueDriverLow),
    (0x2C, 4, Field::QueueDriverHigh),
    (0x30, 4, Field::QueueDeviceLow),
    (0x34, 4, Field::QueueDeviceHigh),
];

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(value: &mut u64, half: u32) {
    *value = *value & !0xFFFF_FFFF | u64::from(half);
}

fn set_high(value: &mut u64, half: u32) {
    *value = *value & 0xFFFF_FFFF | u64::from(half) << 32;
}

impl State {
    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn common_field(&self, field: Field) -> u32 {
        let queue = self.selected();
        let of_queue = |value: fn(&Queue) -> u32| queue.map_or(0, value);
        match field {
            Field::DeviceFeatureSelect => self.features.device_select,
            Field::DeviceFeature => self.features.device_window(),
            Field::DriverFeatureSelect => self.features.driver_select,
            Field::DriverFeature => self.features.driver_window(),
            Field::ConfigMsixVector => self.interrupts.config_vector().into(),
            Field::NumQueues => u16::try_from(self.queues.len()).unwrap_or(u16::MAX).into(),
            Field::DeviceStatus => self.status.into(),
            Field::ConfigGeneration => self.config.generation.into(),
            Field::QueueSelect => self.queue_select.into(),
            // Size 0: there is no such queue.
            Field::QueueSize => of_queue(|queue| queue.size.into()),
            Field::QueueMsixVector => {
                queue.map_or(NO_VECTOR, |_| self.interrupts.queue_vector(self.queue_select)).into()
            }
            Field::QueueEnable => of_queue(|queue| queue.enabled.into()),
            Field::QueueNotifyOff => queue.map_or(0, |_| self.queue_select.into()),
            Field::QueueDescLow => of_queue(|queue| low(queue.ring.descriptors)),
            Field::QueueDescHigh => of_queue(|queue| high(queue.ring.descriptors)),
            Field::QueueDriverLow => of_queue(|queue| low(queue.ring.available)),
            Field::QueueDriverHigh => of_queue(|queue| high(queue.ring.available)),
            Field::QueueDeviceLow => of_queue(|queue| low(queue.ring.used)),
            Field::QueueDeviceHigh => of_queue(|queue| high(queue.ring.used)),
        }
    }

    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; SIZE];
        for (at, width, field) in FIELDS {
            let bytes = self.common_field(field).to_le_bytes();
            for (to, from) in image.iter_mut().skip(at).zip(bytes.iter().take(width)) {
                *to = *from;
            }
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = image.iter().skip(start);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }
}

impl VirtioPci {
    pub(super) fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(data.len());
        for (at, width, field) in FIELDS {
            if at >= end || at.saturating_add(width) <= start {
                continue;
            }
            let mut bytes = state.common_field(field).to_le_bytes();
            for (index, byte) in bytes.iter_mut().enumerate().take(width) {
                let written = at.saturating_add(index).checked_sub(start).and_then(|index| data.get(index));
                *byte = written.copied().unwrap_or(*byte);
            }
            let [a, b, ..] = bytes;
            self.set_common_field(state, field, u32::from_le_bytes(bytes), u16::from_le_bytes([a, b]), a);
        }
    }

    /// Sets a field, given as wide as it may be.
    fn set_common_field(&self, state: &mut State, field: Field, value: u32, half: u16, byte: u8) {
        let select = state.queue_select;
        match field {
            Field::DeviceFeatureSelect => state.features.device_select = value,
            Field::DriverFeatureSelect => state.features.driver_select = value,
            Field::DriverFeature => {
                if state.status & status::FEATURES_OK == 0 {
                    state.features.set_driver_window(value);
                }
            }
            Field::ConfigMsixVector => state.interrupts.set_config_vector(half),
            Field::DeviceStatus => self.set_status(state, byte),
            Field::QueueSelect => state.queue_select = half,
            Field::QueueMsixVector => {
                if state.selected().is_some() {
                    state.interrupts.set_queue_vector(select, half);
                }
            }
            Field::QueueEnable => {
                if half == 1 {
                    self.enable_queue(state, select);
                }
            }
            Field::DeviceFeature | Field::NumQueues | Field::ConfigGeneration | Field::QueueNotifyOff => {}
            Field::QueueSize
            | Field::QueueDescLow
            | Field::QueueDescHigh
            | Field::QueueDriverLow
            | Field::QueueDriverHigh
            | Field::QueueDeviceLow
            | Field::QueueDeviceHigh => {
                let queue = state.queues.get_mut(usize::from(select));
                if let Some(queue) = queue.filter(|queue| !queue.enabled) {
                    set_queue_field(queue, field, value, half);
                }
            }
        }
    }

    /// The driver writes the device status (sections 2.1 and 3.1).
    fn set_status(&self, state: &mut State, value: u8) {
        if value == 0 {
            self.reset_device(state);
            return;
        }
        let mut new = value & status::DRIVERS | state.status & status::NEEDS_RESET;
        if new & status::FEATURES_OK != 0 && state.status & status::FEATURES_OK == 0 {
            let usable = state.features.acceptable() && state.link.is_some();
            if !usable {
                let accepted = state.features.accepted();
                self.complain(state, &format_args!("features {accepted:#x} of the driver refused"));
                new &= !status::FEATURES_OK;
            }
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        state.status = new;
        self.reconcile(state);
    }

    fn enable_queue(&self, state: &mut State, index: u16) {
        let Some(queue) = state.queues.get_mut(usize::from(index)) else { return };
        if queue.enabled {
            return;
        }
        match queue.check(&self.ram) {
            Ok(()) => {
                queue.enabled = true;
                self.reconcile(state);
            }
            Err(error) => self.complain(state, &format_args!("queue {index} cannot be enabled: {error}")),
        }
    }
}

fn set_queue_field(queue: &mut Queue, field: Field, value: u32, half: u16) {
    match field {
        Field::QueueSize => queue.set_size(half),
        Field::QueueDescLow => set_low(&mut queue.ring.descriptors, value),
        Field::QueueDescHigh => set_high(&mut queue.ring.descriptors, value),
        Field::QueueDriverLow => set_low(&mut queue.ring.available, value),
        Field::QueueDriverHigh => set_high(&mut queue.ring.available, value),
        Field::QueueDeviceLow => set_low(&mut queue.ring.used, value),
        Field::QueueDeviceHigh => set_high(&mut queue.ring.used, value),
        _ => {}
    }
}
