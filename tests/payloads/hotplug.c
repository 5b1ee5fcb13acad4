/* Does what the ACPI handlers of an operating system do with what comes and goes: tells it, and lets it go. 'd' makes it deaf
 * to requests, 'r' resets the machine, 'q' powers off. */
#include "payload.h"

static void say(const char *what, u32 number)
{
    print(what);
    out8(0x3f8, (u8)('0' + number / 10));
    out8(0x3f8, (u8)('0' + number % 10));
    print("\n");
}

/* As a driver would: an address, memory decode and bus mastering, then ACKNOWLEDGE and DRIVER. */
static void use(u32 slot)
{
    u32 address = 0xe0000000u + slot * 0x10000u;
    pci_write(slot, 0, 0x10, address);
    pci_write(slot, 0, 0x04, 6);
    *(volatile u8 *)(u64)(address + 20) = 3;
}

static int is_there(u32 slot) { return (pci_read(slot, 0, 0) & 0xffff) == 0x1af4; }

static void slots(int deaf)
{
    u32 up = in32(0xae00), down = deaf ? 0 : in32(0xae04);
    for (u32 slot = 0; slot < 32; slot++) {
        if (up >> slot & 1) {
            if (is_there(slot)) use(slot);
            say(is_there(slot) ? "in " : "pulled out ", slot);
        }
        if (down >> slot & 1) {
            out32(0xae08, 1u << slot);
            say(is_there(slot) ? "still there " : "out ", slot);
        }
    }
}

static void cpus(int deaf)
{
    out32(0xaf00, 0);
    out8(0xaf05, 0);
    u8 flags = in8(0xaf04);
    u32 cpu = in32(0xaf08);
    if (flags & 2) {
        out8(0xaf04, 2);
        say("cpu in ", cpu);
    } else if (flags & 4 && !deaf) {
        out8(0xaf04, 4);
        out8(0xaf04, 8);
        say(in8(0xaf04) ? "cpu still there " : "cpu out ", cpu);
    }
}

void payload(void)
{
    int deaf = 0;
    uart_reset();
    for (u32 slot = 2; slot < 32; slot++)
        if (is_there(slot)) say("has ", slot);
    print("hotplug begins\n");
    for (;;) {
        slots(deaf);
        cpus(deaf);
        if (!(in8(0x3fd) & 1)) continue;
        u8 byte = in8(0x3f8);
        if (byte == 'd') deaf = 1, print("deaf\n");
        if (byte == 'r') out8(0xcf9, 2), out8(0xcf9, 6);
        if (byte == 'q') break;
    }
    power_off();
}
