/* A multiboot kernel: says what its loader told it, and ends the machine by the debug exit port. */
        .text
        .code32
        .globl  start
        .align  4
header: .long   0x1BADB002, 0x3, -(0x1BADB002 + 0x3)
start:  cmp     $0x2BADB002, %eax
        jne     wrong
        testl   $0x4, (%ebx)            /* there is a command line */
        jz      wrong
        mov     16(%ebx), %esi
        mov     $0x3f8, %dx
1:      lodsb                           /* print it */
        test    %al, %al
        jz      2f
        out     %al, (%dx)
        jmp     1b
2:      mov     $'\n', %al
        out     %al, (%dx)
        mov     $0x21, %al
        out     %al, $0xf4
wrong:  mov     $0x7f, %al
        out     %al, $0xf4
3:      hlt
        jmp     3b
