/* ELF note XEN_ELFNOTE_PHYS32_ENTRY (18): the 32-bit entry point, as in the PVH boot protocol. */
        .section .note.pvh, "a", @note
        .align  4
        .long   4
        .long   4
        .long   18
        .asciz  "Xen"
        .long   pvh_start
