/* Drives the watchdog as its driver does. 'a' arms it with a second and feeds it from then on, 's' stops feeding, 'o' turns it
 * off, 'q' powers off. */
#include "payload.h"

#define BASE 0xe0000000u

static u32 slot;

static void lock(u8 value)
{
    out32(0xcf8, pci_address(slot, 0, 0x68));
    out8(0xcfc, value);
}

static void unlock(void)
{
    *(volatile u8 *)(u64)(BASE + 12) = 0x80;
    *(volatile u8 *)(u64)(BASE + 12) = 0x86;
}

static void feed(void)
{
    unlock();
    *(volatile u16 *)(u64)(BASE + 12) = 0x100;
}

static void arm(void)
{
    out32(0xcf8, pci_address(slot, 0, 0x60));
    out16(0xcfc, 3);
    for (u32 stage = 0; stage < 2; stage++) {
        unlock();
        *(volatile u32 *)(u64)(BASE + 4 * stage) = 512;
    }
    lock(2);
    print((pci_read(slot, 0, 0x68) & 0xff) == 2 ? "armed\n" : "cannot be armed\n");
}

void payload(void)
{
    u32 feeding = 0, turns = 0;
    uart_reset();
    for (slot = 2; slot < 32; slot++)
        if (pci_read(slot, 0, 0) == 0x25ab8086) break;
    if (slot == 32) print("no watchdog\n"), power_off();
    pci_write(slot, 0, 0x10, BASE);
    pci_write(slot, 0, 0x04, 2);
    print(*(volatile u16 *)(u64)(BASE + 12) & 0x200 ? "after it ran out\n" : "after power on\n");
    for (;;) {
        if (feeding && ++turns % 100 == 0) feed();
        if (!(in8(0x3fd) & 1)) continue;
        u8 byte = in8(0x3f8);
        if (byte == 'a') arm(), feeding = 1;
        if (byte == 's') feeding = 0, feed(), print("starving\n");
        if (byte == 'o') feeding = 0, lock(0), print("off\n");
        if (byte == 'p') print("here\n");
        if (byte == 'q') break;
    }
    power_off();
}
