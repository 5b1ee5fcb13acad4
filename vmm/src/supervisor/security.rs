//! `bulkhead ps --security NAME`: each layer of the jail, for each process and thread, as the kernel tells it and not as it was
//! meant to be. What may not be read is shown as `?`; what the kernel shows nobody is called not visible.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_ipc::jail::{cgroup, landlock_version};
use serde::Serialize;

use super::api::{MachineEntry, ProcessEntry};
use super::ps::{field, own_namespaces, shorten};

/// `status` names the five sets of capabilities so (proc_pid_status(5)).
const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
/// Limits that the jail sets, as `limits` names them (proc_pid_limits(5)), and in short.
const LIMITS: [(&str, &str); 7] = [
    ("Max address space", "as"),
    ("Max data size", "data"),
    ("Max open files", "nofile"),
    ("Max processes", "nproc"),
    ("Max file size", "fsize"),
    ("Max core file size", "core"),
    ("Max locked memory", "memlock"),
];
/// Files of a cgroup that are shown.
const GROUP_FILES: [&str; 6] =
    ["memory.max", "memory.current", "pids.max", "pids.current", "cpu.max", "io.max"];

/// A thread.
#[derive(Debug, Serialize)]
struct Thread {
    tid: i32,
    name: String,
    /// 0 none, 2 filter.
    seccomp: Option<u32>,
    seccomp_filters: Option<u32>,
    no_new_privs: Option<bool>,
    /// Capabilities in any of the five sets, hexadecimal.
    capabilities: Option<String>,
}

/// A mount that a process sees.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Mount {
    at: String,
    options: String,
}

/// A process. `None` where something may not be read.
#[derive(Debug, Serialize)]
struct Process {
    #[serde(flatten)]
    process: ProcessEntry,
    uid: Option<u32>,
    gid: Option<u32>,
    /// Namespaces that differ from those of `bulkhead ps`.
    own_namespaces: Option<Vec<&'static str>>,
    /// First inside, first outside, count.
    uid_map: Option<String>,
    gid_map: Option<String>,
    /// Entries in its root folder.
    root_entries: Option<usize>,
    mounts: Option<Vec<Mount>>,
    descriptors: Option<usize>,
    /// Soft limits by short name.
    limits: Option<Vec<(&'static str, String)>>,
    /// Its cgroup v2, and the values of its files.
    cgroup: Option<PathBuf>,
    cgroup_values: Vec<(&'static str, String)>,
    /// What other security modules (AppArmor, SELinux) call it.
    label: Option<String>,
    /// Landlock is not visible from outside of a process: nothing in /proc tells it.
    landlock: &'static str,
    threads: Option<Vec<Thread>>,
}

impl Process {
    fn read(process: ProcessEntry) -> Self {
        let folder = PathBuf::from(format!("/proc/{}", process.pid));
        let text = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let status = text("status").unwrap_or_default();
        let number = |key| field(&status, key).and_then(|word| word.parse().ok());
        let one_line = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let group = cgroup::folder_of(process.pid);
        let values = GROUP_FILES.into_iter().filter_map(|file| {
            let value = fs::read_to_string(group.as_ref()?.join(file)).ok()?;
            Some((file, one_line(value)))
        });
        Self {
            uid: number("Uid"),
            gid: number("Gid"),
            own_namespaces: own_namespaces(&folder),
            uid_map: text("uid_map").map(one_line),
            gid_map: text("gid_map").map(one_line),
            root_entries: fs::read_dir(folder.join("root/")).ok().map(Iterator::count),
            mounts: text("mountinfo").map(|text| mounts(&text)),
            descriptors: fs::read_dir(folder.join("fd")).ok().map(Iterator::count),
            limits: text("limits").map(|text| limits(&text)),
            cgroup_values: values.collect(),
            cgroup: group,
            label: text("attr/current").map(|label| label.trim_end_matches(['\0', '\n']).to_owned()),
            landlock: "not visible",
            threads: threads(&folder),
            process,
        }
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let namespaces = self.own_namespaces.as_ref().map(|own| match own.as_slice() {
            [] => "shared with bulkhead ps".to_owned(),
            own => format!("own {}", own.join(" ")),
        });
        let root = self.root_entries.map(|count| match count {
            0 => "empty".to_owned(),
            count => format!("{count} entries"),
        });
        let mounts = self.mounts.as_ref().map(|mounts| match mounts.as_slice() {
            [Mount { at, options }] => format!("one mount: {at} {options}"),
            mounts => format!("{} mounts", mounts.len()),
        });
        let limits = self.limits.as_ref().map(|limits| pairs(limits));
        let kernel = landlock_version().map_or_else(
            |_| "this kernel has none".to_owned(),
            |version| format!("not visible from outside; this kernel has version {version}"),
        );
        let group = self.cgroup.as_ref().map(|path| path.display().to_string());
        let values =
            if self.cgroup_values.is_empty() { "no limits".to_owned() } else { pairs(&self.cgroup_values) };
        vec![
            ("user", format!("{} group {}", or_unknown(self.uid), or_unknown(self.gid))),
            ("user map", format!("{}; groups {}", known(self.uid_map.clone()), known(self.gid_map.clone()))),
            ("namespaces", known(namespaces)),
            ("root", format!("{}; {}", known(root), known(mounts))),
            ("descriptors", or_unknown(self.descriptors)),
            ("limits", known(limits)),
            ("cgroup", format!("{}: {values}", known(group))),
            ("landlock", kernel),
            ("label", self.label.clone().unwrap_or_else(|| "none".to_owned())),
        ]
    }

    fn text(&self) -> String {
        let ProcessEntry { id, role, pid } = &self.process;
        let mut text = format!("{id} ({}, process {pid})\n", role.name());
        for (name, value) in self.lines() {
            let _infallible = writeln!(text, "  {name:<13}{value}");
        }
        for thread in self.threads.iter().flatten() {
            let seccomp = match thread.seccomp {
                None => "?".to_owned(),
                Some(0) => "none".to_owned(),
                Some(1) => "strict".to_owned(),
                Some(_) => format!("{} filter", or_unknown(thread.seccomp_filters)),
            };
            let capabilities = thread.capabilities.as_ref().map(|set| if set == "0" { "none" } else { set });
            let privileges = thread.no_new_privs.map(|on| if on { "yes" } else { "no" });
            let _infallible = writeln!(
                text,
                "  thread {:<8}{:<16}seccomp {seccomp}, capabilities {}, no_new_privs {}",
                thread.tid,
                thread.name,
                or_unknown(capabilities),
                or_unknown(privileges)
            );
        }
        text
    }
}

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| value.to_string())
}

