//! `--net tap=NAME|user|socket=PATH|fd=N[,…]` and the table `[[net]]`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};
use super::rom::RomChoice;
use super::size::Size;
use super::vhost_user::VhostUserSpec;

/// Most pairs of queues.
const MAX_QUEUES: u16 = 32;
/// Least MTU of IPv4.
const MIN_MTU: u16 = 68;

const KEYS: [&str; 27] = [
    "tap",
    "user",
    "socket",
    "fd",
    "vhost-user",
    "none",
    "address",
    "gateway",
    "dns",
    "mac",
    "mtu",
    "queues",
    "id",
    "restart",
    "link",
    "hostfwd",
    "mac-filter",
    "ip-filter",
    "rx-rate",
    "tx-rate",
    "rx-burst",
    "tx-burst",
    "rx-packets",
    "tx-packets",
    "limit-group",
    "rom",
    "addr",
];

/// A network card as the user describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NetSpec {
    /// Name of a tap interface.
    pub tap: Option<String>,
    /// By passt, with the addresses of the host.
    pub user: bool,
    /// A Unix stream socket, which joins two machines.
    pub socket: Option<PathBuf>,
    /// A tap or socket that is open already.
    pub fd: Option<i32>,
    /// The socket of a vhost-user back end that is not ours.
    pub vhost_user: Option<PathBuf>,
    /// Hardware address.
    pub mac: Option<String>,
    /// Told to the guest, and set at the tap.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub queues: Option<u16>,
    /// The name in messages and commands. Default: net0, net1, …
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Whether the cable is plugged in at the start.
    pub link: Option<bool>,
    /// Ports of the host that lead into the guest.
    pub hostfwd: Vec<String>,
    /// IPv4 address and length of the prefix that passt gives the guest; default: the host's.
    pub address: Option<String>,
    /// What passt tells the guest to be its router, by which it also reaches the host; goes with `address`.
    pub gateway: Option<Ipv4Addr>,
    /// Questions to this address go to the host's first name server.
    pub dns: Option<Ipv4Addr>,
    /// No card, neither by default nor of the file.
    #[serde(skip)]
    pub none: bool,
    /// Packets leave with the card's own hardware address only, and enter only for it or a group.
    pub mac_filter: bool,
    /// The only IP addresses that packets leave with.
    pub ip_filter: Vec<IpAddr>,
    /// Bytes a second to the guest.
    pub rx_rate: Option<Size>,
    /// Bytes a second from it.
    pub tx_rate: Option<Size>,
    /// Bytes at once after a pause.
    pub rx_burst: Option<Size>,
    /// Bytes at once after a pause.
    pub tx_burst: Option<Size>,
    /// Packets a second to the guest.
    pub rx_packets: Option<u64>,
    /// Packets a second from it.
    pub tx_packets: Option<u64>,
    /// A limit that it shares with others, for both directions together.
    pub limit_group: Option<String>,
    /// What firmware finds in its expansion ROM.
    pub rom: RomChoice,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
}

/// Why a text is no network card.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NetSpecError {
    /// None or several of the ways out.
    #[error("a network card has one of tap=NAME, user, socket=PATH, fd=N and vhost-user=SOCKET")]
    Backend,
    /// A key that there is not.
    #[error("unknown key '{key}' of a network card: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A value that its key cannot have.
    #[error("{key}={value}: {wanted} is needed")]
    Value {
        /// The key.
        key: String,
        /// What was written.
        value: String,
        /// What should be.
        wanted: &'static str,
    },
    /// A hardware address that is none.
    #[error("mac={0}: a hardware address is six pairs of hexadecimal digits, such as 52:54:00:12:34:56")]
    Mac(String),
    /// A hardware address of a group.
    #[error(
        "mac={0}: this is a multicast address; the first byte of a card's own is even, such as 52:54:00:12:34:56"
    )]
    Multicast(String),
    /// Only taps have several queues.
    #[error("queues={0}: only a tap has more than one pair of queues")]
    Queues(u16),
    /// hostfwd without passt.
    #[error("hostfwd is for user networking (--net user,hostfwd=…)")]
    Forward,
    /// An address without the router, or the other way round.
    #[error("address and gateway go together (--net user,address=10.0.2.15/24,gateway=10.0.2.2)")]
    Address,
    /// Options of passt for something else.
    #[error("address, gateway and dns are for user networking (--net user,address=…)")]
    NotUser,
    /// Options of our card for somebody else's.
    #[error(
        "with vhost-user=SOCKET only mac, id, restart and addr can be said: the back end sees to the rest itself"
    )]
    Foreign,
    /// `none` and something else.
    #[error("none means no network card: it stands alone (--net none)")]
    None,
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
}

