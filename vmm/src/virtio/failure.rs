//! What happens when a back end fails.

use std::fmt;
use std::io;

use bulkhead_ipc::vhost_user::connection::ConnectionError;
use bulkhead_ipc::vhost_user::frontend::FrontendError;
use thiserror::Error;

use super::device::{State, VirtioPci};
use super::status;
use crate::machine::pci::ConfigError;

/// Why a virtio function cannot work.
#[derive(Debug, Error)]
pub enum VirtioError {
    /// The back end did not answer as it should.
    #[error("{0}")]
    Frontend(#[from] FrontendError),
    /// The back end closed its connection.
    #[error("the device process closed its connection")]
    HungUp,
    /// The back end signalled a ring's error descriptor.
    #[error("the device process reports a queue that it cannot use")]
    Ring,
    /// The back-end channel carried something that is no message.
    #[error("back-end channel: {0}")]
    Requests(ConnectionError),
    /// The back end keeps the core busy with requests.
    #[error("the device process takes more of the core's time than it may, with requests of its own")]
    Flood,
    /// The back end is for legacy drivers only.
    #[error("the device process does not offer VIRTIO_F_VERSION_1")]
    Legacy,
    /// The back end has fewer queues than its type of device needs.
    #[error("the device process has {got} queues, a device of its type has at least {needed}")]
    Queues {
        /// What it has.
        got: u16,
        /// What it needs.
        needed: u16,
    },
    /// A successor lacks features that the guest's driver uses.
    #[error("the new device process lacks features that the driver uses: {0:#x}")]
    FeaturesLost(u64),
    /// The configuration space could not be built.
    #[error("configuration space: {0}")]
    Config(#[from] ConfigError),
    /// Descriptors could not be created.
    #[error("out of descriptors: {0}")]
    Io(#[from] io::Error),
}

/// Who is told about failed back ends. Called with the device's lock held: must not call back into the device.
pub trait Observer: Send + Sync {
    /// The connection to the back end of `device` was given up.
    fn backend_failed(&self, device: &str, error: &VirtioError);
}

impl VirtioPci {
    /// Gives the back end up. The guest learns it, unless the core means to replace the back end.
    pub(super) fn fail(&self, state: &mut State, error: VirtioError) {
        self.fail_with(state, &error);
    }

    /// As [`VirtioPci::fail`], for an error that is needed afterwards.
    pub(super) fn fail_with(&self, state: &mut State, error: &VirtioError) {
        if !self.disconnect(state) {
            return;
        }
        self.observer.backend_failed(&self.device, error);
        if self.settings.hold_on_failure {
            // Whoever holds it says what becomes of it.
            tracing::debug!(device = &*self.device, %error, "device failed");
        } else {
            tracing::error!(device = &*self.device, %error, "device failed");
            Self::needs_reset(state);
        }
    }

    /// Section 2.1.2: the bit, and if the driver is up an interrupt that tells about it.
    pub(super) fn needs_reset(state: &mut State) {
        if state.status & status::DRIVER_OK != 0 && state.status & status::NEEDS_RESET == 0 {
            state.status |= status::NEEDS_RESET;
            state.interrupts.configuration_changed();
        }
    }

    /// No new back end will come: what `hold_on_failure` kept from the guest, it is told now.
    pub fn give_up(&self) {
        let mut state = self.state();
        if state.link.is_none() {
            Self::needs_reset(&mut state);
        }
    }

    /// Reports something that a guest or a back end can cause at will: each time their number doubles.
    pub(super) fn complain(&self, state: &mut State, what: &dyn fmt::Display) {
        state.complaints = state.complaints.saturating_add(1);
        if state.complaints.is_power_of_two() {
            tracing::warn!(device = &*self.device, count = state.complaints, "{what}");
        }
    }
}
