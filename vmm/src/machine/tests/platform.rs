//! Ports and behaviours that operating systems rely on.

use std::time::Duration;

use super::super::{AttachError, IsaDevice, PortRange, PowerEvent, ResetSource};
use super::*;

#[test]
fn only_dwords_latch_the_configuration_address() {
    let (_, machine) = machine(1);
    write(&machine, Space::Port, 0xCF8, 4, 0x8000_0804);
    for (address, width) in [(0xCF8, 1), (0xCFB, 1), (0xCF8, 2), (0xCFA, 2)] {
        write(&machine, Space::Port, address, width, 0x0101);
        assert_eq!(read(&machine, Space::Port, 0xCF8, 4), 0x8000_0804);
    }
    assert_eq!(read(&machine, Space::Port, 0xCF8, 2), 0xFFFF & !0xFF00, "a word meets CF9 in its high byte");
    assert_eq!(inb(&machine, 0xCFB), 0xFF);
}

#[test]
fn linux_finds_mechanism_1() {
    let (_, machine) = machine(1);
    outb(&machine, 0xCFB, 1);
    write(&machine, Space::Port, 0xCF8, 4, 0x8000_0000);
    assert_eq!(read(&machine, Space::Port, 0xCF8, 4), 0x8000_0000);
}

#[test]
fn low_bits_of_confadd_read_zero_and_select_the_lane() {
    let (_, machine) = machine(1);
    write(&machine, Space::Port, 0xCF8, 4, 0x8000_0002);
    assert_eq!(read(&machine, Space::Port, 0xCF8, 4), 0x8000_0000);
    assert_eq!(read(&machine, Space::Port, 0xCFC, 2), 0x1237);
    assert_eq!(read(&machine, Space::Port, 0xCFE, 2), 0x1237);
    write(&machine, Space::Port, 0xCF8, 4, 0x8000_00FF);
    assert_eq!(read(&machine, Space::Port, 0xCFC, 4), 0xFFFF_FF00, "beyond the last register is nothing");
}

#[test]
fn configuration_data_takes_bytes_and_words_in_their_lanes() {
    let (_, machine) = machine(1);
    select(&machine, 1, 0, 0x60);
    write(&machine, Space::Port, 0xCFD, 1, 0x0A);
    write(&machine, Space::Port, 0xCFE, 2, 0x0B05);
    assert_eq!(read(&machine, Space::Port, 0xCFC, 4), 0x0B05_0A80);
    write(&machine, Space::Port, 0xCF8, 4, 0x0000_0860);
    assert_eq!(read(&machine, Space::Port, 0xCFC, 4), 0xFFFF_FFFF, "mechanism off");
    write(&machine, Space::Port, 0xCF8, 4, 0x8001_0860);
    assert_eq!(read(&machine, Space::Port, 0xCFC, 4), 0xFFFF_FFFF, "no bus 1");
}

#[test]
fn every_way_to_reset_is_told() {
    let resets: [(&[(u64, u64)], ResetSource); 4] = [
        (&[(0xCF9, 0x02), (0xCF9, 0x06)], ResetSource::ResetControl),
        (&[(0x92, 0x02), (0x92, 0x03)], ResetSource::Port92),
        (&[(0x64, 0xFE)], ResetSource::KeyboardController),
        (&[(0xCFF, 0x02), (0xCFF, 0x06)], ResetSource::TurboResetControl),
    ];
    for (writes, source) in resets {
        let (host, machine) = machine(1);
        select(&machine, 0, 0, 0x90);
        for (port, value) in writes {
            assert_eq!(host.recorded().power, []);
            outb(&machine, *port, *value);
        }
        assert_eq!(host.recorded().power, [PowerEvent::Reset(source)]);
    }
}

#[test]
fn a_panic_of_the_guest_is_told_unless_it_handles_it_itself() {
    let (host, machine) = machine(1);
    assert_eq!(inb(&machine, 0x505), 3, "the events that are known");
    outb(&machine, 0x505, 0x02);
    outb(&machine, 0x505, 0xFC);
    assert_eq!(host.recorded().power, []);
    outb(&machine, 0x505, 0x01);
    assert_eq!(host.recorded().power, [PowerEvent::Panicked]);
}

