//! Device-specific configuration, kept in the core (section 2.5): a read of the driver asks nobody.

use bulkhead_ipc::vhost_user::frontend::{FrontendError, Problem};
use bulkhead_ipc::vhost_user::message::VhostUserProtocolFeatures;

use super::device::{State, VirtioPci};

/// The configuration as the back end told it last.
#[derive(Debug)]
pub(super) struct DeviceConfig {
    bytes: Vec<u8>,
    /// `config_generation`: differs after every change.
    pub generation: u8,
}

impl DeviceConfig {
    pub fn new(size: u16) -> Self {
        Self { bytes: vec![0; size.into()], generation: 0 }
    }

    /// Beyond the end zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = self.bytes.iter().skip(start);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }
}

impl VirtioPci {
    /// Reads the configuration from the back end. `notify`: interrupt the driver if it differs.
    pub(super) fn refresh_config(&self, state: &mut State, notify: bool) -> Result<(), FrontendError> {
        let Some(link) = state.link.as_mut() else { return Ok(()) };
        if state.config.bytes.is_empty() || !link.frontend.has(VhostUserProtocolFeatures::CONFIG) {
            return Ok(());
        }
        let mut bytes = vec![0; state.config.bytes.len()];
        link.frontend.get_config(0, &mut bytes)?;
        if bytes != state.config.bytes {
            state.config.bytes = bytes;
            state.config.generation = state.config.generation.wrapping_add(1);
            if notify {
                state.interrupts.configuration_changed();
            }
        }
        Ok(())
    }

    /// The driver writes: the back end decides what becomes of it.
    pub(super) fn write_config(&self, state: &mut State, offset: u64, data: &[u8]) {
        let inside =
            offset.checked_add(data.len() as u64).is_some_and(|end| end <= state.config.bytes.len() as u64);
        let Some(link) = state.link.as_mut().filter(|_| inside) else { return };
        if !link.frontend.has(VhostUserProtocolFeatures::CONFIG) {
            return;
        }
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        let result = link.frontend.set_config(offset, data).and_then(|()| self.refresh_config(state, false));
        if let Err(error) = result {
            match error.problem {
                Problem::Refused(_) => self.complain(state, &error),
                _ => self.fail(state, error.into()),
            }
        }
    }
}
