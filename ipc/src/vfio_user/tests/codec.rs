//! Encoding and decoding.

use proptest::prelude::*;

use super::super::wire::*;
use super::super::{capabilities, shadow::ShadowState};

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
        let _ = Header::decode(&bytes);
        let _ = Version::decode(&bytes);
        let _ = DeviceInfo::decode(&bytes);
        let _ = RegionInfo::decode(&bytes);
        let _ = IrqInfo::decode(&bytes);
        let _ = IrqSet::decode(&bytes);
        let _ = RegionAccess::decode(&bytes);
        let _ = capabilities::parse(&bytes);
    }

    #[test]
    fn headers_survive_the_wire(id: u16, command: u16, size in 16_u32..4000, kind in 0_usize..4, errno: u32) {
        let kind = [Kind::Command, Kind::Posted, Kind::Reply, Kind::ErrorReply(errno)][kind];
        let header = Header { id, command, size, kind };
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn payloads_survive_the_wire(a: u32, b: u32, c: u32, d: u32, e: u64, f: u64) {
        let info = DeviceInfo { argsz: a, flags: b, num_regions: c, num_irqs: d };
        prop_assert_eq!(DeviceInfo::decode(&info.encode()), Ok(info));
        let region = RegionInfo { argsz: a, flags: b, index: c, cap_offset: d, size: e, offset: f };
        prop_assert_eq!(RegionInfo::decode(&region.encode()), Ok(region));
        let irq = IrqInfo { argsz: a, flags: b, index: c, count: d };
        prop_assert_eq!(IrqInfo::decode(&irq.encode()), Ok(irq));
        let set = IrqSet { argsz: a, flags: b, index: c, start: d, count: a ^ b };
        prop_assert_eq!(IrqSet::decode(&set.encode()), Ok(set));
        let access = RegionAccess { offset: e, region: a, count: b % 4097 };
        let bytes = access.encode();
        prop_assert_eq!(RegionAccess::decode(&bytes), Ok((access, &[][..])));
        prop_assert_eq!(ShadowState::unpack(e).pack(), e);
    }
}

#[test]
fn the_header_has_the_layout_of_the_specification() {
    let header = Header { id: 0x1122, command: 10, size: 33, kind: Kind::Posted };
    assert_eq!(header.encode(), [0x22, 0x11, 10, 0, 33, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    let header = Header { id: 1, command: 9, size: 16, kind: Kind::ErrorReply(22) };
    assert_eq!(header.encode(), [1, 0, 9, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0]);
}

#[test]
fn headers_with_sizes_and_flags_out_of_range_are_refused() {
    let good = Header { id: 0, command: 1, size: 16, kind: Kind::Command }.encode();
    assert!(Header::decode(&good).is_ok());
    for size in [0_u32, 15, 16 + 16 + 4097, u32::MAX] {
        let mut bytes = good;
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
        assert!(Header::decode(&bytes).is_err(), "size {size}");
    }
    for flags in [2_u32, 0xf, 0x40, 0x11, 0x20, 1 << 31] {
        let mut bytes = good;
        bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
        assert!(Header::decode(&bytes).is_err(), "flags {flags:#x}");
    }
    assert!(Header::decode(&good[..15]).is_err());
}

#[test]
fn version_data_must_end_with_its_only_nul() {
    assert_eq!(Version::decode(&[0, 0, 1, 0]).unwrap().1, b"");
    assert_eq!(Version::decode(b"\0\0\0\0{}\0").unwrap().1, b"{}");
    assert!(Version::decode(b"\0\0\0\0{}").is_err());
    assert!(Version::decode(b"\0\0\0\0{\0}\0").is_err());
    assert!(Version::decode(b"\0\0\0").is_err());
}

#[test]
fn capabilities_have_defaults_and_unknown_names_are_ignored() {
    for data in
        [&b""[..], b"{}", br#"{"capabilities":{}}"#, br#"{"x":[1],"capabilities":{"twin_socket":{}}}"#]
    {
        assert_eq!(capabilities::parse(data).unwrap().max_data_xfer_size, 1 << 20);
    }
    let limited = br#"{"capabilities":{"max_data_xfer_size":8}}"#;
    assert_eq!(capabilities::parse(limited).unwrap().max_data_xfer_size, 8);
    for bad in [&b"{"[..], b"[]x", br#"{"capabilities":{"max_data_xfer_size":-1}}"#, b"\xff"] {
        assert!(capabilities::parse(bad).is_err());
    }
    assert!(capabilities::parse("[".repeat(4000).as_bytes()).is_err(), "nesting is bounded");
}
