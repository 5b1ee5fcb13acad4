//! cgroup v2 (Documentation/admin-guide/cgroup-v2.rst): one group for a machine, below it one for each of its processes.
//!
//! ```text
//! PARENT/                        the nearest group from the supervisor's own upwards that it may write and nobody else is in
//!   bulkhead.supervisors/        the supervisors that had to leave PARENT: a group with controllers holds no processes
//!   bulkhead-MACHINE/            locked (flock) as long as the supervisor lives
//!     core/  disk0/  serial/ …   limits; each process is born in its own (CLONE_INTO_CGROUP)
//! ```
//!
//! A machine's group is removed when [`MachineGroup`] is dropped. That of a supervisor that was killed is empty, since its
//! processes have died with it, and its lock is free: the next machine below the same parent removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{process, thread};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::unistd::{AccessFlags, faccessat};

/// What the names of machines' groups begin with.
const PREFIX: &str = "bulkhead-";
/// Where supervisors go that were in the parent.
const SUPERVISORS: &str = "bulkhead.supervisors";
/// The period of `cpu.max`, in µs.
const PERIOD: u64 = 100_000;
/// How often a group that still counts a process as its own is tried again, a millisecond apart.
const REMOVALS: u32 = 20;
/// Machines of one name below one parent.
const NAMESAKES: u32 = 16;

/// A controller, that is a resource that can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Controller {
    Memory,
    Pids,
    Cpu,
    Io,
}

impl Controller {
    /// The kernel's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Io => "io",
        }
    }
}

/// Limits of the bytes and requests that reach a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoLimits {
    /// Major and minor number of the whole disk; the kernel knows no others here.
    pub device: (u64, u64),
    /// Bytes read in a second.
    pub read_bps: Option<u64>,
    /// Bytes written in a second.
    pub write_bps: Option<u64>,
    /// Reads in a second.
    pub read_iops: Option<u64>,
    /// Writes in a second.
    pub write_iops: Option<u64>,
}

/// Limits of one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupLimits {
    /// Bytes of memory, page cache and the kernel's memory on its behalf included; as much again of swap. At the limit the
    /// kernel frees what it can, then kills the process.
    ///
    /// The kernel charges a page of a memfd to the process that touches it first, so the limit of one that maps guest RAM must
    /// have room for all of it.
    pub memory: Option<u64>,
    /// Threads and processes.
    pub pids: Option<u64>,
    /// CPU time in percent of one CPU.
    pub cpu: Option<u32>,
    /// I/O to one block device.
    pub io: Option<IoLimits>,
}

impl GroupLimits {
    /// The controllers that these limits need.
    #[must_use]
    pub fn controllers(&self) -> Vec<Controller> {
        let wanted = [
            self.memory.map(|_| Controller::Memory),
            self.pids.map(|_| Controller::Pids),
            self.cpu.map(|_| Controller::Cpu),
            self.io.map(|_| Controller::Io),
        ];
        wanted.into_iter().flatten().collect()
    }

    /// File and content for each limit.
    fn settings(&self) -> Vec<(Controller, &'static str, String)> {
        let mut settings = Vec::new();
        if let Some(bytes) = self.memory {
            settings.push((Controller::Memory, "memory.max", bytes.to_string()));
            settings.push((Controller::Memory, "memory.swap.max", bytes.to_string()));
        }
        if let Some(count) = self.pids {
            settings.push((Controller::Pids, "pids.max", count.to_string()));
        }
        if let Some(percent) = self.cpu {
            let quota = u64::from(percent).saturating_mul(PERIOD / 100);
            settings.push((Controller::Cpu, "cpu.max", format!("{quota} {PERIOD}")));
        }
        if let Some(io) = self.io {
            let text = |limit: Option<u64>| limit.map_or_else(|| "max".to_owned(), |it| it.to_string());
            let IoLimits { device: (major, minor), read_bps, write_bps, read_iops, write_iops } = io;
            let (rbps, wbps, riops, wiops) =
                (text(read_bps), text(write_bps), text(read_iops), text(write_iops));
            let line = format!("{major}:{minor} rbps={rbps} wbps={wbps} riops={riops} wiops={wiops}");
            settings.push((Controller::Io, "io.max", line));
        }
        settings
    }
}

