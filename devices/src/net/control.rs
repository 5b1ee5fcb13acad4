//! Commands of the control queue (virtio 1.2, 5.1.6.5).

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
pub const OK: u8 = 0;
/// The command was refused.
pub const ERR: u8 = 1;

/// Longest command that is read: a table of some hundred addresses. What is longer is refused.
pub const MOST: usize = 4096;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Filters of the receiving side: they may let more through than was asked for, and all is let through.
    Filter,
    /// The driver's own address.
    Address([u8; 6]),
    /// The driver has told the network where it is.
    Announced,
    /// The number of pairs of queues in use.
    Pairs(u16),
    /// Which offloads of the features accepted are on: bits as in the features.
    Offloads(u64),
    /// Not understood, or malformed.
    Bad,
}

/// Reads `struct virtio_net_ctrl` without its `ack`.
pub fn parse(bytes: &[u8]) -> Command {
    let Some(([class, command], data)) = bytes.split_first_chunk::<2>() else { return Command::Bad };
    match (class, command, data) {
        // VIRTIO_NET_CTRL_RX: promiscuous, all multicast, all unicast, and what not to receive.
        (0, 0..=5, [0 | 1]) => Command::Filter,
        // VIRTIO_NET_CTRL_MAC_TABLE_SET: unicast addresses, then multicast ones.
        (1, 0, tables) if table(tables).and_then(table).is_some_and(<[u8]>::is_empty) => Command::Filter,
        (1, 1, &[a, b, c, d, e, f]) if a & 1 == 0 => Command::Address([a, b, c, d, e, f]),
        // VIRTIO_NET_CTRL_VLAN_ADD and _DEL.
        (2, 0 | 1, &[_, _]) => Command::Filter,
        (3, 0, []) => Command::Announced,
        (4, 0, &[low, high]) => Command::Pairs(u16::from_le_bytes([low, high])),
        (5, 0, data) => {
            <[u8; 8]>::try_from(data).map_or(Command::Bad, |bits| Command::Offloads(u64::from_le_bytes(bits)))
        }
        _ => Command::Bad,
    }
}

/// What follows a table: its length as u32, then as many addresses.
fn table(bytes: &[u8]) -> Option<&[u8]> {
    let (entries, rest) = bytes.split_first_chunk::<4>()?;
    let entries = usize::try_from(u32::from_le_bytes(*entries)).ok()?;
    rest.get(entries.checked_mul(6)?..)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_commands_of_the_specification() {
        assert_eq!(parse(&[0, 0, 1]), Command::Filter);
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 9]), Command::Address([2, 0, 0, 0, 0, 9]));
        assert_eq!(parse(&[2, 1, 5, 0]), Command::Filter);
        assert_eq!(parse(&[3, 0]), Command::Announced);
        assert_eq!(parse(&[4, 0, 2, 0]), Command::Pairs(2));
        assert_eq!(parse(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]), Command::Offloads(0x82));
        let mut tables = vec![1, 0, 1, 0, 0, 0];
        tables.extend([2; 6]);
        tables.extend([2, 0, 0, 0]);
        tables.extend([3; 12]);
        assert_eq!(parse(&tables), Command::Filter);
        tables.pop();
        assert_eq!(parse(&tables), Command::Bad);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bytes in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 6, 0],
            &[1, 0],
            &[1, 0, 255, 255, 255, 255],
            &[1, 1, 1, 0, 0, 0, 0, 9], // a multicast address
            &[4, 0, 1],
            &[9, 9],
        ] {
            assert_eq!(parse(bytes), Command::Bad, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }
    }
}
