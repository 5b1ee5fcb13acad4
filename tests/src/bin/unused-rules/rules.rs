//! The policies' JSON files, and how often each rule was needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bulkhead_ipc::jail::{PolicyName, syscall_name};
use bulkhead_tests::harness::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Different values of one argument that are worth showing.
const SHOWN: usize = 12;

/// What [`Policies::write_record`] keeps.
#[derive(Serialize, Deserialize)]
struct Record {
    threads: Vec<(PolicyName, u64)>,
    /// By file, system call and conditions.
    rules: Vec<(String, Vec<(PolicyName, u64)>)>,
}

/// One rule of one file.
struct Rule {
    /// File, system call and conditions.
    key: String,
    syscall: String,
    conditions: Vec<Condition>,
    /// Why no workload shows it.
    unseen: Option<String>,
    comment: String,
    /// How often each policy needed it.
    used: BTreeMap<PolicyName, u64>,
}

/// A condition as seccompiler evaluates it.
struct Condition {
    index: usize,
    /// 32 bits of the argument count, or all 64.
    dword: bool,
    operator: String,
    mask: u64,
    value: u64,
}

impl Condition {
    fn read(value: &Value) -> Outcome<Self> {
        let number = |key: &str| value[key].as_u64().ok_or(format!("no number {key} in {value}"));
        let (operator, mask) = match &value["op"] {
            Value::String(word) => (word.clone(), u64::MAX),
            Value::Object(masked) => {
                ("eq".to_owned(), masked["masked_eq"].as_u64().ok_or(format!("no mask in {value}"))?)
            }
            other => return Err(format!("operator {other} is not known")),
        };
        let index = usize::try_from(number("index")?).map_err(|error| error.to_string())?;
        Ok(Self { index, dword: value["type"] == "dword", operator, mask, value: number("val")? })
    }

    fn holds(&self, arguments: &[u64; 6]) -> bool {
        let width = if self.dword { u64::from(u32::MAX) } else { u64::MAX };
        let found = arguments.get(self.index).copied().unwrap_or(0) & width & self.mask;
        let wanted = self.value & self.mask;
        match self.operator.as_str() {
            "eq" => found == wanted,
            "ne" => found != wanted,
            "ge" => found >= wanted,
            "gt" => found > wanted,
            "le" => found <= wanted,
            "lt" => found < wanted,
            _ => false,
        }
    }
}

impl Rule {
    fn read(file: &str, value: &Value) -> Outcome<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let conditions = value["args"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Self {
            key: format!("{file} {} {}", value["syscall"], value["args"]),
            syscall: text("syscall").ok_or("a rule without a system call")?,
            conditions: conditions.iter().map(Condition::read).collect::<Outcome<_>>()?,
            unseen: text("unseen"),
            comment: text("comment").unwrap_or_default(),
            used: BTreeMap::new(),
        })
    }

    fn allows(&self, syscall: &str, arguments: &[u64; 6]) -> bool {
        self.syscall == syscall && self.conditions.iter().all(|condition| condition.holds(arguments))
    }

    fn times(&self) -> u64 {
        self.used.values().sum()
    }
}

/// Values that one argument had.
#[derive(Default)]
struct Seen {
    times: u64,
    values: [BTreeSet<u64>; 6],
}

/// All files, and what was seen.
pub struct Policies {
    /// File name without folder; `common.json` is one of them.
    files: BTreeMap<String, Vec<Rule>>,
    /// Files whose rules a file has as well.
    includes: BTreeMap<String, Vec<String>>,
    threads: BTreeMap<PolicyName, u64>,
    calls: BTreeMap<(PolicyName, &'static str), Seen>,
    violations: BTreeSet<String>,
}

const COMMON: &str = "common.json";

fn file(policy: PolicyName) -> &'static str {
    policy.file().rsplit('/').next().unwrap_or_default()
}

