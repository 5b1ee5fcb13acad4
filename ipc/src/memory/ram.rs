//! Guest RAM of a machine as this process has it mapped.
//!
//! Contains unsafe code: regions are made of mappings that this crate placed itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap, MmapRegion,
};

use super::attach::{Seals, check_set, map_error};
use super::dirty::RegionBitmap;
use super::harvest::{DirtyPages, DirtyRegion};
use super::huge;
use super::log::LogSlot;
use super::mapping::{ACCESS, Mapping};
use super::{
    Direction, DirtyLog, LentBuffer, LentVector, MemoryError, PAGE_SIZE, SharedRegion, View, layout,
};

/// Guest memory as vm-memory, `virtio-queue` and `linux-loader` see it; its writes mark by themselves.
pub type GuestMemory = GuestRegionCollection<GuestRegionMmap<RegionBitmap>>;

pub(super) type Region = GuestRegionMmap<RegionBitmap>;

/// Guest RAM mapped into this process. Cheap to clone; the mappings live as long as a clone does.
///
/// The set of regions of one value never changes: [`GuestRam::insert_region`] and its kin make a new value that
/// shares the mappings, the dirty bitmaps and the log of the regions that stay.
#[derive(Clone, Debug)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: Arc<GuestMemory>,
    log: Arc<LogSlot>,
}

/// One region of guest RAM, with what another process needs to map it.
#[derive(Clone, Copy, Debug)]
pub struct RegionRef<'a> {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where in the file the region begins.
    pub offset: u64,
    /// The file that holds it.
    pub fd: BorrowedFd<'a>,
}

impl RegionRef<'_> {
    /// Duplicates the descriptor, for a region that is sent or stored.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn share(&self) -> io::Result<SharedRegion> {
        let fd = self.fd.try_clone_to_owned()?;
        Ok(SharedRegion { guest_address: self.guest_address, size: self.size, offset: self.offset, fd })
    }
}

/// Where a region lies in this process, for KVM_SET_USER_MEMORY_REGION. Never sent anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMapping {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Virtual address of the first byte in this process.
    pub host_address: u64,
}

impl GuestRam {
    /// Makes the RAM of a machine: `size` bytes in one sealed memfd for each region of [`layout`], all zero.
    ///
    /// # Errors
    /// The size is not one that [`layout`] accepts, or the host has no memory, descriptors or address space left.
    pub fn create(size: u64) -> Result<Self, MemoryError> {
        let log = Arc::new(LogSlot::default());
        let mut regions = Vec::new();
        for piece in layout(size)? {
            let fd = sealed_memfd(piece.size)
                .map_err(|source| MemoryError::Create { size: piece.size, source })?;
            let region = SharedRegion { guest_address: piece.guest_address, size: piece.size, offset: 0, fd };
            let region = map(region, &log)?;
            huge::ask(&region);
            regions.push(Arc::new(region));
        }
        Self::from_regions(regions, log)
    }

    /// Makes one region of memory apart from a machine's RAM, for a ROM: `size` bytes at `address`, all zero.
    ///
    /// # Errors
    /// As [`GuestRam::attach`], or the host has no memory or descriptors left.
    pub fn create_at(address: u64, size: u64) -> Result<Self, MemoryError> {
        let fd = sealed_memfd(size).map_err(|source| MemoryError::Create { size, source })?;
        Self::attach(vec![SharedRegion { guest_address: address, size, offset: 0, fd }])
    }

    /// No RAM at all: what a back end starts with before its front end has sent memory.
    pub fn empty() -> Self {
        Self { inner: Arc::new(Inner { memory: Arc::default(), log: Arc::default() }) }
    }

    /// Maps RAM that was received from the core. The files must be sealed against shrinking, so that nobody can end
    /// this process with SIGBUS.
    ///
    /// # Errors
    /// No region or more than [`super::MAX_REGIONS`], a region that is not aligned, overflows, overlaps another,
    /// whose file is smaller than it says or not sealed, or a mapping that failed.
    pub fn attach(regions: Vec<SharedRegion>) -> Result<Self, MemoryError> {
        Self::empty().replaced(regions, Seals::Required)
    }

