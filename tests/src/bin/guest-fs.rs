//! What a file system must do, asked of a directory; run inside the test guest on a shared one (`tests/guests/tests/fs`).
//!
//! ```text
//! guest-fs DIR exercise [SEED [OPERATIONS [FILES]]]
//! guest-fs DIR read-only
//! ```
//!
//! `exercise` is three things: random reads, writes, maps, truncations, holes, copies and reopenings of a file compared with a copy
//! in memory (as fsx does it); a tree of many files that is listed, renamed, linked and removed; and what programs rely on at
//! the edges: files that are open and have no name, exclusive making, permissions, times, symbolic links that lead nowhere.
//!
//! Exit status 1 and a sentence on a difference.
//!
//! Contains unsafe code: mappings, holes, copies within the kernel and pipes, as programs ask for them.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

type Outcome<T> = Result<T, String>;

/// Largest size of the file, bytes.
const SIZE: usize = 256 << 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: u64| arguments.get(index).map_or(Ok(default), |it| it.parse());
    let result = match (arguments.first().map(Path::new), arguments.get(1).map(String::as_str)) {
        (Some(folder), Some("exercise")) => match (number(2, 1), number(3, 2000), number(4, 500)) {
            (Ok(seed), Ok(operations), Ok(files)) => random(folder, seed, operations)
                .and_then(|()| tree(folder, files))
                .and_then(|()| edges(folder)),
            _ => Err("seed, operations and files are numbers".to_owned()),
        },
        (Some(folder), Some("read-only")) => read_only(folder),
        _ => Err("usage: guest-fs DIR exercise [SEED [OPERATIONS [FILES]]] | DIR read-only".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("guest-fs: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn at<T>(what: &str, result: std::io::Result<T>) -> Outcome<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

fn ensure(holds: bool, what: impl Into<String>) -> Outcome<()> {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn fails<T>(what: &str, result: std::io::Result<T>, errno: i32) -> Outcome<()> {
    match result {
        Ok(_) => Err(format!("{what}: succeeded")),
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let value = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(value).unwrap_or(0).checked_rem(end).unwrap_or(0)
    }
}

/// A mapping of a file's start, shared.
struct Map(*mut u8, usize);

impl Map {
    fn new(file: &File, len: usize) -> Outcome<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        Ok(Self(start.cast(), len))
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as this; the file is used by this thread alone and is at least as long.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, of which no reference is left.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

/// A file and what must be in it.
struct Subject {
    file: File,
    expected: Vec<u8>,
}

fn random(folder: &Path, seed: u64, operations: u64) -> Outcome<()> {
    let path = folder.join("random");
    let open =
        || at("open", OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path));
    let mut random = Random(seed | 1 << 40);
    let mut subject = Subject { file: open()?, expected: Vec::new() };
    at("truncate", subject.file.set_len(0))?;
    for number in 0..operations {
        let operation = random.below(10);
        let done = match operation {
            0..=2 => subject.write(&mut random),
            3 | 4 => subject.read(&mut random),
            5 => subject.map(&mut random),
            6 => subject.truncate(&mut random),
            7 => subject.punch(&mut random),
            8 => subject.copy(&mut random),
            _ => {
                if random.below(2) == 0 {
                    at("fsync", subject.file.sync_all())?;
                }
                subject.file = open()?;
                Ok(())
            }
        };
        done.map_err(|error| format!("operation {number} (kind {operation}): {error}"))?;
        let len = at("stat", subject.file.metadata())?.len();
        ensure(len == subject.expected.len() as u64, format!("operation {number}: the size is {len}"))?;
    }
    at("fsync", subject.file.sync_all())?;
    let all = at("read", fs::read(&path))?;
    ensure(all == subject.expected, "the file differs at the end")?;
    at("unlink", fs::remove_file(&path))
}

impl Subject {
    fn range(&self, random: &mut Random) -> (usize, usize) {
        let start = random.below(self.expected.len().max(1));
        (start, random.below(self.expected.len() - start.min(self.expected.len()) + 1))
    }

    fn write(&mut self, random: &mut Random) -> Outcome<()> {
        let (start, len) = (random.below(SIZE), random.below(64 << 10));
        let len = len.min(SIZE - start);
        let data: Vec<u8> = (0..len).map(|_| u8::try_from(random.below(256)).unwrap_or(0)).collect();
        at("pwrite", self.file.write_all_at(&data, start as u64))?;
        if len > 0 {
            self.expected.resize(self.expected.len().max(start + len), 0);
            self.expected[start..start + len].copy_from_slice(&data);
        }
        Ok(())
    }

    fn read(&mut self, random: &mut Random) -> Outcome<()> {
        let (start, len) = self.range(random);
        let mut data = vec![0; len];
        at("pread", self.file.read_exact_at(&mut data, start as u64))?;
        ensure(data == self.expected[start..start + len], format!("{len} bytes at {start} differ"))
    }

    fn map(&mut self, random: &mut Random) -> Outcome<()> {
        if self.expected.is_empty() {
            return Ok(());
        }
        let (start, len) = self.range(random);
        let mut map = Map::new(&self.file, self.expected.len())?;
        ensure(map.bytes() == self.expected, "the map differs")?;
        map.bytes()[start..start + len].fill(7);
        self.expected[start..start + len].fill(7);
        Ok(())
    }

    fn truncate(&mut self, random: &mut Random) -> Outcome<()> {
        let len = random.below(SIZE);
        self.expected.resize(len, 0);
        at("ftruncate", self.file.set_len(len as u64))
    }

    fn punch(&mut self, random: &mut Random) -> Outcome<()> {
        let (start, len) = self.range(random);
        if len == 0 {
            return Ok(());
        }
        let (from, count) = (i64::try_from(start).unwrap_or(0), i64::try_from(len).unwrap_or(0));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, from, count) } == 0 {
            self.expected[start..start + len].fill(0);
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        // The host's file system may not have holes.
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            Ok(())
        } else {
            Err(format!("fallocate: {error}"))
        }
    }

    fn copy(&mut self, random: &mut Random) -> Outcome<()> {
        let (from, len) = self.range(random);
        let to = self.expected.len();
        let len = len.min(SIZE.saturating_sub(to));
        let (mut source, mut sink) = (from as i64, to as i64);
        // SAFETY: the offsets are live variables.
        let count = unsafe {
            let fd = self.file.as_raw_fd();
            libc::copy_file_range(fd, &raw mut source, fd, &raw mut sink, len, 0)
        };
        let count = usize::try_from(count)
            .map_err(|_| format!("copy_file_range: {}", std::io::Error::last_os_error()))?;
        self.expected.extend_from_within(from..from + count);
        Ok(())
    }
}

fn tree(folder: &Path, files: u64) -> Outcome<()> {
    let top = folder.join("tree");
    at("mkdir", fs::create_dir(&top))?;
    let name =
        |number: u64| format!("file {number} {}", "n".repeat(usize::try_from(number % 200).unwrap_or(0)));
    for number in 0..files {
        at("write", fs::write(top.join(name(number)), number.to_string()))?;
    }
    let list = |path: &Path| -> Outcome<BTreeSet<String>> {
        let entries = at("readdir", fs::read_dir(path))?;
        entries
            .map(|entry| at("entry", entry).map(|it| it.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    let expected: BTreeSet<String> = (0..files).map(name).collect();
    ensure(list(&top)? == expected, "the list of the directory differs")?;
    let below = top.join("below");
    at("mkdir", fs::create_dir(&below))?;
    for number in (0..files).step_by(2) {
        at("rename", fs::rename(top.join(name(number)), below.join(name(number))))?;
    }
    for number in 0..files {
        let path = if number % 2 == 0 { below.join(name(number)) } else { top.join(name(number)) };
        let text = at("read", fs::read_to_string(path))?;
        ensure(text == number.to_string(), format!("file {number} holds {text:?}"))?;
    }
    fails("rmdir of a full directory", fs::remove_dir(&below), libc::ENOTEMPTY)?;
    at("remove", fs::remove_dir_all(&top))?;
    ensure(!top.exists(), "the tree is still there")
}

fn edges(folder: &Path) -> Outcome<()> {
    let path = |name: &str| folder.join(name);
    // Open, without a name.
    let mut file = at("create", OpenOptions::new().read(true).write(true).create_new(true).open(path("a")))?;
    fails("create_new twice", OpenOptions::new().write(true).create_new(true).open(path("a")), libc::EEXIST)?;
    at("write", file.write_all(b"without a name"))?;
    at("unlink", fs::remove_file(path("a")))?;
    at("seek", file.seek(SeekFrom::Start(0)))?;
    let mut text = String::new();
    at("read", file.read_to_string(&mut text))?;
    ensure(text == "without a name", "a file without a name differs")?;
    ensure(at("fstat", file.metadata())?.nlink() == 0, "a file without a name has links")?;
    // Replaced while open.
    at("write", fs::write(path("old"), "old"))?;
    at("write", fs::write(path("new"), "new"))?;
    let old = at("open", File::open(path("old")))?;
    at("rename", fs::rename(path("new"), path("old")))?;
    ensure(at("read", fs::read_to_string(path("old")))? == "new", "a rename did not replace")?;
    let mut bytes = [0; 3];
    at("pread", old.read_exact_at(&mut bytes, 0))?;
    ensure(&bytes == b"old", "a replaced file that is open differs")?;
    // Hard links are one file.
    at("link", fs::hard_link(path("old"), path("link")))?;
    at("append", OpenOptions::new().append(true).open(path("link")).and_then(|mut it| it.write_all(b"er")))?;
    ensure(at("read", fs::read_to_string(path("old")))? == "newer", "a hard link is another file")?;
    let (one, two) = (at("stat", fs::metadata(path("old")))?, at("stat", fs::metadata(path("link")))?);
    ensure(one.ino() == two.ino() && one.nlink() == 2, "hard links differ in number or count")?;
    at("unlink", fs::remove_file(path("old")))?;
    ensure(at("read", fs::read_to_string(path("link")))? == "newer", "the other link is gone, too")?;
    // Permissions and times.
    at("chmod", fs::set_permissions(path("link"), fs::Permissions::from_mode(0o640)))?;
    ensure(at("stat", fs::metadata(path("link")))?.mode() & 0o7777 == 0o640, "the permissions differ")?;
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let times = fs::FileTimes::new().set_modified(then);
    at("utimens", OpenOptions::new().write(true).open(path("link")).and_then(|it| it.set_times(times)))?;
    let modified = at("stat", fs::metadata(path("link")))?.modified();
    ensure(modified.is_ok_and(|it| it == then), "the time differs")?;
    at("unlink", fs::remove_file(path("link")))?;
    // Symbolic links are the guest's own.
    at("symlink", symlink("/etc/hostname-of-nobody", path("nowhere")))?;
    ensure(
        at("readlink", fs::read_link(path("nowhere")))? == Path::new("/etc/hostname-of-nobody"),
        "a link differs",
    )?;
    fails("open of a link that leads nowhere", File::open(path("nowhere")), libc::ENOENT)?;
    at("unlink", fs::remove_file(path("nowhere")))?;
    // Pipes are the guest's own, too.
    let pipe =
        CString::new(path("pipe").to_string_lossy().into_owned()).map_err(|error| error.to_string())?;
    // SAFETY: the path is a live C string.
    ensure(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) } == 0, "mkfifo failed")?;
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path("pipe"));
    drop(at("open of a pipe", reader)?);
    at("unlink", fs::remove_file(path("pipe")))?;
    // Holes.
    let file = at("create", File::create(path("holes")))?;
    at("pwrite", file.write_all_at(b"end", 1 << 20))?;
    // SAFETY: no memory is involved.
    let data = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) };
    ensure((0..=1 << 20).contains(&data), format!("SEEK_DATA finds {data}"))?;
    at("unlink", fs::remove_file(path("holes")))?;
    fails("a name of 256 bytes", File::create(path(&"n".repeat(256))), libc::ENAMETOOLONG)
}

fn read_only(folder: &Path) -> Outcome<()> {
    let first = at("readdir", fs::read_dir(folder))?.flatten().find(|it| it.path().is_file());
    let file = first.ok_or("there is no file to try it with")?.path();
    at("read", fs::read(&file)).map(drop)?;
    fails("create", File::create_new(folder.join("made")), libc::EROFS)?;
    fails("open for writing", OpenOptions::new().append(true).open(&file), libc::EROFS)?;
    fails("mkdir", fs::create_dir(folder.join("made")), libc::EROFS)?;
    fails("unlink", fs::remove_file(&file), libc::EROFS)?;
    fails("rename", fs::rename(&file, folder.join("moved")), libc::EROFS)?;
    fails("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o777)), libc::EROFS)?;
    fails("symlink", symlink("x", folder.join("made")), libc::EROFS)
}
