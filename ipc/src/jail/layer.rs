//! The layers of the jail by name, as a user requires them and reads that one is missing.

use std::fmt;
use std::str::FromStr;

/// A part of the jail that a host can lack or forbid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layer {
    /// New user, mount, pid, net, ipc, uts and cgroup namespaces.
    Namespaces,
    /// Empty read-only root.
    Root,
    /// seccomp filters.
    Seccomp,
    /// No path, no TCP port, no abstract socket and no foreign process by name (landlock(7)).
    Landlock,
    /// Limits of memory, threads, CPU time and I/O by cgroup v2.
    Cgroup,
    /// A host user for each process.
    DistinctUids,
}

impl Layer {
    /// All of them. The first three are never gone without.
    pub const ALL: [Self; 6] =
        [Self::Namespaces, Self::Root, Self::Seccomp, Self::Landlock, Self::Cgroup, Self::DistinctUids];

    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Root => "root",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::Cgroup => "cgroup",
            Self::DistinctUids => "distinct-uids",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A word that is no layer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no layer of the jail: valid: namespaces, root, seccomp, landlock, cgroup, distinct-uids")]
pub struct LayerError(String);

impl FromStr for Layer {
    type Err = LayerError;

    fn from_str(text: &str) -> Result<Self, LayerError> {
        Self::ALL.into_iter().find(|layer| layer.name() == text).ok_or_else(|| LayerError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_reads_back_and_stands_in_the_refusal() {
        let refusal = "cgroups".parse::<Layer>().unwrap_err().to_string();
        for layer in Layer::ALL {
            assert_eq!(layer.to_string().parse(), Ok(layer));
            assert!(refusal.contains(layer.name()), "{refusal}");
        }
    }
}
