//! What a successor must know: which nodes and open files the guest holds. It lies in a file without a name that the supervisor
//! keeps, written at every change, so that nothing has to be saved when the process dies.
//!
//! A node is noted as *name in parent*, with device, number and time of birth, by which the successor knows that it found the same
//! file. The file is sparse: a header, the nodes from one page on, the open files behind room for all nodes. What is read back
//! was written by a predecessor that may have been taken over: it is checked, and names nothing outside of the shared directory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::message::check_name;

/// Most nodes that the guest may hold at a time.
pub(super) const MOST_NODES: u32 = 1 << 20;
/// Most files and directories that the guest may have open.
pub(super) const MOST_HANDLES: u32 = 1 << 16;

const MAGIC: u64 = u64::from_le_bytes(*b"bulkfs01");
const NODES_AT: u64 = 4096;
const NODE_BYTES: usize = 320;
const NODE: u64 = NODE_BYTES as u64;
const NODE_NAME: usize = 56;
const HANDLES_AT: u64 = NODES_AT + NODE * MOST_NODES as u64;
const HANDLE_BYTES: usize = 24;
const HANDLE: u64 = HANDLE_BYTES as u64;

/// What a file is known by, besides its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Key {
    /// Device.
    pub(super) device: u64,
    /// Number of the inode.
    pub(super) number: u64,
    /// Time of birth, seconds and nanoseconds: numbers are used again. Zero where the file system does not know it.
    pub(super) born: (i64, u32),
}

/// A node as it is noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeRecord {
    /// How often the guest looked it up and has not forgotten it.
    pub(super) lookups: u64,
    /// Slot of the directory that it was found in.
    pub(super) parent: u32,
    /// Times that the slot was used.
    pub(super) generation: u32,
    /// `S_IFMT` bits.
    pub(super) kind: u32,
    pub(super) key: Key,
    /// Empty: it has no name any more.
    pub(super) name: Vec<u8>,
}

/// An open file as it is noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HandleRecord {
    /// Slot of its node.
    pub(super) node: u32,
    /// Times that the slot was used.
    pub(super) generation: u32,
    /// Flags to open it anew with.
    pub(super) flags: u32,
    /// It is a directory.
    pub(super) directory: bool,
}

/// What the guest and the server have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Agreed {
    /// FUSE_INIT was answered.
    pub(super) begun: bool,
    /// Slots of nodes that were ever used.
    pub(super) nodes: u32,
    /// Slots of open files that were ever used.
    pub(super) handles: u32,
}

/// The file; without one nothing is noted.
#[derive(Debug)]
pub(super) struct Table {
    file: Option<File>,
}

