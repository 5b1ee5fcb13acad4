/*
 * Interrupts that no access brings about: the RTC's periodic one and the PM timer's overflow. The guest only looks whether the second
 * PIC has the request; that it comes at all is the work of the monitor's own timer.
 */
#include "payload.h"

static u8 cmos_read(u8 index) { out8(0x70, index); return in8(0x71); }
static void cmos_write(u8 index, u8 value) { out8(0x70, index); out8(0x71, value); }

/* Whether IRQ 8 + n is requested. */
static int requested(int n)
{
    out8(0xa0, 0x0a);
    return in8(0xa0) >> n & 1;
}

static void wait_for(const char *name, int n)
{
    print(name);
    for (u32 i = 0; i < 20000000; i++) {
        if (!requested(n)) continue;
        print(" interrupts\n");
        return;
    }
    print(" WRONG\n");
}

void payload(void)
{
    uart_reset();
    cmos_write(0x0a, 0x2f); /* twice a second */
    cmos_read(0x0c);
    if (requested(0) || requested(1)) print("too early WRONG\n");
    cmos_write(0x0b, 0x42);
    wait_for("rtc", 0);
    if ((cmos_read(0x0c) & 0xc0) != 0xc0) print("register C WRONG\n");
    cmos_write(0x0b, 0x02);
    out16(0x600, 0xffff);
    out8(0xb2, 0xf1);
    out16(0x602, 0x0001);
    wait_for("pm timer", 1);
    if (!(in16(0x600) & 1)) print("PM1_STS WRONG\n");
    print("timers end\n");
    power_off();
}
