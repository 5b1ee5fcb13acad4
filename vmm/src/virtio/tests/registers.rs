//! Identity, capabilities and the register blocks.

use super::driver::{
    Block, CONFIG_VECTOR, DEVICE_FEATURE, DEVICE_FEATURE_SELECT, DRIVER_FEATURE, DRIVER_FEATURE_SELECT,
    GENERATION, NUM_QUEUES, QUEUE_DESC, QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_ENABLE, QUEUE_NOTIFY_OFF,
    QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR,
};
use super::*;
use crate::machine::PciFunction;
use crate::machine::pci::header;

#[test]
fn the_function_says_what_it_is() {
    let (scaffold, _peer) = scaffold();
    let driver = &scaffold.driver;
    assert_eq!(driver.config_u32(header::VENDOR_ID), 0x1042_1AF4);
    assert_eq!(driver.config_u32(header::REVISION_ID), 0x0100_0001);
    assert_eq!(driver.config_u32(header::SUBSYSTEM_VENDOR_ID), 0x1100_1AF4);
    assert_eq!(driver.config_u8(header::INTERRUPT_PIN), 1);
    assert_eq!(driver.common, Block { bar: 0, offset: 0, length: 0x38 });
    assert_eq!((driver.isr.length, driver.config.length, driver.notify.length), (1, 60, 8));
    assert_eq!(driver.multiplier, 4);
    assert_ne!((driver.window, driver.msix), (0, 0));
    assert_eq!(driver.config_u32(driver.msix) >> 16 & 0x7FF, 2, "three vectors");
    assert_eq!(driver.get16(NUM_QUEUES), 2);
    for kind in [DeviceType::ENTROPY, DeviceType::CONSOLE, DeviceType::NET, DeviceType::from_id(19)] {
        let layout = capabilities::build(&kind, 256, 257, None).unwrap();
        assert_eq!(layout.config.get_u16(header::DEVICE_ID), 0x1040 + kind.id);
        assert!(layout.pba >= 257 * 16);
    }
}

#[test]
fn features_of_the_transport_are_the_only_ones_offered() {
    let (scaffold, _peer) = scaffold();
    let driver = &scaffold.driver;
    let offered = driver.device_features();
    assert_eq!(offered, 1 << 32 | 1 << 29 | 1 << 28 | 0x1041);
    driver.put32(DEVICE_FEATURE_SELECT, 2);
    assert_eq!(driver.get32(DEVICE_FEATURE), 0);

    assert!(driver.negotiate(1 << 32));
    assert!(!driver.negotiate(1 << 32 | 1 << 34), "a feature that was not offered");
    assert!(!driver.negotiate(0x1041), "no VERSION_1");
    driver.set_status(0);
    driver.accept(1 << 32);
    driver.put32(DRIVER_FEATURE_SELECT, 2);
    driver.put32(DRIVER_FEATURE, 1);
    driver.set_status(11);
    assert_eq!(driver.status(), 3, "a feature beyond the first 64");
    driver.set_status(0);
    assert!(driver.negotiate(offered));
    driver.accept(1 << 32);
    driver.put32(DRIVER_FEATURE_SELECT, 0);
    assert_eq!(driver.get32(DRIVER_FEATURE), 0x3000_1041, "settled by FEATURES_OK");
}

#[test]
fn driver_ok_without_features_ok_starts_nothing() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.bus_master(true);
    driver.queue(0, 256, 0x1_0000);
    peer.requests();
    driver.set_status(7);
    assert_eq!(driver.status(), 3);
    assert!(peer.requests().is_empty());
}

#[test]
fn queues_keep_what_is_written_and_missing_ones_read_zero() {
    let (scaffold, _peer) = scaffold();
    let driver = &scaffold.driver;
    driver.put16(QUEUE_SELECT, 1);
    assert_eq!(driver.get16(QUEUE_SIZE), 256);
    assert_eq!(driver.get16(QUEUE_NOTIFY_OFF), 1);
    assert_eq!(driver.get16(QUEUE_VECTOR), 0xFFFF);
    driver.put64(QUEUE_DESC, 0x1122_3344_5566_7788);
    // Whole, as a 64-bit access.
    driver.put(driver.common, QUEUE_DRIVER, &0x99AA_BBCC_DDEE_FF00u64.to_le_bytes());
    assert_eq!(u64::from_le_bytes(driver.get(driver.common, QUEUE_DESC)), 0x1122_3344_5566_7788);
    assert_eq!(driver.get32(QUEUE_DESC + 4), 0x1122_3344);
    assert_eq!(u64::from_le_bytes(driver.get(driver.common, QUEUE_DRIVER)), 0x99AA_BBCC_DDEE_FF00);
    driver.put16(QUEUE_SELECT, 0);
    assert_eq!(driver.get32(QUEUE_DESC), 0);
    driver.put16(QUEUE_SELECT, 2);
    driver.put32(QUEUE_DESC, 1);
    for register in [QUEUE_SIZE, QUEUE_ENABLE, QUEUE_NOTIFY_OFF, QUEUE_DESC] {
        assert_eq!(driver.get16(register), 0);
    }
    assert_eq!(driver.get16(QUEUE_VECTOR), 0xFFFF);
    for vector in [3, 0x7FFF, 0xFFFF] {
        driver.put16(CONFIG_VECTOR, vector);
        assert_eq!(driver.get16(CONFIG_VECTOR), 0xFFFF, "no such vector");
    }
    driver.put16(CONFIG_VECTOR, 2);
    assert_eq!(driver.get16(CONFIG_VECTOR), 2);
}

