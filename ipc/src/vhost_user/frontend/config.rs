//! Configuration space, device status, reset.

use super::{Frontend, FrontendError, Problem};
use crate::vhost_user::message::{FrontendReq, VhostUserConfig, VhostUserProtocolFeatures, decode_prefix};

/// Largest configuration space, bytes.
const MAX_CONFIG: u32 = 0x1000;

impl Frontend {
    fn config_header(
        &self,
        request: FrontendReq,
        offset: u32,
        size: usize,
    ) -> Result<Vec<u8>, FrontendError> {
        self.need(request, VhostUserProtocolFeatures::CONFIG)?;
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        if size == 0 || offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
            let field = "size of the configuration access";
            let value = size.into();
            return Err(self.error(request, Problem::Parameter { field, value }));
        }
        Ok([offset, size, 0].iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// GET_CONFIG: fills `buffer` with the device's configuration space from `offset`.
    ///
    /// # Errors
    /// [`Problem::Refused`] when the back end has no such bytes.
    pub fn get_config(&mut self, offset: u32, buffer: &mut [u8]) -> Result<(), FrontendError> {
        let request = FrontendReq::GET_CONFIG;
        let mut payload = self.config_header(request, offset, buffer.len())?;
        let size = buffer.len() as u64;
        payload.resize(payload.len().saturating_add(buffer.len()), 0);
        let message = self.query(request, &payload, 0, self.limits.exchange)?;
        let length = message.payload.len() as u64;
        let Some((header, bytes)) = decode_prefix::<VhostUserConfig>(&message.payload) else {
            // An empty payload is how the protocol says "error".
            return Err(match length {
                0 => self.error(request, Problem::Refused(0)),
                _ => self.bad_reply(request, "size", length, "12 and the bytes asked for"),
            });
        };
        let (got_offset, got_size) = (header.offset, header.size);
        if got_size == 0 && bytes.is_empty() {
            return Err(self.error(request, Problem::Refused(0)));
        }
        if got_offset != offset {
            let expected = offset.to_string();
            return Err(self.bad_reply(request, "offset", got_offset.into(), expected));
        }
        if u64::from(got_size) != size {
            let expected = size.to_string();
            return Err(self.bad_reply(request, "configuration size", got_size.into(), expected));
        }
        if bytes.len() != buffer.len() {
            let expected = format!("12 and {size}");
            return Err(self.bad_reply(request, "size", length, expected));
        }
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    /// SET_CONFIG: writes `bytes` to the device's configuration space at `offset`, on behalf of the driver.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        let request = FrontendReq::SET_CONFIG;
        let mut payload = self.config_header(request, offset, bytes.len())?;
        payload.extend_from_slice(bytes);
        self.command(request, &payload, &[])
    }

    /// SET_STATUS: tells the back end the virtio device status.
    ///
    /// # Errors
    /// [`Problem::NotNegotiated`] without STATUS.
    pub fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        self.need(FrontendReq::SET_STATUS, VhostUserProtocolFeatures::STATUS)?;
        let payload = u64::from(status).to_le_bytes();
        self.command(FrontendReq::SET_STATUS, &payload, &[])
    }

    /// GET_STATUS: the back end's view of the virtio device status.
    ///
    /// # Errors
    /// [`Problem::NotNegotiated`] without STATUS.
    pub fn get_status(&mut self) -> Result<u8, FrontendError> {
        let request = FrontendReq::GET_STATUS;
        self.need(request, VhostUserProtocolFeatures::STATUS)?;
        let status = self.query_u64(request)?;
        u8::try_from(status).map_err(|_| self.bad_reply(request, "status", status, "a byte"))
    }

    /// RESET_DEVICE: all rings disabled, all internal state as at the start.
    ///
    /// # Errors
    /// [`Problem::NotNegotiated`] without RESET_DEVICE.
    pub fn reset_device(&mut self) -> Result<(), FrontendError> {
        self.need(FrontendReq::RESET_DEVICE, VhostUserProtocolFeatures::RESET_DEVICE)?;
        self.command(FrontendReq::RESET_DEVICE, &[], &[])
    }
}
