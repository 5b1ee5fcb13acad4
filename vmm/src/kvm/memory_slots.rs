//! KVM's memory slots, which follow the machine's memory map, and the dirty log that KVM keeps of each.
//!
//! Contains unsafe code: memory is given to KVM by host address.
//!
//! A slot cannot be changed in place, and one that is deleted takes its dirty log with it. So the log is read first, and
//! meanwhile no vCPU is in the guest: none may write between the two, nor miss the slot while it is away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_ipc::memory::{GuestRam, HostMapping};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::unpacking_watch::UnpackingWatch;
use super::{Gate, KvmError, Vm, call};
use crate::boot::Unpacking;
use crate::machine::{Backing, MemorySlot};

/// The slots of a machine.
pub struct MemorySlots {
    vm: Arc<VmFd>,
    ram: GuestRam,
    gate: Arc<Gate>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    logging: bool,
    /// What the machine's map asks for.
    wanted: Vec<MemorySlot>,
    unpacking: UnpackingWatch,
    /// By KVM's number.
    slots: Vec<Option<MemorySlot>>,
}

impl MemorySlots {
    /// A machine without memory. `gate` keeps vCPUs out of the guest while slots are replaced.
    pub fn new(vm: &Vm, gate: Arc<Gate>) -> Self {
        Self { vm: vm.handle(), ram: vm.ram.clone(), gate, state: Mutex::default() }
    }

    /// Makes KVM's slots equal to `wanted`. Those that stay as they are are not touched.
    ///
    /// # Errors
    /// The ioctl that failed; the guest must not go on then.
    pub fn update(&self, wanted: &[MemorySlot]) -> Result<(), KvmError> {
        let mut state = self.lock();
        state.wanted = wanted.to_vec();
        self.follow(&mut state)
    }

    /// The guest is about to unpack its kernel, and has not run yet.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn await_unpacking(&self, unpacking: Unpacking) -> Result<(), KvmError> {
        let mut state = self.lock();
        state.unpacking.begin(unpacking);
        self.follow(&mut state)
    }

    /// The guest wrote to RAM at `address`, and had to leave for it.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn ram_written(&self, address: u64) -> Result<(), KvmError> {
        let mut state = self.lock();
        if !state.unpacking.ends(address, &self.ram) {
            return Ok(());
        }
        self.follow(&mut state)
    }

    fn follow(&self, state: &mut State) -> Result<(), KvmError> {
        let wanted = state.unpacking.slots(&state.wanted);
        let stale = |slot: &Option<MemorySlot>| slot.as_ref().is_some_and(|slot| !wanted.contains(slot));
        let count = state.slots.iter().flatten().count();
        if count == wanted.len() && !state.slots.iter().any(stale) {
            return Ok(());
        }
        self.gate.exclude_vcpus(|| {
            let logging = state.logging;
            for (number, slot) in (0..).zip(&mut state.slots).filter(|(_, slot)| stale(slot)) {
                if let Some(old) = slot.as_ref() {
                    self.harvest_slot(number, old, logging)?;
                    self.set(number, old, logging, 0)?;
                }
                *slot = None;
            }
            for new in &wanted {
                if state.slots.iter().flatten().any(|slot| slot == new) {
                    continue;
                }
                let free = state.slots.iter().position(Option::is_none).unwrap_or(state.slots.len());
                let number = u32::try_from(free).unwrap_or(u32::MAX);
                self.set(number, new, logging, new.size)?;
                match state.slots.get_mut(free) {
                    Some(slot) => *slot = Some(new.clone()),
                    None => state.slots.push(Some(new.clone())),
                }
            }
            Ok(())
        })
    }

    /// Starts or ends KVM's dirty log. What it noted before it ends is harvested.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn set_logging(&self, on: bool) -> Result<(), KvmError> {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.logging, on);
        self.each(&state, |number, slot| {
            self.harvest_slot(number, slot, before)?;
            self.set(number, slot, on, slot.size)
        })
    }

    /// Marks the pages that the guest wrote since the last time, so that [`GuestRam::take_dirty`] tells them.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn harvest(&self) -> Result<(), KvmError> {
        let state = self.lock();
        self.each(&state, |number, slot| self.harvest_slot(number, slot, state.logging))
    }

    fn each(
        &self,
        state: &State,
        mut visit: impl FnMut(u32, &MemorySlot) -> Result<(), KvmError>,
    ) -> Result<(), KvmError> {
        let slots = (0..).zip(&state.slots);
        slots
            .filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
            .try_for_each(|(n, slot)| visit(n, slot))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn harvest_slot(&self, number: u32, slot: &MemorySlot, logging: bool) -> Result<(), KvmError> {
        if !logging || !slot.writable || slot.backing != Backing::Ram {
            return Ok(());
        }
        let size = usize::try_from(slot.size).unwrap_or(usize::MAX);
        let words = self.vm.get_dirty_log(number, size).map_err(call("KVM_GET_DIRTY_LOG"))?;
        self.ram.mark_pages(slot.source, &words);
        Ok(())
    }

    /// Sets a slot, or deletes it where `size` is 0.
    #[expect(clippy::disallowed_methods, reason = "what the host's addresses are for")]
    fn set(&self, slot: u32, new: &MemorySlot, logging: bool, size: u64) -> Result<(), KvmError> {
        let host = |mapping: HostMapping| {
            let offset = new.source.checked_sub(mapping.guest_address)?;
            let room = mapping.size.checked_sub(offset)?;
            (new.size <= room).then(|| mapping.host_address.checked_add(offset))?
        };
        let host = match &new.backing {
            Backing::Ram => self.ram.host_mappings().find_map(host),
            Backing::Chip(chip) => chip.memory().host_mappings().find_map(host),
            Backing::File(file) => host(file.host_mapping()),
        };
        let refused = || KvmError::Call {
            call: "KVM_SET_USER_MEMORY_REGION",
            source: kvm_ioctls::Error::new(libc::EFAULT),
        };
        let log = if logging && new.writable { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let region = kvm_userspace_memory_region {
            slot,
            flags: log | if new.writable { 0 } else { KVM_MEM_READONLY },
            guest_phys_addr: new.address,
            memory_size: size,
            userspace_addr: host.ok_or_else(refused)?,
        };
        // SAFETY: the range lies within a mapping of `self.ram`, of the chip or of the file. The former lives as long as this struct; the
        // others as long as the slot does in `state`, which holds chip or file and outlives the slot in KVM: it is dropped from there only
        // after KVM has let go of it. KVM refuses slots that overlap.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }
}
