//! Kills of a shared directory's process while files are open: no handle, no position and no byte is lost.
//!
//! Eight files are read and written at random, one request of each in flight; a directory is listed in small steps; directories are made
//! and removed. Beyond a pause a death may cost one thing: a request that was carried out and not answered is carried out again, so
//! that a name that it made exists, or one that it removed does not.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, FsCache, FsConfig, FsOwners};

use crate::driver::{BUFFERS, Driver, Random};
use crate::storm::{OTHER_KILLS, Victim, check_pause};

const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const MKDIR: u32 = 9;
const RMDIR: u32 = 11;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;

const ROOT: u64 = 1;
const FILES: usize = 8;
const BLOCKS: u64 = 16;
const BLOCK: usize = 4096;
/// Entries of the directory that is listed.
const ENTRIES: u64 = 60;
/// Slots of requests behind those of the files.
const LISTING: usize = FILES;
const NAMES: usize = FILES + 1;
/// Bytes of memory for a slot: the request, and its answer.
const SLOT: u64 = 0x8000;
const ANSWER: u64 = 0x4000;
const ANSWER_SIZE: u32 = 0x2000;

fn contents(file: usize, block: u64, version: u64) -> Vec<u8> {
    let seed = (version << 16 | block << 8 | file as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK as u64 / 8).flat_map(|word| seed.wrapping_add(word).to_le_bytes()).collect()
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What a request was, to judge its answer.
#[derive(Clone, Copy)]
enum Request {
    Read { block: u64 },
    Write,
    List,
    Make,
    Remove,
}

struct Guest {
    unique: u64,
    /// By the slot: the request, and whether a process died while it was under way.
    flying: HashMap<usize, (Request, u64, bool)>,
    slots: HashMap<u16, usize>,
    handles: Vec<u64>,
    nodes: Vec<u64>,
    versions: Vec<[u64; BLOCKS as usize]>,
    listed: (u64, u64),
    /// Where the listing is, and the names that it has shown.
    position: u64,
    shown: Vec<String>,
    listings: u64,
    made: bool,
    folders: u64,
    answers: u64,
    repeated: u64,
}

impl Guest {
    /// Greets the device, opens the files and the directory.
    fn mount(driver: &mut Driver) -> Self {
        let mut guest = Self {
            unique: 0,
            flying: HashMap::new(),
            slots: HashMap::new(),
            handles: Vec::new(),
            nodes: Vec::new(),
            versions: vec![[0; BLOCKS as usize]; FILES],
            listed: (0, 0),
            position: 0,
            shown: Vec::new(),
            listings: 0,
            made: false,
            folders: 0,
            answers: 0,
            repeated: 0,
        };
        let hello = [7_u32, 36, 0, u32::MAX].into_iter().chain([0; 12]);
        let hello: Vec<u8> = hello.flat_map(u32::to_le_bytes).collect();
        guest.call(driver, (INIT, 0), &hello);
        for file in 0..FILES {
            let name = format!("file{file}\0");
            let node = u64_at(&guest.call(driver, (LOOKUP, ROOT), name.as_bytes()), 0);
            let flags = u64::from(libc::O_RDWR.cast_unsigned());
            let handle = u64_at(&guest.call(driver, (OPEN, node), &words(&[flags])), 0);
            guest.nodes.push(node);
            guest.handles.push(handle);
        }
        let node = u64_at(&guest.call(driver, (LOOKUP, ROOT), b"listed\0"), 0);
        guest.listed = (node, u64_at(&guest.call(driver, (OPENDIR, node), &words(&[0])), 0));
        guest
    }

    fn submit(&mut self, driver: &mut Driver, slot: usize, (opcode, node): (u32, u64), body: &[u8]) -> u16 {
        self.unique += 2;
        let at = BUFFERS + slot as u64 * SLOT;
        let len = 40 + body.len() as u32;
        let header =
            [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &words(&[self.unique, node]), &[0; 16], body]
                .concat();
        driver.put(at, &header);
        let head =
            driver.queues[1].submit(&driver.ram, &[(at, len, false), (at + ANSWER, ANSWER_SIZE, true)]);
        driver.queues[1].kick();
        head
    }

    /// The answer in a slot: errno and what follows.
    fn answer(driver: &Driver, slot: usize, len: u32, unique: u64) -> (i32, Vec<u8>) {
        let bytes = driver.get(BUFFERS + slot as u64 * SLOT + ANSWER, len as usize);
        assert_eq!(u64_at(&bytes, 8), unique, "the answer to something else");
        assert_eq!(bytes[..4], len.to_le_bytes());
        (-i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..].to_vec())
    }

    /// A request by itself, before the storm.
    fn call(&mut self, driver: &mut Driver, what: (u32, u64), body: &[u8]) -> Vec<u8> {
        self.submit(driver, 0, what, body);
        let (_, len) = driver.queues[1].wait(&driver.ram);
        let (errno, answer) = Self::answer(driver, 0, len, self.unique);
        assert_eq!(errno, 0, "request {what:?}");
        answer
    }

    fn start(&mut self, driver: &mut Driver, slot: usize, request: Request, what: (u32, u64), body: &[u8]) {
        let head = self.submit(driver, slot, what, body);
        self.slots.insert(head, slot);
        self.flying.insert(slot, (request, self.unique, false));
    }

    fn next(&mut self, driver: &mut Driver, random: &mut Random) {
        for file in 0..FILES {
            if self.flying.contains_key(&file) {
                continue;
            }
            let block = random.below(BLOCKS);
            let at = words(&[self.handles[file], block * BLOCK as u64, BLOCK as u64, 0, 0]);
            if random.below(2) == 0 {
                self.start(driver, file, Request::Read { block }, (READ, self.nodes[file]), &at);
            } else {
                self.versions[file][block as usize] += 1;
                let data = contents(file, block, self.versions[file][block as usize]);
                let body = [at, data].concat();
                self.start(driver, file, Request::Write, (WRITE, self.nodes[file]), &body);
            }
        }
        if !self.flying.contains_key(&LISTING) {
            let body = words(&[self.listed.1, self.position, 256, 0, 0]);
            self.start(driver, LISTING, Request::List, (READDIR, self.listed.0), &body);
        }
        if !self.flying.contains_key(&NAMES) {
            if self.made {
                self.start(driver, NAMES, Request::Remove, (RMDIR, ROOT), b"made\0");
            } else {
                let mode = [&0o755_u32.to_le_bytes()[..], &[0; 4], b"made\0"].concat();
                self.start(driver, NAMES, Request::Make, (MKDIR, ROOT), &mode);
            }
        }
    }

    fn done(&mut self, driver: &Driver, (head, len): (u16, u32)) {
        let slot = self.slots.remove(&head).expect("finished twice, or never asked for");
        let (request, unique, died) = self.flying.remove(&slot).expect("a request");
        let (errno, answer) = Self::answer(driver, slot, len, unique);
        self.answers += 1;
        match request {
            Request::Read { block } => {
                let version = self.versions[slot][block as usize];
                assert!(
                    errno == 0 && answer == contents(slot, block, version),
                    "file {slot}, block {block}: {errno}"
                );
            }
            Request::Write => {
                assert_eq!((errno, answer[..4].to_vec()), (0, (BLOCK as u32).to_le_bytes().to_vec()))
            }
            Request::List => {
                assert_eq!(errno, 0, "the listing");
                self.listed(&answer);
            }
            Request::Make | Request::Remove => {
                let again = if self.made { libc::ENOENT } else { libc::EEXIST };
                assert!(errno == 0 || died && errno == again, "a name: {errno}, died {died}");
                self.repeated += u64::from(errno != 0);
                self.made = !self.made;
                self.folders += 1;
            }
        }
    }

    /// `struct fuse_dirent`s; none: the end, where each name was seen once.
    fn listed(&mut self, mut bytes: &[u8]) {
        if bytes.is_empty() {
            self.shown.retain(|name| name != "made" && !name.starts_with('.'));
            self.shown.sort();
            let expected: Vec<String> = (0..ENTRIES).map(|number| format!("entry{number:03}")).collect();
            assert_eq!(self.shown, expected, "a listing that went on over deaths");
            self.shown.clear();
            self.position = 0;
            self.listings += 1;
        }
        while !bytes.is_empty() {
            let len = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
            self.position = u64_at(bytes, 8);
            self.shown.push(String::from_utf8(bytes[24..24 + len].to_vec()).unwrap());
            bytes = &bytes[(24 + len).next_multiple_of(8)..];
        }
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let open_to_all = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    open_to_all(folder.path(), 0o777);
    for file in 0..FILES {
        let path = folder.path().join(format!("file{file}"));
        let data: Vec<u8> = (0..BLOCKS).flat_map(|block| contents(file, block, 0)).collect();
        fs::write(&path, data).unwrap();
        open_to_all(&path, 0o666);
    }
    let listed = folder.path().join("listed");
    fs::create_dir(&listed).unwrap();
    (0..ENTRIES).for_each(|number| fs::write(listed.join(format!("entry{number:03}")), "").unwrap());
    open_to_all(&listed, 0o777);
    folder
}

#[test]
fn a_storm_of_kills_closes_no_file_of_the_guest() {
    let folder = folder();
    let directory: OwnedFd =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(folder.path()).unwrap().into();
    let table: OwnedFd = tempfile::tempfile().unwrap().into();
    let resources = [&table];
    let root = nix::unistd::geteuid().is_root();
    let own = |id: u32| if root { 65534 } else { id };
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let config = FsConfig {
        table: FdIndex(1),
        tag: "t".into(),
        read_only: false,
        cache: FsCache::Never,
        submounts: false,
        xattr: false,
        owners: FsOwners::One { uid: own(uid), gid: own(gid), others: 65534 },
    };
    let mut victim = Victim::sharing(Some(&directory), "fs", DeviceConfig::Fs(config), &resources, 2);
    let mut guest = Guest::mount(&mut victim.driver);
    let mut random = Random(0x6b8b_4567_327b_23c6);
    let mut longest = Duration::ZERO;
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        let ram = victim.driver.ram.clone();
        loop {
            guest.next(&mut victim.driver, &mut random);
            if Instant::now() >= end {
                break;
            }
            while let Some(finished) = victim.driver.queues[1].finished(&ram) {
                guest.done(&victim.driver, finished);
            }
        }
        longest = longest.max(victim.kill(|driver, _, finished| guest.done(driver, finished)));
        guest.flying.values_mut().for_each(|(_, _, died)| *died = true);
    }
    let ram = victim.driver.ram.clone();
    while !guest.flying.is_empty() {
        let finished = victim.driver.queues[1].wait(&ram);
        guest.done(&victim.driver, finished);
    }
    // A request to a thread that sleeps, so that no kick is left when it is served.
    std::thread::sleep(Duration::from_millis(50));
    guest.call(&mut victim.driver, (LOOKUP, ROOT), b"file0\0");
    victim.driver.queues[1].rests(&ram);
    for file in 0..FILES {
        let found = fs::read(folder.path().join(format!("file{file}"))).unwrap();
        for (block, found) in (0..).zip(found.chunks(BLOCK)) {
            assert!(
                found == contents(file, block, guest.versions[file][block as usize]),
                "file {file} on the host"
            );
        }
    }
    assert_eq!(folder.path().join("made").exists(), guest.made);
    assert!(guest.listings > 0, "the directory was never seen whole");
    println!(
        "fs: {OTHER_KILLS} kills under {} requests, {} listings, {} names made and removed of which {} were told twice: pause at most {longest:.1?}",
        guest.answers, guest.listings, guest.folders, guest.repeated
    );
    check_pause(longest);
    victim.process.stop();
}