#[test]
fn sleep_type_5_powers_off_where_pmbase_says() {
    let (host, machine) = machine(1);
    write(&machine, Space::Port, 0x604, 2, 0x2000);
    assert_eq!(host.recorded().power, [], "the block is not decoded yet");
    machine.assign_resources();
    write(&machine, Space::Port, 0x604, 2, 0x2400);
    assert_eq!(host.recorded().power, [], "another sleep type");
    write(&machine, Space::Port, 0x604, 2, 0x2000);
    assert_eq!(host.recorded().power, [PowerEvent::PowerOff]);
    config_write(&machine, (1, 3), 0x40, 4, 0xB000);
    write(&machine, Space::Port, 0xB004, 2, 0x2000);
    assert_eq!(host.recorded().power.len(), 2);
    assert_eq!(read(&machine, Space::Port, 0x604, 2), 0xFFFF);
}

#[test]
fn pm_timer_runs_with_the_host() {
    let (host, machine) = machine(1);
    machine.assign_resources();
    let before = read(&machine, Space::Port, 0x608, 4);
    host.set_monotonic(Duration::from_millis(1000));
    assert_eq!(read(&machine, Space::Port, 0x608, 4) - before, 3_579_545);
}

#[test]
fn pm_timer_overflow_raises_the_sci_while_it_is_enabled() {
    let (host, machine) = machine(1);
    machine.assign_resources();
    outb(&machine, 0xB2, 0xF1);
    host.set_monotonic(Duration::from_secs(1));
    assert_eq!(host.recorded().timer, None, "nobody wants to hear of it");
    write(&machine, Space::Port, 0x602, 2, 1);
    let due = host.take_timer().unwrap();
    // Bit 23 changes after 2^23 ticks of 3.579545 MHz.
    assert_eq!(due.as_millis(), 2343);
    for (moment, high) in [(due - Duration::from_nanos(1), false), (due, true)] {
        host.set_monotonic(moment);
        machine.timer_expired();
        assert_eq!(host.recorded().irqs & 1 << 9 != 0, high);
    }
    assert_eq!(read(&machine, Space::Port, 0x600, 2), 1);
    assert_eq!(
        host.recorded().timer,
        Some(due),
        "told again when it came too early, and no more once it was due"
    );
    write(&machine, Space::Port, 0x600, 2, 1);
    assert_eq!(host.recorded().irqs & 1 << 9, 0);
    assert_eq!(host.take_timer().unwrap().as_millis(), 4686);
    write(&machine, Space::Port, 0x602, 2, 0);
    host.set_monotonic(Duration::from_secs(60));
    machine.timer_expired();
    assert_eq!(host.recorded().irqs & 1 << 9, 0);
    write(&machine, Space::Port, 0x602, 2, 1);
    assert_ne!(host.recorded().irqs & 1 << 9, 0, "it had overflowed meanwhile");
}

#[test]
fn the_pm_block_goes_anywhere_and_hides_what_is_there() {
    let (_, machine) = machine(1);
    let function = TestFunction::new(2);
    machine.attach_pci(2, function.clone()).unwrap();
    config_write(&machine, (2, 0), 0x20, 4, 0xC000);
    config_write(&machine, (2, 0), 4, 2, 1);
    config_write(&machine, (1, 3), 0x80, 1, 1);
    let block = |base| config_write(&machine, (1, 3), 0x40, 2, base);
    let is_block = |base| {
        write(&machine, Space::Port, base + 2, 2, 0x0120);
        read(&machine, Space::Port, base + 2, 2) == 0x0120
    };
    // Over a BAR, POST, DMA and APM ports, the UART's place, and at the top of the space.
    for base in [0xC000, 0x80, 0x3C0, 0xFFC0, 0x8000] {
        block(base | 0x3F);
        assert!(is_block(base), "{base:#x}");
    }
    assert_eq!(function.writes(), []);
    assert_ne!(read(&machine, Space::Port, 0xC000, 1), 0xFF);
    // Over the configuration ports, which the host bridge keeps, and RCR, which the lower function keeps.
    block(0xCC0);
    assert!(is_block(0xCC0));
    assert_eq!(config_read(&machine, (1, 3), 0x40, 2), 0xCC1);
    outb(&machine, 0xCF9, 0x02);
    assert_eq!(inb(&machine, 0xCF9), 0x02);
    block(0);
    assert!(is_block(0));
    block(0x8000);
    config_write(&machine, (1, 3), 0x80, 1, 0);
    assert!(!is_block(0x8000));
}

