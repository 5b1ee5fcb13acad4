/* What every payload written in C needs: port and memory accesses, and a line on the UART. No library, no header of the host. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 in16(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static inline void uart_reset(void)
{
    out8(0x3fb, 3); /* 8 data bits, the divisor latch closed */
    out8(0x3f9, 0); /* no interrupts */
    out8(0x3fc, 3); /* no loopback */
}

static inline void print(const char *text)
{
    while (*text) out8(0x3f8, (u8)*text++);
}

static inline void print_hex(u64 value)
{
    for (int shift = 60; shift >= 0; shift -= 4) out8(0x3f8, (u8)"0123456789abcdef"[(value >> shift) & 15]);
}

static inline u32 pci_address(u32 device, u32 function, u32 offset)
{
    return 0x80000000u | device << 11 | function << 8 | (offset & 0xfc);
}
static inline u32 pci_read(u32 device, u32 function, u32 offset)
{
    out32(0xcf8, pci_address(device, function, offset));
    return in32(0xcfc);
}
static inline void pci_write(u32 device, u32 function, u32 offset, u32 value)
{
    out32(0xcf8, pci_address(device, function, offset));
    out32(0xcfc, value);
}

static u64 random_state = 0x9e3779b97f4a7c15ull;
static inline u64 random_next(void) /* xorshift64 */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* Ends the machine: S5 by the PIIX4, wherever its block was put. */
static inline void power_off(void)
{
    pci_write(1, 3, 0x40, 0x601);
    pci_write(1, 3, 0x80, 1);
    out16(0x604, 0x2000);
}