fn value<T>(key: &str, value: &str, wanted: &'static str) -> Result<T, NetSpecError> {
    Err(NetSpecError::Value { key: key.into(), value: value.escape_debug().to_string(), wanted })
}

fn number<T: FromStr>(key: &str, text: &str) -> Result<T, NetSpecError> {
    text.parse().or_else(|_| value(key, text, "a number"))
}

fn size(key: &str, text: &str) -> Result<Size, NetSpecError> {
    text.parse().or_else(|_| value(key, text, "a size such as 10M"))
}

fn switch(key: &str, text: &str) -> Result<bool, NetSpecError> {
    match text {
        "on" | "true" | "up" => Ok(true),
        "off" | "false" | "down" => Ok(false),
        _ => value(key, text, "on or off"),
    }
}

impl FromStr for NetSpec {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        let mut spec = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for piece in text.split(',') {
            let (key, text) = piece.split_once('=').unwrap_or((piece, "on"));
            // Two of these add up.
            if seen.contains(&key) && !["hostfwd", "ip-filter"].contains(&key) {
                return Err(NetSpecError::Twice(key.to_owned()));
            }
            seen.push(key);
            match key {
                "tap" => spec.tap = Some(text.to_owned()),
                "user" => spec.user = switch(key, text)?,
                "socket" => spec.socket = Some(text.into()),
                "fd" => spec.fd = Some(number(key, text)?),
                "vhost-user" => spec.vhost_user = Some(text.into()),
                "mac" => spec.mac = Some(text.to_owned()),
                "mtu" => spec.mtu = Some(number(key, text)?),
                "queues" => spec.queues = Some(number(key, text)?),
                "id" => spec.id = Some(text.to_owned()),
                "restart" => spec.restart = Some(text.parse()?),
                "link" => spec.link = Some(switch(key, text)?),
                "hostfwd" => spec.hostfwd.push(text.to_owned()),
                "address" => spec.address = Some(text.to_owned()),
                "gateway" => {
                    spec.gateway = Some(text.parse().or_else(|_| value(key, text, "an IPv4 address"))?)
                }
                "dns" => spec.dns = Some(text.parse().or_else(|_| value(key, text, "an IPv4 address"))?),
                "none" => spec.none = switch(key, text)?,
                "mac-filter" => spec.mac_filter = switch(key, text)?,
                "ip-filter" => spec
                    .ip_filter
                    .push(text.parse().or_else(|_| value(key, text, "an IPv4 or IPv6 address"))?),
                "rx-rate" => spec.rx_rate = Some(size(key, text)?),
                "tx-rate" => spec.tx_rate = Some(size(key, text)?),
                "rx-burst" => spec.rx_burst = Some(size(key, text)?),
                "tx-burst" => spec.tx_burst = Some(size(key, text)?),
                "rx-packets" => spec.rx_packets = Some(number(key, text)?),
                "tx-packets" => spec.tx_packets = Some(number(key, text)?),
                "limit-group" => spec.limit_group = Some(text.to_owned()),
                "rom" => spec.rom = text.into(),
                "addr" => spec.addr = Some(text.parse()?),
                _ => {
                    let hint = hint(key, &KEYS);
                    return Err(NetSpecError::UnknownKey { key: key.escape_debug().to_string(), hint });
                }
            }
        }
        spec.check()?;
        Ok(spec)
    }
}