#[test]
fn the_smbus_controller_finds_nobody() {
    let (_, machine) = machine(1);
    config_write(&machine, (1, 3), 0x90, 4, 0x701);
    assert_eq!(inb(&machine, 0x700), 0xFF, "I/O is off");
    config_write(&machine, (1, 3), 4, 2, 1);
    assert_eq!(inb(&machine, 0x700), 0);
    outb(&machine, 0x704, 0xA1);
    outb(&machine, 0x702, 0x48);
    assert_eq!((inb(&machine, 0x700), inb(&machine, 0x702), inb(&machine, 0x704)), (0x04, 0x08, 0xA1));
    outb(&machine, 0x700, 0xFF);
    assert_eq!(inb(&machine, 0x700), 0);
    config_write(&machine, (1, 3), 0xD2, 1, 0x08);
    assert_eq!(inb(&machine, 0x700), 0xFF);
}

#[test]
fn keyboard_controller_passes_its_tests_and_has_nothing_attached() {
    let (_, machine) = machine(1);
    let command = |command| {
        outb(&machine, 0x64, command);
        assert_eq!(inb(&machine, 0x64) & 3, 1, "an answer waits");
        inb(&machine, 0x60)
    };
    assert_eq!(inb(&machine, 0x64) & 3, 0);
    assert_eq!(command(0xAA), 0x55);
    assert_eq!(command(0xAB), 0x00);
    outb(&machine, 0x64, 0x60);
    outb(&machine, 0x60, 0x03);
    assert_eq!(command(0x20), 0x23, "no auxiliary interface");
    outb(&machine, 0x64, 0xA8);
    assert_eq!(command(0x20), 0x23, "nor can it be enabled");
    assert_eq!(command(0xA9), 0x01);
    outb(&machine, 0x64, 0xD3);
    outb(&machine, 0x60, 0x5A);
    assert_eq!((inb(&machine, 0x64) & 1, inb(&machine, 0x60)), (1, 0), "no loop");
    // A keyboard that is not there does not answer.
    outb(&machine, 0x60, 0xF2);
    assert_eq!(inb(&machine, 0x64) & 1, 0);
}

#[test]
fn chip_selects_gate_clock_and_keyboard_controller() {
    let (_, machine) = machine(1);
    outb(&machine, 0x70, 0x5F);
    assert_eq!(inb(&machine, 0x71), 0);
    config_write(&machine, (1, 0), 0x4E, 1, 0x02);
    assert_eq!(inb(&machine, 0x71), 0xFF);
    assert_ne!(inb(&machine, 0x64), 0xFF);
    config_write(&machine, (1, 0), 0x4E, 1, 0x01);
    assert_eq!(inb(&machine, 0x71), 0);
    assert_eq!(inb(&machine, 0x64), 0xFF);
}

#[test]
fn ports_of_absent_devices_float() {
    let (_, machine) = machine(1);
    for port in [0x278, 0x378, 0x2E9, 0x2F9, 0x3E9, 0x1F7, 0x3F6, 0x20, 0x61] {
        assert_eq!(inb(&machine, port), 0xFF, "{port:#x}");
    }
    assert_eq!(inb(&machine, 0x402), 0xE9);
}

#[test]
fn firmware_configuration_answers() {
    let (_, machine) = machine(3);
    write(&machine, Space::Port, 0x510, 2, 5);
    assert_eq!((inb(&machine, 0x511), inb(&machine, 0x511)), (3, 0));
    assert_eq!(read(&machine, Space::Port, 0x514, 4), u64::from(u32::from_le_bytes(*b"QEMU")));
}

#[test]
fn wide_and_straddling_accesses_split_as_on_the_bus() {
    let (_, machine) = machine(1);
    let function = TestFunction::new(2);
    machine.attach_pci(2, function.clone()).unwrap();
    config_write(&machine, (2, 0), 0x10, 4, 0xE000_0000);
    config_write(&machine, (2, 0), 4, 2, 2);
    write(&machine, Space::Memory, 0xE000_0008, 8, 0x0807_0605_0403_0201);
    assert_eq!(function.writes(), [(0, 8, vec![1, 2, 3, 4]), (0, 12, vec![5, 6, 7, 8])]);
    write(&machine, Space::Memory, 0xE000_0001, 4, 0x0403_0201);
    assert_eq!(function.writes(), [(0, 1, vec![1]), (0, 2, vec![2, 3]), (0, 4, vec![4])]);
    // Half in the BAR, half on an open bus.
    write(&machine, Space::Memory, 0xE000_0FFE, 4, 0x0403_0201);
    assert_eq!(function.writes(), [(0, 0xFFE, vec![1, 2])]);
    let inside = read(&machine, Space::Memory, 0xE000_0FFE, 2);
    assert_ne!(inside, 0xFFFF);
    assert_eq!(read(&machine, Space::Memory, 0xE000_0FFE, 4), 0xFFFF_0000 | inside);
    assert_eq!(read(&machine, Space::Port, 0xFFFE, 8), u64::MAX);
    assert_eq!(read(&machine, Space::Memory, u64::MAX, 8), u64::MAX);
}

