//! The server without a guest: requests as bytes, files in a temporary directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::Path;

use super::abi::{ENTRY, OUT_HEADER, Opcode, ROOT};
use super::host::Host;
use super::nodes::Nodes;
use super::options::{FsCache, FsOptions, FsOwners};
use super::server::{Payload, Server};
use super::table::Table;

/// What a file's bytes travel by here.
struct Bytes {
    request: Vec<u8>,
    filled: Vec<u8>,
}

impl Payload for Bytes {
    fn fill(&mut self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        self.filled.resize(len, 0);
        let count = File::from(file.try_clone_to_owned()?).read_at(&mut self.filled, offset)?;
        self.filled.truncate(count);
        Ok(count)
    }

    fn drain(&mut self, skip: usize, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        File::from(file.try_clone_to_owned()?).write_at(&self.request[skip..skip + len], offset)
    }

    fn room(&self) -> usize {
        1 << 20
    }
}

fn path_only(path: &Path) -> OwnedFd {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap().into()
}

struct Client(Server);

impl Client {
    /// A server with a table and room for so many descriptors, which was not greeted.
    fn with(folder: &Path, table: &File, budget: usize, read_only: bool) -> Self {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let options = FsOptions {
            tag: "t".into(),
            read_only,
            cache: FsCache::Auto,
            submounts: false,
            xattr: false,
            owners: FsOwners::One { uid, gid, others: 65534 },
        };
        let host = Host::new(path_only(folder), path_only(Path::new("/proc/self/fd")), false).unwrap();
        let table = Table::new(Some(table.try_clone().unwrap()));
        let nodes = Nodes::new(&host, budget, table).unwrap();
        Self(Server::new(host, nodes, options).unwrap())
    }

    fn new(folder: &Path, table: &File) -> Self {
        let mut client = Self::with(folder, table, 1000, false);
        client.greet();
        client
    }

    fn greet(&mut self) {
        let hello: Vec<u8> = [7u32, 31, 0, u32::MAX].into_iter().flat_map(u32::to_le_bytes).collect();
        self.call(Opcode::Init, 0, &hello).unwrap();
    }

    fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut request = Vec::new();
        for value in [u32::try_from(40 + body.len()).unwrap(), opcode as u32] {
            request.extend(value.to_le_bytes());
        }
        request.extend(9u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        let mut payload = Bytes { request: request.clone(), filled: Vec::new() };
        let (answer, beyond) = self.0.serve(&request, &mut payload);
        if answer.is_empty() {
            return Ok(Vec::new());
        }
        assert_eq!(beyond, payload.filled.len());
        let whole = [answer, &payload.filled].concat();
        assert_eq!(u32::from_le_bytes(whole[..4].try_into().unwrap()), u32::try_from(whole.len()).unwrap());
        match i32::from_le_bytes(whole[4..8].try_into().unwrap()) {
            0 => Ok(whole[OUT_HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.call(Opcode::Lookup, parent, format!("{name}\0").as_bytes())?;
        assert_eq!(entry.len(), ENTRY);
        Ok(first(&entry))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let flags = u64::from(flags.cast_unsigned());
        self.call(Opcode::Open, node, &flags.to_le_bytes()).map(|open| first(&open))
    }

    fn read(&mut self, handle: u64) -> Result<Vec<u8>, i32> {
        let mut body = [handle, 0].into_iter().flat_map(u64::to_le_bytes).collect::<Vec<_>>();
        body.extend(4096u32.to_le_bytes());
        body.extend([0; 20]);
        self.call(Opcode::Read, 0, &body)
    }

    fn exists(&mut self, node: u64) -> Result<(), i32> {
        self.call(Opcode::Getattr, node, &[0; 16]).map(drop)
    }
}

fn first(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn folder() -> (tempfile::TempDir, File) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("shared")).unwrap();
    fs::write(folder.path().join("secret"), "secret").unwrap();
    (folder, tempfile::tempfile().unwrap())
}

#[test]
fn nothing_leads_out_of_the_directory() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    symlink("../secret", shared.join("link")).unwrap();
    symlink("..", shared.join("up")).unwrap();
    let mut client = Client::new(&shared, &table);
    for name in ["..", ".", "../secret", "up/secret", ""] {
        assert_eq!(client.look_up(ROOT, name), Err(libc::EINVAL), "{name}");
    }
    // A link is itself, whatever is asked of it.
    let link = client.look_up(ROOT, "link").unwrap();
    assert_eq!(client.call(Opcode::Readlink, link, &[]), Ok(b"../secret".to_vec()));
    assert_eq!(client.open(link, libc::O_RDONLY), Err(libc::ENXIO));
    let up = client.look_up(ROOT, "up").unwrap();
    assert_eq!(client.look_up(up, "secret"), Err(libc::ENOTDIR));
    assert_eq!(client.call(Opcode::Opendir, up, &[0; 8]), Err(libc::ENOTDIR));
    let body = [&0u32.to_le_bytes()[..], &0o644u32.to_le_bytes(), &[0; 8], b"link\0"].concat();
    assert_eq!(client.call(Opcode::Create, ROOT, &body), Err(libc::ELOOP));
    // The link's size cannot be changed by way of its target.
    let mut size = vec![0; 88];
    size[0] = 1 << 3;
    assert_eq!(client.call(Opcode::Setattr, link, &size), Err(libc::EINVAL));
    assert_eq!(fs::read_to_string(folder.path().join("secret")).unwrap(), "secret");
    // Nor is a device made.
    let device = [&(libc::S_IFCHR | 0o666).to_le_bytes()[..], &[0; 12], b"null\0"].concat();
    assert_eq!(client.call(Opcode::Mknod, ROOT, &device), Err(libc::EPERM));
}

#[test]
fn a_successor_knows_what_the_guest_holds() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    fs::create_dir_all(shared.join("a/b")).unwrap();
    fs::write(shared.join("a/b/file"), "contents").unwrap();
    fs::write(shared.join("old"), "old").unwrap();
    let mut client = Client::new(&shared, &table);
    let a = client.look_up(ROOT, "a").unwrap();
    let b = client.look_up(a, "b").unwrap();
    let file = client.look_up(b, "file").unwrap();
    let old = client.look_up(ROOT, "old").unwrap();
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    // The guest renames while the first process lives.
    let body = [&ROOT.to_le_bytes()[..], b"file\0moved\0"].concat();
    client.call(Opcode::Rename, b, &body).unwrap();
    drop(client);
    fs::write(shared.join("new"), "new").unwrap();
    fs::rename(shared.join("new"), shared.join("old")).unwrap();

