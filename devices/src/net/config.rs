//! Features and configuration space of virtio-net (virtio 1.2, 5.1.3 and 5.1.4).

use bulkhead_ipc::tap::{
    TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6,
};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::Settings;

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// VIRTIO_NET_S_ANNOUNCE.
const ANNOUNCE: u16 = 2;

/// Feature bit number to feature bit.
pub const fn bit(number: u32) -> u64 {
    1 << number
}

/// The driver takes packets that span several buffers.
pub const MERGEABLE: u64 = bit(VIRTIO_NET_F_MRG_RXBUF);
/// There is a control queue.
pub const CONTROL_QUEUE: u64 = bit(VIRTIO_NET_F_CTRL_VQ);
/// The driver knows of more than one pair of queues.
pub const MULTI_QUEUE: u64 = bit(VIRTIO_NET_F_MQ);

/// What the driver must have accepted for the tap to hand it packets of each kind.
const OFFLOADS: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];

/// `TUN_F_…` for the `VIRTIO_NET_F_GUEST_…` bits among `features`. Nothing is segmented without checksums.
pub fn tap_offloads(features: u64) -> u32 {
    if features & bit(VIRTIO_NET_F_GUEST_CSUM) == 0 {
        return 0;
    }
    let wanted = OFFLOADS.iter().filter(|(feature, _)| features & bit(*feature) != 0);
    wanted.fold(0, |offloads, (_, offload)| offloads | offload)
}

/// The features of a network card, whose tap knows `offloads`.
pub fn features(settings: &Settings, offloads: u32) -> u64 {
    let mut features = bit(VIRTIO_NET_F_MAC)
        | bit(VIRTIO_NET_F_STATUS)
        | MERGEABLE
        | CONTROL_QUEUE
        | bit(VIRTIO_NET_F_CTRL_RX)
        | bit(VIRTIO_NET_F_CTRL_RX_EXTRA)
        | bit(VIRTIO_NET_F_CTRL_VLAN)
        | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
    if !settings.mac_filter {
        features |= bit(VIRTIO_NET_F_CTRL_MAC_ADDR);
    }
    if settings.mtu.is_some() {
        features |= bit(VIRTIO_NET_F_MTU);
    }
    if settings.pairs > 1 {
        features |= MULTI_QUEUE;
    }
    if offloads & TUN_F_CSUM != 0 {
        for (number, _) in OFFLOADS.iter().filter(|(_, offload)| offloads & offload != 0) {
            features |= bit(*number);
        }
        features |= bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
            | bit(VIRTIO_NET_F_CSUM)
            | bit(VIRTIO_NET_F_HOST_TSO4)
            | bit(VIRTIO_NET_F_HOST_TSO6)
            | bit(VIRTIO_NET_F_HOST_ECN)
            | bit(VIRTIO_NET_F_HOST_UFO);
        if offloads & TUN_F_USO4 != 0 {
            features |= bit(VIRTIO_NET_F_HOST_USO);
        }
    }
    features
}

/// The bytes of `struct virtio_net_config` up to `mtu`.
pub fn space(mac: [u8; 6], link_up: bool, announce: bool, pairs: u16, mtu: Option<u16>) -> [u8; 12] {
    let status = if link_up { LINK_UP } else { 0 } | if announce { ANNOUNCE } else { 0 };
    let [a, b, c, d, e, f] = mac;
    let ([g, h], [i, j]) = (status.to_le_bytes(), pairs.to_le_bytes());
    let [k, l] = mtu.unwrap_or(0).to_le_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = 0x7f;

    #[test]
    fn the_configuration_space_has_the_fields_of_the_specification() {
        let bytes = space([2, 3, 4, 5, 6, 7], true, true, 4, Some(0x1234));
        assert_eq!(bytes, [2, 3, 4, 5, 6, 7, 3, 0, 4, 0, 0x34, 0x12]);
        assert_eq!(space([0; 6], false, false, 1, None), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn what_is_offered_follows_the_back_end_and_the_settings() {
        let plain = Settings::default();
        let socket = features(&plain, 0);
        assert_eq!(
            socket & (bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_GUEST_USO4)),
            0
        );
        assert_eq!(socket & (MULTI_QUEUE | bit(VIRTIO_NET_F_MTU)), 0);
        let tap = features(&Settings { pairs: 2, mtu: Some(9000), ..Settings::default() }, ALL);
        for number in [0, 1, 2, 3, 7, 11, 22, 54, 55, 56] {
            assert_ne!(tap & bit(number), 0, "{number}");
        }
        assert_eq!(features(&plain, ALL & !(TUN_F_USO4 | TUN_F_USO6)) & bit(VIRTIO_NET_F_HOST_USO), 0);
        let filtered = features(&Settings { mac_filter: true, ..Settings::default() }, 0);
        assert_eq!(filtered & bit(VIRTIO_NET_F_CTRL_MAC_ADDR), 0);
    }

    #[test]
    fn the_tap_sends_only_what_the_driver_takes() {
        assert_eq!(tap_offloads(0), 0);
        assert_eq!(tap_offloads(bit(VIRTIO_NET_F_GUEST_TSO4)), 0, "no segmentation without checksums");
        assert_eq!(
            tap_offloads(bit(1) | bit(7) | bit(VIRTIO_NET_F_GUEST_USO6)),
            TUN_F_CSUM | TUN_F_TSO4 | TUN_F_USO6
        );
    }
}
