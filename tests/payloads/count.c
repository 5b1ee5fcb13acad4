/* Prints numbers, one a line and none left out, and powers off. Asks for the line status before each character, as drivers do. */
#include "payload.h"

static void send(u8 byte)
{
    while (!(in8(0x3fd) & 0x20)) ;
    out8(0x3f8, byte);
}

void payload(void)
{
    uart_reset();
    out8(0x3fa, 1);
    for (u32 number = 0; number < 4000; number++) {
        for (int shift = 12; shift >= 0; shift -= 4) send((u8)"0123456789abcdef"[(number >> shift) & 15]);
        send('\n');
    }
    print("count ends\n");
    power_off();
}
