//! INTx and MSI-X.

use super::driver::{CONFIG_VECTOR, QUEUE_SELECT, QUEUE_VECTOR};
use super::*;

const ADDRESS: u64 = 0xFEE0_1000;

#[test]
fn without_msix_a_call_sets_isr_and_pin() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    peer.call(1);
    wait_until(&scaffold.device, || scaffold.pin.asserted());
    assert_eq!(driver.get::<1>(driver.isr, 0), [1]);
    assert!(!scaffold.pin.asserted());
    assert_eq!(driver.get::<1>(driver.isr, 0), [0]);
    peer.call(0);
    peer.change_config(vec![1; 60]);
    let mut causes = 0;
    wait_until(&scaffold.device, || {
        causes |= driver.get::<1>(driver.isr, 0)[0];
        causes == 3
    });
}

/// Queues 0 and 1 on vector 1, the configuration on vector 0.
fn with_vectors(driver: &Driver) {
    driver.start();
    driver.vector(0, ADDRESS, 0x40, false);
    driver.vector(1, ADDRESS, 0x41, false);
    driver.msix_control(true, false);
    driver.put16(CONFIG_VECTOR, 0);
    for queue in [0, 1] {
        driver.put16(QUEUE_SELECT, queue);
        driver.put16(QUEUE_VECTOR, 1);
        assert_eq!(driver.get16(QUEUE_VECTOR), 1);
    }
}

#[test]
fn with_msix_calls_go_to_the_host_and_not_through_here() {
    let (scaffold, peer) = scaffold();
    with_vectors(&scaffold.driver);
    assert_eq!(scaffold.messages.of(0), Some(MsiMessage { address: ADDRESS, data: 0x40 }));
    assert_eq!(scaffold.messages.of(1), Some(MsiMessage { address: ADDRESS, data: 0x41 }));
    assert_eq!(scaffold.messages.of(2), scaffold.messages.of(1));
    assert!(!scaffold.messages.delivered(2));
    peer.call(1);
    assert!(scaffold.messages.delivered(2));
    scaffold.device.on_event();
    assert!(!scaffold.pin.asserted());
    assert_eq!(scaffold.driver.pending(), 0);
    peer.change_config(vec![1; 60]);
    wait_until(&scaffold.device, || scaffold.messages.delivered(0));
    // A vector that moves takes its sources along.
    scaffold.driver.vector(1, ADDRESS, 0x51, false);
    assert_eq!(scaffold.messages.of(2), Some(MsiMessage { address: ADDRESS, data: 0x51 }));
}

#[test]
fn masked_vectors_are_pending_and_delivered_when_unmasked() {
    let (scaffold, peer) = scaffold();
    let (driver, messages) = (&scaffold.driver, &scaffold.messages);
    with_vectors(driver);
    driver.put(driver.table, 16 + 12, &1u32.to_le_bytes());
    assert_eq!((messages.of(1), messages.of(2)), (None, None));
    assert!(messages.of(0).is_some());
    peer.call(0);
    assert_eq!(driver.pending(), 1 << 1);
    assert_eq!(driver.pending(), 1 << 1, "reading changes nothing");
    driver.put(driver.table, 16 + 12, &0u32.to_le_bytes());
    assert!(messages.delivered(1));
    assert_eq!(driver.pending(), 0);

    driver.msix_control(true, true);
    assert_eq!(messages.of(0), None);
    peer.call(1);
    peer.change_config(vec![3; 60]);
    wait_until(&scaffold.device, || driver.pending() == 3);
    driver.msix_control(true, false);
    assert!(messages.delivered(0) && messages.delivered(2));
}

#[test]
fn messages_need_a_bus_master() {
    let (scaffold, peer) = scaffold();
    with_vectors(&scaffold.driver);
    scaffold.driver.bus_master(false);
    assert_eq!(scaffold.messages.of(1), None);
    peer.call(0);
    scaffold.driver.bus_master(true);
    assert!(scaffold.messages.delivered(1));
}

#[test]
fn a_source_without_vector_interrupts_nobody() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    driver.vector(1, ADDRESS, 0x41, false);
    driver.msix_control(true, false);
    peer.call(0);
    scaffold.device.on_event();
    assert!(!scaffold.pin.asserted());
    driver.put16(QUEUE_SELECT, 0);
    driver.put16(QUEUE_VECTOR, 1);
    assert!(scaffold.messages.of(1).is_some());
    assert!(!scaffold.messages.delivered(1), "what came before is forgotten");
    driver.put16(QUEUE_VECTOR, 0xFFFF);
    assert_eq!(scaffold.messages.of(1), None);
}

#[test]
fn msix_off_goes_back_to_the_pin_and_reset_disconnects() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    with_vectors(driver);
    driver.msix_control(false, false);
    assert!(scaffold.messages.connected.lock().unwrap().is_empty());
    peer.call(0);
    wait_until(&scaffold.device, || scaffold.pin.asserted());
    driver.msix_control(true, false);
    assert!(!scaffold.pin.asserted());
    assert!(scaffold.messages.of(1).is_some());
    driver.set_status(0);
    assert!(scaffold.messages.connected.lock().unwrap().is_empty());
}

#[test]
fn nothing_stays_connected_when_the_device_goes() {
    let (scaffold, _peer) = scaffold();
    with_vectors(&scaffold.driver);
    let messages = Arc::clone(&scaffold.messages);
    drop(scaffold);
    assert!(messages.connected.lock().unwrap().is_empty());
}
