/*
 * RAM on both sides of the hole below 4 GiB: the last page of each piece holds what is written to it, and what lies just beyond
 * reads as ones. The sizes come from the CMOS, where a PC's firmware finds them.
 */
#include "payload.h"

static u8 cmos(u8 index)
{
    out8(0x70, index);
    return in8(0x71);
}

static int holds(u64 address)
{
    volatile u64 *word = (volatile u64 *)address;
    u64 value = 0x1122334455667788ull ^ address;
    *word = value;
    return *word == value;
}

static int open_bus(u64 address)
{
    volatile u64 *word = (volatile u64 *)address;
    *word = 0;
    return *word == ~0ull;
}

static void check(const char *name, int good)
{
    print(name);
    print(good ? " ok\n" : " WRONG\n");
}

void payload(void)
{
    u64 low = 0x1000000ull + ((u64)cmos(0x34) << 16) + ((u64)cmos(0x35) << 24);
    u64 high = ((u64)cmos(0x5b) << 16) + ((u64)cmos(0x5c) << 24) + ((u64)cmos(0x5d) << 32);
    uart_reset();
    print("below the hole ");
    print_hex(low);
    print("\nabove 4 GiB ");
    print_hex(high);
    print("\n");
    check("end of the lower piece", holds(low - 8));
    check("beyond the lower piece", open_bus(low));
    if (high) {
        check("start of the upper piece", holds(0x100000000ull));
        check("end of the upper piece", holds(0x100000000ull + high - 8));
    }
    check("beyond the upper piece", open_bus(0x100000000ull + high));
    power_off();
}