/// Eight ports that take bytes.
struct Card(Mutex<Vec<(u16, Vec<u8>)>>);

impl IsaDevice for Card {
    fn name(&self) -> &str {
        "card"
    }
    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: 0x3F8, count: 8 }]
    }
    fn irq(&self) -> Option<u8> {
        Some(4)
    }
    fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(port.to_le_bytes()[0]);
    }
    fn write(&self, port: u16, data: &[u8]) {
        lock(&self.0).push((port, data.to_vec()));
    }
    fn reset(&self) {}
}

#[test]
fn isa_cards_get_bytes_and_drive_their_line() {
    let (host, machine) = machine(1);
    let card = Arc::new(Card(Mutex::default()));
    let line = machine.attach_isa(card.clone()).unwrap().unwrap();
    line.set(true);
    assert_eq!(host.recorded().irqs, 1 << 4);
    assert_eq!(read(&machine, Space::Port, 0x3F8, 4), 0xFBFA_F9F8);
    assert_eq!(read(&machine, Space::Port, 0x3FE, 4), 0xFFFF_FFFE | 0xFF00);
    write(&machine, Space::Port, 0x3FA, 2, 0x0201);
    assert_eq!(*lock(&card.0), [(0x3FA, vec![1]), (0x3FB, vec![2])]);
    let again = machine.attach_isa(Arc::new(Card(Mutex::default())));
    assert!(matches!(again, Err(AttachError::PortsTaken { port: 0x3F8, .. })));
}

#[test]
fn slots_of_the_chipset_and_beyond_take_no_device() {
    let (_, machine) = machine(1);
    // With their functions 1.
    for slot in [0, 1, 0x20, 0x21] {
        let refused = machine.attach_pci(slot, TestFunction::new(1)).err();
        assert_eq!(refused, Some(AttachError::NoSuchSlot(slot & 0x1F)));
        assert!(machine.detach_pci(slot).is_err());
    }
    machine.attach_pci(2, TestFunction::new(2)).unwrap();
    let refused = machine.attach_pci(2, TestFunction::new(2)).err();
    assert_eq!(refused, Some(AttachError::SlotTaken(2)));
}

#[test]
fn assigned_resources_are_where_firmware_would_put_them() {
    let (host, machine) = machine(1);
    let functions: Vec<_> = (2..8).map(TestFunction::new).collect();
    for (slot, function) in (2..).zip(&functions) {
        machine.attach_pci(slot, function.clone()).unwrap();
    }
    machine.assign_resources();
    let mut ranges = Vec::new();
    for function in &functions {
        let command = function.config.command();
        assert!(command.io() && command.memory() && !command.bus_master());
        for bar in function.config.bars() {
            let (first, last) = bar.decoded(command).unwrap();
            match bar.kind {
                BarKind::Io => assert!(first >= 0xC000 && last <= 0xFFFF),
                _ => assert!(first >= 0xE000_0000 && last < 0xFEC0_0000),
            }
            assert!(first.is_multiple_of(bar.size));
            ranges.push((first, last));
        }
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0), "no overlap: {ranges:x?}");
    assert_eq!(config_read(&machine, (1, 0), 0x60, 4), 0x0B0B_0A0A);
    // INTA# of slot 2 is PIRQB: 10; of slot 3 PIRQC: 11.
    assert_eq!(config_read(&machine, (2, 0), 0x3C, 2), 0x010A);
    assert_eq!(config_read(&machine, (3, 0), 0x3C, 2), 0x010B);
    assert_eq!(config_read(&machine, (1, 3), 0x40, 4), 0x0601);
    assert_eq!(host.recorded().doorbells.len(), 6 * 3);
}

#[test]
fn a_function_hears_of_its_command_register_after_the_map_follows() {
    let (_, machine) = machine(1);
    let function = TestFunction::new(2);
    machine.attach_pci(2, function.clone()).unwrap();
    let dma = machine.dma_view(2).unwrap();
    assert!(dma.memory().is_err());
    config_write(&machine, (2, 0), 4, 2, 6);
    assert!(dma.memory().is_ok());
    config_write(&machine, (2, 0), 4, 2, 6);
    config_write(&machine, (2, 0), 4, 2, 0xF800);
    assert!(!dma.is_bus_master());
    assert_eq!(*lock(&function.commands), [Command(6), Command(0)]);
}
