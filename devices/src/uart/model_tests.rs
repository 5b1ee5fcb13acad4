//! The chip against the datasheet (PC16550D, June 1995); section numbers are its own.

use proptest::prelude::*;

use super::super::registers::{PORTS, Register};
use super::*;

/// A line that takes so many characters.
#[derive(Default)]
struct Wire {
    sent: Vec<u8>,
    room: usize,
}

impl Line for Wire {
    fn has_room(&self) -> bool {
        self.room > 0
    }

    fn transmit(&mut self, byte: u8) {
        self.room -= 1;
        self.sent.push(byte);
    }
}

/// A chip with OUT2 on, as a PC's driver sets it.
fn uart() -> (Uart16550, Wire) {
    let mut wire = Wire { sent: Vec::new(), room: 1 << 20 };
    let mut uart = Uart16550::default();
    uart.write(Register::Mcr, mcr::OUT2, &mut wire);
    (uart, wire)
}

fn with_fifos(trigger: u8) -> (Uart16550, Wire) {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Fcr, fcr::ENABLE | trigger << fcr::TRIGGER_SHIFT, &mut wire);
    (uart, wire)
}

/// Puts the chip into loopback and sends these characters to itself.
fn loop_back(uart: &mut Uart16550, wire: &mut Wire, bytes: &[u8]) {
    uart.write(Register::Mcr, mcr::LOOP | mcr::OUT2, wire);
    for byte in bytes {
        uart.write(Register::Thr, *byte, wire);
    }
}

fn source(uart: &mut Uart16550) -> u8 {
    uart.read(Register::Iir) & 0x0f
}

#[test]
fn reset_leaves_what_table_iii_says() {
    let (mut uart, mut wire) = with_fifos(3);
    for register in [Register::Ier, Register::Lcr, Register::Mcr, Register::Scr, Register::Dll, Register::Dlm]
    {
        uart.write(register, 0x55, &mut wire);
    }
    uart.reset();
    let values = [Register::Ier, Register::Iir, Register::Lcr, Register::Mcr, Register::Lsr, Register::Msr]
        .map(|register| uart.read(register));
    assert_eq!(values, [0, 1, 0, 0, 0x60, msr::CTS | msr::DSR | msr::DCD]);
    let kept = [Register::Scr, Register::Dll, Register::Dlm].map(|register| uart.read(register));
    assert_eq!(kept, [0x55; 3]);
}

#[test]
fn dlab_selects_the_divisor_latch_8_1() {
    for (offset, dlab, read, written) in [
        (0, false, Register::Rbr, Register::Thr),
        (0, true, Register::Dll, Register::Dll),
        (1, false, Register::Ier, Register::Ier),
        (1, true, Register::Dlm, Register::Dlm),
        (2, true, Register::Iir, Register::Fcr),
        (7, false, Register::Scr, Register::Scr),
    ] {
        assert_eq!(Register::read_at(offset, dlab), Some(read));
        assert_eq!(Register::written_at(offset, dlab), Some(written));
    }
    assert_eq!(Register::read_at(PORTS, false), None);
    assert_eq!(Register::written_at(u64::MAX, true), None);
}

#[test]
fn ier_and_mcr_keep_only_the_bits_that_exist_8_6_8_7() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Ier, 0xff, &mut wire);
    uart.write(Register::Mcr, 0xff, &mut wire);
    assert_eq!((uart.read(Register::Ier), uart.read(Register::Mcr)), (0x0f, 0x1f));
}

#[test]
fn a_character_is_sent_at_once_and_thre_stays_set_8_3() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Thr, b'a', &mut wire);
    assert_eq!(wire.sent, b"a");
    assert_eq!(uart.read(Register::Lsr), lsr::THRE | lsr::TEMT);
}

