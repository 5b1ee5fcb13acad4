//! Sizes of programs, system calls that each policy allows, lines of code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_tests::harness::{Outcome, Places};
use serde_json::Value;

use crate::table;

pub fn run(places: &Places) -> Outcome {
    let root = places.programs.ancestors().nth(3).ok_or("no root of the repository")?;
    let mut rows = Vec::new();
    for name in ["bulkhead", "bulkhead-vmm", "bulkhead-device"] {
        let size =
            fs::metadata(places.programs.join(name)).map_err(|error| format!("{name}: {error}"))?.len();
        rows.push(vec![name.into(), format!("{}", size >> 10)]);
    }
    table::print("Programs (static, stripped)", &["program", "KiB"], &rows);
    policies(&root.join("seccomp-policies"))?;

    let rows: Vec<_> = ["ipc", "vmm", "devices", "tests"]
        .iter()
        .map(|package| {
            let (mut code, mut tests) = (0, 0);
            for file in rust_files(&root.join(package).join("src")) {
                let text = fs::read_to_string(&file).unwrap_or_default();
                let whole_test =
                    file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests");
                let (program, test) = text.split_once("#[cfg(test)]\nmod tests {").unwrap_or((&text, ""));
                if whole_test && *package != "tests" {
                    tests += lines(&text);
                } else {
                    code += lines(program);
                    tests += lines(test);
                }
            }
            vec![(*package).to_owned(), code.to_string(), tests.to_string()]
        })
        .collect();
    table::print("Lines of code (no blank lines, no comments)", &["crate", "code", "tests beside it"], &rows);
    Ok(())
}

/// The policies hold `{NAME: {"filter": [{"syscall": …}, …]}}`; what `common.json` allows, each of them allows.
fn policies(folder: &Path) -> Outcome {
    let read = |path: &Path| -> Outcome<BTreeSet<String>> {
        let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut calls = BTreeSet::new();
        collect(&value, &mut calls);
        Ok(calls)
    };
    let common = read(&folder.join("common.json"))?;
    let mut rows = Vec::new();
    let mut files: Vec<_> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "json")) {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if name != "common" {
            let calls = read(file)?;
            rows.push(vec![name, calls.union(&common).count().to_string()]);
        }
    }
    table::print("System calls that each policy allows", &["policy", "system calls"], &rows);
    Ok(())
}

fn collect(value: &Value, calls: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(call)) = map.get("syscall") {
                calls.insert(call.clone());
            }
            map.values().for_each(|value| collect(value, calls));
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, calls)),
        _ => {}
    }
}

fn lines(text: &str) -> usize {
    text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
