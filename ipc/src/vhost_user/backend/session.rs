//! Messages about what the rings stand on: memory, dirty log, in-flight area, configuration space, status.

use std::os::fd::OwnedFd;

use super::daemon::{Answer, Daemon, Refusal, only};
use super::inflight::InflightArea;
use crate::memory::{DirtyLog, MemoryError};
use crate::vhost_user::message::{
    VHOST_F_LOG_ALL, VhostUserConfig, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, decode, decode_prefix,
};

/// Largest configuration space, bytes.
const CONFIG_SPACE: u32 = 0x1000;

/// Bytes of a VhostUserInflight as QEMU sends it: two u64, two u16, and padding that some leave out.
const INFLIGHT_BYTES: usize = 20;

/// FEATURES_OK of the device status field.
const STATUS_FEATURES_OK: u8 = 8;

/// The dirty log as SET_LOG_BASE described it; mapped while LOG_ALL is on.
#[derive(Debug)]
pub(super) struct LogSource {
    fd: OwnedFd,
    offset: u64,
    size: u64,
}

impl LogSource {
    fn map(&self) -> Result<DirtyLog, MemoryError> {
        let failed = |source| MemoryError::Map { what: "dirty log", size: self.size, source };
        DirtyLog::map(self.fd.try_clone().map_err(failed)?, self.offset, self.size)
    }
}

impl Daemon {
    pub(super) fn set_mem_table(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let bad = || Refusal::Payload(payload.len());
        let (VhostUserMemory { num_regions, .. }, mut rest) = decode_prefix(payload).ok_or_else(bad)?;
        if descriptors.len() as u64 != u64::from(num_regions) {
            return Err(Refusal::Descriptors(descriptors.len()));
        }
        let mut regions = Vec::new();
        for fd in descriptors {
            let (region, tail) = decode_prefix::<VhostUserMemoryRegion>(rest).ok_or_else(bad)?;
            regions.push((region, fd));
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(bad());
        }
        self.with_rings_stopped(|daemon| Ok(daemon.memory.replace(regions)?))?;
        Ok(Answer::Done)
    }

    pub(super) fn add_mem_reg(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let region: VhostUserSingleMemoryRegion = decode(payload).ok_or(Refusal::Payload(payload.len()))?;
        let fd = only(descriptors)?;
        self.with_rings_stopped(|daemon| Ok(daemon.memory.add(&region, fd)?))?;
        Ok(Answer::Done)
    }

    pub(super) fn rem_mem_reg(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        // Some front ends send a descriptor here too; it is closed unused.
        let region: VhostUserSingleMemoryRegion = decode(payload).ok_or(Refusal::Payload(payload.len()))?;
        self.with_rings_stopped(|daemon| Ok(daemon.memory.remove(&region)?))?;
        Ok(Answer::Done)
    }

    pub(super) fn set_log_base(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        if !self.has(VhostUserProtocolFeatures::LOG_SHMFD) {
            return Err(Refusal::State("LOG_SHMFD was not negotiated"));
        }
        let log: VhostUserLog = decode(payload).ok_or(Refusal::Payload(payload.len()))?;
        let source = LogSource { fd: only(descriptors)?, offset: log.mmap_offset, size: log.mmap_size };
        let mapped = source.map()?;
        if self.features & VHOST_F_LOG_ALL != 0 {
            self.memory.ram().set_log(Some(mapped))?;
        }
        self.log = Some(source);
        Ok(Answer::u64(0))
    }

    /// Logs or stops to log, as LOG_ALL says.
    pub(super) fn apply_log(&mut self) -> Result<(), Refusal> {
        let log = match &self.log {
            Some(source) if self.features & VHOST_F_LOG_ALL != 0 => Some(source.map()?),
            _ => None,
        };
        Ok(self.memory.ram().set_log(log)?)
    }

