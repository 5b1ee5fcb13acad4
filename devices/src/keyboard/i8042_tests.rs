use Port::{Command, Data};

use super::*;

/// Writes a command and reads its answer.
fn ask(controller: &mut I8042, command: u8) -> u8 {
    controller.write(Command, command);
    assert_eq!(controller.read(Command) & (STATUS_OUTPUT_FULL | STATUS_COMMAND), 0x09, "{command:x}");
    controller.read(Data)
}

/// Writes to the keyboard and reads all that it says.
fn tell(controller: &mut I8042, bytes: &[u8]) -> Vec<u8> {
    bytes.iter().for_each(|byte| controller.write(Data, *byte));
    said(controller)
}

fn said(controller: &mut I8042) -> Vec<u8> {
    let full = |controller: &mut I8042| controller.read(Command) & STATUS_OUTPUT_FULL != 0;
    std::iter::from_fn(|| full(controller).then(|| controller.read(Data))).collect()
}

fn control(controller: &mut I8042, value: u8) {
    controller.write(Command, 0x60);
    controller.write(Data, value);
}

fn key(code: u16, pressed: bool) -> Key {
    Key { code, pressed }
}

#[test]
fn registers_after_reset() {
    let mut controller = I8042::default();
    assert_eq!(controller.read(Command), STATUS_UNLOCKED);
    assert_eq!(ask(&mut controller, 0x20), 0x70);
    assert_eq!(ask(&mut controller, 0xD0), 0x03);
    assert_eq!(ask(&mut controller, 0xC0), 0x80);
    assert_eq!(controller.read(Data), 0x80, "an empty buffer repeats its last byte");
    assert_eq!(controller.read(Command), STATUS_UNLOCKED | STATUS_COMMAND);
}

/// What SeaBIOS 1.16 does in `ps2_keyboard_setup`.
#[test]
fn firmware_finds_a_keyboard() {
    let mut controller = I8042::default();
    assert_eq!(ask(&mut controller, 0xAA), 0x55);
    assert_eq!(ask(&mut controller, 0xAB), 0x00);
    controller.write(Command, 0xAD);
    controller.write(Command, 0xA7);
    control(&mut controller, 0x30);
    assert_eq!(tell(&mut controller, &[0xFF]), [0xFA, 0xAA]);
    assert_eq!(tell(&mut controller, &[0xF5]), [0xFA]);
    assert_eq!(tell(&mut controller, &[0xF0]), [0xFA]);
    assert_eq!(tell(&mut controller, &[0x02]), [0xFA]);
    control(&mut controller, 0x61);
    assert_eq!(tell(&mut controller, &[0xF4]), [0xFA]);
    controller.press(&[key(0x76, true), key(0x76, false)]);
    assert_eq!(said(&mut controller), [0x01, 0x81]);
}

/// What Linux's i8042 and atkbd do, and that they need not wait for an auxiliary device which is not there.
#[test]
fn linux_finds_a_translated_keyboard_and_no_mouse() {
    let mut controller = I8042::default();
    assert_eq!(ask(&mut controller, 0x20) & CONTROL_TRANSLATE, CONTROL_TRANSLATE);
    controller.write(Command, 0xD3);
    controller.write(Data, 0x5A);
    assert_ne!(said(&mut controller), [0x5A]);
    assert!((1..=3).contains(&ask(&mut controller, 0xA9)));
    controller.write(Command, 0xA7);
    controller.write(Command, 0xA8);
    // What is for a device there is lost without an answer.
    controller.write(Command, 0xD4);
    assert!(tell(&mut controller, &[0xFF]).is_empty());
    assert_ne!(ask(&mut controller, 0x20) & CONTROL_AUX_OFF, 0);
    control(&mut controller, 0x47);
    assert_eq!(tell(&mut controller, &[0xF2]), [0xFA, 0xAB, 0x41]);
    assert_eq!(tell(&mut controller, &[0xED, 0x02]), [0xFA, 0xFA]);
    assert_eq!(tell(&mut controller, &[0xF3, 0x00]), [0xFA, 0xFA]);
    assert_eq!(tell(&mut controller, &[0xF4]), [0xFA]);
    controller.press(&[key(0xE071, true), key(0xE071, false)]);
    assert_eq!(said(&mut controller), [0xE0, 0x53, 0xE0, 0xD3]);
    // The number of a set is translated like a code.
    for (set, translated) in [(3, 0x3F), (1, 0x43), (2, 0x41)] {
        assert_eq!(tell(&mut controller, &[0xF0, set]), [0xFA, 0xFA]);
        assert_eq!(tell(&mut controller, &[0xF0, 0]), [0xFA, 0xFA, translated]);
    }
    // Raw set 2.
    control(&mut controller, 0x07);
    controller.press(&[key(0x1C, true), key(0x1C, false)]);
    assert_eq!(said(&mut controller), [0x1C, 0xF0, 0x1C]);
}

