//! Compiles `seccomp-policies/*.json` into BPF programs that `jail::policy` embeds, and the table of system call names; lists
//! the files with their text for the tests.
//!
//! A policy is one file in seccompiler's format with a single entry, named like the file. `common.json` holds the rules that
//! every policy shares; it is merged into each. A policy may include others (`includes`). The build fails, with file and rule,
//! when a rule has no reason (`comment`), when a system call is both allowed as a whole and with restricted arguments, when an
//! argument that chooses what a call does is not restricted (`build/selectors.rs`), or when an action is not the expected one.
//!
//! One key is ours: `unseen` says why no workload of the tests shows the rule's use; `unused-rules` reads it.

#[path = "build/group.rs"]
mod group;
#[path = "build/selectors.rs"]
mod selectors;
#[path = "build/shorten.rs"]
mod shorten;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Map, Value, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The file whose rules all others share.
const COMMON: &str = "common";

fn main() -> Outcome<()> {
    let folder = Path::new("../seccomp-policies");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed=src/jail/syscalls-x86_64.txt");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/group.rs");
    println!("cargo::rerun-if-changed=build/selectors.rs");
    println!("cargo::rerun-if-changed=build/shorten.rs");
    let target = env::var("OUT_DIR")?;
    let common = rules(folder, COMMON)?;
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            names.insert(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    fs::write(Path::new(&target).join("policy_files.rs"), policy_files(folder, &names)?)?;
    names.remove(COMMON);
    let mut source = String::new();
    for name in names {
        let mut merged: Vec<Value> = common.clone();
        // A rule that several of the included policies have is needed once.
        for rule in included(folder, &name)?.into_iter().filter(|rule| !is_in(rule, &common)) {
            if !is_in(&rule, &merged) {
                merged.push(rule);
            }
        }
        merged.extend(rules(folder, &name)?);
        let allowed = check_merged(&name, &merged)?;
        let program = compile(&name, merged)?;
        write_policy(&mut source, &name, allowed, &program)?;
    }
    fs::write(Path::new(&target).join("policies.rs"), source)?;
    fs::write(Path::new(&target).join("syscalls.rs"), syscalls()?)?;
    Ok(())
}

/// An array of every file's name, as policies state it, and text: a test that runs as another user cannot read the source tree.
fn policy_files(folder: &Path, names: &BTreeSet<String>) -> Outcome<String> {
    let folder = folder.canonicalize()?;
    let mut source = String::from("[\n");
    for name in names {
        let file = folder.join(format!("{name}.json"));
        writeln!(source, "    (\"seccomp-policies/{name}.json\", include_str!({file:?})),")?;
    }
    source.push_str("]\n");
    Ok(source)
}

/// The rules of the policies that a policy includes: those that its process will have later.
fn included(folder: &Path, name: &str) -> Outcome<Vec<Value>> {
    let policy: Value = serde_json::from_str(&fs::read_to_string(folder.join(format!("{name}.json")))?)?;
    let names = policy.pointer(&format!("/{name}/includes")).and_then(Value::as_array);
    let mut all = Vec::new();
    for other in names.into_iter().flatten().filter_map(Value::as_str) {
        all.extend(rules(folder, other)?);
    }
    Ok(all)
}

/// Whether a rule for the same call with the same arguments is in the list.
fn is_in(rule: &Value, list: &[Value]) -> bool {
    list.iter()
        .any(|other| rule.get("syscall") == other.get("syscall") && rule.get("args") == other.get("args"))
}

