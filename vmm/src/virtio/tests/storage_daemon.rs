//! The whole way with a real back end: registers, rings, QEMU's storage daemon, and an interrupt.

use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bulkhead_ipc::memory::Direction;

use super::driver::{QUEUE_SELECT, QUEUE_VECTOR};
use super::*;

const PROGRAM: &str = "qemu-storage-daemon";
const RING: u64 = 0x1_0000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4100;
const DATA: u64 = 0x5000;
const SECTOR: usize = 512;

struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(contents: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        File::create(path("disk.img")).unwrap().write_all(contents).unwrap();
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            path("socket")
        );
        let child = Command::new(PROGRAM)
            .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", path("disk.img"))])
            .args(["--export", &export])
            .stdin(Stdio::null())
            .spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{PROGRAM} cannot be started ({error}): install Debian's qemu-system-common")
        });
        Self { child, folder }
    }

    fn connect(&self) -> UnixStream {
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(self.folder.path().join("socket")) {
                return stream;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{PROGRAM} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn put(ram: &GuestRam, address: u64, bytes: &[u8]) {
    ram.view(address, bytes.len() as u64, Direction::Write).unwrap().write_bytes(0, bytes).unwrap();
}

fn get<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.view(address, N as u64, Direction::Read).unwrap().read_bytes(0, &mut bytes).unwrap();
    bytes
}

/// Puts a request for one sector on the ring as the `number`-th and notifies.
fn submit(scaffold: &Scaffold, number: u16, kind: u32, sector: u64) {
    let ram = &scaffold.ram;
    put(ram, HEADER, &[u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat());
    put(ram, STATUS, &[0xFF]);
    let (next, write) = (1u16, 2u16);
    let data_flags = if kind == 0 { next | write } else { next };
    let descriptors = [(HEADER, 16u32, next, 1u16), (DATA, 512, data_flags, 2), (STATUS, 1, write, 0)];
    for (index, (address, length, flags, next)) in (0u64..).zip(descriptors) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        put(ram, RING + 16 * index, &bytes);
    }
    put(ram, RING + 0x1000 + 4 + 2 * u64::from(number % 256), &[0, 0]);
    put(ram, RING + 0x1002, &(number + 1).to_le_bytes());
    scaffold.driver.notify(0);
}

fn used(scaffold: &Scaffold) -> u16 {
    u16::from_le_bytes(get(&scaffold.ram, RING + 0x2002))
}

fn start(driver: &Driver) {
    driver.bus_master(true);
    assert!(driver.negotiate(1 << 32));
    driver.queue(0, 256, RING);
    driver.set_status(15);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_disk_of_qemu_storage_daemon_works_through_the_registers() {
    let contents: Vec<u8> = (0..64 * SECTOR).map(|n| (n / 3).to_le_bytes()[0]).collect();
    let daemon = Daemon::start(&contents);
    let scaffold = scaffold_with(settings(), daemon.connect());
    let driver = &scaffold.driver;
    assert_eq!(driver.get::<8>(driver.config, 0), 64u64.to_le_bytes(), "capacity");

    // INTx#.
    start(driver);
    submit(&scaffold, 0, 0, 5);
    // The daemon interrupts once when a ring starts, too.
    wait_until(&scaffold.device, || scaffold.pin.asserted() && used(&scaffold) == 1);
    assert_eq!(driver.get::<1>(driver.isr, 0), [1]);
    assert_eq!(get::<1>(&scaffold.ram, STATUS), [0]);
    assert_eq!(get::<SECTOR>(&scaffold.ram, DATA), contents[5 * SECTOR..6 * SECTOR]);

    // Reset, and everything again with MSI-X and a write.
    driver.set_status(0);
    put(&scaffold.ram, RING, &[0; 0x3000]);
    driver.vector(1, 0xFEE0_0000, 0x31, false);
    driver.msix_control(true, false);
    driver.put16(QUEUE_SELECT, 0);
    start(driver);
    driver.put16(QUEUE_VECTOR, 1);
    put(&scaffold.ram, DATA, &[0xC3; SECTOR]);
    submit(&scaffold, 0, 1, 6);
    wait_until(&scaffold.device, || scaffold.messages.delivered(1) && used(&scaffold) == 1);
    assert_eq!(get::<1>(&scaffold.ram, STATUS), [0]);
    assert_eq!(
        std::fs::read(daemon.folder.path().join("disk.img")).unwrap()[6 * SECTOR..7 * SECTOR],
        [0xC3; SECTOR]
    );

    // Stopped by the command register, a request waits; bus master again, it is served.
    driver.bus_master(false);
    submit(&scaffold, 1, 0, 6);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(used(&scaffold), 1);
    driver.bus_master(true);
    wait_until(&scaffold.device, || used(&scaffold) == 2);
    wait_until(&scaffold.device, || scaffold.messages.delivered(1));
    assert_eq!((used(&scaffold), get::<SECTOR>(&scaffold.ram, DATA)), (2, [0xC3; SECTOR]));
    assert_eq!(scaffold.failures.count(), 0);
}

#[test]
fn a_killed_qemu_storage_daemon_is_replaced_and_a_waiting_request_served() {
    let contents: Vec<u8> = (0..64 * SECTOR).map(|n| (n / 5).to_le_bytes()[0]).collect();
    let first = Daemon::start(&contents);
    let settings = Settings { hold_on_failure: true, ..settings() };
    let scaffold = scaffold_with(settings, first.connect());
    start(&scaffold.driver);
    submit(&scaffold, 0, 0, 9);
    wait_until(&scaffold.device, || scaffold.pin.asserted() && used(&scaffold) == 1);
    assert_eq!(scaffold.driver.get::<1>(scaffold.driver.isr, 0), [1]);
    drop(first);
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    submit(&scaffold, 1, 0, 10);

    let second = Daemon::start(&contents);
    scaffold.device.replace_backend(second.connect()).unwrap();
    wait_until(&scaffold.device, || used(&scaffold) == 2);
    assert_eq!(get::<SECTOR>(&scaffold.ram, DATA), contents[10 * SECTOR..11 * SECTOR]);
    assert_eq!((scaffold.driver.status(), get::<1>(&scaffold.ram, STATUS)), (15, [0]));
}