#[test]
fn each_byte_raises_the_interrupt_once() {
    let mut controller = I8042::default();
    control(&mut controller, CONTROL_INTERRUPT | CONTROL_TRANSLATE);
    assert!(!controller.take_edge() && !controller.interrupt());
    controller.press(&[key(0x1C, true), key(0x1C, false)]);
    assert!(controller.take_edge() && !controller.take_edge() && controller.interrupt());
    controller.read(Command);
    assert!(!controller.take_edge());
    controller.read(Data);
    assert!(controller.take_edge(), "the next byte");
    controller.read(Data);
    assert!(!controller.take_edge() && !controller.interrupt());
    // A byte that waits when the interrupt is switched on.
    control(&mut controller, CONTROL_TRANSLATE);
    controller.press(&[key(0x1C, true)]);
    assert!(!controller.take_edge());
    control(&mut controller, CONTROL_INTERRUPT | CONTROL_TRANSLATE);
    assert!(controller.take_edge());
}

#[test]
fn a_disabled_interface_holds_keys_and_an_answer_displaces_none() {
    let mut controller = I8042::default();
    control(&mut controller, CONTROL_TRANSLATE);
    controller.press(&[key(0x1C, true), key(0x32, true)]);
    assert_eq!(ask(&mut controller, 0x20), 0x60);
    controller.write(Command, 0xAD);
    // The byte that was there has left the keyboard; the next one has not.
    assert_eq!(controller.read(Command) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
    assert_eq!(ask(&mut controller, 0x20), 0x70);
    controller.write(Command, 0xAE);
    assert_eq!(said(&mut controller), [0x1E, 0x30]);
}

#[test]
fn the_output_port_keeps_a20_and_never_holds_the_processor() {
    let mut controller = I8042::default();
    controller.write(Command, 0xD1);
    controller.write(Data, 0xFE);
    assert_eq!(ask(&mut controller, 0xD0) & 0x03, 0x03);
    controller.write(Command, 0xDD);
    assert_eq!(ask(&mut controller, 0xD0) & 0x03, 0x01);
    controller.write(Command, 0xDF);
    assert_eq!(ask(&mut controller, 0xD0) & 0x03, 0x03);
    controller.write(Command, 0xFE);
    assert_eq!(controller.read(Command) & STATUS_OUTPUT_FULL, 0);
    controller.write(Command, 0xD2);
    controller.write(Data, 0x12);
    assert_eq!(said(&mut controller), [0x12]);
}

proptest::proptest! {
    #[test]
    fn no_sequence_of_accesses_loses_track(accesses in proptest::collection::vec((0_u8..5, 0_u8..), 0..200)) {
        let mut controller = I8042::default();
        for (what, value) in accesses {
            match what {
                0 | 1 => {
                    controller.read(if what == 0 { Data } else { Command });
                }
                2 => controller.write(Data, value),
                3 => controller.write(Command, value),
                _ => controller.press(&[key(value.into(), true)]),
            }
            proptest::prop_assert!(controller.control & CONTROL_AUX_OFF != 0);
            proptest::prop_assert!(!controller.take_edge() || controller.interrupt());
        }
        // Whatever came before, firmware can begin anew.
        said(&mut controller);
        proptest::prop_assert_eq!(ask(&mut controller, 0xAA), 0x55);
        control(&mut controller, CONTROL_TRANSLATE);
        said(&mut controller);
        proptest::prop_assert_eq!(tell(&mut controller, &[0xFF]), [0xFA, 0xAA]);
    }
}