/// Why there is no group for a machine.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup v2 at all.
    #[error("no cgroup v2 is mounted here")]
    NotMounted,
    /// There is, and it controls nothing: the controllers belong to cgroup v1, or to nobody.
    #[error("cgroup v2 at {} has none of the controllers {wanted} (boot with systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=all)", mount.display())]
    NoControllers {
        /// Where it is mounted.
        mount: PathBuf,
        /// What was looked for.
        wanted: String,
    },
    /// Nothing there may be written by this user, or is free of other processes.
    #[error("{} and the groups above it may not be written by this user or hold other processes (try systemd-run --scope -p Delegate=yes, with --user unless root)", own.display())]
    NotDelegated {
        /// The supervisor's own group.
        own: PathBuf,
    },
    /// Something failed that should not.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// File or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl CgroupError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// Where machines' groups can be made.
#[derive(Debug)]
pub struct Parent {
    folder: PathBuf,
    /// The supervisor is in it and must leave it first.
    occupied: bool,
    /// What can be limited below it, of what was asked for.
    pub controllers: Vec<Controller>,
}

impl Parent {
    /// Looks for the place, from the group of this process upwards; changes nothing.
    ///
    /// # Errors
    /// [`CgroupError`]: there is none.
    pub fn find(wanted: &[Controller]) -> Result<Self, CgroupError> {
        Self::nearest(wanted, false)
    }

    /// Takes a certain group, which exists.
    ///
    /// # Errors
    /// [`CgroupError`]: it cannot be used.
    pub fn at(folder: &Path, wanted: &[Controller]) -> Result<Self, CgroupError> {
        let (mount, _) = own_group().ok_or(CgroupError::NotMounted)?;
        let found = fs::metadata(folder.join("cgroup.procs")).map_err(CgroupError::io("use", folder))?;
        if !found.is_file() || !folder.starts_with(&mount) {
            return Err(CgroupError::io("use", folder)(io::Error::other("it is no group of cgroup v2")));
        }
        Self::first(&mut std::iter::once(folder), wanted, false)?.ok_or_else(|| {
            let names: Vec<&str> = wanted.iter().map(|controller| controller.name()).collect();
            CgroupError::NoControllers { mount: folder.to_owned(), wanted: names.join(", ") }
        })
    }

    /// Looks for a place where groups can be made, with or without controllers.
    ///
    /// # Errors
    /// [`CgroupError`]: there is none.
    pub fn any() -> Result<Self, CgroupError> {
        Self::nearest(&[], true)
    }

    fn nearest(wanted: &[Controller], any: bool) -> Result<Self, CgroupError> {
        let (mount, own) = own_group().ok_or(CgroupError::NotMounted)?;
        let mut folders = own.ancestors().take_while(|folder| folder.starts_with(&mount));
        let names: Vec<&str> = wanted.iter().map(|controller| controller.name()).collect();
        Self::first(&mut folders, wanted, any)?
            .ok_or(CgroupError::NoControllers { mount, wanted: names.join(", ") })
    }