    /// Like [`GuestRam::attach`] for foreign front ends, some of which do not seal: such a peer can
    /// end this process by truncating its memory.
    ///
    /// # Errors
    /// As [`GuestRam::attach`], missing seals excepted.
    pub fn attach_unsealed(regions: Vec<SharedRegion>) -> Result<Self, MemoryError> {
        Self::empty().replaced(regions, Seals::NotRequired)
    }

    /// This RAM with all its regions replaced (SET_MEM_TABLE); the log stays. Seals are not required.
    ///
    /// # Errors
    /// As [`GuestRam::attach_unsealed`], or the log does not cover the new regions.
    pub fn replace_regions(&self, regions: Vec<SharedRegion>) -> Result<Self, MemoryError> {
        self.replaced(regions, Seals::NotRequired)
    }

    /// This RAM and one more region (ADD_MEM_REG), under the same log. Seals are not required.
    ///
    /// # Errors
    /// As [`GuestRam::attach_unsealed`], or the log does not cover the region.
    pub fn insert_region(&self, region: SharedRegion) -> Result<Self, MemoryError> {
        let log = &self.inner.log;
        region.check(Seals::NotRequired)?;
        let mut ranges: Vec<_> =
            self.regions().map(|r| (r.guest_address, r.guest_address.saturating_add(r.size))).collect();
        ranges.push((region.guest_address, region.end()));
        check_set(&mut ranges)?;
        log.check_covers(region.end())?;
        let region = Arc::new(map(region, log)?);
        let memory = self.inner.memory.insert_region(region).map_err(|_| MemoryError::NoRegions)?;
        Ok(Self { inner: Arc::new(Inner { memory: Arc::new(memory), log: Arc::clone(log) }) })
    }

    /// This RAM without one region (REM_MEM_REG). The region is unmapped when the last user of the old value is gone;
    /// what it had dirty is in the old value's bitmap.
    ///
    /// # Errors
    /// No region has this address and size.
    pub fn remove_region(&self, guest_address: u64, size: u64) -> Result<Self, MemoryError> {
        let log = Arc::clone(&self.inner.log);
        let missing = MemoryError::NoSuchRegion { guest_address, size };
        let memory = self.inner.memory.remove_region(GuestAddress(guest_address), size);
        let (memory, _) = memory.map_err(|_| missing)?;
        Ok(Self { inner: Arc::new(Inner { memory: Arc::new(memory), log }) })
    }

    fn replaced(&self, mut regions: Vec<SharedRegion>, seals: Seals) -> Result<Self, MemoryError> {
        if regions.is_empty() {
            return Err(MemoryError::NoRegions);
        }
        for region in &regions {
            region.check(seals)?;
        }
        let mut ranges: Vec<_> = regions.iter().map(|region| (region.guest_address, region.end())).collect();
        check_set(&mut ranges)?;
        let log = Arc::clone(&self.inner.log);
        for region in &regions {
            log.check_covers(region.end())?;
        }
        regions.sort_by_key(|region| region.guest_address);
        let mapped: Result<Vec<_>, _> =
            regions.into_iter().map(|region| map(region, &log).map(Arc::new)).collect();
        Self::from_regions(mapped?, log)
    }

    fn from_regions(regions: Vec<Arc<Region>>, log: Arc<LogSlot>) -> Result<Self, MemoryError> {
        // Order and overlap were checked, so that only an empty set is left to refuse.
        let memory = GuestRegionCollection::from_arc_regions(regions).map_err(|_| MemoryError::NoRegions)?;
        Ok(Self { inner: Arc::new(Inner { memory: Arc::new(memory), log }) })
    }

