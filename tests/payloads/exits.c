/*
 * What accesses cost that leave the guest: batches of each kind, in TSC cycles. Where no virtio function is found (a monitor that
 * answers every access alike), the same accesses go to addresses that nothing is mapped at.
 */
#include "payload.h"

/* A batch is short, so that few of them meet an interruption by the host. */
enum { ACCESSES = 50, BATCHES = 80, KINDS = 7 };

static const char *const names[KINDS] = {
    "open-bus", "cmos", "pm-timer", "pci-configuration", "post-port-write", "virtio-register", "virtio-register-write",
};
static u64 spent[BATCHES][KINDS];

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
            u32 low = pci_read(slot, 0, bar);
            u64 high = (low & 6) == 4 ? pci_read(slot, 0, bar + 4) : 0;
            found = (high << 32 | (low & ~15u)) + pci_read(slot, 0, at + 8);
            break;
        }
    }
    return found;
}

#define BATCH(kind, access)                                      \
    do {                                                         \
        u64 start = cycles();                                    \
        for (u32 count = 0; count < ACCESSES; count++) access;   \
        spent[batch][kind] = cycles() - start;                   \
    } while (0)

void payload(void)
{
    volatile u32 *registers = (volatile u32 *)virtio_registers();
    out32(0xcf8, pci_address(0, 0, 0));
    for (u32 batch = 0; batch < BATCHES; batch++) {
        BATCH(0, in8(0x2e9));
        BATCH(1, in8(0x71));
        BATCH(2, in32(0x608));
        BATCH(3, in32(0xcfc));
        BATCH(4, out8(0x80, 0));
        BATCH(5, (void)*registers);
        BATCH(6, *registers = 0);
    }
    uart_reset();
    for (u32 batch = 0; batch < BATCHES; batch++) {
        for (u32 kind = 0; kind < KINDS; kind++) {
            print("exits ");
            print(names[kind]);
            print(" ");
            print_hex(spent[batch][kind]);
            print("\n");
        }
    }
    print("exits end\n");
    power_off();
}
