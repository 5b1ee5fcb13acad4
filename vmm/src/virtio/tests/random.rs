//! Properties: a guest that writes at random, and the window that shows what direct accesses show.

use proptest::prelude::*;

use super::driver::Block;
use super::*;
use crate::machine::PciFunction;

/// Sets the window up and reads through it.
fn window_read(driver: &Driver, bar: u8, offset: u64, length: usize) -> [u8; 4] {
    aim(driver, bar, offset, length);
    let mut data = [0; 4];
    driver.config_read(driver.window + 16, &mut data);
    data
}

fn aim(driver: &Driver, bar: u8, offset: u64, length: usize) {
    driver.config_write(driver.window + 4, &[bar]);
    driver.config_write(driver.window + 8, &u32::try_from(offset).unwrap().to_le_bytes());
    driver.config_write(driver.window + 12, &u32::try_from(length).unwrap().to_le_bytes());
}

#[derive(Clone, Debug)]
enum Access {
    Bar { bar: u8, offset: u64, data: Vec<u8> },
    Config { offset: u16, data: Vec<u8> },
}

/// Accesses that the bus can deliver; mostly to registers that do something.
fn access() -> impl Strategy<Value = Access> {
    let data = || {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 1),
            proptest::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 2),
            proptest::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 4),
        ]
    };
    let offset = prop_oneof![4 => 0u64..0x38, 1 => 0x1000u64..0x1004, 1 => 0x2000u64..0x2040, 1 => 0x3000u64..0x3010, 1 => 0u64..0x4000];
    prop_oneof![
        6 => (prop_oneof![4 => Just(0u8), 1 => Just(1u8), 1 => any::<u8>()], offset, data()).prop_map(|(bar, offset, data)| {
            let length = data.len() as u64;
            Access::Bar { bar, offset: offset / length * length, data }
        }),
        1 => (0x40u16..0x100, data()).prop_map(|(offset, data)| Access::Config { offset, data }),
        1 => Just(Access::Bar { bar: 0, offset: 0x14, data: vec![15] }),
        1 => Just(Access::Config { offset: 4, data: vec![6, 0] }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_accesses_are_survived_and_the_window_shows_the_same(
        accesses in proptest::collection::vec(access(), 1..120),
    ) {
        let (scaffold, peer) = scaffold();
        let driver = &scaffold.driver;
        let doorbells = scaffold.device.doorbells();
        for access in accesses {
            match access {
                Access::Bar { bar, offset, data } => {
                    scaffold.device.bar_write(bar, offset, &data);
                    scaffold.device.bar_read(bar, offset, &mut data.clone());
                    // Reading the ISR status changes it.
                    let isr = bar == driver.isr.bar && offset & !0xFFF == driver.isr.offset;
                    if !isr && bar < 2 {
                        let mut direct = [0; 4];
                        scaffold.device.bar_read(bar, offset, &mut direct[..data.len()]);
                        prop_assert_eq!(window_read(driver, bar, offset, data.len()), direct);
                    }
                }
                Access::Config { offset, data } => {
                    driver.config_write(offset, &data);
                    driver.config_read(offset, &mut data.clone());
                }
            }
        }
        prop_assert_eq!(scaffold.device.doorbells(), doorbells);
        prop_assert_eq!(scaffold.failures.count(), 0, "nothing of this is the back end's fault");
        driver.set_status(0);
        prop_assert_eq!(driver.status(), 0);
        drop(peer);
    }
}

#[test]
fn the_window_writes_like_a_direct_access() {
    let (scaffold, _peer) = scaffold();
    let driver = &scaffold.driver;
    let Block { bar, .. } = driver.common;
    aim(driver, bar, 0x16, 2);
    driver.config_write(driver.window + 16, &1u16.to_le_bytes());
    assert_eq!(driver.get16(0x16), 1);
    aim(driver, bar, 0x20, 4);
    driver.config_write(driver.window + 16, &0x1234_5678u32.to_le_bytes());
    assert_eq!(driver.get32(0x20), 0x1234_5678);
    aim(driver, bar, 0x14, 1);
    driver.config_write(driver.window + 16, &[3]);
    assert_eq!(driver.status(), 3);
    // What a driver must not ask for reaches nothing.
    for (bar, offset, length) in [(bar, 0x14, 3), (bar, 0x14, 0), (bar, 0x15, 2), (5, 0x14, 1)] {
        assert_eq!(window_read(driver, bar, offset, length), [0; 4]);
        driver.config_write(driver.window + 16, &[0; 4]);
        assert_eq!(driver.status(), 3);
    }
}