#[test]
fn rings_that_no_device_can_use_are_not_enabled() {
    let (scaffold, _peer) = scaffold();
    let driver = &scaffold.driver;
    let enabled = |size: u16, desc: u64, avail: u64, used: u64| {
        driver.set_status(0);
        driver.put16(QUEUE_SELECT, 0);
        driver.put16(QUEUE_SIZE, size);
        driver.put64(QUEUE_DESC, desc);
        driver.put64(QUEUE_DRIVER, avail);
        driver.put64(QUEUE_DEVICE, used);
        driver.put16(QUEUE_ENABLE, 1);
        driver.get16(QUEUE_ENABLE) == 1
    };
    assert!(enabled(256, 0x1000, 0x2000, 0x3000));
    assert!(!enabled(256, 0x1008, 0x2000, 0x3000), "descriptor table: 16 bytes");
    assert!(!enabled(256, 0x1000, 0x2001, 0x3000), "available ring: 2 bytes");
    assert!(!enabled(256, 0x1000, 0x2000, 0x3002), "used ring: 4 bytes");
    assert!(!enabled(256, RAM, 0x2000, 0x3000));
    assert!(!enabled(256, RAM - 256 * 16 + 16, 0x2000, 0x3000));
    assert!(enabled(256, RAM - 256 * 16, 0x2000, 0x3000), "to the last byte");
    assert!(!enabled(256, 0x1000, 0x2000, u64::MAX - 3));
    assert!(!enabled(256, 0x1000, 0x2000, 0xFEE0_0000));
    for size in [0, 3, 512, 0x8000, 0xFFFF] {
        assert!(enabled(size, 0x1000, 0x2000, 0x3000), "{size} is ignored");
        assert_eq!(driver.get16(QUEUE_SIZE), 256);
    }
    driver.put16(QUEUE_SIZE, 64);
    driver.put32(QUEUE_DESC, 0x5000);
    assert_eq!((driver.get16(QUEUE_SIZE), driver.get32(QUEUE_DESC)), (256, 0x1000), "fixed while enabled");
}

#[test]
fn the_configuration_is_cached_and_changes_with_its_generation() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    peer.requests();
    assert_eq!(driver.get::<8>(driver.config, 4), [4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(driver.get::<4>(driver.config, 58), [58, 59, 0, 0]);
    assert!(peer.requests().is_empty(), "a read asks nobody");

    let before = driver.get::<1>(driver.common, GENERATION);
    peer.change_config(vec![9; 60]);
    wait_until(&scaffold.device, || driver.get::<1>(driver.common, GENERATION) != before);
    assert_eq!(driver.get::<4>(driver.config, 0), [9; 4]);
    assert_eq!(driver.get::<1>(driver.isr, 0), [2]);
    assert!(!scaffold.pin.asserted());
}

#[test]
fn a_write_to_the_configuration_reaches_the_back_end() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    driver.put(driver.config, 32, &[1]);
    driver.put(driver.config, 58, &[1, 2, 3, 4]);
    let writes = peer.payloads(bulkhead_ipc::vhost_user::message::FrontendReq::SET_CONFIG);
    assert_eq!(writes, [vec![32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]], "none beyond the end");
}

#[test]
fn doorbells_lead_to_the_kick_descriptors() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    let doorbells = scaffold.device.doorbells();
    let places: Vec<_> = doorbells.iter().map(|bell| (bell.bar, bell.offset, bell.length)).collect();
    assert_eq!(places, [(0, driver.notify.offset, 2), (0, driver.notify.offset + 4, 2)]);
    driver.start();
    let kicked = |queue: usize| {
        let seen = peer.seen.lock().unwrap();
        nix::unistd::read(&seen.kicks[queue], &mut [0; 8]).is_ok()
    };
    // Each start kicks: what waits in the ring must be found.
    assert!(kicked(0) && kicked(1));
    driver.notify(1);
    assert!(!kicked(0) && kicked(1));
    driver.put(driver.notify, 0, &[0]);
    assert!(kicked(0));
    driver.put(driver.notify, 8, &[0, 0]);
    assert!(!kicked(0) && !kicked(1));
    assert!(scaffold.device.doorbell_event(doorbells[1].id).is_some());
    assert!(scaffold.device.doorbell_event(crate::machine::pci::DoorbellId(2)).is_none());
}
