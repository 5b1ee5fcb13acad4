//! The files and directories that the guest has open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::host::Host;
use super::nodes::Nodes;
use super::table::{Agreed, HandleRecord, MOST_HANDLES};

/// An open file.
#[derive(Debug)]
struct Handle {
    record: HandleRecord,
    /// `None` after a restart, until it is used.
    file: Option<OwnedFd>,
    /// Where a directory is read on.
    position: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Handles {
    slots: Vec<Option<Handle>>,
    /// Generations of free slots.
    free: Vec<(usize, u32)>,
}

/// What an open file is opened with again: nothing that happens once.
fn again(flags: OFlags) -> OFlags {
    flags.difference(OFlags::TRUNC | OFlags::CREATE | OFlags::EXCL)
}

fn parts(handle: u64) -> (usize, u32) {
    let slot = usize::try_from(handle & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    (slot, u32::try_from(handle >> 32).unwrap_or(0))
}

impl Handles {
    /// Slots that were ever used.
    pub(super) fn used(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Takes over what a predecessor has noted. Nothing is opened yet.
    pub(super) fn restore(&mut self, nodes: &Nodes, agreed: Agreed) -> std::io::Result<()> {
        for slot in 0..usize::try_from(agreed.handles).unwrap_or(0) {
            let record = nodes.table().handle(slot)?;
            if record.is_none() {
                self.free.push((slot, 0));
            }
            self.slots.push(record.map(|record| Handle { record, file: None, position: 0 }));
        }
        Ok(())
    }

    /// A number for a file that was just opened.
    pub(super) fn add(
        &mut self,
        nodes: &Nodes,
        node: u64,
        file: OwnedFd,
        flags: OFlags,
    ) -> Result<u64, Errno> {
        let (slot, generation) = match self.free.pop() {
            Some((slot, generation)) => (slot, generation.wrapping_add(1)),
            None if self.slots.len() >= MOST_HANDLES as usize => return Err(Errno::NFILE),
            None => {
                self.slots.push(None);
                (self.slots.len().saturating_sub(1), 0)
            }
        };
        let directory = flags.contains(OFlags::DIRECTORY);
        let node = u32::try_from(node).map_err(|_| Errno::INVAL)?;
        let record = HandleRecord { node, generation, flags: again(flags).bits(), directory };
        nodes.table().set_handle(slot, Some(record)).map_err(|_| Errno::IO)?;
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Handle { record, file: Some(file), position: 0 });
        }
        Ok((u64::from(generation) << 32) | slot as u64)
    }

    fn handle(&mut self, handle: u64) -> Result<&mut Handle, Errno> {
        let (slot, generation) = parts(handle);
        let found = self.slots.get_mut(slot).and_then(Option::as_mut);
        found.filter(|found| found.record.generation == generation).ok_or(Errno::BADF)
    }

    /// The open file of a number; one that a predecessor had open is opened again.
    pub(super) fn file(
        &mut self,
        host: &Host,
        nodes: &mut Nodes,
        handle: u64,
    ) -> Result<BorrowedFd<'_>, Errno> {
        let handle = self.handle(handle)?;
        if handle.file.is_none() {
            let held = nodes.file(host, handle.record.node.into())?;
            handle.file = Some(host.open(held, OFlags::from_bits_retain(handle.record.flags))?);
        }
        handle.file.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// The file of a number that [`Self::file`] was asked for just before.
    pub(super) fn known(&self, handle: u64) -> Result<BorrowedFd<'_>, Errno> {
        let (slot, _) = parts(handle);
        let found = self.slots.get(slot).and_then(Option::as_ref);
        found.and_then(|found| found.file.as_ref()).map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// Where a directory is read on; a file is none.
    pub(super) fn position(&mut self, handle: u64) -> Result<&mut u64, Errno> {
        let handle = self.handle(handle)?;
        if handle.record.directory { Ok(&mut handle.position) } else { Err(Errno::NOTDIR) }
    }

    /// Closes a file.
    pub(super) fn remove(&mut self, nodes: &Nodes, handle: u64) -> Result<(), Errno> {
        let generation = self.handle(handle)?.record.generation;
        let (slot, _) = parts(handle);
        if let Some(place) = self.slots.get_mut(slot) {
            *place = None;
            self.free.push((slot, generation));
        }
        nodes.table().set_handle(slot, None).map_err(|_| Errno::IO)
    }

    /// Closes all.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
    }
}
