//! `bulkhead ps`: machines, and how each process of one is confined.
//!
//! The machine names its processes; what the kernel says about them is read here, with the rights of whoever asks. What may
//! not be read is shown as `?`.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use super::api::client::{ClientError, Connection, list};
use super::api::{MachineEntry, ProcessEntry};
use super::cli::PsArgs;
use super::config::Size;
use super::security::Security;

/// The namespaces that a jailed process has for itself (namespaces(7)).
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// A process and what the kernel says about it; `None` where that may not be read.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    process: ProcessEntry,
    /// Host user id.
    user: Option<u32>,
    /// Namespaces that differ from those of `bulkhead ps`.
    namespaces: Option<Vec<&'static str>>,
    /// 0 none, 2 filter; the least of all threads.
    seccomp: Option<u32>,
    /// Number of seccomp filters of the main thread.
    seccomp_filters: Option<u32>,
    /// Effective capabilities in the process's user namespace, hexadecimal.
    capabilities: Option<String>,
    /// Whether executing a program can add privileges.
    no_new_privs: Option<bool>,
    descriptors: Option<usize>,
    threads: Option<usize>,
    #[serde(flatten)]
    memory: Option<Memory>,
}

/// What a process uses, in KiB. Guest RAM, which several processes map, counts apart.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Memory {
    /// Proportional share, without guest RAM.
    pss_kib: u64,
    /// What only this process has and has written, without guest RAM.
    private_dirty_kib: u64,
    /// Guest RAM that is mapped and present.
    guest_ram_kib: u64,
}

impl Memory {
    /// From the text of `/proc/PID/smaps` (proc(5)): for each mapping a line with its address range and name, then its fields.
    fn parse(smaps: &str) -> Self {
        let mut memory = Self::default();
        let mut guest_ram = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
            let kib = second.parse().unwrap_or(0);
            match first {
                "Rss:" if guest_ram => memory.guest_ram_kib += kib,
                "Pss:" if !guest_ram => memory.pss_kib += kib,
                "Private_Dirty:" if !guest_ram => memory.private_dirty_kib += kib,
                range if !range.ends_with(':') => guest_ram = line.contains("/memfd:guest-ram"),
                _ => {}
            }
        }
        memory
    }
}

impl Row {
    fn read(process: ProcessEntry) -> Self {
        let folder = PathBuf::from(format!("/proc/{}", process.pid));
        let status = fs::read_to_string(folder.join("status")).ok();
        let status = status.as_deref();
        // Empty where it may be opened but not read.
        let smaps = fs::read_to_string(folder.join("smaps")).ok().filter(|text| !text.is_empty());
        Self {
            user: status.and_then(|text| field(text, "Uid")).and_then(|text| text.parse().ok()),
            namespaces: own_namespaces(&folder),
            seccomp: least_seccomp(&folder),
            seccomp_filters: status
                .and_then(|text| field(text, "Seccomp_filters"))
                .and_then(|text| text.parse().ok()),
            capabilities: status.and_then(|text| field(text, "CapEff")).map(shorten),
            no_new_privs: status.and_then(|text| field(text, "NoNewPrivs")).map(|text| text == "1"),
            descriptors: fs::read_dir(folder.join("fd")).ok().map(Iterator::count),
            threads: fs::read_dir(folder.join("task")).ok().map(Iterator::count),
            memory: smaps.map(|text| Memory::parse(&text)),
            process,
        }
    }

    fn cells(&self) -> [String; 13] {
        let namespaces = self.namespaces.as_ref().map(|own| match own.len() {
            0 => "shared".to_owned(),
            count if count == NAMESPACES.len() => "own".to_owned(),
            _ => own.join("+"),
        });
        let seccomp = self.seccomp.map(|mode| match mode {
            0 => "none".to_owned(),
            1 => "strict".to_owned(),
            2 => "filter".to_owned(),
            other => other.to_string(),
        });
        [
            self.process.id.clone(),
            self.process.role.name().to_owned(),
            self.process.pid.to_string(),
            or_unknown(self.user),
            or_unknown(namespaces),
            or_unknown(seccomp),
            or_unknown(self.capabilities.as_ref().map(|set| if set == "0" { "none" } else { set })),
            or_unknown(self.no_new_privs.map(|on| if on { "yes" } else { "no" })),
            or_unknown(self.descriptors),
            or_unknown(self.threads),
            or_unknown(self.memory.as_ref().map(|memory| memory.pss_kib)),
            or_unknown(self.memory.as_ref().map(|memory| memory.private_dirty_kib)),
            or_unknown(self.memory.as_ref().map(|memory| memory.guest_ram_kib)),
        ]
    }
}

const TITLES: [&str; 13] = [
    "PROCESS",
    "ROLE",
    "PID",
    "UID",
    "NAMESPACES",
    "SECCOMP",
    "CAPS",
    "NO_NEW_PRIVS",
    "FDS",
    "THREADS",
    "PSS_KIB",
    "DIRTY_KIB",
    "GUEST_RAM_KIB",
];

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| value.to_string())
}

/// The first word after `key:` in a file of `/proc`.
pub fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()
}

/// A hexadecimal number without the zeros before it.
pub fn shorten(hexadecimal: &str) -> String {
    let digits = hexadecimal.trim_start_matches('0');
    if digits.is_empty() { "0".to_owned() } else { digits.to_owned() }
}