/// The rules of one file, each with a reason.
fn rules(folder: &Path, name: &str) -> Outcome<Vec<Value>> {
    let file = folder.join(format!("{name}.json"));
    let shown = format!("seccomp-policies/{name}.json");
    let text = fs::read_to_string(&file).map_err(|error| format!("{shown}: {error}"))?;
    let policy: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| format!("{shown}: {error}"))?;
    let filter = match policy.iter().next() {
        Some((key, filter)) if policy.len() == 1 && key == name => filter,
        _ => return Err(format!("{shown}: must have one entry, named {name:?}").into()),
    };
    for (key, action) in [("mismatch_action", "kill_process"), ("match_action", "allow")] {
        if filter.get(key).and_then(Value::as_str) != Some(action) {
            return Err(format!("{shown}: {key} must be {action:?}").into());
        }
    }
    let rules =
        filter.get("filter").and_then(Value::as_array).ok_or(format!("{shown}: no list \"filter\""))?;
    for (number, rule) in rules.iter().enumerate() {
        let syscall = rule.get("syscall").and_then(Value::as_str).unwrap_or("?");
        let reason = rule.get("comment").and_then(Value::as_str).unwrap_or("");
        if reason.trim().len() < 8 {
            return Err(format!("{shown}: rule {number} ({syscall}) has no reason in \"comment\"").into());
        }
        if let Some(fault) = selectors::fault(name, rule) {
            return Err(format!("{shown}: rule {number} ({syscall}): {fault}").into());
        }
    }
    let mut rules = rules.clone();
    for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
        rule.remove("unseen");
    }
    Ok(rules)
}

/// Number of different system calls; refuses rules that make each other pointless.
fn check_merged(name: &str, rules: &[Value]) -> Outcome<usize> {
    let mut seen: BTreeMap<&str, Vec<Option<String>>> = BTreeMap::new();
    for rule in rules {
        let syscall = rule.get("syscall").and_then(Value::as_str).unwrap_or("?");
        let arguments = rule.get("args").map(|arguments| {
            let conditions = arguments.as_array().map(Vec::as_slice).unwrap_or_default();
            let bare = conditions.iter().map(|condition| {
                let mut condition = condition.clone();
                condition.as_object_mut().and_then(|it| it.remove("comment"));
                condition.to_string()
            });
            bare.collect::<Vec<_>>().join(" ")
        });
        let others = seen.entry(syscall).or_default();
        let fault = if others.contains(&arguments) {
            "stands twice (here or in common.json)"
        } else if others.contains(&None) || (arguments.is_none() && !others.is_empty()) {
            "is allowed as a whole and with restricted arguments"
        } else {
            others.push(arguments);
            continue;
        };
        return Err(format!("seccomp-policies/{name}.json: {syscall} {fault}").into());
    }
    Ok(seen.len())
}

fn compile(name: &str, rules: Vec<Value>) -> Outcome<BpfProgram> {
    let policy =
        json!({ name: { "mismatch_action": "kill_process", "match_action": "allow", "filter": rules } });
    seccompiler::compile_from_json(policy.to_string().as_bytes(), TargetArch::x86_64)
        .map_err(|error| format!("seccomp-policies/{name}.json: {error}"))?
        .remove(name)
        .ok_or_else(|| format!("seccomp-policies/{name}.json: nothing compiled").into())
        .and_then(|program: BpfProgram| {
            shorten::shorten(&program)
                .and_then(group::group)
                .map_err(|error| format!("seccomp-policies/{name}.json: {error}").into())
        })
}

/// A constant: program, file, number of allowed system calls.
fn write_policy(source: &mut String, name: &str, allowed: usize, program: &BpfProgram) -> Outcome<()> {
    let constant = name.to_uppercase().replace('-', "_");
    writeln!(source, "const {constant}: (&[Instruction], &str, usize) = (&[")?;
    for instruction in program {
        writeln!(
            source,
            "    ({}, {}, {}, {}),",
            instruction.code, instruction.jt, instruction.jf, instruction.k
        )?;
    }
    writeln!(source, "], \"seccomp-policies/{name}.json\", {allowed});")?;
    Ok(())
}

/// Names in one string and their places in it: a table of references would need relocations in every process.
fn syscalls() -> Outcome<String> {
    let (mut names, mut table) = (String::new(), String::new());
    for line in fs::read_to_string("src/jail/syscalls-x86_64.txt")?.lines() {
        if line.starts_with('#') {
            continue;
        }
        let (number, name) = line.split_once(' ').ok_or("syscalls-x86_64.txt: number and name expected")?;
        write!(table, "({number}, {}, {}), ", names.len(), name.len())?;
        names.push_str(name);
    }
    let mut source =
        String::from("/// Number, start and length of its name in `NAMES`; ascending numbers.\n");
    writeln!(source, "const SYSCALLS: &[(u16, u16, u8)] = &[{table}];")?;
    writeln!(source, "const NAMES: &str = {names:?};")?;
    Ok(source)
}
