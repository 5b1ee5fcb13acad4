/*
 * Starts every processor that the MADT lists, one after the other by its x2APIC id, and sends each an interrupt; then has the
 * entropy device send its message to the last one, whose id may have more than 8 bits.
 */
#include "payload.h"

/* An application processor: real mode, at 8000, no stack until it knows its id. For each step that it does it counts its byte at 6000 up. */
__asm__(".pushsection .text\n"
        "        .code16\n"
        "        .align  256\n"
        "processor:\n"
        "        cli\n"
        "        xor     %ax, %ax\n"
        "        mov     %ax, %ds\n"
        "        mov     $0x1b, %ecx\n" /* IA32_APIC_BASE: x2APIC */
        "        rdmsr\n"
        "        or      $0xc00, %eax\n"
        "        wrmsr\n"
        "        mov     $0x80f, %ecx\n" /* spurious vector, the APIC on */
        "        mov     $0x1ff, %eax\n"
        "        xor     %edx, %edx\n"
        "        wrmsr\n"
        "        mov     $0x802, %ecx\n" /* its id */
        "        rdmsr\n"
        "        mov     %eax, %esi\n"
        "        mov     $0xb, %eax\n" /* CPUID says the same */
        "        xor     %ecx, %ecx\n"
        "        cpuid\n"
        "        cmp     %edx, %esi\n"
        "        jne     2f\n"
        "        cmp     $0x1000, %esi\n"
        "        jae     2f\n"
        "        mov     %esi, %eax\n" /* a stack of 64 bytes from 10000 on */
        "        shl     $2, %eax\n"
        "        add     $0x1000, %eax\n"
        "        mov     %ax, %ss\n"
        "        mov     $64, %sp\n"
        "        incb    0x6000(%esi)\n"
        "1:      sti\n"
        "        hlt\n"
        "        jmp     1b\n"
        "2:      hlt\n"
        "        jmp     2b\n"
        "        .align  256\n" /* 8100 */
        "interrupted:\n"
        "        incb    0x6000(%esi)\n"
        "        mov     $0x80b, %ecx\n" /* EOI */
        "        xor     %eax, %eax\n"
        "        xor     %edx, %edx\n"
        "        wrmsr\n"
        "        iret\n"
        "processor_end:\n"
        "        .code64\n"
        "        .popsection\n");
extern const u8 processor[], processor_end[];

enum { VECTOR = 0x40, ICR = 0x830, INIT = 0x4500, STARTUP_AT_8000 = 0x4608, QUEUE_SIZE = 8 };

static int wrong;

static void write_msr(u32 msr, u64 value) { __asm__ volatile("wrmsr" ::"c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory"); }
static u64 read_msr(u32 msr) { u32 low, high; __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr)); return (u64)high << 32 | low; }

static void send(u32 id, u32 command) { write_msr(ICR, (u64)id << 32 | command); }
static u8 steps(u32 id) { return *(volatile u8 *)(0x6000ull + id); }

static void print_number(u32 value)
{
    if (value >= 10) print_number(value / 10);
    out8(0x3f8, (u8)('0' + value % 10));
}

static void wait_for(const char *what, u32 id, u8 step)
{
    for (u32 i = 0; i < 1000000000; i++)
        if (steps(id) == step) return;
    wrong++;
    print(what);
    print(" WRONG at id ");
    print_number(id);
    print("\n");
}

static u32 u32_at(const u8 *at) { return *(const u32 *)at; }

static const u8 *madt(void)
{
    for (u64 at = 0xc0000; at < 0x100000; at += 16) {
        if (*(u64 *)at != 0x2052545020445352ull) continue; /* "RSD PTR " */
        const u8 *xsdt = (const u8 *)(u64)u32_at((const u8 *)at + 24);
        for (u32 entry = 36; entry < u32_at(xsdt + 4); entry += 8) {
            const u8 *table = (const u8 *)(u64)u32_at(xsdt + entry);
            if (u32_at(table) == 0x43495041) return table; /* "APIC" */
        }
    }
    return 0;
}

