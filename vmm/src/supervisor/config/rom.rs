//! `--option-rom [DEVICE=]FILE` and `rom=` of `--net`: code that runs in firmware, from a device's expansion ROM or a file of
//! its own.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::nearest::hint;
use super::{ConfigError, NicConfig};

/// Where Debian's packages have option ROMs, for a bare name.
const FOLDERS: [&str; 3] = ["/usr/lib/ipxe/qemu", "/usr/share/seabios", "/usr/share/qemu"];
/// iPXE for virtio network cards: for both kinds of firmware, or for a BIOS alone.
const OF_CARDS: [&str; 2] = ["efi-virtio.rom", "pxe-virtio.rom"];

/// An option ROM as the user names it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct RomSpec {
    /// The PCI device that brings it; `None`: it belongs to no device.
    pub device: Option<String>,
    /// Its file, or a name among `FOLDERS`.
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

/// What a network card has as expansion ROM (`rom=on|off|FILE`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "Choice")]
pub enum RomChoice {
    /// iPXE, where there are firmware to run it and a package that has it.
    #[default]
    Usual,
    /// Nothing.
    Off,
    /// A file, or a name among `FOLDERS`.
    File(PathBuf),
}

/// As the configuration file has it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Choice {
    Switch(bool),
    Text(String),
}

impl From<Choice> for RomChoice {
    fn from(choice: Choice) -> Self {
        match choice {
            Choice::Switch(true) => Self::Usual,
            Choice::Switch(false) => Self::Off,
            Choice::Text(text) => text.as_str().into(),
        }
    }
}

impl From<&str> for RomChoice {
    fn from(text: &str) -> Self {
        match text {
            "on" | "true" => Self::Usual,
            "off" | "false" => Self::Off,
            _ => Self::File(text.into()),
        }
    }
}

impl RomChoice {
    /// The same, where relative paths start at a folder; a bare name that is no file there stays one.
    pub fn at(self, folder: &Path) -> Self {
        match self {
            Self::File(path) => Self::File(RomSpec { device: None, path }.at(folder).path),
            other => other,
        }
    }
}

/// The expansion ROM of a network card in a machine with firmware, or without.
pub fn of_card(nic: &NicConfig, firmware: bool) -> Option<RomSpec> {
    let path = match &nic.rom {
        RomChoice::Off => return None,
        RomChoice::File(path) => path.clone(),
        RomChoice::Usual if !firmware => return None,
        RomChoice::Usual => {
            let places = FOLDERS.iter().flat_map(|folder| OF_CARDS.map(|name| Path::new(folder).join(name)));
            places.into_iter().find(|path| path.exists())?
        }
    };
    Some(find(RomSpec { device: Some(nic.id.clone()), path }))
}

fn is_bare(path: &Path) -> bool {
    path.components().count() == 1 && !path.as_os_str().is_empty() && path.is_relative()
}

/// Checks the devices, finds files that are named by their bare names, and adds the ROMs of network cards that no option
/// gives another. `devices`: those on the PCI bus.
pub fn resolve(
    mut specs: Vec<RomSpec>,
    devices: &[&str],
    nics: &[NicConfig],
    firmware: bool,
) -> Result<Vec<RomSpec>, ConfigError> {
    for nic in nics {
        let named = specs.iter().any(|spec| spec.device.as_ref() == Some(&nic.id));
        if !named || matches!(nic.rom, RomChoice::File(_)) {
            specs.extend(of_card(nic, firmware));
        }
    }
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
            resolve(specs, &["disk0", "rng"], &[], firmware).unwrap_err().to_string()
        };
        assert!(refusal(&["disk=a"], true).contains("did you mean 'disk0'?"));
        assert!(refusal(&["rng=a", "b", "rng=c"], true).contains("'rng' has two"));
        assert!(refusal(&["a"], false).contains("is for firmware"));
        assert!(resolve(vec![spec("rng=a"), spec("b"), spec("c")], &["rng"], &[], true).is_ok());
        assert!(resolve(vec![spec("rng=a")], &["rng"], &[], false).is_ok(), "a kernel can read it, too");
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

    #[test]
    fn cards_have_ipxe_where_firmware_can_run_it() {
        let roms = |card: &str, option: &[&str], firmware| -> Vec<String> {
            let card: super::super::NetSpec = card.parse().unwrap();
            let nic = card.resolve("vm", "net0", Path::new("/base")).unwrap();
            let option = option.iter().map(|text| spec(text)).collect();
            let roms = resolve(option, &["net0"], &[nic], firmware);
            let text = |rom: RomSpec| format!("{}={}", rom.device.unwrap(), rom.path.display());
            roms.map_or_else(|error| vec![error.to_string()], |roms| roms.into_iter().map(text).collect())
        };
        if Path::new("/usr/lib/ipxe/qemu/efi-virtio.rom").exists() {
            for card in ["user", "user,rom=on"] {
                assert_eq!(roms(card, &[], true), ["net0=/usr/lib/ipxe/qemu/efi-virtio.rom"]);
            }
            let named = roms("user,rom=pxe-virtio.rom", &[], true);
            assert_eq!(named, ["net0=/usr/lib/ipxe/qemu/pxe-virtio.rom"]);
        }
        assert_eq!(roms("user", &[], false), [""; 0], "a kernel does without");
        assert_eq!(roms("user,rom=off", &[], true), [""; 0]);
        assert_eq!(roms("user,rom=a/b.rom", &[], false), ["net0=/base/a/b.rom"]);
        assert_eq!(roms("user", &["net0=/x.rom"], true), ["net0=/x.rom"], "an option says what it is");
        assert_eq!(roms("user,rom=off", &["net0=/x.rom"], true), ["net0=/x.rom"]);
        assert!(roms("user,rom=/y.rom", &["net0=/x.rom"], true)[0].contains("'net0' has two"));
    }
}
