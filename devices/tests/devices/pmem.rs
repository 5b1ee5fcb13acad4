//! Persistent memory: flushes that succeed, fail and make no sense, in the jail.

use std::fs::File;

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, PmemConfig};
use bulkhead_ipc::jail::Enforcement;

use crate::driver::{BUFFERS, Driver};
use crate::supervised::Supervised;

const ANSWER: u64 = BUFFERS + 0x1000;

/// The front end, which stays connected, and the answer to a flush.
fn flush(process: &mut Supervised) -> (Driver, u8) {
    let mut driver = process.driver(1);
    let mut space = [0; 16];
    driver.frontend.get_config(0, &mut space).unwrap();
    assert_eq!(space, [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0x40, 0, 0, 0, 0, 0]].concat()[..]);
    let mut result = 0;
    for (kind, known) in [(0u32, true), (1, false)] {
        driver.put(BUFFERS, &kind.to_le_bytes());
        driver.put(ANSWER, &[9; 4]);
        // The answer in two pieces.
        let buffers = [(BUFFERS, 4, false), (ANSWER, 1, true), (ANSWER + 1, 3, true)];
        assert_eq!(driver.run(0, &buffers), 4);
        let answer = driver.get(ANSWER, 4);
        assert_eq!(answer[1..], [0; 3]);
        if known {
            result = answer[0];
        } else {
            assert_eq!(answer[0], 1, "an unknown request");
        }
    }
    (driver, result)
}

fn start(file: File) -> Supervised {
    let config = PmemConfig { file: FdIndex(1), address: 1 << 32, size: 4 << 20 };
    Supervised::start("pmem", DeviceConfig::Pmem(config), &[&file.into()], Enforcement::Supervised)
}

#[test]
fn a_file_that_is_open_for_reading_is_flushed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut process = start(File::open(file.path()).unwrap());
    let (_driver, answer) = flush(&mut process);
    assert_eq!(answer, 0);
    process.stop();
}

#[test]
fn a_flush_that_fails_is_an_error_for_the_guest() {
    // A pipe cannot be flushed (EINVAL).
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let mut process = start(reader.into());
    let (_driver, answer) = flush(&mut process);
    assert_eq!(answer, 1);
    process.stop();
}
