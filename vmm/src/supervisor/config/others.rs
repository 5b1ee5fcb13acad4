//! The devices of which a machine has at most one and which have a name: vsock and balloon.

use super::{
    BALLOON, BalloonConfig, BalloonSpec, ConfigError, DiskConfig, RESERVED, RestartPolicy, VSOCK,
    VsockConfig, VsockSpec, balloon_pages, check_name,
};
use crate::supervisor::cli::RunArgs;

/// They, checked.
#[derive(Debug, Default)]
pub(super) struct Others {
    pub vsock: Option<VsockConfig>,
    pub balloon: Option<BalloonConfig>,
}

impl Others {
    /// Takes them out of the options, those of the command line first.
    pub fn resolve(
        args: &mut RunArgs,
        file: &mut RunArgs,
        disks: &[DiskConfig],
        memory: u64,
        restart: RestartPolicy,
    ) -> Result<Self, ConfigError> {
        let vsock = args.vsock.take().or(file.vsock.take());
        let vsock = vsock.map(|vsock| name_vsock(vsock, disks, restart)).transpose()?;
        let balloon = args.balloon.take().or(file.balloon.take());
        let balloon = balloon.map(|balloon| name_balloon(balloon, disks, vsock.as_ref(), memory, restart));
        Ok(Self { vsock, balloon: balloon.transpose()? })
    }

    /// Their ids.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let vsock = self.vsock.iter().map(|vsock| vsock.id.as_str());
        vsock.chain(self.balloon.iter().map(|balloon| balloon.id.as_str()))
    }

    /// Gives them the policies that were said of them by name.
    pub fn apply(&mut self, restarts: &[(String, RestartPolicy)]) {
        let policy_of =
            |id: &str| restarts.iter().find(|(device, _)| device == id).map(|(_, policy)| *policy);
        if let Some(vsock) = &mut self.vsock {
            vsock.restart = policy_of(&vsock.id).unwrap_or(vsock.restart);
        }
        if let Some(balloon) = &mut self.balloon {
            balloon.restart = policy_of(&balloon.id).unwrap_or(balloon.restart);
        }
    }
}

/// Checks a vsock, and gives it its id.
pub fn name_vsock(
    spec: VsockSpec,
    disks: &[DiskConfig],
    restart: RestartPolicy,
) -> Result<VsockConfig, ConfigError> {
    let cid = spec.check()?;
    let id = match spec.id {
        Some(id) => check_name("id of the vsock", id)?,
        None => VSOCK.to_owned(),
    };
    if RESERVED.contains(&id.as_str()) || disks.iter().any(|disk| disk.id == id) {
        return Err(ConfigError::IdTaken { device: "vsock", id });
    }
    Ok(VsockConfig { cid, path: spec.path, id, restart: spec.restart.unwrap_or(restart) })
}

/// Checks a balloon for a guest with so much memory, and gives it its id.
pub fn name_balloon(
    spec: BalloonSpec,
    disks: &[DiskConfig],
    vsock: Option<&VsockConfig>,
    memory: u64,
    restart: RestartPolicy,
) -> Result<BalloonConfig, ConfigError> {
    let id = match spec.id {
        Some(id) => check_name("id of the balloon", id)?,
        None => BALLOON.to_owned(),
    };
    let others = disks.iter().map(|disk| &disk.id).chain(vsock.map(|vsock| &vsock.id));
    if RESERVED.contains(&id.as_str()) || others.into_iter().any(|other| *other == id) {
        return Err(ConfigError::IdTaken { device: "balloon", id });
    }
    Ok(BalloonConfig {
        target: balloon_pages(spec.size.map_or(0, |size| size.0), memory)?,
        deflate_on_oom: spec.deflate_on_oom.unwrap_or(true),
        free_page_reporting: spec.free_page_reporting.unwrap_or(true),
        id,
        restart: spec.restart.unwrap_or(restart),
    })
}
