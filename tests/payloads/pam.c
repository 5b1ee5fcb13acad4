/*
 * PAM and SMRAM of the host bridge: an area in all four modes, again and again, while a second CPU runs from an area that is flipped
 * between writable and read-only. No firmware is there, so that what does not come from RAM reads as ones.
 */
#include "payload.h"

/* The second CPU: real mode, at F0000. It counts, and looks at a word of the area that it runs from. */
__asm__(".pushsection .text\n"
        "        .code16\n"
        "second_cpu:\n"
        "        xor     %ax, %ax\n"
        "        mov     %ax, %ds\n"
        "        mov     $0xf000, %ax\n"
        "        mov     %ax, %es\n"
        "1:      incl    0x7000\n"
        "        cmpl    $0x12345678, %es:0x8000\n"
        "        je      1b\n"
        "        incl    0x7004\n"
        "        jmp     1b\n"
        "second_cpu_end:\n"
        "        .code64\n"
        "        .popsection\n");
extern const u8 second_cpu[], second_cpu_end[];

enum { ROUNDS = 40, PAM0 = 0x59, PAM5 = 0x5e, SMRAM = 0x72 };

static int wrong;

static volatile u32 *word(u64 address) { return (volatile u32 *)address; }

static void check(const char *what, u32 found, u32 expected)
{
    if (found == expected) return;
    wrong++;
    print(what);
    print(" WRONG ");
    print_hex(found);
    print("\n");
}

static void bridge_write(u32 offset, u8 value)
{
    out32(0xcf8, pci_address(0, 0, offset));
    out8((u16)(0xcfc + (offset & 3)), value);
}

static u8 bridge_read(u32 offset)
{
    out32(0xcf8, pci_address(0, 0, offset));
    return in8((u16)(0xcfc + (offset & 3)));
}

static void start_second_cpu(void)
{
    for (u32 i = 0; i < (u32)(second_cpu_end - second_cpu); i++) *(volatile u8 *)(0xf0000ull + i) = second_cpu[i];
    *word(0xf8000) = 0x12345678;
    *word(0x7000) = *word(0x7004) = 0;
    *word(0xfee00310) = 1u << 24;
    *word(0xfee00300) = 0x4500; /* INIT */
    *word(0xfee00310) = 1u << 24;
    *word(0xfee00300) = 0x46f0; /* start at F0000 */
}

static int moves(void)
{
    u32 count = *word(0x7000);
    for (u32 i = 0; i < 10000000; i++)
        if (*word(0x7000) != count) return 1;
    return 0;
}

static void all_modes(u32 value)
{
    bridge_write(PAM5, 0x03);
    *word(0xe0000) = value;
    check("writable area", *word(0xe0000), value);
    bridge_write(PAM5, 0x02);
    check("write-only area reads", *word(0xe0000), ~0u);
    *word(0xe0000) = value + 1;
    bridge_write(PAM5, 0x00);
    check("closed area reads", *word(0xe0000), ~0u);
    *word(0xe0000) = value + 2;
    bridge_write(PAM5, 0x01);
    check("write-only area wrote", *word(0xe0000), value + 1);
    *word(0xe0000) = value + 3;
    check("read-only area", *word(0xe0000), value + 1);
}

static void smram(void)
{
    bridge_write(SMRAM, 0x4a);
    *word(0xa0000) = 0xcafe;
    check("open SMRAM", *word(0xa0000), 0xcafe);
    bridge_write(SMRAM, 0x0a);
    check("closed SMRAM", *word(0xa0000), ~0u);
    bridge_write(SMRAM, 0x4a);
    check("SMRAM opened again", *word(0xa0000), 0xcafe);
    bridge_write(SMRAM, 0x5a);
    check("locked SMRAM", bridge_read(SMRAM), 0x1a);
    bridge_write(SMRAM, 0x4a);
    check("locked register", bridge_read(SMRAM), 0x1a);
    check("locked SMRAM reads", *word(0xa0000), ~0u);
}

void payload(void)
{
    uart_reset();
    bridge_write(PAM0, 0x30);
    *word(0xf9000) = 0;
    start_second_cpu();
    check("second CPU starts", moves(), 1);
    for (u32 round = 1; round <= ROUNDS; round++) {
        bridge_write(PAM0, 0x10);
        *word(0xf9000) = round;
        check("read-only code area", *word(0xf9000), round - 1);
        check("second CPU runs from a read-only area", moves(), 1);
        bridge_write(PAM0, 0x30);
        *word(0xf9000) = round;
        check("writable code area", *word(0xf9000), round);
        all_modes(round << 8);
    }
    check("second CPU goes on", moves(), 1);
    check("second CPU saw other words", *word(0x7004), 0);
    smram();
    print(wrong ? "pam failed\n" : "pam ends\n");
    power_off();
}