impl Table {
    /// Notes in `file`.
    pub(super) fn new(file: Option<File>) -> Self {
        Self { file }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.write_all_at(bytes, at))
    }

    /// Notes the header.
    pub(super) fn set_agreed(&self, agreed: Agreed) -> io::Result<()> {
        let mut bytes = [0; 24];
        put(&mut bytes, 0, &MAGIC.to_le_bytes());
        put(&mut bytes, 8, &u32::from(agreed.begun).to_le_bytes());
        put(&mut bytes, 12, &agreed.nodes.to_le_bytes());
        put(&mut bytes, 16, &agreed.handles.to_le_bytes());
        self.write(0, &bytes)
    }

    /// The header that a predecessor noted.
    pub(super) fn agreed(&self) -> io::Result<Agreed> {
        let mut bytes = [0; 24];
        let Some(file) = &self.file else { return Ok(Agreed::default()) };
        if file.read_at(&mut bytes, 0)? < bytes.len() || u64_at(&bytes, 0) != MAGIC {
            return Ok(Agreed::default());
        }
        Ok(Agreed {
            begun: u32_at(&bytes, 8) == 1,
            nodes: u32_at(&bytes, 12).min(MOST_NODES),
            handles: u32_at(&bytes, 16).min(MOST_HANDLES),
        })
    }

    /// Notes a node.
    pub(super) fn set_node(&self, slot: usize, node: &NodeRecord) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let mut bytes = [0; NODE_BYTES];
        let name = node.name.get(..node.name.len().min(255)).unwrap_or_default();
        put(&mut bytes, 0, &node.lookups.to_le_bytes());
        put(&mut bytes, 8, &node.parent.to_le_bytes());
        put(&mut bytes, 12, &node.generation.to_le_bytes());
        put(&mut bytes, 16, &node.key.device.to_le_bytes());
        put(&mut bytes, 24, &node.key.number.to_le_bytes());
        put(&mut bytes, 32, &node.key.born.0.to_le_bytes());
        put(&mut bytes, 40, &node.key.born.1.to_le_bytes());
        put(&mut bytes, 44, &node.kind.to_le_bytes());
        put(&mut bytes, 48, &(name.len() as u64).to_le_bytes());
        put(&mut bytes, NODE_NAME, name);
        let used = NODE_NAME.saturating_add(name.len());
        self.write(node_at(slot), bytes.get(..used).unwrap_or(&bytes))
    }

    /// Notes how often a node was looked up; 0: the slot is free.
    pub(super) fn set_lookups(&self, slot: usize, lookups: u64) -> io::Result<()> {
        self.write(node_at(slot), &lookups.to_le_bytes())
    }

    /// The node of a slot as a predecessor noted it, used or not.
    pub(super) fn node(&self, slot: usize) -> io::Result<Option<NodeRecord>> {
        let mut bytes = [0; NODE_BYTES];
        let Some(file) = &self.file else { return Ok(None) };
        if file.read_at(&mut bytes, node_at(slot))? < NODE_NAME {
            return Ok(None);
        }
        let len = usize::try_from(u64_at(&bytes, 48)).unwrap_or(usize::MAX).min(255);
        let name = bytes.get(NODE_NAME..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        let name = if check_name(name).is_ok() && !name.contains(&0) { name.to_vec() } else { Vec::new() };
        Ok(Some(NodeRecord {
            lookups: u64_at(&bytes, 0),
            parent: u32_at(&bytes, 8),
            generation: u32_at(&bytes, 12),
            kind: u32_at(&bytes, 44),
            key: Key {
                device: u64_at(&bytes, 16),
                number: u64_at(&bytes, 24),
                born: (u64_at(&bytes, 32).cast_signed(), u32_at(&bytes, 40)),
            },
            name,
        }))
    }

    /// Notes an open file; `None`: the slot is free.
    pub(super) fn set_handle(&self, slot: usize, handle: Option<HandleRecord>) -> io::Result<()> {
        let mut bytes = [0; HANDLE_BYTES];
        if let Some(handle) = handle {
            put(&mut bytes, 0, &1u32.to_le_bytes());
            put(&mut bytes, 4, &handle.node.to_le_bytes());
            put(&mut bytes, 8, &handle.generation.to_le_bytes());
            put(&mut bytes, 12, &handle.flags.to_le_bytes());
            put(&mut bytes, 16, &u32::from(handle.directory).to_le_bytes());
        }
        self.write(handle_at(slot), &bytes)
    }

    /// The open file of a slot as a predecessor noted it.
    pub(super) fn handle(&self, slot: usize) -> io::Result<Option<HandleRecord>> {
        let mut bytes = [0; HANDLE_BYTES];
        let Some(file) = &self.file else { return Ok(None) };
        if file.read_at(&mut bytes, handle_at(slot))? < bytes.len() || u32_at(&bytes, 0) != 1 {
            return Ok(None);
        }
        Ok(Some(HandleRecord {
            node: u32_at(&bytes, 4),
            generation: u32_at(&bytes, 8),
            flags: u32_at(&bytes, 12),
            directory: u32_at(&bytes, 16) == 1,
        }))
    }

    /// Gives the room of all nodes and open files back to the host.
    pub(super) fn clear(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => file.set_len(0),
            None => Ok(()),
        }
    }
}

fn node_at(slot: usize) -> u64 {
    NODES_AT.saturating_add(NODE.saturating_mul(slot as u64))
}

fn handle_at(slot: usize) -> u64 {
    HANDLES_AT.saturating_add(HANDLE.saturating_mul(slot as u64))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        place.copy_from_slice(value);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_reads_back() {
        let table = Table::new(Some(tempfile::tempfile().unwrap()));
        assert_eq!(table.agreed().unwrap(), Agreed::default());
        let agreed = Agreed { begun: true, nodes: 8, handles: 3 };
        table.set_agreed(agreed).unwrap();
        assert_eq!(table.agreed().unwrap(), agreed);
        let key = Key { device: 5, number: 6, born: (-7, 8) };
        let mut node =
            NodeRecord { lookups: 2, parent: 0, generation: 9, kind: 0o100_000, key, name: b"file".to_vec() };
        table.set_node(7, &node).unwrap();
        assert_eq!(table.node(7).unwrap(), Some(node.clone()));
        table.set_lookups(7, 11).unwrap();
        node.lookups = 11;
        assert_eq!(table.node(7).unwrap(), Some(node));
        assert_eq!(table.node(6).unwrap().unwrap().lookups, 0);
        let handle = HandleRecord { node: 7, generation: 1, flags: 2, directory: true };
        table.set_handle(2, Some(handle)).unwrap();
        assert_eq!(table.handle(2).unwrap(), Some(handle));
        assert_eq!(table.handle(1).unwrap(), None);
        table.clear().unwrap();
        assert_eq!(table.agreed().unwrap(), Agreed::default());
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_believed() {
        let table = Table::new(Some(tempfile::tempfile().unwrap()));
        for name in [&b"../etc"[..], b"..", b"a\0b", b"/"] {
            let key = Key::default();
            let node = NodeRecord { lookups: 1, parent: 0, generation: 0, kind: 0, key, name: name.to_vec() };
            table.set_node(1, &node).unwrap();
            assert_eq!(table.node(1).unwrap().unwrap().name, b"", "{name:?}");
        }
    }
}
