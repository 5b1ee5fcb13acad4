/* Takes a payload written in C from the PVH entry (32-bit, no paging) to 64-bit mode with the first 8 GiB mapped one to one. */
#include "pvh_note.h"
        .text
        .code32
        .globl  pvh_start
pvh_start:
        mov     $stack_top, %esp
        mov     $page_directories, %edi
        mov     $0x83, %eax             /* present, writable, 2 MiB page */
        xor     %edx, %edx
        mov     $4096, %ecx
1:      mov     %eax, (%edi)
        mov     %edx, 4(%edi)
        add     $0x200000, %eax
        adc     $0, %edx
        add     $8, %edi
        dec     %ecx
        jnz     1b
        mov     $page_pointers, %edi
        mov     $(page_directories + 3), %eax
        mov     $8, %ecx
2:      mov     %eax, (%edi)
        movl    $0, 4(%edi)
        add     $0x1000, %eax
        add     $8, %edi
        dec     %ecx
        jnz     2b
        movl    $(page_pointers + 3), page_root
        mov     %cr4, %eax
        or      $0x20, %eax             /* PAE */
        mov     %eax, %cr4
        mov     $page_root, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       /* EFER.LME */
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80000001, %eax
        mov     %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $8, $long_start
        .code64
long_start:
        mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        call    payload
3:      hlt
        jmp     3b
        .data
        .align  8
gdt:    .quad   0
        .quad   0x00af9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
        .bss
        .align  4096
page_root:        .skip 4096
page_pointers:    .skip 4096
page_directories: .skip 8 * 4096
        .skip   16384
stack_top:
