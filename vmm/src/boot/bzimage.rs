//! bzImage: the Linux boot protocol with its 64-bit entry (Documentation/arch/x86/boot.rst).

use bulkhead_ipc::memory::{Direction, GuestRam, HUGE_PAGE_SIZE};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::entry::{Entry, Segment, Unpacking};
use super::image::Image;
use super::initrd::{self, Initrd};
use super::map::{MapEntry, memory_map};
use super::{BootError, BootSource, KERNEL_START, low_ram_end, paging, write_command_line};

const KIND: &str = "bzImage";

/// Guest address of `boot_params`.
const BOOT_PARAMS: u64 = 0x7000;
/// File offset of the setup header.
const HEADER: u64 = 0x1F1;
/// File offset of the header's second jump byte, which says where the header ends, counted from 0x202.
const HEADER_LENGTH: u64 = 0x201;
const SECTOR: u64 = 512;
/// The 64-bit entry, counted from the load address.
const ENTRY_64: u64 = 0x200;

/// Protocol 2.12 brought `xloadflags`, which say whether there is a 64-bit entry.
const VERSION_2_12: u16 = 0x020C;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;

/// What the header says, checked.
struct Plan {
    header: setup_header,
    /// File offset and bytes of the protected-mode kernel.
    payload: (u64, u64),
    load_address: u64,
    /// First address that the kernel does not need while it unpacks itself.
    end: u64,
}

/// Loads a bzImage with its `boot_params`.
pub(super) fn boot(ram: &GuestRam, image: &Image<'_>, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let plan = plan(image, low_ram_end(ram))?;
    let Plan { mut header, payload: (offset, length), load_address, end } = plan;
    // Fields of the packed header are copied before they are used.
    let (initrd_addr_max, cmdline_size) = (header.initrd_addr_max, header.cmdline_size);

    let command_line = write_command_line(ram, source.command_line, u64::from(cmdline_size))?;
    let map = memory_map(ram, source.reserved);
    let limit = low_ram_end(ram).min(u64::from(initrd_addr_max).saturating_add(1));
    let initrd = initrd::load(ram, source, end, load_address, limit)?;
    ram.back_with_huge_pages(load_address, length);
    image.load(ram, offset, length, load_address)?;
    // Before it unpacks, the kernel moves to the end of what it needs.
    let start = end.saturating_sub(length) / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
    ram.back_with_huge_pages(start, end.saturating_add(HUGE_PAGE_SIZE - 1).saturating_sub(start));

    header.type_of_loader = LOADER_UNDEFINED;
    header.code32_start = narrow("load address", load_address)?;
    header.cmd_line_ptr = narrow("command line address", command_line)?;
    header.setup_data = 0;
    let Initrd { address, size } = initrd.unwrap_or(Initrd { address: 0, size: 0 });
    header.ramdisk_image = narrow("initrd address", address)?;
    header.ramdisk_size = narrow("initrd size", size)?;
    write_boot_params(ram, header, &map, source.rsdp)?;

    Ok(Entry {
        rip: load_address.saturating_add(ENTRY_64),
        rsi: BOOT_PARAMS,
        rbx: 0,
        rax: 0,
        rflags: Entry::RFLAGS,
        mode: paging::write(ram)?,
        code: Segment::CODE_64,
        data: Segment::DATA,
        task: Segment::TASK,
        unpacking: Some(Unpacking {
            // A huge page lies in one slot.
            above: end.checked_next_multiple_of(HUGE_PAGE_SIZE).unwrap_or(end),
            size: end.saturating_sub(load_address),
        }),
    })
}

/// Reads and checks the setup header; `ram_end` is the end of RAM below the hole.
fn plan(image: &Image<'_>, ram_end: u64) -> Result<Plan, BootError> {
    let header = read_header(image)?;
    let version = header.version;
    if version < VERSION_2_12 {
        let [minor, major] = version.to_le_bytes();
        return Err(BootError::OldProtocol { major, minor });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(bad("loadflags", header.loadflags));
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = setup_sectors.saturating_add(1).saturating_mul(SECTOR);
    let length = u64::from(header.syssize).saturating_mul(16);
    if length <= ENTRY_64 {
        return Err(bad("syssize", header.syssize));
    }
    image.check_range(KIND, "kernel", offset, length)?;
    let load_address = load_address(&header, length, ram_end)?;
    let end = load_address.saturating_add(footprint(&header, length));
    Ok(Plan { header, payload: (offset, length), load_address, end })
}

/// Reads the setup header; what an older kernel's header does not reach is zero.
fn read_header(image: &Image<'_>) -> Result<setup_header, BootError> {
    let mut length = [0];
    image.read(KIND, "header", HEADER_LENGTH, &mut length)?;
    let [length] = length;
    let end = HEADER_LENGTH.saturating_add(1).saturating_add(u64::from(length));
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let present = usize::try_from(end.saturating_sub(HEADER)).unwrap_or(usize::MAX).min(bytes.len());
    let bytes = bytes.get_mut(..present).unwrap_or_default();
    image.read(KIND, "header", HEADER, bytes)?;
    Ok(header)
}

/// Bytes that the kernel takes from its load address on until it has its own memory map.
fn footprint(header: &setup_header, length: u64) -> u64 {
    u64::from(header.init_size).max(length)
}

/// The address that the kernel prefers; where that does not fit into RAM and the kernel can be moved, the lowest
/// address that its alignment allows.
fn load_address(header: &setup_header, length: u64, ram_end: u64) -> Result<u64, BootError> {
    let needed = footprint(header, length);
    let fits = |address: u64| address.checked_add(needed).is_some_and(|end| end <= ram_end);
    let preferred = header.pref_address;
    if preferred >= KERNEL_START && fits(preferred) {
        return Ok(preferred);
    }
    if header.relocatable_kernel != 0 {
        let alignment = u64::from(header.kernel_alignment);
        if !alignment.is_power_of_two() {
            return Err(bad("kernel_alignment", header.kernel_alignment));
        }
        let lowest = KERNEL_START.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        if fits(lowest) {
            return Ok(lowest);
        }
        let needed = lowest.saturating_add(needed);
        return Err(BootError::KernelTooLarge { needed, available: ram_end });
    }
    if preferred < KERNEL_START {
        return Err(BootError::KernelTooLow(preferred));
    }
    Err(BootError::KernelTooLarge { needed: preferred.saturating_add(needed), available: ram_end })
}

fn write_boot_params(
    ram: &GuestRam,
    header: setup_header,
    map: &[MapEntry],
    rsdp: Option<u64>,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp.unwrap_or(0), ..boot_params::default() };
    let mut table = params.e820_table;
    let limit = table.len();
    let too_long = BootError::MapTooLong { entries: map.len(), limit };
    if map.len() > limit {
        return Err(too_long);
    }
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.address, size: entry.size, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).map_err(|_| too_long)?;
    let bytes = params.as_slice();
    ram.view(BOOT_PARAMS, bytes.len() as u64, Direction::Write)?.write_bytes(0, bytes)?;
    Ok(())
}

fn narrow(field: &'static str, value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| bad(field, value))
}

fn bad(field: &'static str, value: impl Into<u64>) -> BootError {
    BootError::BadHeader { kind: KIND, field, value: value.into() }
}