    let mut client = Client::with(&shared, &table, 1000, false);
    assert_eq!(client.read(handle), Ok(b"contents".to_vec()));
    for node in [a, b, file] {
        assert_eq!(client.exists(node), Ok(()), "node {node}");
    }
    assert_eq!(client.look_up(ROOT, "a"), Ok(a));
    // Another file by the same name is another file.
    assert_eq!(client.exists(old), Err(libc::ESTALE));
    // What is forgotten is forgotten by both.
    client.call(Opcode::Forget, file, &1u64.to_le_bytes()).unwrap();
    assert_eq!(client.exists(file), Err(libc::ESTALE));
    drop(client);
    let mut client = Client::with(&shared, &table, 1000, false);
    assert_eq!(client.exists(file), Err(libc::ESTALE));
    assert_eq!(client.exists(b), Ok(()));
    // A guest that begins anew holds nothing.
    client.greet();
    assert_eq!(client.exists(b), Err(libc::ESTALE));
    assert_eq!(client.read(handle), Err(libc::EBADF));
}

#[test]
fn files_are_found_again_when_descriptors_run_short() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    let mut client = Client::with(&shared, &table, 8, false);
    client.greet();
    let mut nodes = Vec::new();
    for number in 0..300 {
        let name = format!("file{number}");
        fs::write(shared.join(&name), name.as_bytes()).unwrap();
        nodes.push(client.look_up(ROOT, &name).unwrap());
    }
    let held = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(held < 250, "{held} descriptors");
    for (number, node) in nodes.iter().enumerate() {
        let handle = client.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(client.read(handle).unwrap(), format!("file{number}").as_bytes());
        client.call(Opcode::Release, *node, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).unwrap();
    }
}

#[test]
fn a_file_without_a_name_stays_while_it_is_known() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    fs::write(shared.join("file"), "contents").unwrap();
    let mut client = Client::new(&shared, &table);
    let file = client.look_up(ROOT, "file").unwrap();
    client.call(Opcode::Unlink, ROOT, b"file\0").unwrap();
    assert!(!shared.join("file").exists());
    assert_eq!(client.exists(file), Ok(()));
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(handle), Ok(b"contents".to_vec()));
}

#[test]
fn a_directory_for_reading_is_not_changed() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    fs::write(shared.join("file"), "contents").unwrap();
    let mut client = Client::with(&shared, &table, 1000, true);
    client.greet();
    let file = client.look_up(ROOT, "file").unwrap();
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(handle), Ok(b"contents".to_vec()));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        assert_eq!(client.open(file, flags), Err(libc::EROFS));
    }
    for opcode in [Opcode::Unlink, Opcode::Mkdir, Opcode::Setattr, Opcode::Write, Opcode::Create] {
        assert_eq!(client.call(opcode, ROOT, b"file\0"), Err(libc::EROFS), "{opcode:?}");
    }
}

#[test]
fn nonsense_is_answered_and_nothing_else_happens() {
    let (folder, table) = folder();
    let shared = folder.path().join("shared");
    let mut client = Client::with(&shared, &table, 1000, false);
    assert_eq!(client.look_up(ROOT, "file"), Err(libc::EIO), "before it was greeted");
    client.greet();
    for opcode in (0..60).filter_map(Opcode::from_number).filter(|it| *it != Opcode::Destroy) {
        for body in [&[][..], &[0xFF; 3], &[0xFF; 64], &[0; 200], &[0x41; 4000]] {
            for node in [0, ROOT, 77, u64::MAX] {
                let _any = client.call(opcode, node, body);
            }
        }
    }
    assert_eq!(
        client.0.serve(&[1, 2, 3], &mut Bytes { request: Vec::new(), filled: Vec::new() }),
        (&[][..], 0)
    );
    client.greet();
    fs::write(shared.join("file"), "").unwrap();
    assert!(client.look_up(ROOT, "file").is_ok());
}
