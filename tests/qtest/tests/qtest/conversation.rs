//! The server by itself: protocol, clock, interrupts, QMP, and how it ends.

use std::io::Write;
use std::process::{Command, Stdio};

use super::peer::{OURS, Peer};

#[test]
fn started_like_qemu_it_answers_and_ends_with_success_on_sigterm() {
    let mut peer = Peer::start(OURS, "-machine pc -m 64 -frobnicate -accel qtest");
    assert_eq!(peer.ask("endianness"), "OK little");
    assert_eq!(peer.ask("outl 0xcf8 0x80000000"), "OK");
    assert_eq!(peer.ask("inl 0xcfc"), "OK 0x12378086");
    assert_eq!(peer.ask("inw 0xcfc"), "OK 0x8086");
    assert_eq!(peer.ask("rtas get-time-of-day 0 0 0 0"), "FAIL Unknown command 'rtas'");
    assert_eq!(peer.ask(""), "FAIL Unknown command ''");
    assert!(peer.execute("query-status").contains("\"running\""));
    assert!(peer.execute("query-block").contains("CommandNotFound"));
    assert_eq!(peer.terminate().code(), Some(0));
}

#[test]
fn memory_is_real_and_ends_where_it_ends() {
    let mut peer = Peer::start(OURS, "-m 16");
    peer.ok("write 0x100000 4 0xDEADBEEF");
    assert_eq!(peer.ask("readl 0x100000"), "OK 0x00000000efbeadde");
    assert_eq!(peer.ask("b64read 0x100000 4"), "OK 3q2+7w==");
    peer.ok("memset 0x100001 2 0x11");
    assert_eq!(peer.ask("read 0x100000 5"), "OK 0xde1111ef00");
    peer.ok("writeq 0xFFFFFC 0x1122334455667788");
    // The last dword lies beyond RAM.
    assert_eq!(peer.ask("readq 0xFFFFFC"), "OK 0xffffffff55667788");
}

#[test]
fn only_the_test_moves_the_clock() {
    let mut peer = Peer::start(OURS, "-rtc base=2006-06-17T16:01:21,clock=vm");
    let seconds = |peer: &mut Peer| {
        peer.ok("outb 0x70 0x00");
        peer.number("inb 0x71")
    };
    assert_eq!(seconds(&mut peer), 0x21);
    assert_eq!(peer.ask("clock_step 5000000000"), "OK 5000000000");
    assert_eq!(seconds(&mut peer), 0x26);
    assert_eq!(peer.ask("clock_set 1"), "OK 5000000000");
    assert_eq!(peer.ask("clock_set 6000000000"), "OK 6000000000");
    assert_eq!(seconds(&mut peer), 0x27);
}

#[test]
fn interrupt_lines_are_reported_once_they_are_intercepted() {
    let mut peer = Peer::start(OURS, "");
    assert_eq!(peer.ask("irq_intercept_in nobody"), "FAIL Unknown device");
    assert_eq!(peer.ask("irq_intercept_in ioapic"), "OK");
    assert_eq!(peer.ask("irq_intercept_in ioapic"), "OK");
    assert_eq!(peer.ask("irq_intercept_out piix3"), "FAIL IRQ intercept already enabled");
    peer.ok("set_irq_in ioapic unnamed-gpio-in 5 1");
    peer.ok("set_irq_in ioapic unnamed-gpio-in 5 1");
    peer.ok("set_irq_in ioapic unnamed-gpio-in 5 0");
    assert_eq!(peer.irqs, ["raise 5", "lower 5"]);
    // The power button raises the SCI when firmware has enabled both.
    peer.irqs.clear();
    for line in ["outl 0xcf8 0x80000b40", "outl 0xcfc 0x600", "outl 0xcf8 0x80000b80", "outb 0xcfc 1"] {
        peer.ok(line);
    }
    peer.ok("outw 0x602 0x100");
    peer.ok("outw 0x604 0x1");
    assert!(peer.execute("system_powerdown").contains("return"));
    peer.ok("outw 0x600 0x100");
    assert_eq!(peer.irqs, ["raise 9", "lower 9"]);
}

#[test]
fn the_guest_resets_panics_and_powers_off_as_the_events_say() {
    let mut peer = Peer::start(OURS, "-device pvpanic -action panic=pause");
    peer.ok("outl 0xcf8 0x80000904");
    peer.ok("outb 0xcf9 6");
    assert!(peer.event("RESET").contains("guest-reset"));
    assert_eq!(peer.number("inl 0xcf8"), 0, "RST# clears CONFADD");
    peer.ok("outb 0x505 1");
    assert!(peer.event("GUEST_PANICKED").contains("pause"));
    assert!(peer.execute("query-status").contains("guest-panicked"));
    assert!(peer.execute("system_reset").contains("return"));
    for line in ["outl 0xcf8 0x80000b40", "outl 0xcfc 0x600", "outl 0xcf8 0x80000b80", "outb 0xcfc 1"] {
        peer.ok(line);
    }
    // S5 ends the program; whether the reply still comes is not said.
    peer.qmp.send("{\"execute\":\"query-name\"}");
    peer.ask("outw 0x604 0x2000");
    assert!(peer.event("SHUTDOWN").contains("guest-shutdown"));
    assert_eq!(peer.wait().code(), Some(0));
}

#[test]
fn it_serves_standard_input_and_refuses_other_machines() {
    let mut child = Command::new(OURS)
        .args(["-qtest", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"endianness\ninb 0x402\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "OK little\nOK 0x00e9\n");
    assert!(output.status.success());
    let refused = Command::new(OURS).args(["-qtest", "stdio", "-M", "q35"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unsupported machine type 'q35'"));
}