    /// The regions, lowest address first, with what another process needs to map them.
    pub fn regions(&self) -> impl Iterator<Item = RegionRef<'_>> {
        self.inner.memory.iter().filter_map(|region| {
            let file = region.file_offset()?;
            Some(RegionRef {
                guest_address: region.start_addr().raw_value(),
                size: region.len(),
                offset: file.start(),
                fd: file.file().as_fd(),
            })
        })
    }

    /// Where the regions lie in this process. For KVM_SET_USER_MEMORY_REGION in the core and nothing else.
    pub fn host_mappings(&self) -> impl Iterator<Item = HostMapping> {
        self.inner.memory.iter().map(|region| HostMapping {
            guest_address: region.start_addr().raw_value(),
            size: region.len(),
            #[expect(
                clippy::disallowed_methods,
                reason = "the address alone; KVM's own dirty log sees the guest's writes"
            )]
            host_address: region.as_ptr().addr() as u64,
        })
    }

    /// Bytes of RAM in all regions.
    pub fn size(&self) -> u64 {
        self.inner.memory.iter().map(GuestMemoryRegion::len).fold(0, u64::saturating_add)
    }

    /// First address beyond the last region, 0 without regions.
    pub fn end(&self) -> u64 {
        let ends = self
            .inner
            .memory
            .iter()
            .map(|region| region.start_addr().raw_value().saturating_add(region.len()));
        ends.max().unwrap_or(0)
    }

    /// Whether all of `len` bytes at `address` is RAM. An empty range is, wherever it lies.
    pub fn contains(&self, address: u64, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| self.inner.memory.check_range(GuestAddress(address), len))
    }

    /// Gives all of RAM back to the host: it reads as zero afterwards, as when it was created. For a reset; nobody else
    /// may be writing. Marks everything.
    ///
    /// # Errors
    /// The file that holds a region cannot have holes.
    pub fn clear(&self) -> Result<(), MemoryError> {
        self.inner.memory.iter().try_for_each(|region| punch(region, 0, region.len()))
    }

    /// Gives `len` bytes at `address`, whole pages, back to the host: they read as zero afterwards. Marks them.
    ///
    /// # Errors
    /// The range is not wholly RAM or does not consist of pages, or its file cannot have holes.
    pub fn punch(&self, address: u64, len: u64) -> Result<(), MemoryError> {
        let refused = MemoryError::OutOfRange { address, len };
        let pages = address.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        if !pages || !self.contains(address, len) {
            return Err(refused);
        }
        let (mut next, mut left) = (address, len);
        while left > 0 {
            let Some((region, offset)) = self.inner.memory.to_region_addr(GuestAddress(next)) else {
                return Err(refused);
            };
            let piece = region.len().saturating_sub(offset.raw_value()).min(left);
            punch(region, offset.raw_value(), piece)?;
            next = next.saturating_add(piece);
            left = left.saturating_sub(piece);
        }
        Ok(())
    }

    /// Guest memory for `virtio-queue` and loaders. Writes through vm-memory's `Bytes` mark by themselves; writes
    /// through a pointer taken from it do not, and are not allowed.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// As [`GuestRam::memory`], shared: for iterators of `virtio-queue` that outlive a borrow.
    pub fn shared_memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.inner.memory)
    }

    pub(super) fn inner_memory(&self) -> &Arc<GuestMemory> {
        &self.inner.memory
    }

    /// A view of `len` bytes at `address`, for typed and checked access.
    ///
    /// # Errors
    /// The range is not wholly RAM.
    pub fn view(&self, address: u64, len: u64, direction: Direction) -> Result<View, MemoryError> {
        View::new(self.clone(), address, len, direction)
    }

    /// Lends `len` bytes at `address` to the kernel.
    ///
    /// # Errors
    /// The range is not wholly RAM.
    pub fn lend(&self, address: u64, len: u64, direction: Direction) -> Result<LentBuffer, MemoryError> {
        LentBuffer::new(self, address, len, direction)
    }

    /// An empty scatter-gather list of buffers that are lent to the kernel in one operation.
    pub fn lend_vector(&self, direction: Direction) -> LentVector {
        LentVector::new(self, direction)
    }

    /// Sets, replaces or removes the vhost-user dirty log. It holds for this value, its clones, and every value
    /// derived from it. What is written after this returns is logged, until it is called again.
    ///
    /// # Errors
    /// The log has no bit for the end of this RAM; the log that was set before stays.
    pub fn set_log(&self, log: Option<DirtyLog>) -> Result<(), MemoryError> {
        if let Some(log) = &log {
            log.check_covers(self.end())?;
        }
        self.inner.log.replace(log);
        Ok(())
    }

    /// Reads and clears the dirty bitmaps: the pages that this process wrote since the last time. The log is not
    /// touched. A page that is written while this runs is in this answer or in the next one.
    pub fn take_dirty(&self) -> DirtyPages {
        self.harvest(RegionBitmap::take)
    }

    /// Reads the dirty bitmaps and leaves them.
    pub fn dirty_pages(&self) -> DirtyPages {
        self.harvest(RegionBitmap::snapshot)
    }

    /// Marks pages that another writer has noted, the guest by KVM's dirty log for instance: one bit for each page from
    /// `address` on, lowest page in the lowest bit. What is not RAM is ignored.
    pub fn mark_pages(&self, address: u64, words: &[u64]) {
        for page in DirtyRegion::new(address, 0, words.to_vec()).pages() {
            if let Some((region, offset)) = self.inner.memory.to_region_addr(GuestAddress(page)) {
                let offset = usize::try_from(offset.raw_value()).unwrap_or(usize::MAX);
                GuestMemoryRegion::bitmap(region).mark_dirty(offset, 1);
            }
        }
    }

    fn harvest(&self, read: impl Fn(&RegionBitmap) -> Vec<u64>) -> DirtyPages {
        let regions = self.inner.memory.iter().map(|region| {
            let bitmap = MmapRegion::bitmap(region);
            DirtyRegion::new(region.start_addr().raw_value(), region.len(), read(bitmap))
        });
        DirtyPages::new(regions.collect())
    }
}