impl Policies {
    /// Reads them from the source tree that this program was built from.
    pub fn read() -> Outcome<Self> {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../seccomp-policies"));
        let (mut files, mut includes) = (BTreeMap::new(), BTreeMap::new());
        for name in PolicyName::ALL.map(file).into_iter().chain([COMMON]) {
            let text = fs::read_to_string(folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
            let json: Value = serde_json::from_str(&text).map_err(|error| format!("{name}: {error}"))?;
            let entry = json.as_object().and_then(|map| map.values().next()).cloned().unwrap_or_default();
            let others = entry["includes"].as_array().into_iter().flatten().filter_map(Value::as_str);
            includes.insert(name.to_owned(), others.map(|other| format!("{other}.json")).collect());
            let rules = entry["filter"].as_array().ok_or(format!("{name}: no rules"))?;
            files.insert(
                name.to_owned(),
                rules.iter().map(|rule| Rule::read(name, rule)).collect::<Outcome<Vec<_>>>()?,
            );
        }
        let (threads, calls, violations) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        Ok(Self { files, includes, threads, calls, violations })
    }

    /// A thread loaded this policy.
    pub fn loaded(&mut self, policy: PolicyName) {
        *self.threads.entry(policy).or_default() += 1;
    }

    /// A thread under this policy made a call.
    pub fn call(&mut self, policy: PolicyName, number: i32, arguments: &[u64; 6]) {
        let name = syscall_name(number);
        let seen = self.calls.entry((policy, name)).or_default();
        seen.times += 1;
        for (values, value) in seen.values.iter_mut().zip(arguments) {
            if values.len() <= SHOWN {
                values.insert(*value);
            }
        }
        let mut allowed = false;
        for key in [file(policy), COMMON] {
            for rule in self.files.get_mut(key).into_iter().flatten() {
                if rule.allows(name, arguments) {
                    *rule.used.entry(policy).or_default() += 1;
                    allowed = true;
                }
            }
        }
        // What an included file allows is not needed there because of this policy.
        let others = self.includes.get(file(policy)).into_iter().flatten();
        let mut others = others.filter_map(|other| self.files.get(other)).flatten();
        allowed = allowed || others.any(|rule| rule.allows(name, arguments));
        // The C library asks for a thread by clone3 first; ENOSYS makes it take clone.
        if !allowed && (policy, name) != (PolicyName::CoreSetup, "clone3") {
            self.violations.insert(format!("{name}, under {}", policy.file()));
        }
    }

    /// Adds the counts of a record; one that does not exist yet is empty.
    pub fn add_record(&mut self, path: &str) -> Outcome {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            read => read.map_err(|error| format!("{path}: {error}"))?,
        };
        let record: Record = serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
        for (policy, count) in record.threads {
            *self.threads.entry(policy).or_default() += count;
        }
        for (key, used) in record.rules {
            let rule = self.files.values_mut().flatten().find(|rule| rule.key == key);
            // A rule that was changed since is another one.
            let Some(rule) = rule else { continue };
            for (policy, count) in used {
                *rule.used.entry(policy).or_default() += count;
            }
        }
        Ok(())
    }

    /// Writes the counts.
    pub fn write_record(&self, path: &str) -> Outcome {
        let rules = self.files.values().flatten().filter(|rule| !rule.used.is_empty());
        let rules = rules.map(|rule| (rule.key.clone(), rule.used.clone().into_iter().collect())).collect();
        let record = Record { threads: self.threads.clone().into_iter().collect(), rules };
        let text = serde_json::to_string(&record).map_err(|error| error.to_string())?;
        fs::write(path, text).map_err(|error| format!("{path}: {error}"))
    }

    /// Prints what each policy saw: how often, and the values of the arguments that look like flags.
    pub fn print_calls(&self) {
        for ((policy, name), seen) in &self.calls {
            let shown = seen.values.iter().enumerate().filter(|(_, values)| values.len() <= SHOWN);
            let arguments: Vec<String> =
                shown.map(|(index, values)| format!("{index}: {values:x?}")).collect();
            println!("{:<20} {name:<16} {:>8}  {}", file(*policy), seen.times, arguments.join("  "));
        }
    }

    /// Prints what was not needed; the number of findings.
    pub fn report(&self) -> usize {
        let mut findings = 0;
        for policy in PolicyName::ALL {
            match self.threads.get(&policy) {
                Some(threads) => println!("{}: {threads} threads", policy.file()),
                None => {
                    findings += 1;
                    println!("{}: no thread loaded it", policy.file());
                }
            }
        }
        for (name, rules) in &self.files {
            for rule in rules {
                let conditions: Vec<String> = rule
                    .conditions
                    .iter()
                    .map(|it| format!("argument {} {} {:#x}", it.index, it.operator, it.value))
                    .collect();
                let text = format!("{name}: {} {} ({})", rule.syscall, conditions.join(", "), rule.comment);
                match (&rule.unseen, rule.times()) {
                    (None, 0) => println!("never used: {text}"),
                    (Some(_), 0) => continue,
                    (Some(reason), times) => {
                        println!("seen {times} times, although \"{reason}\": {text}");
                    }
                    (None, _) => continue,
                }
                findings += 1;
            }
        }
        for violation in &self.violations {
            println!("forbidden: {violation}");
        }
        println!("unused-rules: {findings} findings");
        findings
    }
}
