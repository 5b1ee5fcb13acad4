//! Headers that an attacker wrote: any answer will do, as long as it is one, and what is loaded hangs together.

use bulkhead_ipc::memory::GuestRam;
use proptest::prelude::*;

use super::super::{Mode, load_kernel};
use super::{MIB, file, make, source};

/// Changes to an image: where, and what is written there.
fn changes(reach: usize) -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let telling =
        prop::sample::select(vec![0u64, 1, 0x7F, 0xFF, 0xFFFF, 0xF_FFFF, 1 << 31, u64::MAX >> 1, u64::MAX]);
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..4),
        (telling, 1usize..=8).prop_map(|(value, len)| value.to_le_bytes()[..len].to_vec()),
    ];
    prop::collection::vec((0..reach, bytes), 1..6)
}

fn survives(mut image: Vec<u8>, changes: Vec<(usize, Vec<u8>)>, cut: Option<usize>, initrd: bool) {
    for (at, bytes) in changes {
        make::put(&mut image, at, &bytes);
    }
    if let Some(cut) = cut {
        image.truncate(cut);
    }
    let ram = GuestRam::create(20 * MIB).unwrap();
    let (kernel, disk) = (file(&image), file(&[7; 9000]));
    if let Ok(entry) = load_kernel(&ram, &source(&kernel, initrd.then_some(&disk), "quiet")) {
        assert!(entry.rip >= MIB && ram.contains(entry.rip, 1), "{entry:x?}");
        if let Mode::Long { cr3, gdt } = entry.mode {
            assert!(ram.contains(cr3, 4096) && ram.contains(gdt.base, u64::from(gdt.limit)));
        }
        // ACPI tables are somebody else's.
        assert!(ram.dirty_pages().pages().all(|page| !(0x9_F000..0x10_0000).contains(&page)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn bzimage_headers(
        changes in changes(0x280 - 8).prop_map(|changes| changes.into_iter().map(|(at, b)| (at.max(0x1C0), b)).collect()),
        cut in prop::option::weighted(0.2, 0usize..make::PAYLOAD_OFFSET + make::PAYLOAD),
        initrd: bool,
    ) {
        survives(make::bzimage(), changes, cut, initrd);
    }

    #[test]
    fn elf_headers(
        changes in changes(0xB0),
        cut in prop::option::weighted(0.2, 0usize..0x1400),
        initrd: bool,
    ) {
        survives(make::elf(), changes, cut, initrd);
    }

    #[test]
    fn elf_notes(notes in prop::collection::vec(any::<u8>(), 0..200), name in any::<bool>()) {
        let mut notes = notes;
        if name {
            notes.extend(make::note(b"Xen\0", 18, &make::ENTRY.to_le_bytes()));
        }
        survives(make::elf_with_notes(&notes), vec![], None, false);
    }

    #[test]
    fn bytes_of_any_kind(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        survives(bytes, vec![], None, false);
    }
}
