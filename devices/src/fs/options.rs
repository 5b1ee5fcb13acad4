//! How a directory is shared.

use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use bulkhead_ipc::channel::message::FsConfig;
pub use bulkhead_ipc::channel::message::{FsCache, FsOwners};

/// The longest tag, bytes (virtio 1.2, 5.11.4).
pub const TAG: usize = 36;

/// A long time: as good as for ever.
const DAY: Duration = Duration::from_secs(86400);

/// How a directory is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsOptions {
    /// The name that the guest mounts it by: 1 to 36 bytes.
    pub tag: String,
    /// Refuse changes.
    pub read_only: bool,
    /// What the guest may keep.
    pub cache: FsCache,
    /// Whether mounts below the directory are shared too.
    pub submounts: bool,
    /// Whether extended attributes are.
    pub xattr: bool,
    /// Whose files are whose.
    pub owners: FsOwners,
}

impl From<&FsConfig> for FsOptions {
    fn from(config: &FsConfig) -> Self {
        let FsConfig { table: _, tag, read_only, cache, submounts, xattr, owners } = config.clone();
        Self { tag, read_only, cache, submounts, xattr, owners }
    }
}

/// What follows from a way of caching.
pub(super) trait Caching {
    /// How long the guest may believe names and attributes.
    fn lifetime(self) -> Duration;
    /// Whether contents are read and written without the guest's page cache.
    fn bypasses_pages(self) -> bool;
}

impl Caching for FsCache {
    fn lifetime(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Metadata | Self::Always => DAY,
        }
    }

    fn bypasses_pages(self) -> bool {
        matches!(self, Self::Never | Self::Metadata)
    }
}

/// A word that is no way of caching.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("cache: '{0}' is not one of auto, always, metadata, never")]
pub struct CacheError(String);

/// Reads a way of caching.
///
/// # Errors
/// [`CacheError`].
pub fn cache_from_word(word: &str) -> Result<FsCache, CacheError> {
    match word {
        "auto" => Ok(FsCache::Auto),
        "always" => Ok(FsCache::Always),
        "metadata" => Ok(FsCache::Metadata),
        "never" => Ok(FsCache::Never),
        _ => Err(CacheError(word.to_owned())),
    }
}

/// A switch of the command line.
///
/// # Errors
/// The word, when it is neither `on` nor `off`.
pub fn switch(word: &str) -> Result<bool, String> {
    match word {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        other => Err(other.to_owned()),
    }
}

/// A name that the guest can mount by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(pub String);

impl FromStr for Tag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > TAG || text.contains('\0') {
            return Err(format!("the tag has {} bytes; it needs 1 to {TAG}", text.len()));
        }
        Ok(Self(text.to_owned()))
    }
}
