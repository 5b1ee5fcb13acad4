//! The least that a monitor can do: a loop around KVM_RUN that answers every access in place, all ones to reads.
//!
//! Contains unsafe code: KVM is told where the guest's memory lies in this process.

use std::fs;
use std::path::Path;

use bulkhead_tests::harness::Outcome;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: usize = 4 << 20;
/// A payload's program header is the first after the ELF header.
const PROGRAM_HEADER: usize = 64;
const UART: u16 = 0x3F8;
const PM1_CNT: u16 = 0x604;

fn failed(what: &str) -> impl Fn(kvm_ioctls::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// Runs a payload until it powers off; returns what it wrote to the UART.
pub fn run(payload: &Path) -> Outcome<String> {
    let kvm = Kvm::new().map_err(failed("/dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|error| format!("guest memory: {error}"))?;
    // The address is only handed to KVM; the bench itself writes before the guest runs.
    #[expect(clippy::disallowed_methods)]
    let host = memory.get_host_address(GuestAddress(0)).map_err(|error| error.to_string())?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is exactly the mapping that `memory` owns, which is dropped after the vCPU has run for the last time.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let image = fs::read(payload).map_err(|error| format!("{}: {error}", payload.display()))?;
    let entry = load(&memory, &image).ok_or(format!("{} is no payload", payload.display()))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    // Long mode is there only for a guest whose CPUID says so.
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    enter_at(&vcpu, entry)?;
    answer(&mut vcpu)
}

fn number<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Loads the one segment of a payload and returns its entry.
fn load(memory: &GuestMemoryMmap, image: &[u8]) -> Option<u64> {
    let entry = u64::from_le_bytes(number(image, 24)?);
    let offset = usize::try_from(u64::from_le_bytes(number(image, PROGRAM_HEADER + 8)?)).ok()?;
    let address = u64::from_le_bytes(number(image, PROGRAM_HEADER + 24)?);
    let size = usize::try_from(u64::from_le_bytes(number(image, PROGRAM_HEADER + 32)?)).ok()?;
    memory.write_slice(image.get(offset..offset.checked_add(size)?)?, GuestAddress(address)).ok()?;
    Some(entry)
}

/// 32-bit protected mode without paging, flat segments: the entry of the PVH boot protocol.
fn enter_at(vcpu: &VcpuFd, entry: u64) -> Outcome {
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let segment = |selector, kind| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = segment(16, 3);
    sregs.cs = segment(8, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    (regs.rip, regs.rflags) = (entry, 2);
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

fn answer(vcpu: &mut VcpuFd) -> Outcome<String> {
    let mut written = Vec::new();
    loop {
        match vcpu.run().map_err(failed("KVM_RUN"))? {
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xFF),
            VcpuExit::IoOut(UART, data) => written.extend_from_slice(data),
            VcpuExit::IoOut(PM1_CNT, _) => return Ok(String::from_utf8_lossy(&written).into_owned()),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            other => return Err(format!("unexpected exit {other:?}")),
        }
    }
}
