//! A balloon in its jail: what the guest gives is a hole in the file of its memory.

use std::time::Duration;

use bulkhead_ipc::channel::message::{BalloonConfig, BalloonReport, DeviceConfig, FromDevice, ToDevice};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::vhost_user::frontend::BackendRequest;
use nix::sys::stat::fstat;

use crate::driver::{BUFFERS, Driver};
use crate::supervised::{LIMIT, Supervised};

const PAGE: u64 = 4096;
/// Where the pages lie that the guest gives.
const FIRST: u64 = 48 << 20;
const COUNT: u64 = 2048;
/// Pages that requests touch for the first time.
const OTHERS: u64 = 16;

fn start(target: u32, actual: u32) -> Supervised {
    let config = BalloonConfig { target, actual, deflate_on_oom: true, free_page_reporting: true };
    Supervised::start("balloon", DeviceConfig::Balloon(config), &[], Enforcement::Standalone)
}

/// Memory that the guest's RAM costs the host, bytes.
fn resident(driver: &Driver) -> u64 {
    let blocks = driver.ram.regions().map(|region| fstat(region.fd).unwrap().st_blocks).sum::<i64>();
    u64::try_from(blocks).unwrap() * 512
}

fn touch(driver: &Driver) {
    (0..COUNT).for_each(|page| driver.put(FIRST + page * PAGE, &[0xA5; PAGE as usize]));
}

fn report(device: &Supervised) -> BalloonReport {
    match device.channel.recv::<FromDevice>(Some(LIMIT)).unwrap() {
        (FromDevice::Balloon(report), _) => report,
        other => panic!("{other:?}"),
    }
}

/// Gives page numbers, in an order of the guest's own.
fn inflate(driver: &mut Driver, pages: &[u64]) {
    for some in pages.chunks(256) {
        let numbers: Vec<u8> =
            some.iter().flat_map(|page| u32::try_from(page / PAGE).unwrap().to_le_bytes()).collect();
        driver.put(BUFFERS, &numbers);
        driver.run(0, &[(BUFFERS, 100, false), (BUFFERS + 100, numbers.len() as u32 - 100, false)]);
    }
}

#[test]
fn the_host_gets_what_the_guest_gives_and_nothing_else() {
    let mut device = start(0, 0);
    let mut driver = device.driver(4);
    touch(&driver);
    driver.put(FIRST + COUNT * PAGE, b"kept");
    driver.put(FIRST - 4, b"kept");
    driver.ram.take_dirty();
    let full = resident(&driver);
    let pages: Vec<u64> = (0..COUNT).rev().map(|page| FIRST + page * PAGE).collect();
    inflate(&mut driver, &pages);
    assert!(full - resident(&driver) >= (COUNT - OTHERS) * PAGE, "{full} and now {}", resident(&driver));
    assert_eq!(driver.get(FIRST, 8), [0; 8]);
    assert_eq!(driver.get(FIRST + (COUNT - 1) * PAGE, 8), [0; 8]);
    assert_eq!(
        (driver.get(FIRST + COUNT * PAGE, 4), driver.get(FIRST - 4, 4)),
        (b"kept".into(), b"kept".into())
    );
    // The guest takes them back: they are new pages.
    driver.put(BUFFERS, &u32::try_from(FIRST / PAGE).unwrap().to_le_bytes());
    driver.run(1, &[(BUFFERS, 4, false)]);
    driver.put(FIRST, b"new");
    assert_eq!(driver.get(FIRST, 4), b"new\0");
    // What is not memory is passed over.
    driver.put(BUFFERS, &[0xFF; 8]);
    driver.run(0, &[(BUFFERS, 8, false)]);
    device.stop();
}

#[test]
fn free_pages_are_reported_in_ranges() {
    let mut device = start(0, 0);
    let mut driver = device.driver(4);
    touch(&driver);
    let full = resident(&driver);
    let half = (COUNT / 2 * PAGE) as u32;
    // The second range begins and ends within pages, which stay.
    let second = FIRST + u64::from(half) + 1;
    driver.run(3, &[(FIRST, half, true), (second, half - 2, true)]);
    let gone = full - resident(&driver);
    assert!(((COUNT - 2 - OTHERS) * PAGE..=(COUNT - 2) * PAGE).contains(&gone), "{gone}");
    assert_eq!(
        (driver.get(second - 1, 1), driver.get(FIRST + COUNT * PAGE - 1, 1)),
        (vec![0xA5], vec![0xA5])
    );
    device.stop();
}

#[test]
fn size_and_statistics_come_by_the_control_channel() {
    let mut device = start(100, 7);
    let mut driver = device.driver(4);
    let mut channel = driver.frontend.open_backend_requests().unwrap();
    let mut config = [0; 8];
    driver.frontend.get_config(0, &mut config).unwrap();
    assert_eq!(config, [100, 0, 0, 0, 7, 0, 0, 0], "what a predecessor had reached");
    // A guest that says what it has, and says it again whenever its buffer comes back.
    let say = |driver: &mut Driver, free: u64| {
        let statistics =
            [&4u16.to_le_bytes()[..], &free.to_le_bytes(), &5u16.to_le_bytes(), &[1; 8]].concat();
        driver.put(BUFFERS, &statistics);
        driver.queues[2].submit(&driver.ram, &[(BUFFERS, 20, false)]);
        driver.queues[2].kick();
    };
    say(&mut driver, 11);
    std::thread::sleep(Duration::from_millis(20));
    device.channel.send(&ToDevice::Balloon { target: Some(300) }, &[]).unwrap();
    driver.queues[2].wait(&driver.ram);
    say(&mut driver, 22);
    let BalloonReport { target, actual, statistics } = report(&device);
    assert_eq!((target, actual), (300, 7));
    assert_eq!(statistics.unwrap(), [(4, 22), (5, 0x0101_0101_0101_0101)]);
    // The front end hears of the new size, and the supervisor of what the guest did.
    assert!(matches!(channel.receive().unwrap(), BackendRequest::ConfigChange));
    driver.frontend.get_config(0, &mut config).unwrap();
    assert_eq!(config[..4], 300u32.to_le_bytes());
    driver.frontend.set_config(4, &300u32.to_le_bytes()).unwrap();
    assert_eq!(report(&device), BalloonReport { target: 300, actual: 300, statistics: None });
    // A guest that does not answer is waited for a moment only.
    device.channel.send(&ToDevice::Balloon { target: None }, &[]).unwrap();
    assert_eq!(report(&device).statistics.unwrap().first(), Some(&(4, 22)));
    assert!(
        driver.frontend.set_config(0, &[1, 0, 0, 0]).is_err(),
        "the size that is wanted is not the guest's"
    );
    device.stop();
}
