/* Jumps to where no memory is: KVM cannot go on, and its monitor has to say what happened. */
#include "pvh_note.h"
        .text
        .code32
        .globl  pvh_start
pvh_start:
        mov     $0xd0000000, %eax
        jmp     *%eax