/// The namespaces of a process, by its folder in `/proc`, that are not those of this one.
pub fn own_namespaces(folder: &std::path::Path) -> Option<Vec<&'static str>> {
    let mut own = Vec::new();
    for name in NAMESPACES {
        let theirs = fs::read_link(folder.join("ns").join(name)).ok()?;
        if fs::read_link(PathBuf::from("/proc/self/ns").join(name)).ok()? != theirs {
            own.push(name);
        }
    }
    Some(own)
}

/// The weakest seccomp mode of all threads: one thread without a filter is a hole.
fn least_seccomp(folder: &std::path::Path) -> Option<u32> {
    let tasks = fs::read_dir(folder.join("task")).ok()?;
    let modes = tasks.flatten().map(|task| {
        let text = fs::read_to_string(task.path().join("status")).ok()?;
        field(&text, "Seccomp")?.parse::<u32>().ok()
    });
    modes.collect::<Option<Vec<u32>>>()?.into_iter().min()
}

/// A machine with its processes as they are shown.
#[derive(Debug, Serialize)]
struct Machine {
    name: String,
    state: String,
    cpus: u16,
    memory: u64,
    processes: Vec<Row>,
}

impl Machine {
    fn read(entry: MachineEntry) -> Self {
        let MachineEntry { name, state, cpus, memory, processes } = entry;
        Self { name, state, cpus, memory, processes: processes.into_iter().map(Row::read).collect() }
    }
}

/// Columns as wide as their longest cell; numbers are not aligned differently, for a `?` may stand there.
fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize, title: &str| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(title.len())
    };
    let widths: Vec<usize> = titles.iter().enumerate().map(|(column, title)| width(column, title)).collect();
    let mut text = String::new();
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _infallible = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The text of `bulkhead ps`.
pub fn ps(args: &PsArgs) -> Result<String, ClientError> {
    match &args.name {
        Some(name) if args.security => {
            let security = Security::read(Connection::to_name(name)?.machine()?);
            Ok(if args.json { json(&security) } else { security.text() })
        }
        Some(name) => {
            let machine = Machine::read(Connection::to_name(name)?.machine()?);
            if args.json {
                return Ok(json(&machine));
            }
            let Machine { name, state, cpus, memory, processes } = machine;
            let rows: Vec<Vec<String>> = processes.iter().map(|row| row.cells().to_vec()).collect();
            let cpus = format!("{cpus} CPU{}", if cpus == 1 { "" } else { "s" });
            Ok(format!("{name}: {state}, {cpus}, {} memory\n\n{}", Size(memory), table(&TITLES, &rows)))
        }
        None => {
            // A machine may end between being listed and being asked.
            let machines = list()?.into_iter().filter_map(|address| {
                let entry = Connection::to(&address).ok()?.machine().ok()?;
                Some((address.uid, entry))
            });
            let machines: Vec<(u32, MachineEntry)> = machines.collect();
            if args.json {
                return Ok(json(
                    &machines.into_iter().map(|(_, entry)| Machine::read(entry)).collect::<Vec<_>>(),
                ));
            }
            let rows: Vec<Vec<String>> = machines.iter().map(|(uid, entry)| summary(*uid, entry)).collect();
            Ok(table(&["NAME", "UID", "STATE", "CPUS", "MEMORY", "PROCESSES", "PID"], &rows))
        }
    }
}

fn summary(uid: u32, entry: &MachineEntry) -> Vec<String> {
    vec![
        entry.name.clone(),
        uid.to_string(),
        entry.state.clone(),
        entry.cpus.to_string(),
        Size(entry.memory).to_string(),
        entry.processes.len().to_string(),
        entry.processes.first().map_or_else(String::new, |process| process.pid.to_string()),
    ]
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::process::Role;

    #[test]
    fn reads_this_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let row = Row::read(ProcessEntry { id: "x".into(), role: Role::Core, pid });
        assert_eq!(row.user, Some(nix::unistd::getuid().as_raw()));
        assert_eq!(row.namespaces, Some(vec![]));
        assert!(row.descriptors.unwrap() >= 3);
        assert!(row.threads.unwrap() >= 1);
        assert!(row.memory.unwrap().pss_kib > 0);
        assert!(row.seccomp.is_some());
    }

    #[test]
    fn what_cannot_be_read_is_a_question_mark() {
        let row = Row::read(ProcessEntry { id: "x".into(), role: Role::Core, pid: -1 });
        assert!(row.cells().iter().skip(3).all(|cell| cell == "?"), "{:?}", row.cells());
    }

    #[test]
    fn fields_of_proc() {
        assert_eq!(field("Name:\tx\nCapEff:\t0000000000000000\n", "CapEff"), Some("0000000000000000"));
        assert_eq!(field("Pss_Dirty:  5 kB\nPss:   12 kB\n", "Pss"), Some("12"));
        assert_eq!(shorten("0000000000000000"), "0");
        assert_eq!(shorten("000001ffffffffff"), "1ffffffffff");
    }

    #[test]
    fn guest_ram_counts_apart() {
        let smaps = "7f00-7f10 rw-s 0 0:1 5 /memfd:guest-ram (deleted)\nRss: 100 kB\nPss: 50 kB\nPrivate_Dirty: 40 kB\n\
                     5500-5510 rw-p 0 0:1 5 /bin/x\nRss: 9 kB\nPss: 7 kB\nPrivate_Dirty: 3 kB\n";
        let expected = Memory { pss_kib: 7, private_dirty_kib: 3, guest_ram_kib: 100 };
        assert_eq!(Memory::parse(smaps), expected);
    }

    #[test]
    fn columns_are_aligned() {
        let text = table(&["A", "LONG"], &[vec!["wide".into(), "x".into()]]);
        assert_eq!(text, "A     LONG\nwide  x\n");
    }
}