    pub(super) fn get_inflight(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        if !self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Err(Refusal::State("INFLIGHT_SHMFD was not negotiated"));
        }
        let (_, _, queues, queue_size) = inflight(payload)?;
        if queues == 0 || queues > self.device.queues() {
            return Err(Refusal::Value { what: "number of queues", value: u64::from(queues) });
        }
        if queue_size == 0 || queue_size > self.device.queue_max_size() {
            return Err(Refusal::Value { what: "queue size", value: u64::from(queue_size) });
        }
        let (_, fd) = InflightArea::create(queues, queue_size)?;
        let mut reply = Vec::with_capacity(24);
        reply.extend_from_slice(&(InflightArea::size(queues, queue_size) as u64).to_ne_bytes());
        reply.extend_from_slice(&0u64.to_ne_bytes());
        reply.extend_from_slice(&queues.to_ne_bytes());
        reply.extend_from_slice(&queue_size.to_ne_bytes());
        reply.extend_from_slice(&[0; 4]);
        Ok(Answer::ReplyWith(reply, fd))
    }

    pub(super) fn set_inflight(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        if !self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Err(Refusal::State("INFLIGHT_SHMFD was not negotiated"));
        }
        let (size, offset, queues, queue_size) = inflight(payload)?;
        let area = InflightArea::attach(only(descriptors)?, offset, size, queues, queue_size)?;
        self.with_rings_stopped(|daemon| {
            daemon.inflight = Some(area);
            Ok(())
        })?;
        Ok(Answer::Done)
    }

    pub(super) fn get_config(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let (header, data) = config(payload)?;
        let mut reply = payload.get(..size_of::<VhostUserConfig>()).unwrap_or_default().to_vec();
        let mut bytes = vec![0; data.len()];
        self.device.read_config(header.offset, &mut bytes);
        reply.append(&mut bytes);
        Ok(Answer::Reply(reply))
    }

    pub(super) fn set_config(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let (header, data) = config(payload)?;
        if !self.device.write_config(header.offset, data) {
            let offset = header.offset;
            return Err(Refusal::Value { what: "configuration write at", value: u64::from(offset) });
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_status(&mut self, value: u64) -> Result<Answer, Refusal> {
        let bad = Refusal::Value { what: "status", value };
        let mut status = u8::try_from(value).map_err(|_| bad)?;
        if status == 0 {
            self.reset_device()?;
        }
        if status & STATUS_FEATURES_OK != 0 && self.features & !self.offered() != 0 {
            status &= !STATUS_FEATURES_OK;
        }
        self.status = status;
        Ok(Answer::Done)
    }

    pub(super) fn reset_device(&mut self) -> Result<Answer, Refusal> {
        self.disable_all()?;
        self.status = 0;
        self.device.reset();
        Ok(Answer::Done)
    }
}

/// Size, offset, number of queues and queue size of an in-flight message.
fn inflight(payload: &[u8]) -> Result<(u64, u64, u16, u16), Refusal> {
    let bad = || Refusal::Payload(payload.len());
    if payload.len() != INFLIGHT_BYTES && payload.len() != INFLIGHT_BYTES + 4 {
        return Err(bad());
    }
    let (size, rest) = payload.split_first_chunk::<8>().ok_or_else(bad)?;
    let (offset, rest) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
    let (queues, rest) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
    let (queue_size, _) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
    Ok((
        u64::from_ne_bytes(*size),
        u64::from_ne_bytes(*offset),
        u16::from_ne_bytes(*queues),
        u16::from_ne_bytes(*queue_size),
    ))
}

/// Header and bytes of a configuration message.
fn config(payload: &[u8]) -> Result<(VhostUserConfig, &[u8]), Refusal> {
    let (header, data): (VhostUserConfig, _) =
        decode_prefix(payload).ok_or(Refusal::Payload(payload.len()))?;
    let VhostUserConfig { offset, size, .. } = header;
    let fits = offset.checked_add(size).is_some_and(|end| end <= CONFIG_SPACE);
    if !fits || u64::from(size) != data.len() as u64 {
        return Err(Refusal::Payload(payload.len()));
    }
    Ok((header, data))
}
