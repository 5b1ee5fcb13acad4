//! The nodes that the guest knows, each a file of the host.
//!
//! A node holds its file by a descriptor. When descriptors run short, and after a restart, it has none: then the file is found again
//! by its name in its parent, and counts as found only if it is the same file. A file that has lost its name keeps its descriptor.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::abi::ROOT;
use super::host::{Found, Host};
use super::table::{Agreed, Key, MOST_NODES, NodeRecord, Table};

/// Deepest directory that is found again.
const DEEPEST: usize = 1024;
/// Descriptors that are given up at a time.
const GIVEN_UP: usize = 64;

/// A node.
#[derive(Debug)]
struct Node {
    lookups: u64,
    parent: usize,
    generation: u32,
    kind: u32,
    key: Key,
    /// Its name in its parent; `None` when it has none any more.
    name: Option<CString>,
    held: Option<OwnedFd>,
}

impl Node {
    fn record(&self) -> NodeRecord {
        NodeRecord {
            lookups: self.lookups,
            parent: u32::try_from(self.parent).unwrap_or(u32::MAX),
            generation: self.generation,
            kind: self.kind,
            key: self.key,
            name: self.name.as_ref().map(|name| name.to_bytes().to_vec()).unwrap_or_default(),
        }
    }
}

/// All nodes. The root is in slot 0 and always there.
#[derive(Debug)]
pub(super) struct Nodes {
    slots: Vec<Option<Node>>,
    /// Generations of free slots.
    free: Vec<(usize, u32)>,
    by_key: HashMap<Key, usize>,
    /// Nodes that hold a descriptor.
    held: usize,
    /// Most of them.
    budget: usize,
    /// Where the search for one to give up goes on.
    hand: usize,
    table: Table,
}

/// Slot of a node; EINVAL for a number that is none.
fn slot_of(node: u64) -> Result<usize, Errno> {
    node.checked_sub(ROOT).and_then(|slot| usize::try_from(slot).ok()).ok_or(Errno::INVAL)
}

fn lost(_: io::Error) -> Errno {
    Errno::IO
}

