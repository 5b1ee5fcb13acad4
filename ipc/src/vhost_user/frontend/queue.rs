//! Vrings: size, base, addresses, event descriptors, enabling and stopping.

use std::os::fd::BorrowedFd;

use super::{Frontend, FrontendError, Problem};
use crate::vhost_user::message::{
    FrontendReq, VRING_NO_FD, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState, decode,
    encode,
};

/// Where a split ring lies, guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

impl Frontend {
    fn vring_state(&mut self, request: FrontendReq, queue: u16, value: u16) -> Result<(), FrontendError> {
        let payload = encode(&VhostUserVringState::new(queue.into(), value.into()));
        self.command(request, &payload, &[])
    }

    /// SET_VRING_NUM: the ring's size in entries.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_num(&mut self, queue: u16, size: u16) -> Result<(), FrontendError> {
        self.vring_state(FrontendReq::SET_VRING_NUM, queue, size)
    }

    /// SET_VRING_BASE: the index of the available ring from which the back end goes on.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_base(&mut self, queue: u16, base: u16) -> Result<(), FrontendError> {
        self.vring_state(FrontendReq::SET_VRING_BASE, queue, base)
    }

    /// SET_VRING_ENABLE. A disabled ring is not processed.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_enable(&mut self, queue: u16, enable: bool) -> Result<(), FrontendError> {
        self.vring_state(FrontendReq::SET_VRING_ENABLE, queue, enable.into())
    }

    /// SET_VRING_ADDR. `log`: guest-physical address of the used ring for the dirty log, sent with VHOST_VRING_F_LOG.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_addr(
        &mut self,
        queue: u16,
        ring: &RingAddresses,
        log: Option<u64>,
    ) -> Result<(), FrontendError> {
        let flags = match log {
            Some(_) => VhostUserVringAddrFlags::VHOST_VRING_F_LOG,
            None => VhostUserVringAddrFlags::empty(),
        };
        let payload = encode(&VhostUserVringAddr::new(
            queue.into(),
            flags,
            ring.descriptors,
            ring.used,
            ring.available,
            log.unwrap_or(0),
        ));
        self.command(FrontendReq::SET_VRING_ADDR, &payload, &[])
    }

    /// SET_VRING_KICK: the eventfd by which the driver notifies the device. Starts the ring.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_kick(&mut self, queue: u16, event: BorrowedFd<'_>) -> Result<(), FrontendError> {
        self.vring_event(FrontendReq::SET_VRING_KICK, queue, Some(event))
    }

    /// SET_VRING_CALL: the eventfd by which the device interrupts the driver; `None`: nobody is to be interrupted.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_call(&mut self, queue: u16, event: Option<BorrowedFd<'_>>) -> Result<(), FrontendError> {
        self.vring_event(FrontendReq::SET_VRING_CALL, queue, event)
    }

    /// SET_VRING_ERR: the eventfd by which the device says that the ring is beyond repair.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_vring_err(&mut self, queue: u16, event: BorrowedFd<'_>) -> Result<(), FrontendError> {
        self.vring_event(FrontendReq::SET_VRING_ERR, queue, Some(event))
    }

    fn vring_event(
        &mut self,
        request: FrontendReq,
        queue: u16,
        event: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrontendError> {
        let Ok(index) = u8::try_from(queue) else {
            let value = queue.into();
            let field = "queue index";
            return Err(self.error(request, Problem::Parameter { field, value }));
        };
        let value = u64::from(index) | if event.is_none() { VRING_NO_FD } else { 0 };
        self.command(request, &value.to_le_bytes(), event.as_slice())
    }

    /// GET_VRING_BASE: stops the ring, waits until the back end has finished what it works on, and returns the index
    /// of the available ring from which a later start goes on.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`]; the deadline is [`Limits::stop`](super::Limits::stop).
    pub fn get_vring_base(&mut self, queue: u16) -> Result<u16, FrontendError> {
        let request = FrontendReq::GET_VRING_BASE;
        let payload = encode(&VhostUserVringState::new(queue.into(), 0));
        let message = self.query(request, &payload, 0, self.limits.stop)?;
        let Some(state) = decode::<VhostUserVringState>(&message.payload) else {
            return Err(self.bad_reply(request, "size", message.payload.len() as u64, "8"));
        };
        if state.index != u32::from(queue) {
            let expected = queue.to_string();
            return Err(self.bad_reply(request, "queue index", state.index.into(), expected));
        }
        u16::try_from(state.num)
            .map_err(|_| self.bad_reply(request, "base", state.num.into(), "at most 0xffff"))
    }
}
