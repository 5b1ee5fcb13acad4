/* Sends back what the UART receives, in capitals, so that an echo of the terminal cannot be taken for it; 'q' powers off. */
#include "payload.h"

void payload(void)
{
    uart_reset();
    out8(0x3fa, 1); /* FIFOs on: a burst of input must not overrun */
    print("echo begins\n");
    for (;;) {
        if (!(in8(0x3fd) & 1)) continue;
        u8 byte = in8(0x3f8);
        if (byte == 'q') break;
        out8(0x3f8, byte >= 'a' && byte <= 'z' ? byte - 32 : byte);
    }
    print("echo ends\n");
    power_off();
}
