//! `--vsock cid=…,path=…[,id=…][,restart=…][,addr=…]` and the table `[vsock]`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use bulkhead_ipc::connector::MAX_PATH;
use serde::Deserialize;
use thiserror::Error;

use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "a vsock",
    shape: "cid=N,path=SOCKET[,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]",
    keys: &["cid", "path", "id", "restart", "addr"],
};

/// A vsock as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context id.
    pub cid: u64,
    /// A Unix socket for connections to the guest; those of the guest go to `PATH_PORT`.
    pub path: PathBuf,
    /// The name in messages and in `bulkhead ps`. Default: vsock.
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
}

/// A vsock with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id.
    pub cid: u32,
    /// The socket.
    pub path: PathBuf,
    /// Unique among the processes of the machine.
    pub id: String,
    /// What follows the death of its process.
    pub restart: RestartPolicy,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why a vsock is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VsockSpecError {
    /// The `cid` or `path` is missing.
    #[error("a vsock needs {0}: cid=N,path=SOCKET[,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]")]
    Missing(&'static str),
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// A context id that is no number.
    #[error("cid={0}: a context id is a number, 3 or more")]
    NotANumber(String),
    /// One that no guest may have.
    #[error("vsock: the context id {0} {why}: take another, from 3 to 4294967294", why = meaning(*.0))]
    Cid(u64),
    /// A path that leaves no room for a port.
    #[error(
        "vsock: the socket path '{path}' has {length} bytes; with _PORT behind it the kernel allows at most {MAX_PATH}: choose a shorter one",
        path = path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
}

/// What a reserved context id means (virtio 1.2, 5.10.4; vsock(7)).
const fn meaning(cid: u64) -> &'static str {
    match cid {
        0 => "is the hypervisor's",
        1 => "is that of local connections",
        2 => "is the host's",
        _ => "is not a guest's",
    }
}

impl VsockSpec {
    /// Checks what can be checked without a look at the host. Returns the context id.
    pub fn check(&self) -> Result<u32, VsockSpecError> {
        let cid = u32::try_from(self.cid).ok().filter(|cid| (3..u32::MAX).contains(cid));
        let cid = cid.ok_or(VsockSpecError::Cid(self.cid))?;
        let length = self.path.as_os_str().len();
        if length > MAX_PATH {
            return Err(VsockSpecError::PathTooLong { path: self.path.clone(), length });
        }
        Ok(cid)
    }

    /// The same with its path below `base`, if it is relative.
    #[must_use]
    pub fn below(self, base: &Path) -> Self {
        Self { path: base.join(&self.path), ..self }
    }
}

impl FromStr for VsockSpec {
    type Err = VsockSpecError;

    fn from_str(text: &str) -> Result<Self, VsockSpecError> {
        let (mut cid, mut path, mut id, mut restart, mut addr) = (None, None, None, None, None);
        for (key, value) in PAIRS.read(text)? {
            match key {
                "cid" => cid = Some(value.parse().map_err(|_| VsockSpecError::NotANumber(value.to_owned()))?),
                "path" => path = Some(PathBuf::from(value)),
                "id" => id = Some(value.to_owned()),
                "restart" => restart = Some(value.parse()?),
                _ => addr = Some(value.parse()?),
            }
        }
        let cid = cid.ok_or(VsockSpecError::Missing("a context id"))?;
        let path = path.filter(|path: &PathBuf| !path.as_os_str().is_empty());
        Ok(Self { cid, path: path.ok_or(VsockSpecError::Missing("a path"))?, id, restart, addr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let checked = text.parse::<VsockSpec>().and_then(|spec| spec.check().map(drop));
        checked.unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let vsock: VsockSpec = "cid=7,path=/run/v.sock,id=v,restart=never,addr=6".parse().unwrap();
        let (id, restart, addr) = (Some("v".into()), Some(RestartPolicy::Never), "06.0".parse().ok());
        assert_eq!(vsock, VsockSpec { cid: 7, path: "/run/v.sock".into(), id, restart, addr });
        assert_eq!(vsock.check(), Ok(7));
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        assert!(refusal("cid=0,path=v").contains("0 is the hypervisor's"));
        assert!(refusal("cid=1,path=v").contains("local connections"));
        assert!(refusal("cid=2,path=v").contains("2 is the host's"));
        assert!(refusal("cid=4294967295,path=v").contains("is not a guest's"));
        assert!(refusal("cid=4294967299,path=v").contains("from 3 to 4294967294"));
        assert!(refusal("cid=x,path=v").contains("cid=x"));
        assert!(refusal("cid=3").contains("needs a path"));
        assert!(refusal("path=v").contains("needs a context id"));
        assert!(refusal("cid=3,pth=v").contains("did you mean 'path'?"));
        assert!(refusal("cid=3,path=v,cid=4").contains("given twice"));
        assert!(refusal("v.sock").contains("not KEY=VALUE"));
        assert!(refusal(&format!("cid=3,path=/{}", "v".repeat(96))).contains("97 bytes"));
    }
}
