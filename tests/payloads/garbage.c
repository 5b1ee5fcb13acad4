/*
 * Garbage to every port, to all of PCI configuration space and to every register of every BAR, then proof that the machine still
 * answers: a line on the UART and an orderly power-off. Left out are only the writes whose documented effect is the end of the machine:
 * reset by CF9, port 92 and 64, and the power management block.
 */
#include "payload.h"

static int ends_machine(u16 port)
{
    return port == 0xcf9 || port == 0xcf8 || port == 0x92 || (port >= 0x60 && port <= 0x64) || (port >= 0x600 && port < 0x640) || port == 0xf4
        || port == 0x505;
}

static void ports(void)
{
    for (u32 port = 0; port < 0x10000; port++) {
        u16 p = (u16)port;
        if (ends_machine(p) || ends_machine((u16)(p + 1)) || ends_machine((u16)(p + 2)) || ends_machine((u16)(p + 3))) continue;
        u64 r = random_next();
        if (port >= 0xcfc && port < 0xd00) continue; /* configuration data has its own part */
        /* One access where nothing is, of any kind; some of all kinds where the chipset and its devices are. */
        int empty = (port >= 0x1000 && port < 0xae00) || port >= 0xb100;
        u32 kinds = empty ? 1u << ((u32)(r >> 6 & 0xffff) % 6) : (u32)r;
        if (kinds & 1) in8(p);
        if (kinds & 2) in16(p);
        if (kinds & 4) in32(p);
        if (kinds & 8) out8(p, (u8)(r >> 8));
        if (kinds & 16) out16(p, (u16)(r >> 16));
        if (kinds & 32) out32(p, (u32)(r >> 32));
    }
}

/* String accesses, of no element, of one or of many, to the ports that take them; and what comes in is as wide as was asked for. */
static void strings(void)
{
    static const u16 targets[] = {0x70, 0x80, 0x3f8, 0x402, 0x510, 0x514, 0x518, 0xae00, 0xae08, 0xaf00, 0xaf08, 0xcfc};
    static u8 buffer[4100];
    for (u32 i = 0; i < sizeof(targets) / sizeof(*targets); i++) {
        for (u64 count = 0; count <= 1024; count = count ? count * 4 : 1) {
            u16 port = targets[i];
            void *at = buffer;
            u64 n = count;
            u8 after = buffer[count * 4] = (u8)random_next();
            __asm__ volatile("rep insl" : "+D"(at), "+c"(n) : "d"(port) : "memory");
            at = buffer + 1, n = count;
            __asm__ volatile("rep insb" : "+D"(at), "+c"(n) : "d"(port) : "memory");
            if (port == 0xcfc) continue; /* what is written there has its own part */
            at = buffer + 1, n = count;
            __asm__ volatile("rep outsw" : "+S"(at), "+c"(n) : "d"(port) : "memory");
            if (buffer[count * 4] != after && count) print("strings WRONG\n");
        }
    }
}

static void registers(u32 base, u32 size)
{
    for (u32 offset = 0; offset < size; offset += 4) {
        u64 r = random_next();
        volatile u8 *address = (volatile u8 *)(u64)(base + offset);
        switch (r & 7) {
        case 0: *(volatile u8 *)(address + (r >> 8 & 3)) = (u8)(r >> 16); break;
        case 1: *(volatile u16 *)(address + (r >> 8 & 3)) = (u16)(r >> 16); break;
        case 2: *(volatile u32 *)(address + (r >> 8 & 3)) = (u32)(r >> 16); break;
        case 3: *(volatile u64 *)(address + (r >> 8 & 3)) = r; break;
        case 4: (void)*(volatile u8 *)(address + (r >> 8 & 3)); break;
        case 5: (void)*(volatile u16 *)(address + (r >> 8 & 3)); break;
        case 6: (void)*(volatile u32 *)(address + (r >> 8 & 3)); break;
        default: (void)*(volatile u64 *)(address + (r >> 8 & 3)); break;
        }
    }
}

static void bars(u32 rounds)
{
    for (u32 device = 2; device < 32; device++) {
        if ((pci_read(device, 0, 0) & 0xffff) == 0xffff) continue;
        pci_write(device, 0, 4, 6);
        for (u32 bar = 0x10; bar < 0x28; bar += 4) {
            u32 base = pci_read(device, 0, bar);
            if (base == 0 || base & 1 || base < 0x80000000u) continue;
            for (u32 round = 0; round < rounds; round++) registers(base & ~15u, 0x4000);
        }
    }
}

static void configuration(void)
{
    for (u32 device = 0; device < 32; device++) {
        for (u32 function = 0; function < 8; function++) {
            if (device == 1 && function == 3) continue;
            if ((pci_read(device, function, 0) & 0xffff) == 0xffff && (random_next() & 31)) continue;
            for (u32 offset = 0; offset < 256; offset += 4) {
                u64 r = random_next();
                out32(0xcf8, pci_address(device, function, offset));
                switch (r & 3) {
                case 0: out8((u16)(0xcfc + (r >> 8 & 3)), (u8)(r >> 16)); break;
                case 1: out16((u16)(0xcfc + (r >> 8 & 2)), (u16)(r >> 16)); break;
                default: out32(0xcfc, (u32)(r >> 16)); break;
                }
                in32(0xcfc);
            }
        }
    }
}

void payload(void)
{
    uart_reset();
    print("garbage begins\n");
    bars(2);
    print("bars done\n");
    ports();
    uart_reset();
    print("ports done\n");
    strings();
    uart_reset();
    print("strings done\n");
    for (int round = 0; round < 2; round++) configuration();
    uart_reset();
    print("configuration done\n");
    /* BARs now stand anywhere; what they decode must still be answered. */
    bars(1);
    uart_reset();
    print("host bridge ");
    print_hex(pci_read(0, 0, 0));
    print("\ngarbage ends\n");
    power_off();
    print("power-off had no effect\n");
}
