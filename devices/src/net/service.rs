//! A network card as a service.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use bulkhead_ipc::channel::message::{DeviceConfig, NetBackend, NetConfig, NetLimits};
use bulkhead_ipc::tap::{Tap, attach_tap_queue};

use crate::standalone::arguments::{Given, OptionSpec};
use crate::standalone::outfit::{Outfit, OutfitError};
use crate::standalone::{ServiceType, StandaloneError};

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "net",
    backend_type: "net",
    features: &[],
    description: "a network card at a tap, passt or a socket (virtio-net)",
    options: &[
        OptionSpec { name: "--tap", value: Some("NAME"), help: "a tap interface; it is made if it may be" },
        OptionSpec { name: "--stream", value: Some("PATH"), help: "a Unix socket, passt's or QEMU's" },
        OptionSpec {
            name: "--num-queues",
            value: Some("N"),
            help: "pairs of queues at a tap, 1 (the default) to 32",
        },
        OptionSpec { name: "--mac", value: Some("ADDRESS"), help: "hardware address [52:54:00:12:34:56]" },
        OptionSpec { name: "--mtu", value: Some("BYTES"), help: "told to the guest, and set at the tap" },
        OptionSpec { name: "--rx-rate", value: Some("N[,BURST]"), help: "most bytes a second to the guest" },
        OptionSpec {
            name: "--tx-rate",
            value: Some("N[,BURST]"),
            help: "most bytes a second from the guest",
        },
        OptionSpec {
            name: "--rx-packets",
            value: Some("N[,BURST]"),
            help: "most packets a second to the guest",
        },
        OptionSpec {
            name: "--tx-packets",
            value: Some("N[,BURST]"),
            help: "most packets a second from the guest",
        },
    ],
    prepare,
};

/// A hardware address, as six pairs of digits with colons between.
fn mac(text: &str) -> Result<[u8; 6], StandaloneError> {
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let wrong = || StandaloneError::usage(format!("--mac: {text:?} is not like 52:54:00:12:34:56"));
    bytes.try_into().map_err(|_| wrong())
}

/// The limits of a direction.
fn limits(given: &Given, bytes: &str, packets: &str) -> Result<NetLimits, StandaloneError> {
    let ((bytes, bytes_burst), (packets, packets_burst)) = (given.rate(bytes)?, given.rate(packets)?);
    Ok(NetLimits { bytes, bytes_burst, packets, packets_burst })
}

fn prepare(given: &Given, outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let pairs: u16 = given.number("--num-queues", 1)?;
    let mtu = given.value("--mtu").map(|_| given.number("--mtu", 0)).transpose()?;
    let backend = match (given.value("--tap"), given.value("--stream")) {
        (Some(name), None) => {
            let refused = |error: bulkhead_ipc::tap::TapError| StandaloneError::Refused(error.to_string());
            let tap = Tap::open(name, pairs).map_err(refused)?;
            tap.configure(mtu).map_err(refused)?;
            for (number, queue) in tap.queues.iter().enumerate().filter(|_| pairs > 1) {
                attach_tap_queue(queue.as_fd(), number == 0)
                    .map_err(|error| StandaloneError::System("a queue of the tap", error))?;
            }
            outfit.limits.descriptors = outfit.limits.descriptors.saturating_add(u64::from(pairs) << 3);
            let queues = tap.queues.into_iter().map(|queue| outfit.add(queue)).collect();
            NetBackend::Tap { queues, positions: Vec::new(), offloads: tap.offloads }
        }
        (None, Some(path)) => {
            let failed = |error| OutfitError::Open { what: "stream", path: path.into(), error };
            NetBackend::Stream(Some(outfit.add(UnixStream::connect(path).map_err(failed)?)))
        }
        _ => return Err(StandaloneError::usage("--tap NAME or --stream PATH is needed")),
    };
    Ok(DeviceConfig::Net(NetConfig {
        backend,
        mac: given.value("--mac").map_or(Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56]), mac)?,
        mtu,
        receive: limits(given, "--rx-rate", "--rx-packets")?,
        transmit: limits(given, "--tx-rate", "--tx-packets")?,
        mac_filter: false,
        ip_filter: Vec::new(),
        link: true,
        successor: false,
        kept: None,
        way: 1,
        group: None,
    }))
}
