//! Firmware's variables: the file that keeps them, and the memory that the guest reads them from.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use super::{FIRMWARE_UNIT, MOST_FIRMWARE, ResourceError, kind, lock, memory, open_error};
use crate::supervisor::config::FirmwareConfig;

const FIELD: &str = "firmware-vars";

/// The chip's contents.
#[derive(Debug)]
pub struct Variables {
    /// The file, locked; memory where they are forgotten.
    pub file: OwnedFd,
    /// What the guest reads. A device process fills it from the file.
    pub memory: OwnedFd,
    /// Size of both in bytes.
    pub size: u64,
}

/// Opens the file, made from the template where it is not there. Firmware without a file and without a template has no
/// variables. `image`: the size of the firmware, above which there is no room.
pub fn open(firmware: &FirmwareConfig, image: u64) -> Result<Option<Variables>, ResourceError> {
    let (path, file) = match (&firmware.variables, &firmware.template) {
        (Some(path), template) => {
            if let Some(template) = template.as_deref().filter(|_| !path.exists()) {
                create(path, template)?;
            }
            (path, open_file(path)?)
        }
        (None, Some(template)) => (template, forgotten(template)?),
        (None, None) => return Ok(None),
    };
    let size = file.metadata().map_err(|error| open_error(FIELD, path, &error))?.len();
    if size == 0 || !size.is_multiple_of(FIRMWARE_UNIT) || size.saturating_add(image) > MOST_FIRMWARE {
        return Err(ResourceError::VariablesSize { path: path.clone(), size });
    }
    Ok(Some(Variables { file: file.into(), memory: memory(FIELD, size)?, size }))
}

fn open_file(path: &Path) -> Result<File, ResourceError> {
    let failed = |error: std::io::Error| open_error(FIELD, path, &error);
    let file = super::open(OpenOptions::new().read(true).write(true), path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        let (field, wanted) = (FIELD.to_owned(), "a regular file");
        return Err(ResourceError::Kind { field, path: path.to_owned(), is: kind(&metadata), wanted });
    }
    lock(&file, false).map_err(|_| ResourceError::VariablesLocked(path.to_owned()))?;
    Ok(file)
}

/// Copies the template; the file has its name when it is whole.
fn create(path: &Path, template: &Path) -> Result<(), ResourceError> {
    let bytes = fs::read(template).map_err(|error| open_error(FIELD, template, &error))?;
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}", std::process::id()));
    let written = File::create_new(&unfinished).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    });
    written.map_err(|error| {
        let _nothing_to_remove = fs::remove_file(&unfinished);
        open_error(FIELD, path, &error)
    })
}

/// A copy of the template that is gone with the machine.
fn forgotten(template: &Path) -> Result<File, ResourceError> {
    let failed = |error: std::io::Error| open_error(FIELD, template, &error);
    let mut bytes = Vec::new();
    File::open(template).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(failed)?;
    let mut file = File::from(memory(FIELD, bytes.len() as u64)?);
    file.write_all(&bytes).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: Option<&Path>, template: Option<&Path>) -> FirmwareConfig {
        FirmwareConfig {
            image: "/f".into(),
            template: template.map(Path::to_owned),
            variables: variables.map(Path::to_owned),
            order: Vec::new(),
            menu: false,
        }
    }

    #[test]
    fn a_missing_file_is_made_from_the_template_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (path, template) = (folder.path().join("vars"), folder.path().join("template"));
        fs::write(&template, [7; 8192]).unwrap();
        let variables = open(&config(Some(&path), Some(&template)), 0).unwrap().unwrap();
        assert_eq!(variables.size, 8192);
        assert_eq!(fs::read(&path).unwrap(), [7; 8192]);
        let refused = open(&config(Some(&path), None), 0).unwrap_err().to_string();
        assert!(refused.contains("is locked by another"), "{refused}");
        drop(variables);
        fs::write(&path, [8; 8192]).unwrap();
        open(&config(Some(&path), Some(&template)), 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [8; 8192], "an existing file is not overwritten");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn without_a_file_the_template_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let template = folder.path().join("template");
        fs::write(&template, [7; 4096]).unwrap();
        let variables = open(&config(None, Some(&template)), 0).unwrap().unwrap();
        File::from(variables.file).write_all(&[1; 10]).unwrap_or(());
        assert_eq!(fs::read(&template).unwrap(), [7; 4096]);
        assert!(open(&config(None, None), 0).unwrap().is_none());
    }

    #[test]
    fn files_that_can_be_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars");
        let refusal = || open(&config(Some(&path), None), 7 << 20).unwrap_err().to_string();
        assert!(refusal().contains("no such file"), "{}", refusal());
        for size in [0, 100, 4097, (1 << 20) + 4096] {
            fs::write(&path, vec![0; size]).unwrap();
            assert!(refusal().contains("is it the right file?"), "{}", refusal());
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(refusal().contains("firmware-vars"), "{}", refusal());
    }
}