/// As it can be given to `--net`.
impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |key: &str, value: Option<String>| value.map(|value| format!("{key}={value}"));
        let size = |key: &str, value: Option<Size>| text(key, value.map(|size| size.to_string()));
        let count = |key: &str, value: Option<u64>| text(key, value.map(|count| count.to_string()));
        let flag = |key: &str, on: bool| on.then(|| key.to_owned());
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let words = [
            flag("none", self.none),
            flag("user", self.user),
            text("tap", self.tap.clone()),
            text("socket", self.socket.as_ref().map(path)),
            text("fd", self.fd.map(|fd| fd.to_string())),
            text("vhost-user", self.vhost_user.as_ref().map(path)),
            text("address", self.address.clone()),
            text("gateway", self.gateway.map(|it| it.to_string())),
            text("dns", self.dns.map(|it| it.to_string())),
            text("mac", self.mac.clone()),
            count("mtu", self.mtu.map(u64::from)),
            count("queues", self.queues.map(u64::from)),
            text("id", self.id.clone()),
            text("restart", self.restart.map(|it| it.to_string())),
            text("link", self.link.map(|up| if up { "on" } else { "off" }.to_owned())),
            flag("mac-filter", self.mac_filter),
            size("rx-rate", self.rx_rate),
            size("tx-rate", self.tx_rate),
            size("rx-burst", self.rx_burst),
            size("tx-burst", self.tx_burst),
            count("rx-packets", self.rx_packets),
            count("tx-packets", self.tx_packets),
            text("limit-group", self.limit_group.clone()),
            match &self.rom {
                RomChoice::Usual => None,
                RomChoice::Off => Some("rom=off".to_owned()),
                RomChoice::File(file) => text("rom", Some(path(file))),
            },
        ];
        let forwards = self.hostfwd.iter().map(|it| format!("hostfwd={it}"));
        let addresses = self.ip_filter.iter().map(|it| format!("ip-filter={it}"));
        let words: Vec<String> = words.into_iter().flatten().chain(forwards).chain(addresses).collect();
        f.write_str(&words.join(","))
    }
}

/// Where packets go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetTarget {
    /// A tap.
    Tap(String),
    /// passt.
    User(UserNet),
    /// A stream socket.
    Socket(PathBuf),
    /// An open descriptor.
    Descriptor(i32),
}

/// What passt is to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserNet {
    /// Ports of the host.
    pub forwards: Vec<Forward>,
    /// The guest's address with the length of its prefix, and its router; none: the host's.
    pub address: Option<(Ipv4Addr, u8, Ipv4Addr)>,
    /// Stands for the host's name server.
    pub dns: Option<Ipv4Addr>,
}

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// UDP, not TCP.
    pub udp: bool,
    /// Address of the host; none: all.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        let parse = || {
            let (protocol, rest) = text.split_once(':')?;
            let udp = match protocol {
                "tcp" => false,
                "udp" => true,
                _ => return None,
            };
            let (rest, guest) = rest.rsplit_once(':')?;
            let (address, host) =
                rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
            let address = match address {
                None | Some("") => None,
                Some(address) => Some(address.trim_matches(['[', ']']).parse().ok()?),
            };
            let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
            Some(Self { udp, address, host: port(host)?, guest: port(guest)? })
        };
        parse().map_or_else(|| value("hostfwd", text, "tcp:[ADDRESS:]PORT:PORT or udp:…"), Ok)
    }
}

/// An address and the length of its prefix.
pub fn parse_address(text: &str) -> Result<(Ipv4Addr, u8), NetSpecError> {
    let parts = text
        .split_once('/')
        .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)));
    match parts {
        Some((address, prefix)) if (1..=30).contains(&prefix) => Ok((address, prefix)),
        _ => value("address", text, "an IPv4 address and a length such as 10.0.2.15/24"),
    }
}

