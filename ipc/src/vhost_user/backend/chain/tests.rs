use super::*;
use vm_memory::GuestMemoryMmap;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const TABLE: u64 = 0x1000;
const SIZE: u16 = 8;

/// Walks the chain at descriptor 0; entries are (table address, index, address, length, flags, next).
fn walk(entries: &[(u64, u16, u64, u32, u16, u16)]) -> (Result<(), ChainError>, Chain) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    for &(table, index, address, len, flags, next) in entries {
        let descriptor = Descriptor::new(address, len, flags, next);
        memory.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }
    let mut chain = Chain::new();
    let result = chain.walk(&memory, TABLE, SIZE, 0, true);
    (result, chain)
}

#[test]
fn readable_and_writable_parts_are_told_apart() {
    let (result, chain) = walk(&[
        (TABLE, 0, 0x2000, 16, NEXT, 3),
        (TABLE, 3, 0x3000, 100, NEXT | WRITE, 1),
        (TABLE, 1, 0x4000, 1, WRITE, 0),
    ]);
    result.unwrap();
    assert_eq!(chain.readable(), [Segment { address: 0x2000, len: 16 }]);
    assert_eq!(
        chain.writable(),
        [Segment { address: 0x3000, len: 100 }, Segment { address: 0x4000, len: 1 }]
    );
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 101));
}

#[test]
fn an_indirect_table_continues_the_chain() {
    let (result, chain) = walk(&[
        (TABLE, 0, 0x2000, 8, NEXT, 1),
        (TABLE, 1, 0x5000, 32, INDIRECT, 0),
        (0x5000, 0, 0x3000, 4, NEXT, 1),
        (0x5000, 1, 0x4000, 4, WRITE, 0),
    ]);
    result.unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
}

#[test]
fn a_loop_is_found() {
    let loops = [(TABLE, 0, 0x2000, 1, NEXT, 1), (TABLE, 1, 0x2000, 1, NEXT, 0)];
    assert_eq!(walk(&loops).0, Err(ChainError::Loop));
    let in_indirect = [(TABLE, 0, 0x5000, 16, INDIRECT, 0), (0x5000, 0, 0x2000, 1, NEXT, 0)];
    assert_eq!(walk(&in_indirect).0, Err(ChainError::Loop));
}

#[test]
fn each_malformation_has_its_name() {
    type Entries<'a> = &'a [(u64, u16, u64, u32, u16, u16)];
    let cases: [(Entries<'_>, ChainError); 10] = [
        (&[(TABLE, 0, 0x2000, 1, NEXT, 8)], ChainError::OutsideTable { index: 8, size: 8 }),
        (&[(TABLE, 0, 0x2000, 0, 0, 0)], ChainError::Empty),
        (
            &[(TABLE, 0, 0x2000, 1, NEXT | WRITE, 1), (TABLE, 1, 0x2000, 1, 0, 0)],
            ChainError::ReadableAfterWritable,
        ),
        (
            &[(TABLE, 0, 0x5000, 16, INDIRECT, 0), (0x5000, 0, 0x6000, 16, INDIRECT, 0)],
            ChainError::IndirectInIndirect,
        ),
        (&[(TABLE, 0, 0x5000, 16, INDIRECT | NEXT, 0)], ChainError::IndirectWithNext),
        (&[(TABLE, 0, 0x5000, 0, INDIRECT, 0)], ChainError::IndirectLength(0)),
        (&[(TABLE, 0, 0x5000, 17, INDIRECT, 0)], ChainError::IndirectLength(17)),
        (&[(TABLE, 0, 0x5000, 16 * 1025, INDIRECT, 0)], ChainError::IndirectLength(16 * 1025)),
        (&[(TABLE, 0, 0xFFFF_F000, 16, INDIRECT, 0)], ChainError::TableNotMemory(0xFFFF_F000)),
        (&[(TABLE, 0, 0, u32::MAX, NEXT, 1), (TABLE, 1, 0, 1, 0, 0)], ChainError::TooLong),
    ];
    for (entries, expected) in cases {
        assert_eq!(walk(entries).0, Err(expected));
    }
}

#[test]
fn indirect_tables_need_the_feature() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    memory.write_obj(Descriptor::new(0x5000, 16, INDIRECT, 0), GuestAddress(TABLE)).unwrap();
    let result = Chain::new().walk(&memory, TABLE, SIZE, 0, false);
    assert_eq!(result, Err(ChainError::IndirectNotNegotiated));
}

mod random {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the table holds, a walk ends, and what it accepts is within its limits.
        #[test]
        fn any_table_is_walked_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 256), flags in proptest::collection::vec(0u16..8, 16)) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            memory.write_slice(&bytes, GuestAddress(TABLE)).unwrap();
            for (index, flags) in (0u64..).zip(flags) {
                let at = TABLE + index * 16;
                memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
                memory.write_obj(TABLE + (index % 4) * 64, GuestAddress(at)).unwrap();
            }
            let mut chain = Chain::new();
            for head in 0..SIZE {
                if chain.walk(&memory, TABLE, SIZE, head, true).is_ok() {
                    prop_assert!(chain.readable().len() + chain.writable().len() <= 1024 + usize::from(SIZE));
                    prop_assert!(chain.readable().iter().chain(chain.writable()).all(|segment| segment.len > 0));
                }
            }
        }
    }
}
