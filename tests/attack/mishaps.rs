//! What can go wrong in an honest program, under its policy: each must end as it is meant to, not by a forbidden call. And what
//! its allocator does when all is well.
//!
//! Contains unsafe code: faults on purpose, and ioctls of KVM.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How each mishap ends, as the supervisor tells it, and what the process says before.
pub const ENDS: &[(&str, &str, &str)] = &[
    ("panic", "panicked (its message stands above)", "panic: panicked at"),
    ("index", "panicked (its message stands above)", "index out of bounds: the len is 0"),
    ("lock", "panicked (its message stands above)", "PoisonError"),
    // Without /proc the standard library does not know where the main thread's stack ends, and says nothing of it.
    ("stack", "was killed by SIG", ""),
    ("memory", "was killed by SIG", "memory allocation of"),
    ("heap", "was killed by SIG", "free(): invalid pointer"),
    ("segment", "was killed by SIGSEGV", ""),
    ("bus", "was killed by SIGBUS", ""),
    ("abort", "was killed by SIG", ""),
    ("allocator", "ended by itself with exit code 7", ""),
];

/// Does what the word says; ends the process.
pub fn happen(word: &str) {
    match word {
        "panic" => panic!("a sentence with {}", black_box(3)),
        "index" => {
            let nothing: Vec<u8> = black_box(Vec::new());
            black_box(nothing[black_box(3)]);
        }
        "lock" => {
            let poisoned: Result<u8, _> = black_box(Err(std::sync::PoisonError::new(black_box(1_u8))));
            black_box(poisoned.unwrap());
        }
        "stack" => {
            black_box(deeper(black_box(1)));
        }
        "memory" => drop(black_box(vec![1_u8; 1 << 40])),
        "heap" => {
            let words = black_box([0x91_u64; 32]);
            // SAFETY: none; this is the fault: no allocation begins here, nor at an address that is no multiple of 16.
            unsafe { libc::free((words.as_ptr() as usize | 8) as *mut libc::c_void) }
        }
        "segment" => {
            // SAFETY: none; this is the fault.
            unsafe { black_box(std::ptr::null_mut::<u8>()).write_volatile(1) };
        }
        "bus" => {
            let page = BEYOND.load(Ordering::Relaxed) as *mut u8;
            // SAFETY: none; this is the fault: the file has no such page.
            unsafe { page.write_volatile(1) };
        }
        "abort" => std::process::abort(),
        "allocator" => allocate(),
        word => panic!("no mishap {word}"),
    }
}

#[expect(unconditional_recursion, reason = "the fault")]
fn deeper(depth: u64) -> u64 {
    let room = black_box([depth; 512]);
    deeper(depth + 1) + room[7]
}

/// Small and large allocations, in place and moved, freed from the top so that the heap is trimmed.
fn allocate() {
    for round in 0..3 {
        let mut small: Vec<Vec<u8>> = (1..4000_usize).map(|size| vec![1; size]).collect();
        let mut large: Vec<Vec<u8>> =
            (0..8_usize).map(|number| vec![2; (256 << 10) << (number % 4)]).collect();
        for buffer in small.iter_mut().chain(&mut large) {
            // realloc: within the heap, from the heap to a mapping, of a mapping (mremap).
            buffer.resize(buffer.len() * 2 + round, 3);
        }
        for buffer in small.iter_mut().chain(&mut large) {
            buffer.truncate(10);
            buffer.shrink_to_fit();
        }
        let mut aligned = std::ptr::null_mut();
        // SAFETY: the pointer is live; what is allocated is freed.
        unsafe {
            libc::posix_memalign(&raw mut aligned, 2 << 20, 3 << 20);
            aligned.cast::<u8>().write_bytes(1, 3 << 20);
            libc::free(aligned);
        }
        drop(small);
        drop(large);
        // SAFETY: gives unused memory back to the kernel.
        unsafe { libc::malloc_trim(0) };
    }
    // SAFETY: ends the process; buffers of the standard library are empty.
    unsafe { libc::_exit(7) };
}

/// Address of a page of a file that has none.
static BEYOND: AtomicUsize = AtomicUsize::new(0);

/// What a mishap needs and a sealed thread cannot have.
pub fn prepare() {
    // SAFETY: a new mapping of a new file; nobody touches it but the mishap.
    let page = unsafe {
        let file = libc::memfd_create(c"empty".as_ptr(), 0);
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_WRITE, libc::MAP_SHARED, file, 0);
        libc::close(file);
        page
    };
    BEYOND.store(page as usize, Ordering::Relaxed);
}

/// A virtual machine with a vCPU, as the core holds them. The descriptors stay open.
pub fn virtual_machine(kvm: i32) {
    // SAFETY: KVM_CREATE_VM and KVM_CREATE_VCPU take integers.
    unsafe {
        let vm = libc::ioctl(kvm, 0xAE01, 0);
        let vcpu = libc::ioctl(vm, 0xAE41, 0);
        assert!(vm >= 0 && vcpu >= 0, "no virtual machine: {}", std::io::Error::last_os_error());
    }
}
