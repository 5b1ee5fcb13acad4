//! A load generator for vhost-user-blk, the same for every back end: the crate `virtio-driver`.
//!
//! Contains unsafe code: the driver takes raw pointers to buffers, and the system call that makes their memory.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use bulkhead_tests::harness::Outcome;
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

/// Entries of the queue.
const SIZE: u16 = 512;
/// Without a completion for so long the back end has lost a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes of a request.
    pub size: usize,
    /// Requests under way at any time.
    pub depth: usize,
    /// Writes, else reads.
    pub writes: bool,
    /// One after the other, else anywhere.
    pub sequential: bool,
    /// The driver looks at the used ring all the time, else it sleeps until its interrupt.
    pub polls: bool,
}

/// What it came to.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Requests that ended.
    pub requests: u64,
    /// Time that they took together.
    pub time: Duration,
}

/// A connection to a back end, with buffers for requests.
pub struct Generator {
    transport: Box<VirtioBlkTransport>,
    /// Keeps the buffers.
    _memory: Memory,
    buffers: usize,
    disk: u64,
}

/// Shared memory.
struct Memory {
    address: usize,
    len: usize,
    _file: File,
}

impl Memory {
    fn new(len: usize) -> Outcome<Self> {
        // SAFETY: the name is a C string, and the descriptor that comes back is nobody else's.
        let file = unsafe {
            let fd = libc::memfd_create(c"buffers".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err("memfd_create failed".into());
            }
            File::from_raw_fd(fd)
        };
        file.set_len(len as u64).map_err(|error| error.to_string())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping, of a file that is as long.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err("mmap failed".into());
        }
        Ok(Self { address: address as usize, len, _file: file })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, unmapped once.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

impl Generator {
    /// Connects; `disk` is the disk's size in bytes.
    pub fn new(socket: &str, load: Load, disk: u64) -> Outcome<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::CONFIG_WCE.bits();
        let transport = VhostUser::<_, VirtioBlkReqBuf>::new(socket, features)
            .map_err(|error| format!("{socket}: {error}"))?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let memory = Memory::new(load.size * load.depth)?;
        transport
            .map_mem_region(memory.address, memory.len, memory._file.as_raw_fd(), 0)
            .map_err(|error| format!("memory: {error}"))?;
        Ok(Self { transport, buffers: memory.address, _memory: memory, disk })
    }

    /// Keeps the back end busy for `time`.
    pub fn run(&mut self, load: Load, time: Duration) -> Outcome<Rate> {
        let mut queues = VirtioBlkQueue::<usize>::setup_queues(self.transport.as_mut(), 1, SIZE)
            .map_err(|error| format!("queue: {error}"))?;
        let queue = queues.first_mut().ok_or("no queue")?;
        let (kick, call) = (self.transport.get_submission_notifier(0), self.transport.get_completion_fd(0));
        queue.set_used_notif_enabled(!load.polls);
        let mut places = Places { load, blocks: self.disk / load.size as u64, next: 0x1357_9bdf_2468_ace1 };
        let mut submit = |queue: &mut VirtioBlkQueue<'_, usize>, lane: usize| {
            let buffer = self.buffers + lane * load.size;
            let offset = places.next();
            // SAFETY: the buffer is this lane's, mapped as long as `self` is, and no reference leads to it.
            let result = unsafe {
                if load.writes {
                    queue.write_raw(offset, buffer as *const u8, load.size, lane)
                } else {
                    queue.read_raw(offset, buffer as *mut u8, load.size, lane)
                }
            };
            result.map_err(|error| format!("request: {error}"))
        };
        for lane in 0..load.depth {
            submit(queue, lane)?;
        }
        let notify = |queue: &mut VirtioBlkQueue<'_, usize>| {
            fence(Ordering::SeqCst);
            if queue.avail_notif_needed() { kick.notify().map_err(|error| error.to_string()) } else { Ok(()) }
        };
        notify(queue)?;
        let (begin, mut count, mut last) = (Instant::now(), 0u64, Instant::now());
        let mut done = Vec::with_capacity(load.depth);
        while begin.elapsed() < time {
            done.extend(queue.completions().map(|completion| (completion.context, completion.ret)));
            if done.is_empty() {
                if load.polls {
                    std::hint::spin_loop();
                } else {
                    // The back end may have made it non-blocking.
                    let mut fds = [libc::pollfd { fd: call.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
                    // SAFETY: one entry, which lives through the call.
                    if unsafe { libc::poll(fds.as_mut_ptr(), 1, 1000) } > 0 {
                        call.read().map_err(|error| error.to_string())?;
                    }
                }
                if last.elapsed() > PATIENCE {
                    return Err("a request is never finished".into());
                }
                continue;
            }
            last = Instant::now();
            for (lane, status) in done.drain(..) {
                if status != 0 {
                    return Err(format!("a request failed: {status}"));
                }
                count += 1;
                submit(queue, lane)?;
            }
            notify(queue)?;
        }
        let time = begin.elapsed();
        // What is under way still writes to the buffers.
        let mut left = load.depth;
        while left > 0 && last.elapsed() < PATIENCE {
            left -= queue.completions().count();
        }
        Ok(Rate { requests: count, time })
    }
}

/// Where requests go.
struct Places {
    load: Load,
    blocks: u64,
    next: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        let block = if self.load.sequential {
            self.next = self.next.wrapping_add(1);
            self.next
        } else {
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
            self.next >> 11
        };
        block % self.blocks * self.load.size as u64
    }
}
