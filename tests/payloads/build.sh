#!/bin/sh
# Builds the bare-metal payloads into the folder given: small guests that need no kernel and run on any KVM.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mkdir -p "$out"
flags="-m64 -O1 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -mno-red-zone -mgeneral-regs-only -mcmodel=small -fno-asynchronous-unwind-tables"
link="-nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments -Wl,-T,$here/pvh.ld"
for payload in first_byte bad_fetch; do
    gcc $flags $link -o "$out/$payload.elf" "$here/$payload.S"
done
for payload in garbage memory echo count pam timers exits hotplug peers watchdog processors; do
    gcc $flags $link -o "$out/$payload.elf" "$here/long_mode.S" "$here/$payload.c"
done
gcc -m32 -ffreestanding -fno-pic -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments \
    -Wl,-Ttext=0x100000 -Wl,-e,start -Wl,-N -o "$out/multiboot.elf" "$here/multiboot.S"
gcc -m32 -ffreestanding -fno-pic -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-Ttext=0 -Wl,-e,start -Wl,--oformat=binary \
    -o "$out/option_rom.bin" "$here/option_rom.S"