    /// The first that can be used; `None` when those that could have no controllers.
    fn first(
        folders: &mut dyn Iterator<Item = &Path>,
        wanted: &[Controller],
        any: bool,
    ) -> Result<Option<Self>, CgroupError> {
        let (mut nearest, mut refused) = (None, false);
        for folder in folders {
            nearest.get_or_insert(folder);
            if folder.ends_with(SUPERVISORS) {
                continue;
            }
            let offered = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
            let has = |controller: &&Controller| offered.split_whitespace().any(|it| it == controller.name());
            let controllers: Vec<Controller> = wanted.iter().filter(has).copied().collect();
            if controllers.is_empty() && !any {
                continue;
            }
            let writable = |path: &Path| faccessat(AT_FDCWD, path, AccessFlags::W_OK, AtFlags::AT_EACCESS);
            if writable(folder).is_ok() && writable(&folder.join("cgroup.procs")).is_ok() {
                match occupants(folder) {
                    Occupants::None => {
                        return Ok(Some(Self { folder: folder.to_owned(), occupied: false, controllers }));
                    }
                    Occupants::Supervisor => {
                        return Ok(Some(Self { folder: folder.to_owned(), occupied: true, controllers }));
                    }
                    Occupants::Others => {}
                }
            }
            refused = true;
        }
        match nearest {
            Some(own) if refused => Err(CgroupError::NotDelegated { own: own.to_owned() }),
            _ => Ok(None),
        }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Who keeps a group from having controllers for the groups below it.
enum Occupants {
    None,
    Supervisor,
    Others,
}

fn occupants(folder: &Path) -> Occupants {
    // The hierarchy's root alone has no type; processes there, which may be many, are in nobody's way.
    if !folder.join("cgroup.type").exists() {
        return Occupants::None;
    }
    let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    if procs.trim().is_empty() {
        Occupants::None
    } else if procs.trim() == process::id().to_string() {
        Occupants::Supervisor
    } else {
        Occupants::Others
    }
}

/// The folder of a process's group, as this process sees it.
#[must_use]
pub fn folder_of(pid: i32) -> Option<PathBuf> {
    group_of(&pid.to_string()).map(|(_, folder)| folder)
}

fn own_group() -> Option<(PathBuf, PathBuf)> {
    group_of("self")
}

/// Mount point of cgroup v2 and the folder of a process's group in it.
fn group_of(pid: &str) -> Option<(PathBuf, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (root, mount) = mounts.lines().find_map(|line| {
        // proc_pid_mountinfo(5): the fourth and fifth field are root and mount point; the type follows a dash.
        let (fields, kind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        kind.starts_with("cgroup2 ").then_some((fields.next()?, fields.next()?))
    })?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(root).ok()?;
    let mount = PathBuf::from(mount);
    let own = if below.as_os_str().is_empty() { mount.clone() } else { mount.join(below) };
    Some((mount, own))
}

/// The group of a machine; removed on drop, with those of its processes.
#[derive(Debug)]
pub struct MachineGroup {
    folder: PathBuf,
    _lock: Flock<File>,
    controllers: Vec<Controller>,
}

impl MachineGroup {
    /// Makes the group of a machine, after removing what killed supervisors have left.
    ///
    /// # Errors
    /// [`CgroupError`]; no group is left.
    pub fn create(parent: &Parent, machine: &str) -> Result<Self, CgroupError> {
        remove_dead(&parent.folder);
        if parent.occupied {
            let leaf = parent.folder.join(SUPERVISORS);
            make_folder(&leaf)?;
            write(&leaf.join("cgroup.procs"), &process::id().to_string())?;
        }
        let controllers = enable(&parent.folder, &parent.controllers);
        for number in 0..NAMESAKES {
            let suffix = if number == 0 { String::new() } else { format!(".{number}") };
            let folder = parent.folder.join(format!("{PREFIX}{machine}{suffix}"));
            make_folder(&folder)?;
            let Some(lock) = lock(&folder) else { continue };
            let controllers = enable(&folder, &controllers);
            return Ok(Self { folder, _lock: lock, controllers });
        }
        let exists = io::ErrorKind::AlreadyExists.into();
        Err(CgroupError::Io {
            what: "create another group like",
            path: parent.folder.join(machine),
            source: exists,
        })
    }

    /// What can be limited.
    #[must_use]
    pub fn controllers(&self) -> &[Controller] {
        &self.controllers
    }

    /// Turns on what the limits of another process need; returns what cannot be had.
    pub fn need(&mut self, wanted: &[Controller]) -> Vec<Controller> {
        let lacks = |has: &[Controller]| -> Vec<Controller> {
            wanted.iter().filter(|controller| !has.contains(controller)).copied().collect()
        };
        let offered = self.folder.parent().map(|parent| enable(parent, &lacks(&self.controllers)));
        let enabled = enable(&self.folder, &offered.unwrap_or_default());
        self.controllers.extend(enabled);
        lacks(&self.controllers)
    }

    /// Removes the group of a process that has ended: another of its name begins without its limits.
    pub fn remove_leaf(&self, process: &str) {
        let folder = self.leaf_folder(process);
        for _ in 0..REMOVALS {
            match fs::remove_dir(&folder) {
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                    // A process that was reaped a moment ago may still be counted.
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return,
            }
        }
    }

    /// The group for a process, made or changed to these limits; those whose controller is missing are left out.
    ///
    /// # Errors
    /// [`CgroupError`] when it cannot be made, or a limit be set.
    pub fn leaf(&self, process: &str, limits: &GroupLimits) -> Result<OwnedFd, CgroupError> {
        let folder = self.leaf_folder(process);
        make_folder(&folder)?;
        for (controller, file, text) in limits.settings() {
            let path = folder.join(file);
            // A kernel without swap has no limit of it.
            let exists = file != "memory.swap.max" || path.exists();
            if exists && self.controllers.contains(&controller) {
                write(&path, &text)?;
            }
        }
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&folder);
        Ok(opened.map_err(CgroupError::io("open", &folder))?.into())
    }

    /// A name with a dot might be that of one of the kernel's own files; no name of a process begins with `_`.
    fn leaf_folder(&self, process: &str) -> PathBuf {
        let guard = if process.contains('.') { "_" } else { "" };
        self.folder.join(format!("{guard}{process}"))
    }

    /// How often the kernel has killed this process, or one before it, for want of memory within its limit.
    #[must_use]
    pub fn killed_for_memory(&self, process: &str) -> u64 {
        let events = fs::read_to_string(self.leaf_folder(process).join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for MachineGroup {
    fn drop(&mut self) {
        for _ in 0..REMOVALS {
            if remove(&self.folder) {
                return;
            }
            // A process that was reaped a moment ago may still be counted.
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn make_folder(folder: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::io("create", folder)(error))
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    let written =
        OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(CgroupError::io("write", path))
}

/// Turns controllers on for the groups below a folder; returns those that are.
fn enable(folder: &Path, controllers: &[Controller]) -> Vec<Controller> {
    let file = folder.join("cgroup.subtree_control");
    let on = fs::read_to_string(&file).unwrap_or_default();
    let enabled = |controller: &&Controller| {
        on.split_whitespace().any(|it| it == controller.name())
            || write(&file, &format!("+{}", controller.name())).is_ok()
    };
    controllers.iter().filter(enabled).copied().collect()
}

/// The lock of a group that nobody else has and that still exists.
fn lock(folder: &Path) -> Option<Flock<File>> {
    let lock = Flock::lock(File::open(folder).ok()?, FlockArg::LockExclusiveNonblock).ok()?;
    // Somebody who held it for dead may have removed it between the two.
    let same = fs::metadata(folder).ok()?.ino() == lock.metadata().ok()?.ino();
    same.then_some(lock)
}

/// Removes a machine's group with those of its processes; false while something lives there.
fn remove(folder: &Path) -> bool {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _lives = fs::remove_dir(entry.path());
        }
    }
    match fs::remove_dir(folder) {
        Ok(()) => true,
        Err(error) => error.raw_os_error() != Some(Errno::EBUSY as i32),
    }
}

/// Removes the groups below a folder whose supervisors are gone.
fn remove_dead(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            // Held while it is removed: a new machine of the same name sees that its folder is gone.
            if let Some(_lock) = lock(&entry.path()) {
                let _lives = remove(&entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let io = IoLimits {
            device: (8, 16),
            read_bps: Some(1 << 20),
            write_bps: None,
            read_iops: None,
            write_iops: Some(100),
        };
        let limits = GroupLimits { memory: Some(4096), pids: Some(3), cpu: Some(150), io: Some(io) };
        let settings: Vec<(&str, String)> =
            limits.settings().into_iter().map(|(_, file, text)| (file, text)).collect();
        let expected = [
            ("memory.max", "4096"),
            ("memory.swap.max", "4096"),
            ("pids.max", "3"),
            ("cpu.max", "150000 100000"),
            ("io.max", "8:16 rbps=1048576 wbps=max riops=max wiops=100"),
        ];
        assert_eq!(settings, expected.map(|(file, text)| (file, text.to_owned())));
        assert_eq!(limits.controllers().len(), 4);
        assert!(GroupLimits::default().controllers().is_empty());
    }

    #[test]
    fn groups_of_dead_supervisors_are_removed_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["bulkhead-dead/core", "bulkhead-alive/core", "somebody-elses/x"] {
            fs::create_dir_all(folder.path().join(path)).unwrap();
        }
        let alive = lock(&folder.path().join("bulkhead-alive")).unwrap();
        remove_dead(folder.path());
        let exists = |path: &str| folder.path().join(path).exists();
        assert!(!exists("bulkhead-dead") && exists("bulkhead-alive/core") && exists("somebody-elses/x"));
        drop(alive);
        remove_dead(folder.path());
        assert!(!exists("bulkhead-alive"));
    }

    #[test]
    fn a_group_that_was_removed_after_it_was_opened_is_not_locked() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("bulkhead-x");
        let parent = Parent { folder: folder.path().to_owned(), occupied: false, controllers: Vec::new() };
        let first = MachineGroup::create(&parent, "x").unwrap();
        // The name is taken while it lives, so that a namesake gets another folder.
        let second = MachineGroup::create(&parent, "x").unwrap();
        assert_eq!((first.folder(), second.folder()), (&*group, &*folder.path().join("bulkhead-x.1")));
        first.leaf("core", &GroupLimits::default()).unwrap();
        drop((first, second));
        assert!(!group.exists() && !folder.path().join("bulkhead-x.1").exists());
    }
}
