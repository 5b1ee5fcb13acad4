//! What came of the attempts: checked against what each attempt says must stop it, and written down in docs/security.md.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use bulkhead_ipc::jail::PolicyName;
use nix::errno::Errno;

use crate::attempts::{self, Attempt, MAY, THEMES};
use crate::hostile::{CORE, DEVICES, Kind};
use crate::machine::Bench;
use crate::sizes;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md");
const ATTEMPTS: [&str; 2] = ["<!-- attempts: begin -->\n", "<!-- attempts: end -->\n"];
const SIZES: [&str; 2] = ["<!-- sizes: begin -->\n", "<!-- sizes: end -->\n"];

/// Outcomes of all attempts, by policy file or kind of process.
#[derive(Default)]
pub struct Outcomes(BTreeMap<String, BTreeMap<usize, String>>);

/// Columns of the first pass: each policy of each kind of process. The core has one more before it is sealed.
fn sealed() -> Vec<String> {
    let of = |kind: &Kind| {
        let others = kind.others.iter().map(|(policy, _)| *policy);
        [kind.main].into_iter().chain(others).map(|policy| kind.column(policy)).collect::<Vec<_>>()
    };
    let set_up = CORE.column(PolicyName::CoreSetup);
    [set_up].into_iter().chain([CORE].iter().chain(&DEVICES).flat_map(of)).collect()
}

/// Columns of the second pass: each kind of process.
fn open() -> Vec<String> {
    [CORE].iter().chain(&DEVICES).map(|kind| kind.name.to_owned()).collect()
}

impl Outcomes {
    /// Takes them from the supervisor's messages.
    pub fn read(&mut self, messages: &str) -> Result<(), String> {
        for line in messages.lines() {
            let Some((_, rest)) = line.split_once("outcomes of ") else { continue };
            let (who, rest) = rest.split_once(" from ").ok_or("no number")?;
            let (start, list) = rest.split_once(": ").ok_or("no list")?;
            let start: usize = start.parse().map_err(|_| format!("{start:?}"))?;
            let of = self.0.entry(who.to_owned()).or_default();
            of.extend(list.split_whitespace().enumerate().map(|(index, it)| (start + index, it.to_owned())));
        }
        Ok(())
    }

    /// Holds each outcome against what its attempt says.
    pub fn check(&self) -> Result<(), String> {
        let mut faults = String::new();
        for policy in PolicyName::ALL {
            let attacked = sealed().iter().any(|column| policy.file().ends_with(&format!("/{column}.json")));
            if !attacked {
                let _ = writeln!(faults, "{}: nobody attacks under it", policy.file());
            }
        }
        for who in sealed() {
            self.check_one(&who, true, &mut faults);
        }
        for kind in open() {
            self.check_one(&kind, false, &mut faults);
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn check_one(&self, who: &str, sealed: bool, faults: &mut String) {
        let Some(outcomes) = self.0.get(who) else {
            let _ = writeln!(faults, "{who}: nobody attacked");
            return;
        };
        for (number, attempt) in attempts::all().enumerate() {
            let outcome = outcomes.get(&number).map_or("missing", String::as_str);
            if let Err(why) = judge(who, attempt, outcome, sealed) {
                let _ = writeln!(faults, "{who}: {}: {why}", attempt.goal);
            }
        }
    }

    /// The table for the document.
    fn table(&self) -> String {
        let mut table = String::from(
            "| what a hostile process wants | under its policies | without them |\n| --- | --- | --- |\n",
        );
        let mut number = 0;
        for (theme, attempts) in THEMES {
            let _ = writeln!(table, "| **{theme}** | | |");
            for attempt in *attempts {
                let sealed = self.cell(number, &sealed(), attempt);
                let open = self.cell(number, &open(), attempt);
                let _ = writeln!(table, "| {} | {sealed} | {open} |", attempt.goal);
                number += 1;
            }
        }
        table
    }

    /// What most came to, and who came to something else.
    fn cell(&self, number: usize, who: &[String], attempt: &Attempt) -> String {
        let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
        for name in who {
            let outcome = self.0.get(name).and_then(|it| it.get(&number)).map_or("missing", String::as_str);
            let text = describe(name, attempt, outcome);
            match groups.iter_mut().find(|(other, _)| *other == text) {
                Some((_, names)) => names.push(name),
                None => groups.push((text, vec![name])),
            }
        }
        groups.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
        let cells = groups.iter().enumerate().map(|(index, (text, names))| {
            if index == 0 { text.clone() } else { format!("{}: {text}", names.join(", ")) }
        });
        cells.collect::<Vec<_>>().join("; ")
    }

    /// Compares the table in the document with this run's, or writes it. What the policies stop must be the same everywhere.
    /// Which of its walls stops an attempt without policies depends on the host's kernel: there a row is only compared
    /// where the attempt leaves one possibility.
    pub fn compare_with_docs(&self, bench: &Bench, write: bool) -> Result<(), String> {
        let text = fs::read_to_string(DOCUMENT).map_err(|error| format!("docs/security.md: {error}"))?;
        let (attempts, sizes) = (self.table(), sizes::tables(bench)?);
        if write {
            let text = replaced(&replaced(&text, ATTEMPTS, &attempts)?, SIZES, &sizes)?;
            return fs::write(DOCUMENT, text).map_err(|error| error.to_string());
        }
        let policies = |row: &str| row.split('|').take(3).collect::<Vec<_>>().join("|");
        let mut wrong = missing(between(&text, ATTEMPTS)?.1, &attempts, policies);
        wrong.extend(missing(between(&text, SIZES)?.1, &sizes, str::to_owned));
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!("docs/security.md does not show this run (attack --write does):\n{}", wrong.join("\n")))
    }
}

/// What is before, between and after two marks.
fn between<'a>(text: &'a str, [begin, end]: [&str; 2]) -> Result<(&'a str, &'a str, &'a str), String> {
    let (before, rest) = text.split_once(begin).ok_or(format!("docs/security.md has no {begin}"))?;
    let (inside, after) = rest.split_once(end).ok_or(format!("docs/security.md has no {end}"))?;
    Ok((before, inside, after))
}

