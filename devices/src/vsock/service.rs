//! A vsock as a service.

use std::path::{Path, PathBuf};
use std::thread::Builder;

use bulkhead_ipc::channel::message::{DeviceConfig, VsockConfig};
use bulkhead_ipc::connector::{Connector, MAX_PATH};
use nix::sys::signal::SigSet;
use tracing::warn;

use super::MAX_STREAMS;
use crate::standalone::arguments::{Given, OptionSpec, Socket};
use crate::standalone::entrance::Entrance;
use crate::standalone::outfit::Outfit;
use crate::standalone::{ServiceType, StandaloneError};

/// Descriptors beside those of connections.
const OTHER_DESCRIPTORS: u64 = 128;

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "vsock",
    backend_type: "vsock",
    features: &[],
    description: "streams between a guest and Unix sockets (virtio-vsock)",
    options: &[
        OptionSpec {
            name: "--guest-cid",
            value: Some("N"),
            help: "the guest's context id, 3 (the default) or more",
        },
        OptionSpec {
            name: "--uds-path",
            value: Some("PATH"),
            help: "a socket for connections to the guest; those of the guest to port P go to PATH_P",
        },
    ],
    prepare,
};

/// Makes the connector, which runs on a thread of the program that listens: the device's process may neither connect nor accept.
fn prepare(given: &Given, outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let guest_cid: u32 = given.number("--guest-cid", 3)?;
    if !(3..u32::MAX).contains(&guest_cid) {
        let reserved = "--guest-cid: 0, 1, 2 and 4294967295 have a meaning of their own; take 3 or more";
        return Err(StandaloneError::usage(reserved));
    }
    let path = given.required("--uds-path")?;
    if path.len() > MAX_PATH {
        let long = format!("--uds-path: more than {MAX_PATH} bytes leave no room for _PORT");
        return Err(StandaloneError::usage(long));
    }
    let Entrance::Listening(door) = Entrance::open(&Socket::Path(PathBuf::from(path)))? else {
        return Err(StandaloneError::usage("--uds-path: nothing to listen on"));
    };
    let failed = |error| StandaloneError::System("the connector", error);
    let listener = door.listener().try_clone().map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let (connector, for_device) = Connector::new(Path::new(path))?;
    let body = move || {
        // Signals are for the thread that waits for them.
        let _cannot_fail = SigSet::all().thread_block();
        if let Err(error) = connector.run(&listener) {
            warn!(%error, "no connection can be made any more");
        }
    };
    Builder::new().name("connector".into()).spawn(body).map_err(failed)?;
    outfit.keep(door);
    outfit.limits.descriptors = MAX_STREAMS as u64 + OTHER_DESCRIPTORS;
    Ok(DeviceConfig::Vsock(VsockConfig { guest_cid, connector: outfit.add(for_device) }))
}