static u32 start_all(const u8 *table, u32 *last)
{
    u32 count = 1;
    for (u32 at = 44; at < u32_at(table + 4); at += table[at + 1]) {
        const u8 *entry = table + at;
        u32 id, wide = entry[0] == 9;
        if (wide ? !(u32_at(entry + 8) & 1) : entry[0] != 0 || !(u32_at(entry + 4) & 1)) continue;
        id = wide ? u32_at(entry + 4) : entry[3];
        if (!id) continue;
        send(id, INIT);
        send(id, STARTUP_AT_8000);
        wait_for("start", id, 1);
        send(id, VECTOR);
        wait_for("interrupt", id, 2);
        *last = id;
        count++;
    }
    return count;
}

static struct {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[QUEUE_SIZE];
    struct { u16 flags, index, entries[QUEUE_SIZE]; } available;
    u8 used[128] __attribute__((aligned(64)));
    u8 bytes[16];
} ring __attribute__((aligned(4096)));

static u32 byte_of(u32 slot, u32 offset) { return pci_read(slot, 0, offset) >> (offset % 4 * 8) & 0xff; }
static volatile u8 *bar(u32 slot, u32 number) { return (volatile u8 *)(u64)(pci_read(slot, 0, 0x10 + 4 * number) & ~15u); }

/* Asks the device for bytes; its queue's message goes to the processor `id`. */
static void request(u32 slot, u32 id)
{
    volatile u8 *common = 0, *notify = 0;
    for (u32 at = byte_of(slot, 0x34); at; at = byte_of(slot, at + 1)) {
        if (byte_of(slot, at) == 0x11) {
            volatile u32 *entry = (volatile u32 *)(bar(slot, byte_of(slot, at + 4) & 7) + (pci_read(slot, 0, at + 4) & ~7u));
            pci_write(slot, 0, at, pci_read(slot, 0, at) | 1u << 31);
            entry[0] = 0xfee00000u | (id & 0xff) << 12 | (id >> 8) << 5;
            entry[1] = 0, entry[2] = VECTOR, entry[3] = 0;
        }
        if (byte_of(slot, at) != 9) continue;
        volatile u8 *block = bar(slot, byte_of(slot, at + 4)) + pci_read(slot, 0, at + 8);
        if (byte_of(slot, at + 3) == 1) common = block;
        if (byte_of(slot, at + 3) == 2) notify = block;
    }
    pci_write(slot, 0, 4, 6);
    common[0x14] = 0, common[0x14] = 1, common[0x14] = 3;
    *(volatile u32 *)(common + 0x08) = 1, *(volatile u32 *)(common + 0x0c) = 1; /* VERSION_1 */
    common[0x14] = 11;
    *(volatile u16 *)(common + 0x16) = 0, *(volatile u16 *)(common + 0x18) = QUEUE_SIZE;
    *(volatile u16 *)(common + 0x1a) = 0; /* vector 0 */
    *(volatile u64 *)(common + 0x20) = (u64)ring.descriptors;
    *(volatile u64 *)(common + 0x28) = (u64)&ring.available;
    *(volatile u64 *)(common + 0x30) = (u64)ring.used;
    *(volatile u16 *)(common + 0x1c) = 1;
    common[0x14] = 15;
    ring.descriptors[0].address = (u64)ring.bytes;
    ring.descriptors[0].length = sizeof ring.bytes;
    ring.descriptors[0].flags = 2;
    *(volatile u16 *)&ring.available.index = 1;
    *(volatile u16 *)notify = 0;
}

void payload(void)
{
    uart_reset();
    for (u32 i = 0; i < (u32)(processor_end - processor); i++) *(volatile u8 *)(0x8000ull + i) = processor[i];
    for (u32 i = 0; i < 0x1000; i++) *(volatile u8 *)(0x6000ull + i) = 0;
    *(volatile u32 *)(u64)(VECTOR * 4) = 0x8100; /* interrupted, at 0000:8100 */
    write_msr(0x1b, read_msr(0x1b) | 0xc00);
    write_msr(0x80f, 0x1ff);
    const u8 *table = madt();
    if (!table) print("no MADT WRONG\n");
    u32 last = 0, count = table ? start_all(table, &last) : 0;
    print_number(count);
    print(" processors, the last has the id ");
    print_number(last);
    print("\n");
    for (u32 slot = 2; slot < 8; slot++) {
        if (pci_read(slot, 0, 0) != 0x10441af4 || !last) continue;
        request(slot, last);
        wait_for("message", last, 3);
        print("a message reached it\n");
    }
    print(wrong ? "processors failed\n" : "processors end\n");
    power_off();
}
