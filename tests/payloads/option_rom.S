/* An option ROM for a virtio entropy device, or for none: tells the debug port where firmware says that its device is. Its last byte is
   for a checksum, which whoever uses it fills in. */
        .text
        .code16
        .globl  start
start:  .byte   0x55, 0xAA, 1           /* a block of 512 bytes */
        jmp     init
        .org    0x18
        .word   pcir, pnp
pcir:   .ascii  "PCIR"                  /* PCI Firmware Specification 3.0, section 5.1.2 */
        .word   0x1AF4, 0x1044, 0, 0x18
        .byte   0, 0, 0, 0xFF           /* revision, class */
        .word   1, 0                    /* blocks, version */
        .byte   0, 0x80                 /* for a PC, the last image */
        .word   0
pnp:    .ascii  "$PnP"                  /* Plug and Play BIOS Specification 1.0A, section 3.2: without it firmware names no device */
        .byte   1, 2                    /* revision, length in 16 bytes */
        .word   0, 0
        .long   0
        .word   0, 0
        .byte   0, 0, 0, 0
        .word   0, 0, 0, 0, 0           /* nothing to boot from */
init:   pushaw
        mov     %ax, %bx                /* bus, device and function */
        mov     $0x402, %dx
        mov     $text, %si
1:      lodsb   %cs:(%si), %al
        test    %al, %al
        jz      2f
        out     %al, (%dx)
        jmp     1b
2:      mov     $4, %cx
3:      rol     $4, %bx
        mov     %bl, %al
        and     $0xF, %al
        add     $'0', %al
        out     %al, (%dx)
        loop    3b
        mov     $'\n', %al
        out     %al, (%dx)
        popaw
        xor     %ax, %ax                /* nothing to boot from */
        lretw
text:   .asciz  "\noption ROM of the device at "
        .org    511
        .byte   0
