//! An initial RAM file system as the kernel reads it: cpio, format "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fmt::Write as _;

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// A directory.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, libc::S_IFDIR | 0o755, &[]);
    }

    /// A file.
    pub fn file(&mut self, name: &str, contents: &[u8], mode: u32) {
        self.entry(name, libc::S_IFREG | mode, contents);
    }

    /// A character device.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.put(name, libc::S_IFCHR | 0o666, &[], (major, minor));
    }

    /// The complete archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.put(name, mode, contents, (0, 0));
    }

    fn put(&mut self, name: &str, mode: u32, contents: &[u8], (major, minor): (u32, u32)) {
        self.inodes = self.inodes.saturating_add(1);
        let size = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let named = u32::try_from(name.len().saturating_add(1)).unwrap_or(u32::MAX);
        // Inode, mode, user, group, links, time, size, device of the file and of what it stands for, name, checksum.
        let fields = [self.inodes, mode, 0, 0, 1, 0, size, 0, 0, major, minor, named, 0];
        let mut header = String::from("070701");
        for field in fields {
            let _infallible = write!(header, "{field:08X}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_it() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/a", b"hello", 0o755);
        archive.file("empty", b"", 0o644);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes.get(..6), Some(&b"070701"[..]));
        // Where the program is there.
        let program = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut program) = program else { return };
        program.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = program.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "bin\nbin/a\nempty\n");
    }
}
