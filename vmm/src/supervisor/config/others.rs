//! The devices with names that are no disks: vsock and balloon, of which a machine has at most one, network cards, those of other
//! back ends, and shared directories.

use std::mem::take;
use std::path::Path;

use super::{
    BALLOON, BalloonConfig, BalloonSpec, ConfigError, DiskConfig, FsSpec, Ids, LimitGroupSpec, NetSpec,
    NicConfig, PORTS, PmemConfig, PmemSpec, PortSpec, RestartPolicy, RestartRule, ShareConfig, VSOCK,
    VhostUserConfig, VhostUserSpec, VsockConfig, VsockSpec, WATCHDOG, WatchdogConfig, WatchdogSpec,
    balloon_pages, fs, port,
};
use crate::supervisor::cli::RunArgs;

/// They, checked.
#[derive(Debug, Default)]
pub(super) struct Others {
    pub vsock: Option<VsockConfig>,
    pub balloon: Option<BalloonConfig>,
    pub watchdog: Option<WatchdogConfig>,
    pub nics: Vec<NicConfig>,
    pub vhost_user: Vec<VhostUserConfig>,
    pub shares: Vec<ShareConfig>,
    pub pmems: Vec<PmemConfig>,
    pub ports: Vec<PortSpec>,
    pub limit_groups: Vec<LimitGroupSpec>,
}

impl Others {
    /// Takes them out of the options, those of the command line first; `foreign` were taken already. What cards and directories
    /// say of restarts comes before all other rules.
    pub fn resolve(
        args: &mut RunArgs,
        file: &mut RunArgs,
        (machine, mut ids, foreign): (&str, Ids, Vec<VhostUserSpec>),
        memory: u64,
        (restart, rules): (RestartPolicy, &mut Vec<RestartRule>),
    ) -> Result<Self, ConfigError> {
        let mut this = Self::default();
        let vsock = args.vsock.take().or(file.vsock.take());
        this.vsock = vsock.map(|vsock| name_vsock(vsock, &mut ids, restart)).transpose()?;
        let balloon = args.balloon.take().or(file.balloon.take());
        let named = balloon.map(|balloon| name_balloon(balloon, &mut ids, memory, restart));
        this.balloon = named.transpose()?;
        let watchdog = args.watchdog.take().or(file.watchdog.take());
        this.watchdog = watchdog.map(|it| name_watchdog(it, &mut ids, restart)).transpose()?;
        let mut nets = take(if args.nets.is_empty() { &mut file.nets } else { &mut args.nets });
        if matches!(nets.as_slice(), [only] if only.none) {
            nets.clear();
        }
        this.nics = name_nets(&nets, &mut ids, machine, rules)?;
        this.vhost_user = name_foreign(foreign, &mut ids)?;
        let fs = take(if args.fs.is_empty() { &mut file.fs } else { &mut args.fs });
        this.shares = name_shares(fs, &mut ids, rules)?;
        let pmems = take(if args.pmems.is_empty() { &mut file.pmems } else { &mut args.pmems });
        this.pmems = name_pmems(pmems, &mut ids)?;
        this.ports = take(if args.ports.is_empty() { &mut file.ports } else { &mut args.ports });
        port::check(&this.ports)?;
        let groups =
            if args.limit_groups.is_empty() { &mut file.limit_groups } else { &mut args.limit_groups };
        this.limit_groups = take(groups);
        Ok(this)
    }

    /// Their ids.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let vsock = self.vsock.iter().map(|vsock| vsock.id.as_str());
        vsock
            .chain(self.balloon.iter().map(|balloon| balloon.id.as_str()))
            .chain(self.nics.iter().map(|nic| nic.id.as_str()))
            .chain(self.vhost_user.iter().map(|device| device.id.as_str()))
            .chain(self.shares.iter().map(|share| share.id.as_str()))
            .chain(self.pmems.iter().map(|pmem| pmem.id.as_str()))
            .chain((!self.ports.is_empty()).then_some(PORTS))
            .chain(self.watchdog.iter().map(|watchdog| watchdog.id.as_str()))
    }

    /// The ids of what firmware can boot from: the disks and network cards, of all back ends.
    pub fn bootable<'a>(&'a self, disks: &'a [DiskConfig]) -> Vec<&'a str> {
        let disks = disks.iter().map(|disk| &*disk.id);
        let foreign = self.vhost_user.iter().filter(|device| device.is_bootable()).map(|device| &*device.id);
        disks.chain(self.nics.iter().map(|nic| &*nic.id)).chain(foreign).collect()
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
        if let Some(watchdog) = &mut self.watchdog {
            watchdog.restart = policy_of(&watchdog.id).unwrap_or(watchdog.restart);
        }
    }
}

/// Checks a vsock, and gives it its id.
pub fn name_vsock(
    spec: VsockSpec,
    ids: &mut Ids,
    restart: RestartPolicy,
) -> Result<VsockConfig, ConfigError> {
    let cid = spec.check()?;
    let id = ids.take("vsock", spec.id.unwrap_or_else(|| VSOCK.to_owned()))?;
    Ok(VsockConfig { cid, path: spec.path, id, restart: spec.restart.unwrap_or(restart), addr: spec.addr })
}