impl Nodes {
    /// No node but the root.
    pub(super) fn new(host: &Host, budget: usize, table: Table) -> Result<Self, Errno> {
        let mut nodes = Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            held: 0,
            budget,
            hand: 0,
            table,
        };
        nodes.clear(host)?;
        Ok(nodes)
    }

    /// Forgets all nodes.
    pub(super) fn clear(&mut self, host: &Host) -> Result<(), Errno> {
        let found = host.stat(host.root())?;
        let root = Node {
            lookups: 1,
            parent: 0,
            generation: 0,
            kind: found.kind(),
            key: found.key,
            name: None,
            held: None,
        };
        self.slots.clear();
        self.slots.push(Some(root));
        self.free.clear();
        self.by_key.clear();
        self.by_key.insert(found.key, 0);
        self.held = 0;
        self.hand = 0;
        Ok(())
    }

    /// The table in which they are noted.
    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    /// Slots that were ever used.
    pub(super) fn used(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Takes over what a predecessor has noted. Nothing is opened yet.
    pub(super) fn restore(&mut self, agreed: Agreed) -> io::Result<()> {
        for slot in 1..usize::try_from(agreed.nodes).unwrap_or(0) {
            let record = self.table.node(slot)?;
            let generation = record.as_ref().map_or(0, |record| record.generation);
            let node = record.filter(|record| record.lookups > 0).map(|record| Node {
                lookups: record.lookups,
                parent: usize::try_from(record.parent).unwrap_or(usize::MAX),
                generation,
                kind: record.kind,
                key: record.key,
                name: CString::new(record.name).ok().filter(|name| !name.is_empty()),
                held: None,
            });
            match &node {
                Some(node) => drop(self.by_key.insert(node.key, slot)),
                None => self.free.push((slot, generation)),
            }
            self.slots.push(node);
        }
        Ok(())
    }

    fn node(&self, slot: usize) -> Result<&Node, Errno> {
        self.slots.get(slot).and_then(Option::as_ref).ok_or(Errno::STALE)
    }

    fn node_mut(&mut self, slot: usize) -> Result<&mut Node, Errno> {
        self.slots.get_mut(slot).and_then(Option::as_mut).ok_or(Errno::STALE)
    }

    /// `S_IFMT` bits of a node.
    pub(super) fn kind(&self, node: u64) -> Result<u32, Errno> {
        Ok(self.node(slot_of(node)?)?.kind)
    }

    /// The descriptor that holds a node's file.
    pub(super) fn file<'a>(&'a mut self, host: &'a Host, node: u64) -> Result<BorrowedFd<'a>, Errno> {
        let slot = slot_of(node)?;
        if slot == 0 {
            return Ok(host.root());
        }
        if self.node(slot)?.held.is_none() {
            self.find_again(host, slot)?;
        }
        self.node(slot)?.held.as_ref().map(AsFd::as_fd).ok_or(Errno::STALE)
    }

    /// Takes hold of a node's file and of the directories on the way to it.
    fn find_again(&mut self, host: &Host, slot: usize) -> Result<(), Errno> {
        let mut way = Vec::new();
        let mut next = slot;
        while next != 0 && self.node(next)?.held.is_none() {
            if way.len() >= DEEPEST {
                return Err(Errno::STALE);
            }
            way.push(next);
            next = self.node(next)?.parent;
        }
        for slot in way.into_iter().rev() {
            let node = self.node(slot)?;
            let directory = match node.parent {
                0 => host.root(),
                parent => self.node(parent)?.held.as_ref().map(AsFd::as_fd).ok_or(Errno::STALE)?,
            };
            let name = node.name.as_ref().ok_or(Errno::STALE)?;
            let held = host.hold(directory, name).map_err(|_| Errno::STALE)?;
            if host.stat(held.as_fd())?.key != node.key {
                return Err(Errno::STALE);
            }
            self.node_mut(slot)?.held = Some(held);
            self.held = self.held.saturating_add(1);
        }
        Ok(())
    }

    /// Counts one more lookup of a file that is known already.
    pub(super) fn look_up_again(&mut self, key: &Key) -> Option<(u64, u64)> {
        let slot = *self.by_key.get(key)?;
        let node = self.slots.get_mut(slot)?.as_mut()?;
        node.lookups = node.lookups.saturating_add(1);
        let (lookups, generation) = (node.lookups, node.generation);
        if slot != 0 {
            self.table.set_lookups(slot, lookups).ok()?;
        }
        Some((slot as u64 + ROOT, generation.into()))
    }

    /// Counts the first lookup of a file, which was found as `name` in `parent`. Its number and generation.
    pub(super) fn look_up(
        &mut self,
        parent: u64,
        name: CString,
        found: &Found,
        held: OwnedFd,
    ) -> Result<(u64, u64), Errno> {
        if let Some(known) = self.look_up_again(&found.key) {
            return Ok(known);
        }
        if self.held >= self.budget {
            self.give_up_some();
        }
        let parent = slot_of(parent)?;
        let (slot, generation) = match self.free.pop() {
            Some((slot, generation)) => (slot, generation.wrapping_add(1)),
            None if self.slots.len() >= MOST_NODES as usize => return Err(Errno::NFILE),
            None => {
                self.slots.push(None);
                (self.slots.len().saturating_sub(1), 0)
            }
        };
        let (kind, key) = (found.kind(), found.key);
        let node = Node { lookups: 1, parent, generation, kind, key, name: Some(name), held: Some(held) };
        self.table.set_node(slot, &node.record()).map_err(lost)?;
        self.by_key.insert(found.key, slot);
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(node);
        }
        self.held = self.held.saturating_add(1);
        Ok((slot as u64 + ROOT, generation.into()))
    }

    /// Gives up descriptors of nodes that can be found again.
    fn give_up_some(&mut self) {
        let mut left = GIVEN_UP;
        for _ in 0..self.slots.len() {
            self.hand = self.hand.wrapping_add(1).checked_rem(self.slots.len()).unwrap_or(0);
            let Some(Some(node)) = self.slots.get_mut(self.hand) else { continue };
            if node.name.is_some() && node.held.take().is_some() {
                self.held = self.held.saturating_sub(1);
                left = left.saturating_sub(1);
                if left == 0 {
                    return;
                }
            }
        }
    }

    /// The guest forgets lookups of a node.
    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        let Ok(slot @ 1..) = slot_of(node) else { return };
        let Ok(node) = self.node_mut(slot) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        let left = node.lookups;
        // A note that cannot be written costs room after a restart.
        let _ = self.table.set_lookups(slot, left);
        if left > 0 {
            return;
        }
        let Some(node) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        if self.by_key.get(&node.key) == Some(&slot) {
            self.by_key.remove(&node.key);
        }
        if node.held.is_some() {
            self.held = self.held.saturating_sub(1);
        }
        self.free.push((slot, node.generation));
    }

    /// The descriptor of a node whose [`Self::file`] was asked for just before.
    pub(super) fn known<'a>(&'a self, host: &'a Host, node: u64) -> Result<BorrowedFd<'a>, Errno> {
        match slot_of(node)? {
            0 => Ok(host.root()),
            slot => self.node(slot)?.held.as_ref().map(AsFd::as_fd).ok_or(Errno::STALE),
        }
    }

    /// A file that was `old` (name in a node) has another name, or none, if that is the one by which it would be found again.
    pub(super) fn renamed(&mut self, key: &Key, old: (u64, &CStr), new: Option<(u64, &CStr)>) {
        let Some(&slot @ 1..) = self.by_key.get(key) else { return };
        let is_old = |node: &Node| {
            slot_of(old.0) == Ok(node.parent) && node.name.as_deref().is_some_and(|name| name == old.1)
        };
        let Ok(node) = self.node_mut(slot) else { return };
        if !is_old(node) {
            return;
        }
        match new.and_then(|(parent, name)| Some((slot_of(parent).ok()?, name))) {
            Some((parent, name)) => (node.parent, node.name) = (parent, Some(name.to_owned())),
            None => node.name = None,
        }
        let record = node.record();
        let _ = self.table.set_node(slot, &record);
    }

    /// Takes hold of a file that is about to lose its name: only a descriptor leads to it from then on.
    pub(super) fn hold_before_loss(&mut self, host: &Host, key: &Key) {
        if let Some(&slot @ 1..) = self.by_key.get(key) {
            let _ = self.file(host, slot as u64 + ROOT);
        }
    }
}
