//! Which ids are taken: every device and process of a machine has one of its own.

use super::{CONSOLE, CORE, ConfigError, FLASH, KEYBOARD, PORTS, RNG, SERIAL, SUPERVISOR, check_name};

/// Ids that no device can be given: they are those of processes and of devices that are always called so.
const RESERVED: [&str; 8] = [SERIAL, CONSOLE, PORTS, RNG, FLASH, KEYBOARD, CORE, SUPERVISOR];

/// The ids of a machine.
#[derive(Debug)]
pub struct Ids(Vec<String>);

impl Ids {
    /// The ids of every machine, and those of these devices.
    pub fn new<'a>(devices: impl IntoIterator<Item = &'a str>) -> Self {
        Self(RESERVED.into_iter().chain(devices).map(str::to_owned).collect())
    }

    /// Whether a device or process has this id, or may have it at any time.
    pub fn is_taken(&self, id: &str) -> bool {
        self.0.iter().any(|taken| taken == id)
    }

    /// Takes an id for a device, which messages call `device`.
    ///
    /// # Errors
    /// It is taken, or can be none.
    pub fn take(&mut self, device: &str, id: String) -> Result<String, ConfigError> {
        let id = check_name(&format!("id of {device}"), id)?;
        if self.is_taken(&id) {
            return Err(ConfigError::IdTaken { device: device.to_owned(), id });
        }
        self.0.push(id.clone());
        Ok(id)
    }

    /// The first of STEM0, STEM1, … that nobody has.
    pub fn free(&self, stem: &str) -> String {
        (0..).map(|number| format!("{stem}{number}")).find(|id| !self.is_taken(id)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once() {
        let mut ids = Ids::new(["disk0", "net1"]);
        for id in RESERVED.into_iter().chain(["disk0", "net1"]) {
            let error = ids.take("vsock", id.to_owned()).unwrap_err().to_string();
            assert!(error.starts_with("vsock: the id '") && error.contains("already belongs"), "{error}");
        }
        assert_eq!((ids.free("disk"), ids.free("net")), ("disk1".to_owned(), "net0".to_owned()));
        assert_eq!(ids.take("net", "net0".to_owned()).unwrap(), "net0");
        assert!(ids.take("net", "net0".to_owned()).is_err());
        assert_eq!(ids.free("net"), "net2");
        let error = ids.take("vhost-user '/x'", "a/b".to_owned()).unwrap_err().to_string();
        assert!(error.contains("id of vhost-user '/x': 'a/b' is not a possible name"), "{error}");
    }
}
