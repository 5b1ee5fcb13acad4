//! `--firmware`, `--firmware-vars`, `--boot-order`, `--boot-menu`: what a machine runs that starts no kernel directly.

use std::path::{Path, PathBuf};

use super::ConfigError;
use crate::supervisor::cli::{RunArgs, Switch};

/// Firmware of a Debian package.
struct Known {
    /// The name on the command line, which is the package's too.
    name: &'static str,
    /// Where its image may be, each with a template of its variables.
    places: &'static [(&'static str, Option<&'static str>)],
}

const KNOWN: [Known; 2] = [
    Known { name: "seabios", places: &[("/usr/share/seabios/bios-256k.bin", None)] },
    Known {
        name: "ovmf",
        places: &[
            ("/usr/share/OVMF/OVMF_CODE_4M.fd", Some("/usr/share/OVMF/OVMF_VARS_4M.fd")),
            ("/usr/share/OVMF/OVMF_CODE.fd", Some("/usr/share/OVMF/OVMF_VARS.fd")),
        ],
    },
];

/// Firmware, and what it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareConfig {
    /// The image.
    pub image: PathBuf,
    /// What a file of variables begins as, when it is not there.
    pub template: Option<PathBuf>,
    /// The file with its variables; they are forgotten without.
    pub variables: Option<PathBuf>,
    /// Ids of disks and network cards, the first to be tried first. Empty: all disks in the order of their slots, then all cards.
    pub order: Vec<String>,
    /// It shall offer a menu of what can be booted.
    pub menu: bool,
}

impl FirmwareConfig {
    /// Whether there is a chip with variables, and a process for it.
    pub const fn has_variables(&self) -> bool {
        self.variables.is_some() || self.template.is_some()
    }
}

/// Takes what concerns firmware out of the options, those of the command line first. `bootable`: ids of disks and cards.
pub fn resolve(
    args: &mut RunArgs,
    file: &mut RunArgs,
    bootable: &[&str],
) -> Result<Option<FirmwareConfig>, ConfigError> {
    let order = args.boot_order.take().or(file.boot_order.take());
    let menu = args.boot_menu.or(file.boot_menu) == Some(Switch::On);
    let variables = args.firmware_vars.take().or(file.firmware_vars.take());
    // A kernel named on the command line wins over firmware in the file, and the other way round.
    let named = match (&args.firmware, &args.kernel) {
        (Some(_), Some(_)) => return Err(ConfigError::KernelAndFirmware),
        (Some(_), None) => args.firmware.take(),
        (None, Some(_)) => None,
        (None, None) if file.kernel.is_some() && file.firmware.is_some() => {
            return Err(ConfigError::KernelAndFirmware);
        }
        (None, None) => file.firmware.take(),
    };
    let Some(named) = named else {
        let lonely =
            [("boot-order", order.is_some()), ("boot-menu", menu), ("firmware-vars", variables.is_some())];
        return match lonely.iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(ConfigError::NeedsFirmware(option)),
            None => Ok(None),
        };
    };
    let order = order.map_or_else(Vec::new, |BootOrder(ids)| ids);
    for (index, id) in order.iter().enumerate() {
        if !bootable.contains(&id.as_str()) {
            return Err(ConfigError::BootOrder { id: id.clone(), known: bootable.join(", ") });
        }
        if order.iter().take(index).any(|before| before == id) {
            return Err(ConfigError::BootOrderTwice(id.clone()));
        }
    }
    let (image, template) = find(&named)?;
    Ok(Some(FirmwareConfig { image, template, variables, order, menu }))
}

/// Whether this stands for firmware of Debian's packages.
pub fn is_known(name: &Path) -> bool {
    KNOWN.iter().any(|known| Path::new(known.name) == name)
}

/// A known name's image and template, or the path itself.
fn find(named: &Path) -> Result<(PathBuf, Option<PathBuf>), ConfigError> {
    let Some(Known { name, places }) = KNOWN.iter().find(|known| Path::new(known.name) == named) else {
        return Ok((named.to_owned(), None));
    };
    let path = places.first().map_or("", |place| place.0);
    let found = places.iter().find(|(image, _)| Path::new(image).exists());
    let (image, template) = found.ok_or(ConfigError::NoSuchFirmware { name, path })?;
    Ok((image.into(), template.map(PathBuf::from)))
}

/// Ids of disks and network cards with commas between them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct BootOrder(pub Vec<String>);

impl std::str::FromStr for BootOrder {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.split(',').map(str::to_owned).collect()))
    }
}
