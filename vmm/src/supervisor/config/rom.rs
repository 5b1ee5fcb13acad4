//! `--option-rom [DEVICE=]FILE`: code that runs in firmware, from a device's expansion ROM or a file of its own.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::ConfigError;
use super::nearest::hint;

/// Where Debian's packages have option ROMs, for a bare name.
const FOLDERS: [&str; 3] = ["/usr/lib/ipxe/qemu", "/usr/share/seabios", "/usr/share/qemu"];

/// An option ROM as the user names it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct RomSpec {
    /// The PCI device that brings it; `None`: it belongs to no device.
    pub device: Option<String>,
    /// Its file, or a name among [`FOLDERS`].
    pub path: PathBuf,
}

impl From<String> for RomSpec {
    fn from(text: String) -> Self {
        match text.split_once('=') {
            // A path with a folder in it before the `=` is no device.
            Some((device, path)) if !device.contains('/') => {
                Self { device: Some(device.to_owned()), path: path.into() }
            }
            _ => Self { device: None, path: text.into() },
        }
    }
}

impl FromStr for RomSpec {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.to_owned().into())
    }
}

impl RomSpec {
    /// The same, where relative paths start at a folder; a bare name that is no file there stays one.
    pub fn at(self, folder: &Path) -> Self {
        let path = folder.join(&self.path);
        if is_bare(&self.path) && !path.exists() { self } else { Self { path, ..self } }
    }
}

fn is_bare(path: &Path) -> bool {
    path.components().count() == 1 && !path.as_os_str().is_empty() && path.is_relative()
}

/// Checks the devices and finds files that are named by their bare names. `devices`: those on the PCI bus.
pub fn resolve(specs: Vec<RomSpec>, devices: &[&str], firmware: bool) -> Result<Vec<RomSpec>, ConfigError> {
    for (index, RomSpec { device, .. }) in specs.iter().enumerate() {
        match device {
            None if !firmware => return Err(ConfigError::NeedsFirmware("option-rom without a device")),
            None => {}
            Some(name) if !devices.contains(&name.as_str()) => {
                let hint = match devices {
                    [] => "it has no device on the PCI bus".to_owned(),
                    devices => hint(name, devices),
                };
                return Err(ConfigError::RomDevice { name: name.clone(), hint });
            }
            Some(name) if specs.iter().take(index).any(|before| before.device == *device) => {
                return Err(ConfigError::RomTwice(name.clone()));
            }
            Some(_) => {}
        }
    }
    Ok(specs.into_iter().map(find).collect())
}

fn find(spec: RomSpec) -> RomSpec {
    if !is_bare(&spec.path) || spec.path.exists() {
        return spec;
    }
    let known = FOLDERS.iter().map(|folder| Path::new(folder).join(&spec.path)).find(|path| path.exists());
    RomSpec { path: known.unwrap_or(spec.path), device: spec.device }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> RomSpec {
        text.parse().unwrap()
    }

    #[test]
    fn what_stands_before_the_equals_sign_is_a_device_unless_it_is_a_path() {
        assert_eq!(spec("a.rom"), RomSpec { device: None, path: "a.rom".into() });
        assert_eq!(spec("net0=a=b.rom"), RomSpec { device: Some("net0".into()), path: "a=b.rom".into() });
        assert_eq!(spec("./a=b.rom"), RomSpec { device: None, path: "./a=b.rom".into() });
    }

    #[test]
    fn devices_are_those_of_the_bus_and_have_one_rom_each() {
        let refusal = |texts: &[&str], firmware| {
            let specs = texts.iter().map(|text| spec(text)).collect();
            resolve(specs, &["disk0", "rng"], firmware).unwrap_err().to_string()
        };
        assert!(refusal(&["disk=a"], true).contains("did you mean 'disk0'?"));
        assert!(refusal(&["rng=a", "b", "rng=c"], true).contains("'rng' has two"));
        assert!(refusal(&["a"], false).contains("is for firmware"));
        assert!(resolve(vec![spec("rng=a"), spec("b"), spec("c")], &["rng"], true).is_ok());
        assert!(resolve(vec![spec("rng=a")], &["rng"], false).is_ok(), "a kernel can read it, too");
    }

    #[test]
    fn bare_names_are_looked_for_where_packages_have_them() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("here.rom"), []).unwrap();
        assert_eq!(spec("here.rom").at(folder.path()).path, folder.path().join("here.rom"));
        assert_eq!(spec("there.rom").at(folder.path()).path, PathBuf::from("there.rom"));
        assert_eq!(spec("a/b.rom").at(folder.path()).path, folder.path().join("a/b.rom"));
        assert_eq!(find(spec("no-such.rom")), spec("no-such.rom"));
        if Path::new("/usr/share/seabios/bios.bin").exists() {
            assert_eq!(find(spec("bios.bin")).path, PathBuf::from("/usr/share/seabios/bios.bin"));
        }
    }
}