fn known(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "?".to_owned())
}

fn pairs(values: &[(&'static str, String)]) -> String {
    values.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

/// proc_pid_mountinfo(5): the fifth field is the mount point, the sixth its options.
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        Some(Mount { at: fields.next()?.to_owned(), options: fields.next()?.to_owned() })
    };
    text.lines().filter_map(mount).collect()
}

fn limits(text: &str) -> Vec<(&'static str, String)> {
    let limit = |(name, short): (&str, &'static str)| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some((short, rest.split_whitespace().next()?.to_owned()))
    };
    LIMITS.into_iter().filter_map(limit).collect()
}

fn threads(folder: &Path) -> Option<Vec<Thread>> {
    let tasks = fs::read_dir(folder.join("task")).ok()?.flatten();
    let mut threads: Vec<Thread> = tasks
        .filter_map(|task| {
            let tid = task.file_name().to_string_lossy().parse().ok()?;
            // One that has just ended is none.
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let number = |key| field(&status, key).and_then(|word| word.parse().ok());
            let sets: Option<Vec<&str>> = CAPABILITIES.iter().map(|set| field(&status, set)).collect();
            let union = sets.and_then(|sets| {
                sets.into_iter().try_fold(0, |all, set| Some(all | u64::from_str_radix(set, 16).ok()?))
            });
            Some(Thread {
                tid,
                name: fs::read_to_string(task.path().join("comm")).unwrap_or_default().trim().to_owned(),
                seccomp: number("Seccomp"),
                seccomp_filters: number("Seccomp_filters"),
                no_new_privs: field(&status, "NoNewPrivs").map(|word| word == "1"),
                capabilities: union.map(|set| shorten(&format!("{set:x}"))),
            })
        })
        .collect();
    threads.sort_by_key(|thread| thread.tid);
    Some(threads)
}

/// A machine with each layer of each process.
#[derive(Debug, Serialize)]
pub struct Security {
    name: String,
    /// Version of the kernel's Landlock; 0 where it has none.
    kernel_landlock: i64,
    processes: Vec<Process>,
}

impl Security {
    /// Asks the kernel about each process of a machine.
    pub fn read(entry: MachineEntry) -> Self {
        let processes = entry.processes.into_iter().map(Process::read).collect();
        Self { name: entry.name, kernel_landlock: landlock_version().unwrap_or(0), processes }
    }

    /// For people.
    pub fn text(&self) -> String {
        let processes: Vec<String> = self.processes.iter().map(Process::text).collect();
        format!("{}\n\n{}", self.name, processes.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::process::Role;

    #[test]
    fn reads_this_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = Process::read(ProcessEntry { id: "x".into(), role: Role::Core, pid });
        assert_eq!(process.uid, Some(nix::unistd::getuid().as_raw()));
        assert_eq!(process.own_namespaces, Some(vec![]));
        assert!(process.root_entries.unwrap() > 0 && process.mounts.as_ref().unwrap().len() > 1);
        assert_eq!(process.limits.as_ref().unwrap().len(), LIMITS.len());
        let threads = process.threads.as_ref().unwrap();
        assert!(
            threads.iter().any(|thread| thread.tid == pid) && threads.iter().all(|it| it.seccomp.is_some())
        );
        let text = process.text();
        assert!(text.contains("shared with bulkhead ps") && text.contains("landlock"), "{text}");
    }

    #[test]
    fn what_cannot_be_read_is_a_question_mark() {
        let process = Process::read(ProcessEntry { id: "x".into(), role: Role::Core, pid: -1 });
        for (name, value) in process.lines() {
            assert!(value.contains('?') || ["landlock", "label"].contains(&name), "{name}: {value}");
        }
    }

    #[test]
    fn a_jail_has_one_mount() {
        let text = "600 500 0:77 / / ro,nosuid,nodev,noexec,relatime - tmpfs none ro,size=4k\n";
        let expected = Mount { at: "/".into(), options: "ro,nosuid,nodev,noexec,relatime".into() };
        assert_eq!(mounts(text), [expected]);
    }
}