/// A hardware address.
pub fn parse_mac(text: &str) -> Result<[u8; 6], NetSpecError> {
    let bad = || NetSpecError::Mac(text.escape_debug().to_string());
    let byte = |byte: &str| {
        let digits = byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(byte, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac: [u8; 6] = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(bad)?;
    if mac == [0; 6] {
        return Err(bad());
    }
    if mac[0] & 1 == 1 { Err(NetSpecError::Multicast(text.to_owned())) } else { Ok(mac) }
}

/// An address of this machine's own, the same at every start: a locally administered one.
fn default_mac(machine: &str, id: &str) -> [u8; 6] {
    // FNV-1a, 64 bits.
    let hash = machine.bytes().chain([0]).chain(id.bytes()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    [2, a, b, c, d, e]
}

impl NetSpec {
    fn target(&self) -> Result<NetTarget, NetSpecError> {
        match (&self.tap, self.user, &self.socket, self.fd) {
            (Some(tap), false, None, None) => Ok(NetTarget::Tap(tap.clone())),
            (None, true, None, None) => self.user_net().map(NetTarget::User),
            (None, false, Some(path), None) => Ok(NetTarget::Socket(path.clone())),
            (None, false, None, Some(fd)) => Ok(NetTarget::Descriptor(fd)),
            _ => Err(NetSpecError::Backend),
        }
    }

    fn user_net(&self) -> Result<UserNet, NetSpecError> {
        let forwards: Result<Vec<Forward>, _> = self.hostfwd.iter().map(|text| text.parse()).collect();
        let address = match (&self.address, self.gateway) {
            (Some(text), Some(gateway)) => {
                let (address, prefix) = parse_address(text)?;
                Some((address, prefix, gateway))
            }
            (None, None) => None,
            _ => return Err(NetSpecError::Address),
        };
        Ok(UserNet { forwards: forwards?, address, dns: self.dns })
    }

    /// Whether it can be; what the file says is checked with [`NetSpec::resolve`].
    fn check(&self) -> Result<(), NetSpecError> {
        if self.none {
            let alone = Self { none: true, ..Self::default() };
            return if *self == alone { Ok(()) } else { Err(NetSpecError::None) };
        }
        if self.vhost_user.is_some() {
            return self.check_foreign();
        }
        let target = self.target()?;
        self.mac.as_deref().map(parse_mac).transpose()?;
        if !self.hostfwd.is_empty() && !self.user {
            return Err(NetSpecError::Forward);
        }
        if !self.user && (self.address.is_some() || self.gateway.is_some() || self.dns.is_some()) {
            return Err(NetSpecError::NotUser);
        }
        match (self.queues.unwrap_or(1), &target) {
            (1, _) => {}
            (queues, NetTarget::Tap(_)) if (1..=MAX_QUEUES).contains(&queues) => {}
            (queues, NetTarget::Tap(_)) => {
                return value("queues", &queues.to_string(), "a number from 1 to 32");
            }
            (queues, _) => return Err(NetSpecError::Queues(queues)),
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => value("mtu", &mtu.to_string(), "a number from 68 to 65535"),
            _ => Ok(()),
        }
    }

    /// Nothing that the back end would have to know.
    fn check_foreign(&self) -> Result<(), NetSpecError> {
        let Self { vhost_user, mac, id, restart, addr, .. } = self.clone();
        mac.as_deref().map(parse_mac).transpose()?;
        let alone = Self { vhost_user, mac, id, restart, addr, ..Self::default() };
        if *self == alone { Ok(()) } else { Err(NetSpecError::Foreign) }
    }

    /// The card as a device of another back end; none: it is our own.
    ///
    /// # Errors
    /// [`NetSpecError`].
    pub fn foreign(&self) -> Result<Option<VhostUserSpec>, NetSpecError> {
        let Some(socket) = self.vhost_user.clone() else { return Ok(None) };
        self.check_foreign()?;
        let Self { mac, id, restart, addr, .. } = self.clone();
        let kind = Some("net".to_owned());
        Ok(Some(VhostUserSpec { kind, socket, mac, id, restart, addr, ..VhostUserSpec::default() }))
    }

    /// The network card `id` of this machine.
    ///
    /// # Errors
    /// [`NetSpecError`].
    pub fn resolve(&self, machine: &str, id: &str, folder: &Path) -> Result<NicConfig, NetSpecError> {
        self.check()?;
        if self.none {
            return Err(NetSpecError::None);
        }
        let target = match self.target()? {
            NetTarget::Socket(path) => NetTarget::Socket(folder.join(path)),
            other => other,
        };
        let mac = self.mac.as_deref().map(parse_mac).transpose()?;
        let rate = |size: Option<Size>| size.map_or(0, |size| size.0);
        Ok(NicConfig {
            id: id.to_owned(),
            target,
            mac: mac.unwrap_or_else(|| default_mac(machine, id)),
            mtu: self.mtu,
            queues: self.queues.unwrap_or(1),
            link: self.link.unwrap_or(true),
            mac_filter: self.mac_filter,
            ip_filter: self.ip_filter.clone(),
            receive: RateSpec {
                bytes: rate(self.rx_rate),
                burst: rate(self.rx_burst),
                packets: self.rx_packets.unwrap_or(0),
            },
            transmit: RateSpec {
                bytes: rate(self.tx_rate),
                burst: rate(self.tx_burst),
                packets: self.tx_packets.unwrap_or(0),
            },
            limit_group: self.limit_group.clone(),
            rom: self.rom.clone().at(folder),
            addr: self.addr,
        })
    }
}

/// Limits of a direction; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateSpec {
    /// Bytes a second.
    pub bytes: u64,
    /// Bytes at once.
    pub burst: u64,
    /// Packets a second.
    pub packets: u64,
}

/// A network card, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// Unique among the processes of the machine.
    pub id: String,
    /// Where packets go.
    pub target: NetTarget,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Told to the guest, if at all.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub queues: u16,
    /// Whether the cable is plugged in.
    pub link: bool,
    /// See [`NetSpec::mac_filter`].
    pub mac_filter: bool,
    /// See [`NetSpec::ip_filter`].
    pub ip_filter: Vec<IpAddr>,
    /// What may reach the guest.
    pub receive: RateSpec,
    /// What may leave it.
    pub transmit: RateSpec,
    /// A limit that it shares with others, for both directions.
    pub limit_group: Option<String>,
    /// What firmware finds in its expansion ROM.
    pub rom: RomChoice,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(text: &str) -> NicConfig {
        text.parse::<NetSpec>().unwrap().resolve("vm", "net0", Path::new("/base")).unwrap()
    }

    fn refusal(text: &str) -> String {
        text.parse::<NetSpec>().unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let card = nic(
            "tap=t0,mac=52:54:00:12:34:56,mtu=9000,queues=4,id=x,restart=never,link=off,mac-filter,ip-filter=10.0.0.1,\
             ip-filter=fe80::1,rx-rate=1M,tx-rate=2M,rx-burst=64K,tx-burst=128K,rx-packets=1000,tx-packets=2000,limit-group=g,addr=5.1",
        );
        assert_eq!(card.target, NetTarget::Tap("t0".into()));
        assert_eq!(
            (card.mac, card.mtu, card.queues, card.link),
            ([0x52, 0x54, 0, 0x12, 0x34, 0x56], Some(9000), 4, false)
        );
        assert_eq!(card.addr, "05.1".parse().ok());
        assert!(card.mac_filter && card.ip_filter.len() == 2 && card.limit_group.as_deref() == Some("g"));
        assert_eq!(card.receive, RateSpec { bytes: 1 << 20, burst: 64 << 10, packets: 1000 });
        assert_eq!(card.transmit, RateSpec { bytes: 2 << 20, burst: 128 << 10, packets: 2000 });
        assert_eq!(nic("socket=s").target, NetTarget::Socket("/base/s".into()));
        assert_eq!(nic("fd=5").target, NetTarget::Descriptor(5));
    }

    #[test]
    fn ports_of_the_host_lead_into_the_guest() {
        let NetTarget::User(UserNet { forwards, .. }) =
            nic("user,hostfwd=tcp:8080:80,hostfwd=udp:127.0.0.1:53:5353,hostfwd=tcp:[::1]:1:2").target
        else {
            panic!("another target");
        };
        assert_eq!(forwards[0], Forward { udp: false, address: None, host: 8080, guest: 80 });
        assert_eq!(forwards[1].address, Some("127.0.0.1".parse().unwrap()));
        assert_eq!(forwards[2].address, Some("::1".parse().unwrap()));
        for text in ["tcp:80", "sctp:1:2", "tcp:0:1", "tcp:1:70000", "tcp:host:1:2", "tcp::"] {
            assert!(refusal(&format!("user,hostfwd={text}")).contains("tcp:[ADDRESS:]PORT:PORT"), "{text}");
        }
        assert!(refusal("tap=x,hostfwd=tcp:1:2").contains("--net user"));
    }

    #[test]
    fn user_networking_may_have_addresses_of_its_own() {
        let NetTarget::User(user) = nic("user,address=10.0.2.15/24,gateway=10.0.2.2,dns=10.0.2.3").target
        else {
            panic!("another target");
        };
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        assert_eq!(user.address, Some((address("10.0.2.15"), 24, address("10.0.2.2"))));
        assert_eq!(user.dns, Some(address("10.0.2.3")));
        assert_eq!(nic("user").target, NetTarget::User(UserNet::default()));
        for text in ["10.0.2.15", "10.0.2.15/33", "fe80::1/64", "/24", "10.0.2.15/"] {
            assert!(
                refusal(&format!("user,gateway=10.0.2.2,address={text}")).contains("10.0.2.15/24"),
                "{text}"
            );
        }
        assert!(refusal("user,address=10.0.2.15/24").contains("go together"));
        assert!(refusal("user,dns=::1").contains("an IPv4 address"));
        assert!(refusal("tap=x,dns=10.0.2.3").contains("--net user"));
    }

    #[test]
    fn what_was_read_can_be_written() {
        for text in [
            "none",
            "user,address=10.0.2.15/24,gateway=10.0.2.2,dns=10.0.2.3,hostfwd=tcp:1:2,hostfwd=udp:3:4",
            "tap=t0,mac=52:54:00:12:34:56,mtu=9000,queues=4,id=x,restart=never,link=off,mac-filter,rx-rate=1M,tx-rate=2M,rx-burst=64K,\
             tx-burst=128K,rx-packets=1000,tx-packets=2000,ip-filter=10.0.0.1,ip-filter=fe80::1",
            "socket=/a/b",
            "fd=7,rom=off",
        ] {
            assert_eq!(text.parse::<NetSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn none_stands_alone() {
        assert!("none".parse::<NetSpec>().unwrap().none);
        assert!(refusal("none,mtu=1400").contains("stands alone"));
        let none = NetSpec { none: true, ..NetSpec::default() };
        assert_eq!(none.resolve("vm", "net0", Path::new("")), Err(NetSpecError::None));
    }

    #[test]
    fn every_machine_and_card_has_an_address_of_its_own() {
        let of =
            |machine, id| "user".parse::<NetSpec>().unwrap().resolve(machine, id, Path::new("")).unwrap().mac;
        assert_eq!(of("a", "net0"), of("a", "net0"));
        assert_ne!(of("a", "net0"), of("a", "net1"));
        assert_ne!(of("a", "net0"), of("b", "net0"));
        assert_eq!(of("a", "net0")[0], 2);
    }

    #[test]
    fn refusals_say_what_to_write() {
        for mac in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:5g",
            "52-54-00-12-34-56",
            "+2:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            assert!(refusal(&format!("user,mac={mac}")).contains("six pairs"), "{mac}");
        }
        assert!(refusal("user,mac=01:00:5e:00:00:01").contains("multicast"));
        assert!(refusal("tap=a,user").contains("one of tap=NAME"));
        assert!(refusal("mac=52:54:00:12:34:56").contains("one of tap=NAME"));
        assert!(refusal("user,queues=2").contains("only a tap"));
        assert!(
            refusal("tap=a,queues=33").contains("1 to 32") && refusal("tap=a,queues=0").contains("1 to 32")
        );
        assert!(refusal("tap=a,mtu=60").contains("68 to 65535"));
        assert!(refusal("tap=a,tapp=b").contains("did you mean 'tap'?"));
        assert!(refusal("tap=a,tap=b").contains("given twice"));
        assert!(refusal("user,ip-filter=host").contains("IPv4 or IPv6"));
    }
}
