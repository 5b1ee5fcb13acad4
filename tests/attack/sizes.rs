//! How much each policy allows and each process of a real machine holds, for docs/security.md.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};

use bulkhead_ipc::jail::policies;
use bulkhead_tests::processes::descendants;
use serde_json::Value;

use crate::hostile::DEVICES;
use crate::machine::Bench;

/// Firmware of one page that halts at the reset vector.
pub fn halting_firmware() -> Vec<u8> {
    let mut image = vec![0_u8; 0x1000];
    // hlt; jmp to it
    for (to, from) in image.iter_mut().skip(0xFF0).zip([0xF4, 0xEB, 0xFD]) {
        *to = from;
    }
    image
}

/// Both tables.
pub fn tables(bench: &Bench) -> Result<String, String> {
    let mut text = String::from(
        "| policy | system calls | of them with limited arguments | BPF instructions |\n| --- | --- | --- | --- |\n",
    );
    for policy in policies() {
        let limited = limited(policy.file)?;
        let (allowed, instructions) = (policy.allowed, policy.instructions);
        let _ = writeln!(text, "| `{}` | {allowed} | {limited} | {instructions} |", policy.file);
    }
    text.push_str("\n| process | descriptors | most it may have |\n| --- | --- | --- |\n");
    for (process, open, most) in descriptors(bench)? {
        let _ = writeln!(text, "| {process} | {open} | {most} |");
    }
    Ok(text)
}

/// Number of calls that the file and the common one allow with limited arguments alone.
fn limited(file: &str) -> Result<usize, String> {
    let mut calls = BTreeMap::new();
    let mut files = vec![file.to_owned(), "seccomp-policies/common.json".to_owned()];
    // What a file includes is its own as well; nothing that is included includes more.
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        next += 1;
        let path = format!("{}/../{file}", env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(path).map_err(|error| format!("{file}: {error}"))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| format!("{file}: {error}"))?;
        let entry = json.as_object().and_then(|map| map.values().next()).cloned().unwrap_or_default();
        let others = entry["includes"].as_array().into_iter().flatten().filter_map(Value::as_str);
        files.extend(others.map(|other| format!("seccomp-policies/{other}.json")));
        for rule in entry["filter"].as_array().into_iter().flatten() {
            calls.insert(rule["syscall"].to_string(), rule.get("args").is_some());
        }
    }
    Ok(calls.values().filter(|limited| **limited).count())
}

/// Process, its open descriptors, and how many it may have.
type Row = (String, usize, String);

/// Open descriptors and `RLIMIT_NOFILE` of each process, once all are ready.
fn descriptors(bench: &Bench) -> Result<Vec<Row>, String> {
    let mut child = bench.real_machine().spawn().map_err(|error| error.to_string())?;
    let messages = child.stderr.take().ok_or("no messages")?;
    let mut lines = BufReader::new(messages).lines();
    let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("processes are ready"));
    let mut found = Vec::new();
    for process in descendants(child.id()).into_iter().filter(|_| ready) {
        let title = process.title();
        let Some((_, name)) = title.split_once('[') else { continue };
        let name = name.split(']').next().unwrap_or_default();
        let name = name.split_once('/').map_or("core", |(_, device)| device).to_owned();
        let limits = fs::read_to_string(process.file("limits")).unwrap_or_default();
        let most = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let most = most.and_then(|rest| rest.split_whitespace().next()).unwrap_or("?").to_owned();
        // Of a shared directory it is the host's own limit, where that is lower.
        let most = if name == "fs0" { "as the host allows, up to 524288".to_owned() } else { most };
        found.push((name, process.descriptors()?.len(), most));
    }
    let _gone = child.kill();
    let _reaped = child.wait();
    // The core, and all but the relay, whose back end the real core would wait for.
    if found.len() == DEVICES.len() {
        Ok(found)
    } else {
        Err(format!("{} processes: {found:?}", found.len()))
    }
}
