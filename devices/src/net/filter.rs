//! What a guest may say it is: addresses that a packet may come from, and those that it may be for.
//!
//! The filter sees a copy of the packet's beginning; the same copy is sent, so that the guest cannot change it in between.
//! What cannot be judged is dropped: under a filter for IP addresses only ARP, IPv4 and IPv6 without a VLAN tag pass.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of a packet that the filter wants to see: Ethernet, IPv6, a hop-by-hop header and a neighbour advertisement.
pub const LOOKS_AT: usize = 96;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const HOP_BY_HOP: u8 = 0;
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Filters of one network card.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The only address that packets come from, and the only one, beside groups, that they are for.
    pub mac: Option<[u8; 6]>,
    /// The only IP addresses that packets come from; none: any.
    pub addresses: Vec<IpAddr>,
}

fn bytes<const N: usize>(packet: &[u8], offset: usize) -> Option<[u8; N]> {
    packet.get(offset..)?.first_chunk().copied()
}

impl Filter {
    /// Whether everything passes.
    pub fn is_off(&self) -> bool {
        self.mac.is_none() && self.addresses.is_empty()
    }

    /// Whether a packet of the guest may leave. `packet`: its beginning, without the header of virtio.
    pub fn leaves(&self, packet: &[u8]) -> bool {
        let from = bytes::<6>(packet, 6);
        if self.mac.is_some() && from != self.mac {
            return false;
        }
        self.addresses.is_empty() || from.is_some_and(|from| self.is_own(packet, from).unwrap_or(false))
    }