/// Checks a balloon for a guest with so much memory, and gives it its id.
pub fn name_balloon(
    spec: BalloonSpec,
    ids: &mut Ids,
    memory: u64,
    restart: RestartPolicy,
) -> Result<BalloonConfig, ConfigError> {
    let id = ids.take("balloon", spec.id.unwrap_or_else(|| BALLOON.to_owned()))?;
    Ok(BalloonConfig {
        target: balloon_pages(spec.size.map_or(0, |size| size.0), memory)?,
        deflate_on_oom: spec.deflate_on_oom.unwrap_or(true),
        free_page_reporting: spec.free_page_reporting.unwrap_or(true),
        id,
        restart: spec.restart.unwrap_or(restart),
        addr: spec.addr,
    })
}

/// Gives a watchdog its id.
fn name_watchdog(
    spec: WatchdogSpec,
    ids: &mut Ids,
    restart: RestartPolicy,
) -> Result<WatchdogConfig, ConfigError> {
    let id = ids.take("watchdog", spec.id.unwrap_or_else(|| WATCHDOG.to_owned()))?;
    Ok(WatchdogConfig { action: spec.action, id, restart: spec.restart.unwrap_or(restart), addr: spec.addr })
}

/// Gives network cards their ids, and checks them.
fn name_nets(
    nets: &[NetSpec],
    ids: &mut Ids,
    machine: &str,
    rules: &mut Vec<RestartRule>,
) -> Result<Vec<NicConfig>, ConfigError> {
    let mut nics: Vec<NicConfig> = Vec::with_capacity(nets.len());
    for (index, net) in nets.iter().enumerate() {
        let id = ids.take("net", net.id.clone().unwrap_or_else(|| format!("net{index}")))?;
        let nic =
            net.resolve(machine, &id, Path::new("")).map_err(|source| ConfigError::Net { id, source })?;
        let rule = net.restart.map(|policy| RestartRule { device: Some(nic.id.clone()), policy });
        rules.splice(0..0, rule);
        nics.push(nic);
    }
    Ok(nics)
}

/// Gives the devices of other back ends their ids.
fn name_foreign(specs: Vec<VhostUserSpec>, ids: &mut Ids) -> Result<Vec<VhostUserConfig>, ConfigError> {
    let mut named = Vec::with_capacity(specs.len());
    for (index, spec) in specs.into_iter().enumerate() {
        let id = spec.id.clone().unwrap_or_else(|| format!("vhost-user{index}"));
        let id = ids.take(&format!("vhost-user '{}'", spec.socket.display()), id)?;
        named.push(spec.resolve(id, RestartPolicy::always())?);
    }
    Ok(named)
}

impl ShareConfig {
    /// A directory with its id.
    pub fn new(spec: FsSpec, id: String, ids: &mut Ids) -> Result<Self, ConfigError> {
        let id = ids.take(&format!("fs '{}'", spec.path.display()), id)?;
        if let Some(fault) = fs::tag_fault(&spec.tag) {
            return Err(ConfigError::Tag { path: spec.path, fault });
        }
        let FsSpec { tag, path, readonly, cache, submounts, xattr, owner, others, addr, .. } = spec;
        Ok(Self { tag, path, readonly, cache, submounts, xattr, owner, others, id, addr })
    }
}

/// Gives persistent memory its ids.
fn name_pmems(specs: Vec<PmemSpec>, ids: &mut Ids) -> Result<Vec<PmemConfig>, ConfigError> {
    let mut named = Vec::with_capacity(specs.len());
    for (index, PmemSpec { path, readonly, id, addr }) in specs.into_iter().enumerate() {
        let id = id.unwrap_or_else(|| format!("pmem{index}"));
        let id = ids.take(&format!("pmem '{}'", path.display()), id)?;
        named.push(PmemConfig { path, readonly, id, addr });
    }
    Ok(named)
}

/// Gives shared directories their ids.
fn name_shares(
    specs: Vec<FsSpec>,
    ids: &mut Ids,
    rules: &mut Vec<RestartRule>,
) -> Result<Vec<ShareConfig>, ConfigError> {
    let mut shares: Vec<ShareConfig> = Vec::with_capacity(specs.len());
    for (index, mut spec) in specs.into_iter().enumerate() {
        if let Some(other) = shares.iter().find(|other| other.tag == spec.tag) {
            let fault = format!("the tag '{}' is already that of {}", spec.tag, other.id);
            return Err(ConfigError::Tag { path: spec.path, fault });
        }
        let id = spec.id.take().unwrap_or_else(|| format!("fs{index}"));
        let restart = spec.restart;
        let share = ShareConfig::new(spec, id, ids)?;
        let rule = restart.map(|policy| RestartRule { device: Some(share.id.clone()), policy });
        rules.splice(0..0, rule);
        shares.push(share);
    }
    Ok(shares)
}
