/*
 * Loaded into the lab's QEMU by LD_PRELOAD: mends two places where QEMU's emulation of SVM forgets the big QEMU lock.
 *
 * 1. QEMU's helper_write_crN() (target/i386/tcg), for a write to CR8 by a guest of the emulated SVM while an interrupt waits for it, calls
 * cpu_interrupt() without the big QEMU lock, and QEMU ends with "tcg_handle_interrupt: assertion failed". KVM lets its guests write CR8, and
 * UEFI firmware does so at the end of each interrupt; Linux does not. So it is in Debian's QEMU 7.2, 10.0 and 11.1.
 *
 * 2. helper_vmrun() and do_vmexit() change the CPU's word of pending interrupts in two steps and without the lock. An interrupt that the
 * main loop raises in between is lost: its APIC has it and does not raise it again, the CPU stays halted, and the lab stands still.
 *
 * Here cpu_interrupt() begins with a jump to a function that takes the lock around it where it is not held, and a thread asks each CPU
 * to look at its APIC again now and then. The beginning of the function must be what is expected; otherwise nothing is changed. With
 * BULKHEAD_LAB_QEMU_REPORT set, says on standard output what came of it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* mov DISP(%rip),%rax; push %rbx; mov %rdi,%rbx; mov OFFSET(%rax),%rax: the accelerator's table, and its function. */
static const uint8_t load[] = {0x48, 0x8B, 0x05};
static const uint8_t rest[] = {0x53, 0x48, 0x89, 0xFB, 0x48, 0x8B, 0x80};
enum { LOAD = 7, REST = 11, JUMP = 12 };

static bool (*locked)(void);
static void (*lock)(const char *file, int line);
static void (*unlock)(void);
static void (*original)(void *cpu, int mask);

/* CPU_INTERRUPT_POLL: the CPU asks its APIC what is pending. */
enum { POLL = 0x10, POLL_MICROSECONDS = 20000, MOST_CPUS = 16 };

/* The CPUs that were interrupted so far; QEMU's lock guards them. */
static void *cpus[MOST_CPUS];
static int known;

static void *poll_for_lost_interrupts(void *unused)
{
    for (;;) {
        usleep(POLL_MICROSECONDS);
        lock(__FILE__, __LINE__);
        for (int cpu = 0; cpu < known; cpu++)
            original(cpus[cpu], POLL);
        unlock();
    }
    return unused;
}

/* Before the first interrupt there may be no lock yet, and no signal must end up in the thread. */
static void remember(void *cpu)
{
    for (int other = 0; other < known; other++)
        if (cpus[other] == cpu)
            return;
    if (known == MOST_CPUS)
        return;
    cpus[known++] = cpu;
    if (known > 1)
        return;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, poll_for_lost_interrupts, NULL))
        fputs("lab: no thread for lost interrupts: the lab may stand still\n", stderr);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void cpu_interrupt_locked(void *cpu, int mask)
{
    bool take = !locked();
    if (take)
        lock(__FILE__, __LINE__);
    remember(cpu);
    original(cpu, mask);
    if (take)
        unlock();
}

/* movabs $to,%rax; jmp *%rax */
static void jump(uint8_t *at, const void *to)
{
    uint64_t address = (uintptr_t)to;
    memcpy(at, (uint8_t[]){0x48, 0xB8}, 2);
    memcpy(at + 2, &address, 8);
    memcpy(at + 10, (uint8_t[]){0xFF, 0xE0}, 2);
}

static void *either(const char *newer, const char *older)
{
    void *symbol = dlsym(RTLD_DEFAULT, newer);
    return symbol ? symbol : dlsym(RTLD_DEFAULT, older);
}

static bool patch(void)
{
    uint8_t *function = dlsym(RTLD_DEFAULT, "cpu_interrupt");
    locked = either("bql_locked", "qemu_mutex_iothread_locked");
    lock = either("bql_lock_impl", "qemu_mutex_lock_iothread_impl");
    unlock = either("bql_unlock", "qemu_mutex_unlock_iothread");
    if (!function || !locked || !lock || !unlock || memcmp(function, load, sizeof load) || memcmp(function + LOAD, rest, sizeof rest))
        return false;
    long page = sysconf(_SC_PAGESIZE);
    uint8_t *copy = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED)
        return false;
    /* movabs $table,%rax; mov (%rax),%rax; what does not depend on its place; then on in the original, by a register that is free there. */
    int32_t displacement;
    memcpy(&displacement, function + sizeof load, 4);
    uint64_t table = (uintptr_t)function + LOAD + (int64_t)displacement, on = (uintptr_t)function + LOAD + REST;
    uint8_t *at = copy;
    at = mempcpy(at, (uint8_t[]){0x48, 0xB8}, 2);
    at = mempcpy(at, &table, 8);
    at = mempcpy(at, (uint8_t[]){0x48, 0x8B, 0x00}, 3);
    at = mempcpy(at, function + LOAD, REST);
    at = mempcpy(at, (uint8_t[]){0x49, 0xBB}, 2); /* movabs $on,%r11; jmp *%r11 */
    at = mempcpy(at, &on, 8);
    mempcpy(at, (uint8_t[]){0x41, 0xFF, 0xE3}, 3);
    uint8_t *first = (uint8_t *)((uintptr_t)function & -page);
    size_t length = (size_t)(function + JUMP - first);
    if (mprotect(copy, page, PROT_READ | PROT_EXEC) || mprotect(first, length, PROT_READ | PROT_WRITE | PROT_EXEC))
        return false;
    original = (void (*)(void *, int))(uintptr_t)copy;
    jump(function, (void *)(uintptr_t)cpu_interrupt_locked);
    return !mprotect(first, length, PROT_READ | PROT_EXEC);
}

__attribute__((constructor)) static void loaded(void)
{
    bool done = patch();
    if (getenv("BULKHEAD_LAB_QEMU_REPORT"))
        puts(done ? "cpu_interrupt takes the lock" : "cpu_interrupt is not as expected");
}
