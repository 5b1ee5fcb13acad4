//! Doorbells: guest writes that KVM turns into a signal of an eventfd, without waking the core.
//!
//! What exists in KVM is derived from the bus tree: each change of the tree hands the whole wanted set, and only the difference is carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, Vm, call};
use crate::machine::pci::DoorbellId;
use crate::machine::{MappedDoorbell, Space};
use crate::virtio::VirtioPci;

/// A function whose doorbells signal eventfds.
pub trait DoorbellEvents: Send + Sync {
    /// The eventfd of a doorbell: the same one for the function's whole life.
    fn event(&self, id: DoorbellId) -> Option<&EventFd>;
}

impl DoorbellEvents for VirtioPci {
    fn event(&self, id: DoorbellId) -> Option<&EventFd> {
        self.doorbell_event(id).map(|event| event.eventfd())
    }
}

/// The ioeventfds of a machine.
pub struct Doorbells {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By slot.
    functions: BTreeMap<u8, Arc<dyn DoorbellEvents>>,
    mapped: BTreeSet<MappedDoorbell>,
}

impl Doorbells {
    /// A machine without doorbells.
    pub fn new(vm: &Vm) -> Self {
        Self { vm: vm.handle(), state: Mutex::default() }
    }

    /// Names the function whose eventfds the doorbells of `slot` signal; before it is attached to the tree.
    pub fn register(&self, slot: u8, function: Arc<dyn DoorbellEvents>) {
        self.lock().functions.insert(slot, function);
    }

    /// Makes KVM's ioeventfds equal to `wanted`, which is sorted. What KVM refuses stays with the slow path (the tree gets the
    /// write and signals the eventfd itself), so nothing is lost; the first error is returned for the log.
    ///
    /// # Errors
    /// The first ioctl that failed.
    pub fn update(&self, wanted: &[MappedDoorbell]) -> Result<(), KvmError> {
        let mut state = self.lock();
        let State { functions, mapped } = &mut *state;
        let mut result = Ok(());
        mapped.retain(|old| {
            let keep = wanted.binary_search(old).is_ok();
            if !keep {
                first_error(&mut result, self.set(functions, old, false));
            }
            keep
        });
        for new in wanted {
            if !mapped.contains(new) {
                match self.set(functions, new, true) {
                    Ok(()) => {
                        mapped.insert(*new);
                    }
                    error => first_error(&mut result, error),
                }
            }
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(
        &self,
        functions: &BTreeMap<u8, Arc<dyn DoorbellEvents>>,
        doorbell: &MappedDoorbell,
        on: bool,
    ) -> Result<(), KvmError> {
        let function = functions.get(&doorbell.slot);
        let Some(event) = function.and_then(|function| function.event(doorbell.id)) else {
            return Ok(());
        };
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

fn first_error(result: &mut Result<(), KvmError>, next: Result<(), KvmError>) {
    if result.is_ok() {
        *result = next;
    }
}
