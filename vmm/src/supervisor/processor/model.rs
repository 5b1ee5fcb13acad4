//! Processor models: which bits of CPUID a host must offer, and which of them a guest may see.

use std::fs;
use std::io;
use std::path::PathBuf;

use bulkhead_ipc::channel::message::CpuidLeaf;
use serde::Deserialize;
use thiserror::Error;

/// The models that come with Bulkhead.
const BUILT_IN: [(&str, &str); 2] = [
    ("x86-64-v2", include_str!("models/x86-64-v2.toml")),
    ("x86-64-v3", include_str!("models/x86-64-v3.toml")),
];
/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The registers in the order in which a leaf has them.
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Why a model cannot be used.
#[derive(Debug, Error)]
pub enum ModelError {
    /// No such file.
    #[error(
        "cpu-model '{path}': no such file, and no model of that name comes with Bulkhead: say host, x86-64-v2, x86-64-v3 or FILE",
        path = .0.display()
    )]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("cpu-model: cannot read '{path}': {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no model.
    #[error("{path}:{line}: {message}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// The host is older than the model.
    #[error(
        "cpu-model '{model}': this host lacks bits {lacking:#010x} of CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, {register}: choose another model or host"
    )]
    Lacking {
        /// The model.
        model: String,
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: &'static str,
        /// What the host does not offer.
        lacking: u32,
    },
}

/// A processor model. Without a mask the guest sees what the host offers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuModel {
    name: String,
    masks: Masks,
}

/// A model's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Masks {
    /// Bits that the host must offer.
    require: Vec<Mask>,
    /// Bits that the guest may see.
    allow: Vec<Mask>,
}

/// Bits of one leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mask {
    leaf: u32,
    /// All of them when there is none.
    subleaf: Option<u32>,
    eax: Option<u32>,
    ebx: Option<u32>,
    ecx: Option<u32>,
    edx: Option<u32>,
}

impl Mask {
    fn is_about(&self, entry: &CpuidLeaf) -> bool {
        entry.leaf == self.leaf && self.subleaf.is_none_or(|subleaf| subleaf == entry.subleaf)
    }

    const fn registers(&self) -> [Option<u32>; 4] {
        [self.eax, self.ebx, self.ecx, self.edx]
    }
}

impl CpuModel {
    /// Reads a model: `host`, the name of one that comes with Bulkhead, or a file.
    ///
    /// # Errors
    /// There is none of that name, or it is none.
    pub fn read(name: &str) -> Result<Self, ModelError> {
        if name == "host" {
            return Ok(Self::default());
        }
        let path = PathBuf::from(name);
        let text = match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            Some((_, text)) => (*text).to_owned(),
            None => {
                let failed = |source: io::Error| match source.kind() {
                    io::ErrorKind::NotFound => ModelError::Missing(path.clone()),
                    _ => ModelError::Read { path: path.clone(), source },
                };
                if fs::metadata(&path).map_err(failed)?.len() > MAX_BYTES {
                    return Err(failed(io::Error::from_raw_os_error(libc::EFBIG)));
                }
                fs::read_to_string(&path).map_err(failed)?
            }
        };
        let masks = toml::from_str(&text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
            let line = before.matches('\n').count().saturating_add(1);
            ModelError::Content { path: path.clone(), line, message: error.message().to_owned() }
        })?;
        Ok(Self { name: name.to_owned(), masks })
    }

    /// Takes away what the guest may not see.
    ///
    /// # Errors
    /// The host lacks something that the model requires.
    pub(super) fn apply(&self, cpuid: &mut [CpuidLeaf]) -> Result<(), ModelError> {
        for mask in &self.masks.require {
            let subleaf = mask.subleaf.unwrap_or(0);
            let found = cpuid.iter().find(|entry| entry.leaf == mask.leaf && entry.subleaf == subleaf);
            let offered = found.map_or([0; 4], |entry| entry.registers);
            for ((wanted, offered), register) in mask.registers().into_iter().zip(offered).zip(REGISTERS) {
                let lacking = wanted.unwrap_or(0) & !offered;
                if lacking != 0 {
                    let (model, leaf) = (self.name.clone(), mask.leaf);
                    return Err(ModelError::Lacking { model, leaf, subleaf, register, lacking });
                }
            }
        }
        for entry in cpuid {
            let about = *entry;
            for mask in self.masks.allow.iter().filter(|mask| mask.is_about(&about)) {
                for (value, allowed) in entry.registers.iter_mut().zip(mask.registers()) {
                    *value &= allowed.unwrap_or(u32::MAX);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf, flags: 0, registers }
    }

    fn model(text: &str) -> Result<CpuModel, ModelError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.toml");
        fs::write(&path, text).unwrap();
        CpuModel::read(path.to_str().unwrap())
    }

    #[test]
    fn masks_take_away_and_never_add() {
        let model = model("allow = [{leaf=1, ecx=0xff}, {leaf=7, subleaf=1, eax=0}]").unwrap();
        let mut cpuid = [leaf(1, 0, [1, 2, 0xf0f, 4]), leaf(7, 0, [9; 4]), leaf(7, 1, [9; 4])];
        model.apply(&mut cpuid).unwrap();
        assert_eq!(cpuid.map(|leaf| leaf.registers), [[1, 2, 0xf, 4], [9; 4], [0, 9, 9, 9]]);
    }

    #[test]
    fn a_host_that_lacks_something_is_refused() {
        let model = model("require = [{leaf=1, edx=6}, {leaf=0x80000001, ecx=1}]").unwrap();
        let error = model.apply(&mut [leaf(1, 0, [0, 0, 0, 2])]).unwrap_err().to_string();
        assert!(error.contains("lacks bits 0x00000004 of CPUID leaf 0x1, subleaf 0x0, EDX"), "{error}");
        let error = model.apply(&mut [leaf(1, 0, [0, 0, 0, 6])]).unwrap_err().to_string();
        assert!(error.contains("leaf 0x80000001"), "{error}");
    }

    #[test]
    fn models_that_come_with_bulkhead_allow_what_they_require() {
        for (name, _) in BUILT_IN {
            let model = CpuModel::read(name).unwrap();
            for required in &model.masks.require {
                let subleaf = required.subleaf.unwrap_or(0);
                let mut cpuid = [leaf(required.leaf, subleaf, [u32::MAX; 4])];
                CpuModel { masks: Masks { require: Vec::new(), ..model.masks.clone() }, ..model.clone() }
                    .apply(&mut cpuid)
                    .unwrap();
                for (wanted, left) in required.registers().into_iter().zip(cpuid[0].registers) {
                    assert_eq!(wanted.unwrap_or(0) & !left, 0, "{name}: leaf {:#x}", required.leaf);
                }
            }
        }
        assert_eq!(CpuModel::read("host").unwrap(), CpuModel::default());
    }

    #[test]
    fn what_is_no_model_is_refused_with_its_line() {
        let refusal = |text: &str| model(text).unwrap_err().to_string();
        assert!(refusal("allow = []\n[[alow]]\nleaf = 1\n").contains("model.toml:2: unknown field `alow`"));
        assert!(refusal("allow = [{ecx=1}]").contains("missing field `leaf`"));
        assert!(refusal("allow = [{leaf=1, ecx=-1}]").contains(":1:"));
        assert!(CpuModel::read("x86-64-v9").unwrap_err().to_string().contains("x86-64-v2"));
        assert!(matches!(CpuModel::read("/"), Err(ModelError::Read { .. })));
    }
}
