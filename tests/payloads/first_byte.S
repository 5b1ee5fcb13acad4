/* The shortest useful guest: one byte to the UART, then it waits. It measures what a VMM needs before and after its guest. */
#include "pvh_note.h"
        .text
        .code32
        .globl  pvh_start
pvh_start:
        mov     $0x3f8, %dx
        mov     $'!', %al
        out     %al, (%dx)
1:      hlt
        jmp     1b