#[test]
fn a_line_without_room_leaves_the_transmitter_busy_8_3() {
    let (mut uart, mut wire) = with_fifos(0);
    wire.room = 0;
    for byte in 0..16 {
        uart.write(Register::Thr, byte, &mut wire);
        assert_eq!(uart.read(Register::Lsr) & (lsr::THRE | lsr::TEMT), 0);
    }
    wire.room = 100;
    uart.pump(&mut wire);
    assert_eq!(wire.sent, (0..16).collect::<Vec<u8>>());
    assert_eq!(uart.read(Register::Lsr), lsr::THRE | lsr::TEMT);
}

#[test]
fn thr_empty_interrupt_comes_with_enabling_and_goes_with_reading_iir_8_5() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Ier, ier::ETBEI, &mut wire);
    assert!(uart.take_edge());
    assert_eq!(source(&mut uart), iir::THR_EMPTY);
    assert_eq!(source(&mut uart), iir::NONE, "reading IIR clears it");
    uart.write(Register::Thr, 1, &mut wire);
    assert!(uart.take_edge(), "empty again: a new edge");
    assert_eq!(source(&mut uart), iir::THR_EMPTY);
    uart.write(Register::Ier, ier::ETBEI, &mut wire);
    assert_eq!(source(&mut uart), iir::NONE, "was enabled before");
    uart.write(Register::Ier, 0, &mut wire);
    uart.write(Register::Ier, ier::ETBEI, &mut wire);
    assert_eq!(source(&mut uart), iir::THR_EMPTY);
}

#[test]
fn reading_iir_for_another_source_keeps_thr_empty_8_5() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Ier, ier::ETBEI | ier::ERBFI, &mut wire);
    uart.receive(b'x');
    assert_eq!(source(&mut uart), iir::DATA_AVAILABLE);
    assert_eq!(uart.read(Register::Rbr), b'x');
    assert_eq!(source(&mut uart), iir::THR_EMPTY);
}

#[test]
fn priorities_are_those_of_table_iv_8_5() {
    let (mut uart, mut wire) = with_fifos(0);
    uart.write(Register::Ier, ier::MASK, &mut wire);
    loop_back(&mut uart, &mut wire, &[0; 17]);
    uart.write(Register::Mcr, mcr::OUT2, &mut wire);
    assert_eq!(source(&mut uart), iir::LINE_STATUS);
    assert_ne!(uart.read(Register::Lsr) & lsr::OE, 0);
    assert_eq!(source(&mut uart), iir::DATA_AVAILABLE);
    while uart.read(Register::Lsr) & lsr::DR != 0 {
        uart.read(Register::Rbr);
    }
    assert_eq!(source(&mut uart), iir::THR_EMPTY);
    assert_eq!(source(&mut uart), iir::MODEM_STATUS);
    uart.read(Register::Msr);
    assert_eq!(source(&mut uart), iir::NONE);
}

#[test]
fn iir_shows_the_fifos_8_5() {
    let (mut uart, _) = uart();
    assert_eq!(uart.read(Register::Iir), 0x01);
    let (mut uart, _) = with_fifos(0);
    assert_eq!(uart.read(Register::Iir), 0xc1);
}

#[test]
fn data_available_follows_the_trigger_level_8_10() {
    for (code, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
        let (mut uart, mut wire) = with_fifos(code);
        uart.write(Register::Ier, ier::ERBFI, &mut wire);
        for count in 1..=level {
            assert_eq!(source(&mut uart), iir::NONE);
            uart.receive(count);
        }
        assert_eq!(source(&mut uart), iir::DATA_AVAILABLE, "level {level}");
        assert!(uart.take_edge());
        uart.read(Register::Rbr);
        assert_eq!(source(&mut uart), iir::NONE, "cleared below the trigger");
    }
}

