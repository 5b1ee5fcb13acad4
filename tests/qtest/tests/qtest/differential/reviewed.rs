//! Where this machine means to differ from QEMU 7.2.

/// Bits of a configuration register that differ.
pub struct ConfigDifference {
    /// Device number × 8 + function.
    pub devfn: u64,
    /// The register's offset.
    pub register: u64,
    /// The bits that differ at some time.
    pub bits: u8,
    /// Why that is right.
    pub reason: &'static str,
}

/// After a reset.
pub const RESET: [ConfigDifference; 0] = [];
/// At any time, with random writes.
pub const WRITTEN: [ConfigDifference; 0] = [];