/// Makes a hole of `len` bytes at `offset` in the file of a region, and marks it.
fn punch(region: &Region, offset: u64, len: u64) -> Result<(), MemoryError> {
    let Some(file) = region.file_offset() else { return Ok(()) };
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let start = i64::try_from(file.start().saturating_add(offset));
    let range = start.and_then(|start| Ok((start, i64::try_from(len)?)));
    let (start, length) = range.map_err(|error| MemoryError::Io(io::Error::other(error)))?;
    let punched = fallocate(file.file(), mode, start, length);
    // On failure too: part of the hole may have been made.
    let [offset, len] = [offset, len].map(|value| usize::try_from(value).unwrap_or(usize::MAX));
    GuestMemoryRegion::bitmap(region).mark_dirty(offset, len);
    punched.map_err(|errno| MemoryError::Io(errno.into()))
}

/// A memfd of `size` bytes that can neither grow nor shrink nor be executed.
fn sealed_memfd(size: u64) -> io::Result<OwnedFd> {
    let sealing = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let never_executable = sealing | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    let fd = match memfd_create(c"guest-ram", never_executable) {
        // Linux before 6.3 does not know the flag.
        Err(Errno::EINVAL) => memfd_create(c"guest-ram", sealing)?,
        other => other?,
    };
    let file = File::from(fd);
    file.set_len(size)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Maps a region that was checked, shared and kept out of core dumps.
fn map(region: SharedRegion, log: &Arc<LogSlot>) -> Result<Region, MemoryError> {
    const WHAT: &str = "guest memory region";
    let SharedRegion { guest_address, size, offset, fd } = region;
    let file = File::from(fd);
    let mapping = Mapping::new(&file, offset, size, guest_address, ACCESS)
        .map_err(|source| MemoryError::Map { what: WHAT, size, source })?;
    let start = mapping.start();
    let length = usize::try_from(size).map_err(|_| MemoryError::Overflow { guest_address, size, offset })?;
    let bitmap = RegionBitmap::new(guest_address, size, Arc::clone(log), mapping)?;
    let builder = MmapRegionBuilder::new_with_bitmap(length, bitmap)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
    // SAFETY: start and length are those of a mapping that the bitmap keeps, and the region keeps the bitmap.
    let mapping = unsafe { builder.with_raw_mmap_pointer(start) }.build();
    let mapping = mapping.map_err(|error| map_error(WHAT, size, error))?;
    GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or(MemoryError::Overflow {
        guest_address,
        size,
        offset,
    })
}
