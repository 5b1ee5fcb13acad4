//! `bulkhead events`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{Bench, finish, signal, skip, wait_for};
use crate::restart::{count, murder};

pub const CASES: &[(&str, fn())] = &[
    ("events_tell_the_life_of_each_process", lives),
    ("events_name_what_broke_a_policy_or_hung", reasons),
    ("a_follower_hears_of_the_end", follower),
    ("passt_that_dies_is_started_anew_and_the_card_is_told", passt),
];

fn events(bench: &Bench) -> Vec<Value> {
    let text = bench.ask("events NAME").out;
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The kinds of events of one process.
fn kinds(events: &[Value], process: &str) -> Vec<String> {
    let of = events.iter().filter(|event| event["process"] == process);
    of.map(|event| event["event"].as_str().unwrap().to_owned()).collect()
}

fn lives() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --restart 1/60 --log-file log", "");
    murder(&bench, "disk0");
    wait_for("the successor", || count(&bench, "disk0 was replaced within") == 1);
    murder(&bench, "disk0");
    wait_for("the end of all attempts", || count(&bench, "disk0 has no process") == 1);
    assert_eq!(bench.ask("device restart NAME disk0").code, 0);
    assert_eq!(bench.ask("device restart NAME rng").code, 0);
    let events = events(&bench);
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
    assert_eq!(
        kinds(&events, "disk0"),
        "start ready death restart start ready replaced death given-up asked start ready replaced"
            .split(' ')
            .collect::<Vec<_>>()
    );
    assert_eq!(kinds(&events, "rng"), ["start", "ready", "start", "asked", "ready", "death", "replaced"]);
    assert_eq!(kinds(&events, "core"), ["start", "ready"]);
    let find = |kind: &str, process: &str| {
        events.iter().find(|event| event["event"] == kind && event["process"] == process).unwrap()
    };
    assert_eq!(find("death", "disk0")["signal"], 9);
    assert!(find("death", "disk0")["reason"].as_str().unwrap().contains("SIGKILL"));
    assert_eq!(find("death", "rng")["exit_code"], 0);
    assert_eq!(find("restart", "disk0")["pause_ms"], 0);
    assert!(find("replaced", "disk0")["took_us"].as_u64().unwrap() < 10_000_000);
    assert!(events.iter().any(|event| event["event"] == "running" && event.get("process").is_none()));
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn reasons() {
    let bench = Bench::new();
    let options = "--disk path=a.img,id=late-violate --disk path=b.img,id=stalls --stall-deadline 1 \
        --restart 1/60 --log-file log";
    let child = bench.start(options, "");
    wait_for("the end of all attempts", || count(&bench, "such ends it is given up") == 2);
    let events = events(&bench);
    let reason = |kind: &str| {
        let event = events.iter().find(|event| event["event"] == kind).unwrap();
        event["reason"].as_str().unwrap().to_owned()
    };
    assert!(reason("violation").contains("sethostname"), "{}", reason("violation"));
    assert!(reason("hang").contains("queue 1"), "{}", reason("hang"));
    let list = bench.ask("device list NAME").out;
    assert!(list.contains("failed") && list.contains("sethostname") && list.contains("queue 1"), "{list}");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

/// The process of passt that a supervisor has started.
fn passt_of(supervisor: u32) -> Option<Pid> {
    let parent = format!("PPid:\t{supervisor}\n");
    let mut found = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let passt =
            status.starts_with("Name:\tpasst") && status.contains(&parent) && !status.contains("State:\tZ");
        passt.then(|| entry.file_name().to_string_lossy().parse().ok())?
    });
    found.next().map(Pid::from_raw)
}

fn passt() {
    // passt takes addresses from the interface with the default route, or is told them.
    let told = "address=10.0.2.15/24,gateway=10.0.2.2";
    if Command::new("passt").arg("--version").output().is_err() {
        skip("passt is not installed");
        return;
    }
    let bench = Bench::new();
    let child = bench.start(&format!("--net user,{told} --restart always --log-file log"), "");
    for round in 1..=2 {
        let first = passt_of(child.id()).expect("no passt");
        kill(first, Signal::SIGKILL).unwrap();
        wait_for("the way", || count(&bench, &format!("way {} of net", round + 1)) == 1);
        assert_ne!(passt_of(child.id()), Some(first));
        assert_eq!(count(&bench, "the other end of its stream has gone"), round);
    }
    // The process of the card is another matter: passt outlives it.
    let before = passt_of(child.id());
    murder(&bench, "net0");
    wait_for("the successor", || count(&bench, "net0 was replaced within") == 1);
    assert_eq!(passt_of(child.id()), before);
    let kinds = kinds(&events(&bench), "net0").join(" ");
    let wanted =
        "start ready disconnected connected disconnected connected death restart start ready replaced";
    assert_eq!(kinds, wanted);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
    assert_eq!(before.map(|pid| kill(pid, None)), Some(Err(Errno::ESRCH)), "passt is left");
}

fn follower() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --log-file log", "");
    let mut follower = bench.bulkhead(&format!("events {} --follow", bench.name)).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = |kind: &str| loop {
        let line = lines.next().expect("the end").unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == kind {
            return event;
        }
    };
    next("running");
    murder(&bench, "disk0");
    assert_eq!(next("death")["process"], "disk0");
    next("replaced");
    signal(&child, Signal::SIGTERM);
    let end = next("end");
    assert_eq!((&end["exit_code"], end.get("process")), (&143.into(), None));
    assert!(end["reason"].as_str().unwrap().contains("signal 15"), "{end}");
    assert!(follower.wait().unwrap().success());
    assert_eq!(finish(child).code, 143);
}
