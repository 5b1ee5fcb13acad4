/*
 * Drives all virtio devices: sets up one queue of each, and then makes the console (the device with ID 3) print one character after
 * the other, each waited for by the ISR status, that is, by way of the core's event loop. All others are notified, and their
 * configuration space is read, once for each character.
 */
#include "payload.h"

#define SIZE 8

struct ring {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[SIZE];
    struct { u16 flags, index, entries[SIZE], event; } available;
    struct { u16 flags, index; struct { u32 id, length; } entries[SIZE]; u16 event; } used __attribute__((aligned(4096)));
} __attribute__((aligned(4096)));

static struct ring rings[8];

struct device {
    volatile u8 *common, *notify, *isr;
    struct ring *ring;
    u32 slot;
};

static struct device devices[8];

static u32 byte_of(u32 slot, u32 offset) { return pci_read(slot, 0, offset) >> (offset % 4 * 8) & 0xff; }

static volatile u8 *block(u32 slot, u32 capability)
{
    u32 bar = byte_of(slot, capability + 4);
    return (volatile u8 *)(u64)((pci_read(slot, 0, 0x10 + 4 * bar) & ~15u) + pci_read(slot, 0, capability + 8));
}

static void set16(volatile u8 *common, u32 offset, u16 value) { *(volatile u16 *)(common + offset) = value; }
static void set32(volatile u8 *common, u32 offset, u32 value) { *(volatile u32 *)(common + offset) = value; }

static void start(struct device *device, u16 queue)
{
    u32 multiplier = 0;
    for (u32 at = byte_of(device->slot, 0x34); at; at = byte_of(device->slot, at + 1)) {
        if (byte_of(device->slot, at) != 9) continue;
        switch (byte_of(device->slot, at + 3)) {
        case 1: device->common = block(device->slot, at); break;
        case 2: device->notify = block(device->slot, at), multiplier = pci_read(device->slot, 0, at + 16); break;
        case 3: device->isr = block(device->slot, at); break;
        }
    }
    device->notify += multiplier * queue;
    pci_write(device->slot, 0, 4, 6);
    volatile u8 *common = device->common;
    common[0x14] = 0;
    common[0x14] = 1;
    common[0x14] = 3;
    set32(common, 0x08, 1), set32(common, 0x0c, 1); /* VERSION_1 */
    common[0x14] = 11;
    set16(common, 0x16, queue), set16(common, 0x18, SIZE);
    set32(common, 0x20, (u32)(u64)device->ring->descriptors), set32(common, 0x24, 0);
    set32(common, 0x28, (u32)(u64)&device->ring->available), set32(common, 0x2c, 0);
    set32(common, 0x30, (u32)(u64)&device->ring->used), set32(common, 0x34, 0);
    set16(common, 0x1c, 1);
    common[0x14] = 15;
}

void payload(void)
{
    struct device *console = 0;
    u32 count = 0;
    for (u32 slot = 2; slot < 10; slot++) {
        u32 id = pci_read(slot, 0, 0);
        if ((id & 0xffff) != 0x1af4) continue;
        struct device *device = &devices[count];
        device->slot = slot;
        device->ring = &rings[count++];
        u32 is_console = id >> 16 == 0x1043;
        start(device, is_console ? 1 : 0);
        if (is_console) console = device;
    }
    if (!console) return;
    struct ring *ring = console->ring;
    static u8 character = '.';
    for (u16 done = 1;; done++) {
        ring->descriptors[0].address = (u64)&character;
        ring->descriptors[0].length = 1;
        ring->available.entries[(done - 1) % SIZE] = 0;
        *(volatile u16 *)&ring->available.index = done;
        *(volatile u16 *)console->notify = 1;
        for (u32 i = 0; i < count; i++) {
            if (&devices[i] == console) continue;
            *(volatile u16 *)devices[i].notify = 0;
            pci_read(devices[i].slot, 0, 0);
        }
        u8 interrupted = 0;
        while (!interrupted || *(volatile u16 *)&ring->used.index != done) interrupted |= *console->isr & 1;
    }
}
