//! Disk images in formats, by the crate `imago`: qcow2 with backing images, VMDK with its extents.
//!
//! Everything in an image may have been written by an enemy. So it is read only by threads under their filter, in a process that
//! has nothing but these files; the format is what the user said and never guessed; and a file that an image names is not
//! opened because it is named: the user lists the files of a chain, and an image that names one and was given none is refused
//! with what to write. No name in an image is ever resolved, so no chain can be a circle.
//!
//! A process that dies may leave nothing behind that its successor cannot see: what a write changed of the metadata is with
//! the kernel before the write counts as done.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use bulkhead_ipc::channel::message::ImageFormat;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};

mod grow;
mod storage;

use storage::Given;

pub use grow::GrowError;

/// One image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// The file.
    pub file: fs::File,
    /// What is in it.
    pub format: ImageFormat,
}

/// The files of an image: its chain from the top down, and files that hold data for it in the order in which it names them.
#[derive(Debug)]
pub struct Files {
    /// The image itself first, then what backs it.
    pub chain: Vec<Layer>,
    /// Extents of a VMDK image, the data file of a qcow2 image.
    pub data: Vec<fs::File>,
}

/// An image that is open.
#[derive(Debug)]
pub struct Image {
    access: RwLock<FormatAccess<Given>>,
}

/// Hands out the files that the user listed.
struct Listed(VecDeque<fs::File>);

impl ImplicitOpenGate<Given> for Listed {
    fn open_format<F: FormatDriverBuilder<Given>>(&mut self, _builder: F) -> io::Result<FormatAccess<Given>> {
        Err(io::Error::other("it names a backing image that was not given"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Given> {
        match self.0.pop_front() {
            Some(file) => Given::new(file),
            None => {
                let name = options.get_filename().map(|name| name.display().to_string()).unwrap_or_default();
                Err(io::Error::other(format!(
                    "its data lies in the file {name:?}: say data=FILE for each such file, in their order, if you trust the image"
                )))
            }
        }
    }
}

impl Image {
    /// Opens a chain; `write`: its top is to be written.
    ///
    /// # Errors
    /// A sentence for a person.
    pub fn open(files: &Files, write: bool) -> Result<Self, String> {
        let mut below = None;
        for (depth, layer) in files.chain.iter().enumerate().rev() {
            let data = if depth == 0 {
                files.data.iter().map(fs::File::try_clone).collect()
            } else {
                Ok(VecDeque::new())
            };
            let opened =
                data.and_then(|data| open_layer(layer, below.take(), write && depth == 0, Listed(data)));
            let which = || match depth {
                0 => String::new(),
                depth => format!("backing image {depth}: "),
            };
            below = Some(opened.map_err(|error| format!("{}{}", which(), describe(&error)))?);
        }
        let access = below.ok_or("there is no image")?;
        Ok(Self { access: RwLock::new(access) })
    }

    /// Makes the disk of a chain that nobody has open just now longer: `size` bytes, a multiple of `block`.
    ///
    /// # Errors
    /// [`GrowError`]; the disk is as it was then.
    pub fn grow(files: &Files, size: u64, block: u64) -> Result<(), GrowError> {
        let Some((top, below)) = files.chain.split_first() else {
            return Err(GrowError::Image("there is none"));
        };
        if top.format != ImageFormat::Qcow2 {
            return Err(GrowError::Image("only qcow2 images grow while they are in use"));
        }
        let copy = |layer: &Layer| Ok(Layer { file: layer.file.try_clone()?, format: layer.format });
        let below = below.iter().map(copy).collect::<io::Result<Vec<_>>>()?;
        let backing = match below.is_empty() {
            true => None,
            false => {
                let below = Self::open(&Files { chain: below, data: Vec::new() }, false);
                Some(below.map_err(io::Error::other)?.size())
            }
        };
        grow::grow(&top.file, size, block, backing)
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Given>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size of the disk that the guest sees, bytes.
    pub fn size(&self) -> u64 {
        self.shared().size()
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// Of the host's files, or the image is corrupt.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(bytes, offset)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let access = self.shared();
        access.write(bytes, offset)?;
        access.flush()
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn sync(&self) -> io::Result<()> {
        let access = self.shared();
        access.flush()?;
        access.sync()
    }

    /// Makes a range read as zero; the space may stay.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let access = self.shared();
        access.write_zeroes(offset, len)?;
        access.flush()
    }

    /// Gives up the space of a range, which reads as zero then.
    ///
    /// # Errors
    /// As [`Self::read`]; `Unsupported` where the format cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Nobody may be moving data to or from clusters that are given up.
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        access.discard_to_zero(offset, len)?;
        access.flush()
    }
}

fn open_layer(
    layer: &Layer,
    below: Option<FormatAccess<Given>>,
    write: bool,
    gate: Listed,
) -> io::Result<FormatAccess<Given>> {
    let file = Given::new(layer.file.try_clone()?)?;
    match layer.format {
        ImageFormat::Raw if below.is_some() => Err(io::Error::other("a raw image has no backing image")),
        ImageFormat::Raw => Ok(FormatAccess::new(Raw::builder(file).write(write).open(gate)?)),
        ImageFormat::Vmdk if below.is_some() => {
            Err(io::Error::other("backing images of VMDK images cannot be opened"))
        }
        ImageFormat::Vmdk => Ok(FormatAccess::new(Vmdk::<Given>::builder(file).write(write).open(gate)?)),
        ImageFormat::Qcow2 => {
            let given = below.is_some();
            let image = Qcow2::<Given>::builder(file).write(write).backing(below).open(gate)?;
            match (image.implicit_backing_file(), given) {
                (Some(name), false) => {
                    let format = image.implicit_backing_format().map_or("FORMAT", String::as_str);
                    Err(io::Error::other(format!(
                        "it needs the backing image {name:?}: say backing=FILE:{format} for it, if you trust the image"
                    )))
                }
                (None, true) => Err(io::Error::other("it names no backing image, and was given one")),
                _ => Ok(FormatAccess::new(image)),
            }
        }
    }
}

/// The error without control characters, which an image may hold, and not too long.
pub fn describe(error: &io::Error) -> String {
    error.to_string().escape_debug().take(400).collect()
}

#[cfg(test)]
mod tests;
