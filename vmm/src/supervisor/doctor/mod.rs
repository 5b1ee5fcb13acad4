//! `bulkhead doctor`: what this host offers, and what is lost without it.

mod checks;
pub mod kvm;

use serde::Serialize;

/// The outcome of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is there.
    Ok,
    /// It is not there, and machines run without it.
    Missing,
    /// It is not there, and no machine runs without it.
    Needed,
}

/// One check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// The outcome.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What is lost without it, and how to get it; empty when it is there.
    pub without: String,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status: Status::Ok, found: found.into(), without: String::new() }
    }

    fn missing(name: &str, found: impl Into<String>, without: &str) -> Self {
        Self {
            name: name.to_owned(),
            status: Status::Missing,
            found: found.into(),
            without: without.to_owned(),
        }
    }

    fn needed(name: &str, found: impl Into<String>, without: &str) -> Self {
        Self { status: Status::Needed, ..Self::missing(name, found, without) }
    }
}

/// All checks.
#[derive(Debug, Serialize)]
pub struct Report {
    checks: Vec<Check>,
    can_run: bool,
}

impl Report {
    /// Looks at this host.
    pub fn new() -> Self {
        let mut checks = checks::kvm_checks();
        checks.extend(checks::jail_checks());
        checks.extend(checks::optional_checks());
        let can_run = checks.iter().all(|check| check.status != Status::Needed);
        Self { checks, can_run }
    }

    /// Whether machines can run here.
    pub const fn can_run(&self) -> bool {
        self.can_run
    }

    /// For people.
    pub fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for Check { name, status, found, without } in &self.checks {
            let mark = match status {
                Status::Ok => "ok     ",
                Status::Missing => "missing",
                Status::Needed => "NEEDED ",
            };
            let without = if without.is_empty() { String::new() } else { format!(": {without}") };
            text.push_str(&format!("{mark}  {name:width$}  {found}{without}\n"));
        }
        text.push_str(if self.can_run {
            "\nThis host can run machines.\n"
        } else {
            "\nThis host cannot run machines until what is marked NEEDED is there.\n"
        });
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_thing_says_what_is_lost() {
        let report = Report::new();
        assert!(report.checks.len() > 15);
        for check in &report.checks {
            assert_eq!(check.without.is_empty(), check.status == Status::Ok, "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
        assert!(serde_json::from_str::<serde_json::Value>(&report.json()).is_ok());
    }
}
