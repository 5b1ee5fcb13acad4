/*
 * What accesses cost that leave the guest: batches of each kind, in TSC cycles. Where no virtio function is found (a monitor that
 * answers every access alike), the same accesses go to addresses that nothing is mapped at.
 */
#include "payload.h"

enum { ACCESSES = 500, BATCHES = 8 };

static inline u64 cycles(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

/* The common configuration of the last virtio function on the bus. */
static u64 virtio_registers(void)
{
    u64 found = 0xe0000000;
    for (u32 slot = 2; slot < 32; slot++) {
        if ((pci_read(slot, 0, 0) & 0xffff) != 0x1af4) continue;
        for (u32 at = pci_read(slot, 0, 0x34) & 0xfc; at; at = pci_read(slot, 0, at) >> 8 & 0xfc) {
            u32 head = pci_read(slot, 0, at);
            if ((head & 0xff) != 9 || head >> 24 != 1) continue;
            u32 bar = 0x10 + 4 * (pci_read(slot, 0, at + 4) & 7);
            found = (u64)pci_read(slot, 0, bar + 4) << 32 | (pci_read(slot, 0, bar) & ~15u);
            found += pci_read(slot, 0, at + 8);
            break;
        }
    }
    return found;
}

static void report(const char *kind, u64 spent)
{
    print("exits ");
    print(kind);
    print(" ");
    print_hex(spent);
    print("\n");
}

#define BATCH(kind, access)                                      \
    do {                                                         \
        u64 start = cycles();                                    \
        for (u32 count = 0; count < ACCESSES; count++) access;   \
        report(kind, cycles() - start);                          \
    } while (0)

void payload(void)
{
    volatile u32 *registers = (volatile u32 *)virtio_registers();
    uart_reset();
    for (u32 batch = 0; batch < BATCHES; batch++) {
        BATCH("open-bus", in8(0x2e9));
        BATCH("cmos", in8(0x71));
        BATCH("pm-timer", in32(0x608));
        out32(0xcf8, pci_address(0, 0, 0));
        BATCH("pci-configuration", in32(0xcfc));
        BATCH("post-port-write", out8(0x80, 0));
        BATCH("virtio-register", (void)*registers);
        BATCH("virtio-register-write", *registers = 0);
    }
    print("exits end\n");
    power_off();
}
