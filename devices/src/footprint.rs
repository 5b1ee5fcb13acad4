//! What an idle process occupies: the pages of the program that its start has touched are let go.
//!
//! Contains unsafe code: the program's own headers are read where the kernel says that they lie, and its unwritable pages are unmapped.

use std::slice;

/// Lets the pages of the program's code and constants go, which stay in the page cache: what is used from now on comes back by itself, without
/// a copy. Without success nothing is lost but memory.
pub fn release_program() {
    // SAFETY: getauxval only reads what the kernel has handed over.
    let [headers, count] = [libc::AT_PHDR, libc::AT_PHNUM].map(|what| unsafe { libc::getauxval(what) });
    let (Ok(address), Ok(count)) = (usize::try_from(headers), usize::try_from(count)) else { return };
    if address == 0 {
        return;
    }
    // SAFETY: AT_PHDR and AT_PHNUM name the program headers of this program, mapped read-only as long as it runs (getauxval(3)).
    let headers = unsafe { slice::from_raw_parts(address as *const libc::Elf64_Phdr, count) };
    let Some(own) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else { return };
    let Some(base) = address.checked_sub(own.p_vaddr as usize) else { return };
    for header in headers.iter().filter(|it| it.p_type == libc::PT_LOAD && it.p_flags & libc::PF_W == 0) {
        let begin = base.saturating_add(header.p_vaddr as usize).next_multiple_of(PAGE);
        let end = base.saturating_add(header.p_vaddr.saturating_add(header.p_memsz) as usize) / PAGE * PAGE;
        if begin < end {
            // SAFETY: whole pages of a segment that is mapped from the program's file and never writable, so that nothing in them
            // differs from the file (ours has no text relocations): MADV_DONTNEED on them changes no content (madvise(2)).
            unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_DONTNEED) };
        }
    }
}

/// Bytes of a page of x86-64.
const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of the program's unwritable pages that are mapped in.
    fn mapped() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let program = std::env::current_exe().unwrap().display().to_string();
        let (mut ours, mut sum) = (false, 0);
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("Rss:") if ours => sum += words.next().unwrap().parse::<u64>().unwrap(),
                Some(first) if !first.ends_with(':') => {
                    ours = line.contains(&program) && line.contains("r-xp")
                }
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn pages_of_the_program_go_and_come_back() {
        let before = mapped();
        release_program();
        let after = mapped();
        assert!(after < before / 2, "{before} KiB before and {after} after");
        assert_eq!(format!("{:?}", std::time::Duration::from_millis(1500)), "1.5s");
    }
}
