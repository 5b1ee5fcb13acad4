//! The kernel of a run: the one that was named, or one that is installed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;

use super::CommandError;

/// A kernel and its modules.
#[derive(Debug)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The folder of its modules; `None`: it has none that can be found.
    pub modules: Option<PathBuf>,
}

/// The kernel to start.
pub fn find(named: Option<&Path>, root: &Path) -> Result<Kernel, CommandError> {
    let image = match named {
        Some(image) => image.to_owned(),
        None => installed()?,
    };
    let release = release(&image).or_else(|| {
        let name = image.file_name()?.to_str()?;
        name.strip_prefix("vmlinuz-").map(str::to_owned)
    });
    let modules = release.and_then(|release| {
        // Where a package was unpacked, the modules lie beside /boot.
        let beside = image.canonicalize().ok().and_then(|image| Some(image.parent()?.parent()?.to_owned()));
        let places = beside.into_iter().chain([PathBuf::from("/"), root.to_owned()]);
        let folders = places.flat_map(|place| ["lib/modules", "usr/lib/modules"].map(|it| place.join(it)));
        folders.map(|folder| folder.join(&release)).find(|folder| folder.join("modules.dep").is_file())
    });
    Ok(Kernel { image, modules })
}

/// The running kernel's image, or else the newest one that has modules.
fn installed() -> Result<PathBuf, CommandError> {
    let running = uname().ok().map(|names| names.release().to_string_lossy().into_owned());
    let of = |release: &str| image(Path::new("/"), release);
    if let Some(image) = running.as_deref().and_then(of) {
        return Ok(image);
    }
    let mut releases: Vec<String> = fs::read_dir("/lib/modules")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    releases.sort_by_key(|release| numbers(release));
    releases.iter().rev().find_map(|release| of(release)).ok_or(CommandError::NoKernel)
}

/// The image of a release below `root`.
fn image(root: &Path, release: &str) -> Option<PathBuf> {
    let modules = root.join("lib/modules").join(release);
    let name = format!("vmlinuz-{release}");
    // Where a package was unpacked and its modules are a link to there, the image lies beside them.
    let beside =
        modules.canonicalize().ok().and_then(|it| Some(it.ancestors().nth(3)?.join("boot").join(&name)));
    let places = [root.join("boot").join(&name), modules.join("vmlinuz")];
    places.into_iter().chain(beside).find(|image| image.is_file())
}

/// The numbers in a release, by which 6.10 is newer than 6.9.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|it| it.parse().ok()).collect()
}

/// The release that a bzImage says it is (Documentation/arch/x86/boot.rst, `kernel_version`).
fn release(image: &Path) -> Option<String> {
    let file = File::open(image).ok()?;
    let mut header = [0; 0x210];
    file.read_exact_at(&mut header, 0).ok()?;
    if header.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let [low, high] = *header.get(0x20E..0x210)?.first_chunk()?;
    let mut text = [0; 128];
    file.read_exact_at(&mut text, u64::from(u16::from_le_bytes([low, high])).checked_add(0x200)?).ok()?;
    let word = text.split(|byte| matches!(byte, 0 | b' ')).next()?;
    let word = str::from_utf8(word).ok().filter(|word| !word.is_empty() && !word.contains('/'))?;
    Some(word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_their_numbers() {
        let mut releases = ["6.9.1-amd64", "6.10.0-amd64", "5.15.0-3"];
        releases.sort_by_key(|release| numbers(release));
        assert_eq!(releases, ["5.15.0-3", "6.9.1-amd64", "6.10.0-amd64"]);
    }

    #[test]
    fn an_image_lies_in_boot_or_with_its_modules_or_where_a_link_leads() {
        let folder = tempfile::tempdir().unwrap();
        let (root, unpacked) =
            (folder.path().join("root"), folder.path().canonicalize().unwrap().join("unpacked"));
        for place in [
            root.join("boot"),
            root.join("lib/modules/1"),
            unpacked.join("boot"),
            unpacked.join("lib/modules/1"),
        ] {
            fs::create_dir_all(place).unwrap();
        }
        std::os::unix::fs::symlink(unpacked.join("lib/modules/1"), root.join("lib/modules/2")).unwrap();
        assert_eq!(image(&root, "2"), None);
        for (release, place) in [
            ("2", unpacked.join("boot/vmlinuz-2")),
            ("1", root.join("lib/modules/1/vmlinuz")),
            ("1", root.join("boot/vmlinuz-1")),
        ] {
            File::create(&place).unwrap();
            assert_eq!(image(&root, release), Some(place));
        }
    }

    #[test]
    fn a_bzimage_says_its_release() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut bytes = vec![0; 0x1000];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20E..0x210].copy_from_slice(&0x300u16.to_le_bytes());
        bytes[0x500..0x510].copy_from_slice(b"6.1.0-56 (x) #1\0");
        fs::write(&path, &bytes).unwrap();
        assert_eq!(release(&path).as_deref(), Some("6.1.0-56"));
        fs::write(&path, b"ELF").unwrap();
        assert_eq!(release(&path), None);
    }
}
