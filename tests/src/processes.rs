//! What the kernel says about the processes of a machine, read from `/proc` and not from the programs under test.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::harness::Outcome;

/// Names of the shared memory objects that hold guest RAM: ours, and QEMU's.
const RAM: [&str; 2] = ["/memfd:guest-ram", "/memfd:memory-backend-memfd"];

/// A process, told apart from a later one with the same number by its start time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number in our namespace.
    pub pid: u32,
    parent: u32,
    start: u64,
    state: char,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may contain anything; fields count from behind it (proc_pid_stat(5)).
        let fields: Vec<_> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        Some(Self {
            pid,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
        })
    }

    /// Whether it still exists; a zombie does not count.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.start == self.start && !matches!(now.state, 'Z' | 'X'))
    }

    /// Its command line as `ps` shows it.
    #[must_use]
    pub fn title(&self) -> String {
        let bytes = fs::read(self.file("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\0', " ").trim_end().to_owned()
    }

    /// A file of its folder in `/proc`.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// Its threads.
    pub fn threads(&self) -> Outcome<Vec<Thread>> {
        let folder = self.file("task");
        let mut threads = Vec::new();
        for entry in
            fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?.flatten()
        {
            threads.push(Thread { path: entry.path() });
        }
        Ok(threads)
    }

    /// What each open descriptor refers to.
    pub fn descriptors(&self) -> Outcome<BTreeMap<u32, String>> {
        let folder = self.file("fd");
        let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let describe = |entry: fs::DirEntry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?.display().to_string()))
        };
        Ok(entries.flatten().filter_map(describe).collect())
    }

    /// Identity of one of its namespaces, such as `net:[4026531840]`.
    pub fn namespace(&self, kind: &str) -> Outcome<String> {
        let path = self.file("ns").join(kind);
        let link = fs::read_link(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(link.display().to_string())
    }

    /// Proportional and private dirty memory in KiB (`/proc/PID/smaps_rollup`), without guest RAM,
    /// which is a memfd of its own and counts apart.
    pub fn memory_without_ram(&self) -> Outcome<(u64, u64)> {
        let path = self.file("smaps");
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let (mut proportional, mut dirty, mut counted) = (0, 0, true);
        for line in text.lines() {
            let first = line.split_ascii_whitespace().next().unwrap_or_default();
            match first {
                "Pss:" if counted => proportional += kib(line),
                "Private_Dirty:" if counted => dirty += kib(line),
                _ if !first.ends_with(':') => counted = !RAM.iter().any(|name| line.contains(name)),
                _ => {}
            }
        }
        Ok((proportional, dirty))
    }

    /// KiB of guest RAM that it has mapped by huge pages.
    pub fn ram_on_huge_pages(&self) -> Outcome<u64> {
        let path = self.file("smaps");
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let (mut sum, mut of_ram) = (0, false);
        for line in text.lines() {
            let first = line.split_ascii_whitespace().next().unwrap_or_default();
            match first {
                "ShmemPmdMapped:" if of_ram => sum += kib(line),
                _ if !first.ends_with(':') => of_ram = RAM.iter().any(|name| line.contains(name)),
                _ => {}
            }
        }
        Ok(sum)
    }
}

fn kib(line: &str) -> u64 {
    line.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// A thread, by its folder in `/proc`.
#[derive(Debug, Clone)]
pub struct Thread {
    path: PathBuf,
}

impl Thread {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        fs::read_to_string(self.path.join("comm")).unwrap_or_default().trim_end().to_owned()
    }

    /// A field of its `status`, such as `Seccomp` (`proc_pid_status(5)`).
    pub fn status(&self, field: &str) -> Outcome<String> {
        let path = self.path.join("status");
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(value.ok_or(format!("{}: no field {field}", path.display()))?.trim().to_owned())
    }

    /// How often it was put on a CPU: what does not run makes no system calls.
    pub fn times_scheduled(&self) -> Outcome<u64> {
        let path = self.path.join("schedstat");
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        text.split_ascii_whitespace()
            .nth(2)
            .and_then(|word| word.parse().ok())
            .ok_or(format!("{}: '{text}'", path.display()))
    }
}

/// All processes that descend from `pid`, itself first.
#[must_use]
pub fn descendants(pid: u32) -> Vec<Process> {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all: Vec<_> = numbers
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Process::read)
        .filter(|process| !matches!(process.state, 'Z' | 'X'))
        .collect();
    let mut found: Vec<Process> = all.iter().filter(|process| process.pid == pid).cloned().collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|process| process.pid) {
        found.extend(all.iter().filter(|process| process.parent == parent).cloned());
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_child_and_notices_its_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let family = descendants(std::process::id());
        let found = family.iter().find(|process| process.pid == child.id()).cloned().unwrap();
        // Its arguments appear a moment after it does.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while found.title() != "sleep 60" && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        assert!(found.is_alive() && found.title() == "sleep 60", "{}", found.title());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!found.is_alive());
    }

    #[test]
    fn reads_threads_and_descriptors_of_itself() {
        let this = Process::read(std::process::id()).unwrap();
        let thread = this.threads().unwrap().pop().unwrap();
        assert_eq!(thread.status("Seccomp").unwrap(), "0");
        assert!(this.descriptors().unwrap().contains_key(&2));
        assert!(this.memory_without_ram().unwrap().0 > 0);
    }
}