#[test]
fn character_timeout_needs_silence_and_goes_with_a_read_8_10() {
    let (mut uart, mut wire) = with_fifos(3);
    uart.write(Register::Ier, ier::ERBFI, &mut wire);
    uart.character_timeout();
    assert_eq!(source(&mut uart), iir::NONE, "no timeout of an empty FIFO");
    uart.receive(1);
    uart.receive(2);
    assert!(uart.timeout_armed());
    uart.character_timeout();
    assert_eq!(source(&mut uart), iir::TIMEOUT);
    assert_eq!(source(&mut uart), iir::TIMEOUT, "reading IIR does not clear it");
    assert_eq!(uart.read(Register::Rbr), 1);
    assert_eq!(source(&mut uart), iir::NONE);
    assert!(uart.timeout_armed(), "one is left: it starts again");
    uart.character_timeout();
    assert_eq!(uart.read(Register::Rbr), 2);
    assert!(!uart.timeout_armed());
}

#[test]
fn without_fifos_one_character_fits_and_a_second_overruns_8_3() {
    let (mut uart, _) = uart();
    assert_eq!(uart.receive_room(), 1);
    uart.receive(1);
    assert_eq!(uart.receive_room(), 0);
    uart.receive(2);
    assert_eq!(uart.read(Register::Lsr), lsr::DR | lsr::OE | lsr::THRE | lsr::TEMT);
    assert_eq!(uart.read(Register::Lsr) & lsr::OE, 0, "reading LSR clears it");
    assert_eq!(uart.read(Register::Rbr), 1);
    assert_eq!(uart.read(Register::Lsr) & lsr::DR, 0);
}

#[test]
fn line_status_interrupt_goes_with_reading_lsr_8_5() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Ier, ier::ELSI, &mut wire);
    uart.receive(1);
    uart.receive(2);
    assert!(uart.take_edge());
    assert_eq!(source(&mut uart), iir::LINE_STATUS);
    uart.read(Register::Lsr);
    assert_eq!(source(&mut uart), iir::NONE);
}

#[test]
fn errors_show_when_their_character_reaches_the_top_8_3() {
    let (mut uart, mut wire) = with_fifos(0);
    loop_back(&mut uart, &mut wire, &[1]);
    uart.write(Register::Lcr, lcr::BREAK, &mut wire);
    let first = uart.read(Register::Lsr);
    assert_eq!(first & (lsr::BI | lsr::FE), 0, "the break is behind a good character");
    assert_ne!(first & lsr::FIFO_ERROR, 0, "but bit 7 tells of it");
    assert_eq!(uart.read(Register::Rbr), 1);
    let second = uart.read(Register::Lsr);
    assert_eq!(
        second & (lsr::BI | lsr::FE | lsr::DR | lsr::FIFO_ERROR),
        lsr::BI | lsr::FE | lsr::DR | lsr::FIFO_ERROR
    );
    assert_eq!(uart.read(Register::Lsr) & (lsr::BI | lsr::FE | lsr::FIFO_ERROR), 0);
    assert_eq!(uart.read(Register::Rbr), 0, "a break is a character of zeros");
}

#[test]
fn fcr_clears_and_programs_only_with_its_enable_bit_8_4() {
    let (mut uart, mut wire) = with_fifos(0);
    uart.receive(1);
    uart.write(Register::Fcr, fcr::ENABLE | fcr::RESET_RECEIVER, &mut wire);
    assert_eq!(uart.read(Register::Lsr) & lsr::DR, 0);
    uart.receive(1);
    uart.write(Register::Fcr, 0xc0, &mut wire);
    assert_eq!(uart.read(Register::Lsr) & lsr::DR, 0, "changing the mode clears both FIFOs");
    assert_eq!(uart.read(Register::Iir) & 0xc0, 0);
    wire.room = 0;
    uart.write(Register::Fcr, fcr::ENABLE, &mut wire);
    uart.write(Register::Thr, 1, &mut wire);
    uart.write(Register::Fcr, fcr::ENABLE | fcr::RESET_TRANSMITTER, &mut wire);
    assert_ne!(uart.read(Register::Lsr) & lsr::THRE, 0);
    assert!(wire.sent.is_empty());
}