fn replaced(text: &str, marks: [&str; 2], inside: &str) -> Result<String, String> {
    let (before, _, after) = between(text, marks)?;
    Ok([before, marks[0], inside, marks[1], after].concat())
}

/// Rows that only one of the two has, by what of them counts.
fn missing(old: &str, new: &str, counts: impl Fn(&str) -> String) -> Vec<String> {
    let rows = |table: &str| table.lines().map(&counts).collect::<Vec<_>>();
    let (old, new) = (rows(old), rows(new));
    let gone = old.iter().filter(|row| !new.contains(row)).map(|row| format!("- {row}"));
    let added = new.iter().filter(|row| !old.contains(row)).map(|row| format!("+ {row}"));
    gone.chain(added).collect()
}

fn wall(attempt: &Attempt, outcome: &str) -> Option<(&'static str, i32)> {
    let errno: i32 = outcome.parse().ok()?;
    attempt.walls.iter().find(|(known, _)| *known == errno).map(|(known, wall)| (*wall, *known))
}

/// Why this thread or process may do this, where it may.
fn may(who: &str, attempt: &Attempt) -> Option<&'static str> {
    let found = MAY.iter().find(|(names, goals, _)| names.contains(&who) && goals.contains(&attempt.goal));
    found.map(|(_, _, reason)| *reason)
}

/// Whether an outcome is one that the attempt allows.
fn judge(who: &str, attempt: &Attempt, outcome: &str, sealed: bool) -> Result<(), String> {
    if wall(attempt, outcome).is_some() {
        return Ok(());
    }
    match outcome.split_once(':') {
        Some(("seccomp", call)) if sealed && attempt.calls.contains(&call) => Ok(()),
        None if outcome == "works" && may(who, attempt).is_some() => Ok(()),
        None if outcome == "works" && !sealed && attempt.gap.is_some() => Ok(()),
        _ => {
            let errno =
                outcome.parse().map_or(String::new(), |number| format!(" ({:?})", Errno::from_raw(number)));
            Err(format!("{outcome}{errno}"))
        }
    }
}

fn describe(who: &str, attempt: &Attempt, outcome: &str) -> String {
    if let Some((wall, errno)) = wall(attempt, outcome) {
        return format!("{wall} ({:?})", Errno::from_raw(errno));
    }
    if let (Some(reason), "works") = (may(who, attempt), outcome) {
        return format!("**it may**: {reason}");
    }
    match (outcome.split_once(':'), attempt.gap) {
        (Some(("seccomp", call)), _) => format!("seccomp: `{call}`"),
        (None, Some(gap)) if outcome == "works" => format!("**the policy is the only wall**: {gap}"),
        _ => outcome.to_owned(),
    }
}
