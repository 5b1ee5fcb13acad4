//! From a function's pin to the host's interrupt input.

use super::super::pci::InterruptPin;
use super::*;

fn with_pin(slot: u8) -> (Arc<Recorder>, Arc<Machine>, InterruptPin) {
    let (host, machine) = machine(1);
    let pin = machine.attach_pci(slot, TestFunction::new(slot)).unwrap();
    (host, machine, pin)
}

fn route(machine: &Machine, pirq: u64, value: u64) {
    config_write(machine, (1, 0), 0x60 + pirq, 1, value);
}

#[test]
fn pins_swizzle_by_slot() {
    // INTA# of slot 1 is PIRQA, of slot 2 PIRQB, and so on (pin + slot − 1) & 3.
    for (slot, pirq) in [(2, 1), (3, 2), (4, 3), (5, 0), (6, 1)] {
        let (host, machine, pin) = with_pin(slot);
        route(&machine, pirq, 10);
        pin.set(true);
        assert_eq!(host.recorded().irqs, 1 << 10, "slot {slot}");
    }
}

#[test]
fn nothing_is_routed_after_reset_nor_to_reserved_interrupts() {
    let (host, machine, pin) = with_pin(2);
    pin.set(true);
    assert_eq!(host.recorded().irqs, 0);
    for reserved in [0, 1, 2, 8, 13, 0x8A] {
        route(&machine, 1, reserved);
        assert_eq!(host.recorded().irqs, 0, "{reserved:#x}");
    }
}

#[test]
fn an_asserted_pin_follows_its_route() {
    let (host, machine, pin) = with_pin(2);
    pin.set(true);
    route(&machine, 1, 10);
    assert_eq!(host.recorded().irqs, 1 << 10);
    route(&machine, 1, 11);
    assert_eq!(host.recorded().irqs, 1 << 11);
    route(&machine, 1, 0x80);
    assert_eq!(host.recorded().irqs, 0);
    route(&machine, 1, 5);
    pin.set(false);
    assert_eq!(host.recorded().irqs, 0);
    assert_eq!(
        host.recorded().edges,
        [(10, true), (10, false), (11, true), (11, false), (5, true), (5, false)]
    );
}

#[test]
fn a_line_is_high_while_any_source_is() {
    let (host, machine, first) = with_pin(2);
    let second = machine.attach_pci(3, TestFunction::new(3)).unwrap();
    route(&machine, 1, 10);
    route(&machine, 2, 10);
    first.set(true);
    second.set(true);
    first.set(false);
    assert_eq!(host.recorded().irqs, 1 << 10);
    second.set(false);
    assert_eq!(host.recorded().irqs, 0);
}

#[test]
fn interrupt_disable_holds_the_pin_and_status_still_tells() {
    let (host, machine, pin) = with_pin(2);
    route(&machine, 1, 10);
    config_write(&machine, (2, 0), 4, 2, 0x0400);
    pin.set(true);
    assert_eq!(host.recorded().irqs, 0);
    assert_eq!(config_read(&machine, (2, 0), 6, 2) & 8, 8);
    assert_eq!(config_read(&machine, (2, 0), 4, 4) >> 16 & 8, 8);
    config_write(&machine, (2, 0), 4, 2, 0);
    assert_eq!(host.recorded().irqs, 1 << 10);
}

#[test]
fn unplugging_and_reset_release_the_line() {
    let (host, machine, pin) = with_pin(2);
    route(&machine, 1, 10);
    pin.set(true);
    machine.detach_pci(2).unwrap();
    assert_eq!(host.recorded().irqs, 0);
    let next = machine.attach_pci(2, TestFunction::new(2)).unwrap();
    pin.set(true);
    assert_eq!(host.recorded().irqs, 0, "an unplugged function's pin drives nothing");
    next.set(true);
    assert_eq!(host.recorded().irqs, 1 << 10);
    machine.reset();
    assert_eq!(host.recorded().irqs, 0);
}

#[test]
fn power_button_raises_the_sci_until_its_status_is_cleared() {
    let (host, machine) = machine(1);
    machine.assign_resources();
    machine.press_power_button();
    assert_eq!(host.recorded().irqs, 0, "not while the event is disabled");
    write(&machine, Space::Port, 0x602, 2, 0x0100);
    assert_eq!(host.recorded().irqs, 0, "not while firmware owns the registers");
    outb(&machine, 0xB2, 0xF1);
    assert_eq!(host.recorded().irqs, 1 << 9);
    write(&machine, Space::Port, 0x600, 2, 0x0100);
    assert_eq!(host.recorded().irqs, 0);
}