#[test]
fn loopback_returns_characters_and_modem_lines_8_7() {
    let (mut uart, mut wire) = with_fifos(0);
    loop_back(&mut uart, &mut wire, b"hello");
    assert!(wire.sent.is_empty(), "nothing leaves");
    uart.receive(b'!');
    let received: Vec<u8> = (0..5).map(|_| uart.read(Register::Rbr)).collect();
    assert_eq!(received, b"hello");
    assert_eq!(uart.read(Register::Lsr) & lsr::DR, 0, "the input is disconnected");
    for (output, input) in
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
    {
        uart.write(Register::Mcr, mcr::LOOP | output, &mut wire);
        assert_eq!(uart.read(Register::Msr) & 0xf0, input);
    }
    // What Linux probes a chip with: LOOP, OUT2 and RTS must show as DCD and CTS.
    uart.write(Register::Mcr, 0x1a, &mut wire);
    assert_eq!(uart.read(Register::Msr) & 0xf0, 0x90);
}

#[test]
fn modem_changes_are_noted_until_msr_is_read_8_8() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Mcr, mcr::LOOP | mcr::OUT1, &mut wire);
    uart.read(Register::Msr);
    uart.write(Register::Mcr, mcr::LOOP | mcr::RTS, &mut wire);
    assert_eq!(uart.read(Register::Msr), msr::CTS | msr::DCTS | msr::TERI);
    assert_eq!(uart.read(Register::Msr), msr::CTS);
    uart.write(Register::Mcr, mcr::LOOP | mcr::RTS | mcr::OUT1, &mut wire);
    assert_eq!(uart.read(Register::Msr) & msr::TERI, 0, "only the trailing edge of RI");
}

#[test]
fn out2_connects_the_interrupt_and_loopback_cuts_it() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Mcr, 0, &mut wire);
    uart.write(Register::Ier, ier::ETBEI, &mut wire);
    assert!(!uart.take_edge());
    assert_eq!(source(&mut uart), iir::THR_EMPTY, "IIR tells of it all the same");
    uart.write(Register::Ier, 0, &mut wire);
    uart.write(Register::Ier, ier::ETBEI, &mut wire);
    uart.write(Register::Mcr, mcr::OUT2, &mut wire);
    assert!(uart.take_edge());
    uart.write(Register::Mcr, mcr::OUT2 | mcr::LOOP, &mut wire);
    uart.write(Register::Thr, 1, &mut wire);
    assert!(!uart.take_edge());
}

#[test]
fn an_edge_that_is_gone_again_is_not_signalled() {
    let (mut uart, mut wire) = uart();
    uart.write(Register::Ier, ier::ERBFI, &mut wire);
    uart.receive(1);
    uart.read(Register::Rbr);
    assert!(!uart.take_edge());
    uart.receive(2);
    assert!(uart.take_edge());
    assert!(!uart.take_edge(), "one edge, one signal");
}

proptest! {
    #[test]
    fn no_access_panics_and_the_room_is_kept(accesses in proptest::collection::vec((any::<bool>(), 0..8_u64, any::<u8>()), 0..200)) {
        let (mut uart, mut wire) = uart();
        for (write, offset, value) in accesses {
            if write {
                let register = Register::written_at(offset, uart.dlab()).unwrap();
                uart.write(register, value, &mut wire);
            } else {
                let register = Register::read_at(offset, uart.dlab()).unwrap();
                let shown = match register {
                    Register::Lsr => Some(uart.lsr()),
                    Register::Msr => Some(uart.msr()),
                    _ => None,
                };
                let read = uart.read(register);
                prop_assert!(shown.is_none_or(|shown| shown == read));
            }
            for byte in 0..uart.receive_room() as u64 {
                uart.receive(byte.to_le_bytes()[0]);
            }
            prop_assert!(uart.receive_room() == 0);
            if !uart.loopback() {
                uart.character_timeout();
            }
        }
    }
}
