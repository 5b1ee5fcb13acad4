//! Gives memory back that only the launch needed.
//!
//! Contains unsafe code: `malloc_trim`, which has no safe wrapper.

/// Returns freed pages of the heap to the kernel. What the command line parser used would else stay for the life of the
/// machine, in every supervisor of the host.
pub fn trim() {
    // SAFETY: the allocator of this program is the C library's; the call takes no pointer and leaves live blocks alone.
    unsafe { libc::malloc_trim(0) };
}
