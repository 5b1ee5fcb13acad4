//! Doorbells: guest writes that KVM turns into a signal of an eventfd, without waking the core.
//!
//! What exists in KVM is derived from the bus tree: each change of the tree hands the whole wanted set, and only the difference is carried out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, Vm, call};
use crate::machine::pci::DoorbellId;
use crate::machine::{MappedDoorbell, Space};

/// The ioeventfds of a machine.
pub struct Doorbells {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By slot and the function's own name for the doorbell.
    events: BTreeMap<(u8, DoorbellId), Arc<EventFd>>,
    mapped: Vec<MappedDoorbell>,
}

impl Doorbells {
    /// A machine without doorbells.
    pub fn new(vm: &Vm) -> Self {
        Self { vm: vm.handle(), state: Mutex::default() }
    }

    /// Names the eventfd that doorbell `id` of the function in `slot` signals once the tree maps it.
    pub fn register(&self, slot: u8, id: DoorbellId, event: Arc<EventFd>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).events.insert((slot, id), event);
    }

    /// Makes KVM's ioeventfds equal to `wanted`. What KVM refuses stays with the slow path (the tree gets the
    /// write and signals the eventfd itself), so nothing is lost; the first error is returned for the log.
    ///
    /// # Errors
    /// The first ioctl that failed.
    pub fn update(&self, wanted: &[MappedDoorbell]) -> Result<(), KvmError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { events, mapped } = &mut *state;
        let mut result = Ok(());
        mapped.retain(|old| {
            let keep = wanted.contains(old);
            if !keep && let Some(event) = events.get(&(old.slot, old.id)) {
                result = std::mem::replace(&mut result, Ok(())).and(self.set(event, old, false));
            }
            keep
        });
        for new in wanted {
            if !mapped.contains(new)
                && let Some(event) = events.get(&(new.slot, new.id))
            {
                match self.set(event, new, true) {
                    Ok(()) => mapped.push(*new),
                    Err(error) => result = std::mem::replace(&mut result, Ok(())).and(Err(error)),
                }
            }
        }
        result
    }

    fn set(&self, event: &EventFd, doorbell: &MappedDoorbell, on: bool) -> Result<(), KvmError> {
        let address = match doorbell.space {
            Space::Port => IoEventAddress::Pio(doorbell.address),
            Space::Memory => IoEventAddress::Mmio(doorbell.address),
        };
        // No width: a driver may notify with 16 or 32 bits, and the queue's number is in the address.
        let done = if on {
            self.vm.register_ioevent(event, &address, NoDatamatch)
        } else {
            self.vm.unregister_ioevent(event, &address, NoDatamatch)
        };
        done.map_err(call("KVM_IOEVENTFD"))
    }
}
