//! The device status field (section 2.1).

/// The guest has found the device.
pub(super) const ACKNOWLEDGE: u8 = 1;
/// The guest has a driver for it.
pub(super) const DRIVER: u8 = 2;
/// The driver is set up.
pub(super) const DRIVER_OK: u8 = 4;
/// The features are agreed upon.
pub(super) const FEATURES_OK: u8 = 8;
/// The device cannot go on.
pub(super) const NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub(super) const FAILED: u8 = 128;

/// The bits that are the driver's to set.
pub(super) const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