    /// Whether a packet is for this guest.
    pub fn enters(&self, packet: &[u8]) -> bool {
        match (self.mac, bytes::<6>(packet, 0)) {
            (None, _) => true,
            (Some(mac), Some(to)) => to == mac || to[0] & 1 == 1,
            (Some(_), None) => false,
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }

    fn is_own(&self, packet: &[u8], from: [u8; 6]) -> Option<bool> {
        let payload = packet.get(ETHERNET..)?;
        Some(match u16::from_be_bytes(bytes(packet, 12)?) {
            // Without an address yet: DHCP.
            IPV4 => {
                let from = Ipv4Addr::from(bytes::<4>(payload, 12)?);
                from.is_unspecified() || self.has(from.into())
            }
            // Ethernet and IPv4; sender addresses at 8 and 14. Zero is the probe for an address in use.
            ARP => {
                let sender = Ipv4Addr::from(bytes::<4>(payload, 14)?);
                bytes(payload, 0)? == [0, 1, 8, 0, 6, 4]
                    && bytes(payload, 8)? == from
                    && (sender.is_unspecified() || self.has(sender.into()))
            }
            IPV6 => self.is_own_v6(payload)?,
            _ => false,
        })
    }

    fn is_own_v6(&self, payload: &[u8]) -> Option<bool> {
        let from = Ipv6Addr::from(bytes::<16>(payload, 8)?);
        let own = |address: Ipv6Addr| self.has(address.into()) || address.is_unicast_link_local();
        if !from.is_unspecified() && !own(from) {
            return Some(false);
        }
        // A neighbour advertisement may not claim another's address, with a short hop-by-hop header before it or none.
        let (next, offset) = match bytes::<1>(payload, 6)? {
            [HOP_BY_HOP] => match bytes(payload, 40)? {
                [next, 0] => (next, 48usize),
                _ => return Some(false),
            },
            [next] => (next, 40),
        };
        Some(match next {
            ICMPV6 if bytes(payload, offset)? == [NEIGHBOUR_ADVERTISEMENT] => {
                own(Ipv6Addr::from(bytes::<16>(payload, offset.checked_add(8)?)?))
            }
            // Further extension headers could hide one: fragments, routing, options.
            HOP_BY_HOP | 43 | 44 | 60 | 135 => self.has(from.into()),
            _ => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn filter() -> Filter {
        Filter {
            mac: Some(MAC),
            addresses: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        }
    }

    fn frame(from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &from, &kind.to_be_bytes(), payload].concat()
    }

    fn ipv4(from: [u8; 4]) -> Vec<u8> {
        [&[0x45; 12][..], &from, &[8, 8, 8, 8]].concat()
    }

    fn arp(hardware: [u8; 6], from: [u8; 4]) -> Vec<u8> {
        [&[0, 1, 8, 0, 6, 4, 0, 1][..], &hardware, &from, &[0; 10]].concat()
    }

    fn ipv6(from: &str, next: u8, rest: &[u8]) -> Vec<u8> {
        let from: Ipv6Addr = from.parse().unwrap();
        [&[0x60, 0, 0, 0, 0, 64, next, 255][..], &from.octets(), &[0xff; 16], rest].concat()
    }

    fn advertisement(of: &str) -> Vec<u8> {
        let of: Ipv6Addr = of.parse().unwrap();
        [&[136, 0, 0, 0, 0, 0, 0, 0][..], &of.octets()].concat()
    }

    #[test]
    fn only_the_own_hardware_address_leaves_and_enters() {
        let filter = Filter { mac: Some(MAC), addresses: Vec::new() };
        assert!(filter.leaves(&frame(MAC, 0x1234, &[])));
        assert!(!filter.leaves(&frame(OTHER, 0x1234, &[])));
        assert!(!filter.leaves(&[0; 5]));
        let to = |address: [u8; 6]| [&address[..], &[0; 20]].concat();
        assert!(filter.enters(&to(MAC)) && filter.enters(&to([0xff; 6])) && filter.enters(&to([0x33; 6])));
        assert!(!filter.enters(&to(OTHER)) && !filter.enters(&[2, 0]));
        assert!(Filter::default().is_off() && Filter::default().leaves(&frame(OTHER, 1, &[])));
    }

    #[test]
    fn only_own_ip_addresses_leave() {
        let filter = filter();
        let leaves = |kind, payload: &[u8]| filter.leaves(&frame(MAC, kind, payload));
        assert!(leaves(IPV4, &ipv4([10, 0, 0, 1])) && leaves(IPV4, &ipv4([0; 4])));
        assert!(!leaves(IPV4, &ipv4([10, 0, 0, 2])) && !leaves(IPV4, &[0x45; 3]));
        assert!(leaves(ARP, &arp(MAC, [10, 0, 0, 1])) && leaves(ARP, &arp(MAC, [0; 4])));
        assert!(!leaves(ARP, &arp(MAC, [10, 0, 0, 254])), "the gateway's address");
        assert!(!leaves(ARP, &arp(OTHER, [10, 0, 0, 1])));
        assert!(leaves(IPV6, &ipv6("2001:db8::1", 6, &[])) && leaves(IPV6, &ipv6("fe80::5", 17, &[])));
        assert!(!leaves(IPV6, &ipv6("2001:db8::2", 6, &[])));
        // VLAN tags and unknown protocols.
        assert!(!leaves(0x8100, &ipv4([10, 0, 0, 1])) && !leaves(0x8035, &arp(MAC, [10, 0, 0, 1])));
    }

    #[test]
    fn a_neighbour_advertisement_claims_own_addresses_only() {
        let filter = filter();
        let leaves = |payload: &[u8]| filter.leaves(&frame(MAC, IPV6, payload));
        assert!(leaves(&ipv6("fe80::5", 58, &advertisement("2001:db8::1"))));
        assert!(!leaves(&ipv6("fe80::5", 58, &advertisement("2001:db8::2"))));
        let hidden = [&[58, 0, 5, 2, 0, 0, 0, 0][..], &advertisement("2001:db8::2")].concat();
        assert!(!leaves(&ipv6("fe80::5", 0, &hidden)));
        let report = [&[58, 0, 5, 2, 0, 0, 0, 0][..], &[143; 24]].concat();
        assert!(leaves(&ipv6("fe80::5", 0, &report)), "a multicast listener report");
        assert!(!leaves(&ipv6("fe80::5", 44, &[0; 40])), "a fragment");
        assert!(leaves(&ipv6("::", 58, &[135; 24])), "duplicate address detection");
    }

    #[test]
    fn a_packet_fits_what_the_filter_looks_at() {
        let hidden = [&[58, 0, 5, 2, 0, 0, 0, 0][..], &advertisement("2001:db8::1")].concat();
        let packet = frame(MAC, IPV6, &ipv6("fe80::5", 0, &hidden));
        assert!(packet.len() <= LOOKS_AT && filter().leaves(&packet));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nobody_elses_address_leaves(mut packet in proptest::collection::vec(any::<u8>(), 0..96)) {
            let filter = filter();
            let _ = (filter.leaves(&packet), filter.enters(&packet));
            if packet.len() >= 34 {
                packet[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 8, 0]);
                let from: [u8; 4] = packet[26..30].try_into().unwrap();
                prop_assert_eq!(filter.leaves(&packet), from == [10, 0, 0, 1] || from == [0; 4]);
            }
        }
    }
}
