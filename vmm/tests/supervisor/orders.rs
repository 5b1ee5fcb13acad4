//! `bulkhead device`: processes that are replaced because a user asked for it.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::PROTOCOL;
use bulkhead_vmm::supervisor::api::client::Connection;
use bulkhead_vmm::supervisor::api::{ProgramInfo, Request};
use nix::sys::signal::Signal;

use crate::harness::{Bench, Run, finish, signal, wait_for};
use crate::restart::{count, murder};
use crate::stand_in::SAID_TOO_OFTEN;

pub const CASES: &[(&str, fn())] = &[
    ("a_device_is_restarted_in_order", in_order),
    ("a_device_that_was_given_up_is_brought_back", brought_back),
    ("a_stubborn_device_is_replaced_all_the_same", stubborn),
    ("an_upgrade_is_for_successors_and_restarts_too", upgrade),
    ("a_program_that_does_not_serve_leaves_the_old_one_at_work", bad_program),
    ("a_program_of_another_protocol_is_refused", other_protocol),
    ("what_cannot_be_replaced_is_refused_by_name", refusals),
    ("a_disk_gets_another_size", resize),
    ("hundreds_of_processors_come_at_once", processors),
    ("who_resizes_an_image_is_answered_whatever_becomes_of_its_process", resize_image),
];

const ALL: [&str; 4] = ["disk0", "rng", "console", "serial"];

fn list(bench: &Bench) -> serde_json::Value {
    serde_json::from_str(&bench.ask("device list NAME --json").out).unwrap()
}

fn device(bench: &Bench, id: &str) -> serde_json::Value {
    let list = list(bench);
    list.as_array().unwrap().iter().find(|device| device["id"] == id).unwrap().clone()
}

fn done(run: &Run) {
    assert_eq!((run.code, run.err.as_str(), run.out.as_str()), (0, "", ""));
}

fn in_order() {
    let bench = Bench::new();
    // Not even the policy stands in the way.
    let options = "--disk path=a.img --rng --console --restart rng=never --restart 0/60 --log-file log";
    let child = bench.start(options, "");
    for round in 1..=5 {
        for id in ALL {
            let before = bench.pid(id);
            done(&bench.ask(&format!("device restart NAME {id}")));
            assert_ne!(bench.pid(id), before);
            assert_eq!(count(&bench, &format!("{id} was replaced within")), round);
            // Each leaves something to the next.
            wait_for("what was left", || count(&bench, &format!("process {} of {id}", round + 1)) == 1);
            assert_eq!(device(&bench, id)["restarts"], round);
        }
    }
    for bad in ["error: ", "killed", "hangs", "not replaced", "it is restarted"] {
        assert_eq!(count(&bench, bad), 0, "{bad}");
    }
    assert_eq!(bench.left().len(), 5);
    let text = bench.ask("device list NAME").out;
    assert!(text.contains("serving") && text.contains("never") && text.contains("0/60"), "{text}");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn brought_back() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --restart 0/60 --log-file log", "");
    murder(&bench, "disk0");
    wait_for("the end of all attempts", || count(&bench, "disk0 has no process") == 1);
    let failed = device(&bench, "disk0");
    assert_eq!((&failed["state"], &failed["pid"]), (&"failed".into(), &serde_json::Value::Null));
    assert!(failed["last_end"].as_str().unwrap().contains("SIGKILL"), "{failed}");
    done(&bench.ask("device restart NAME disk0"));
    assert_eq!(device(&bench, "disk0")["state"], "serving");
    // The deaths before do not count any more, and those after do.
    murder(&bench, "disk0");
    wait_for("the end of all attempts", || count(&bench, "disk0 has no process") == 2);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

/// `fsize` of a process: soft and hard limit, bytes.
fn file_size(bench: &Bench, id: &str) -> (String, String) {
    let limits = fs::read_to_string(format!("/proc/{}/limits", bench.pid(id))).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

fn resize() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --log-file log", "");
    done(&bench.ask("device resize NAME disk0 8M"));
    assert_eq!(fs::metadata(bench.path("a.img")).unwrap().len(), 8 << 20);
    wait_for("the device's word", || count(&bench, "8388608 bytes for disk0") == 1);
    assert_eq!(file_size(&bench, "disk0").0, (8 << 20).to_string());
    let refused = bench.ask("device resize NAME disk0 4M");
    assert!(refused.err.contains("would be lost: say --shrink"), "{}", refused.err);
    let refused = bench.ask("device resize NAME disc0 4M");
    assert!(refused.err.contains("no disk 'disc0': did you mean 'disk0'?"), "{}", refused.err);
    done(&bench.ask("device resize NAME disk0 4M --shrink"));
    wait_for("the device's word", || count(&bench, "4194304 bytes for disk0") >= 1);
    assert_eq!(fs::metadata(bench.path("a.img")).unwrap().len(), 4 << 20);
    // From outside, and for a successor.
    fs::File::options().write(true).open(bench.path("a.img")).unwrap().set_len(16 << 20).unwrap();
    done(&bench.ask("device resize NAME disk0"));
    done(&bench.ask("device restart NAME disk0"));
    assert_eq!(file_size(&bench, "disk0").0, (16 << 20).to_string());
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

/// While the core is busy and reads nothing.
fn processors() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --cpus 1,max=1024 --log-file log", "wait");
    done(&bench.ask("resize NAME --cpus 1024"));
    done(&bench.ask("device restart NAME disk0"));
    assert_eq!(count(&bench, "does not listen"), 0);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn resize_image() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img,format=qcow2 --log-file log", "");
    let ask = |bytes: u64| {
        let asked = bench.bulkhead(&format!("device resize {} disk0 {bytes}", bench.name)).spawn().unwrap();
        wait_for("the device's word", || count(&bench, &format!("{bytes} bytes for disk0")) == 1);
        asked
    };
    let answered = |asked| {
        let run = finish(asked);
        assert_eq!(run.code, 7, "{}", run.err);
        assert!(run.err.contains("disk0 has lost its process meanwhile"), "{}", run.err);
    };
    let asked = ask(4 << 20);
    let refused = bench.ask("device resize NAME disk0 8M");
    assert!(refused.err.contains("disk0 is being resized"), "{}", refused.err);
    murder(&bench, "disk0");
    answered(asked);
    wait_for("a successor", || count(&bench, "disk0 was replaced within") == 1);
    // Replaced in order.
    let asked = ask(16 << 20);
    done(&bench.ask("device restart NAME disk0"));
    answered(asked);
    // A process that says more than was asked is heard once.
    let asked = ask(SAID_TOO_OFTEN);
    done(&finish(asked));
    wait_for("the rest", || count(&bench, "said it all for disk0") == 1);
    done(&bench.ask("device restart NAME disk0"));
    assert_eq!(count(&bench, "disk0: has 1G now"), 1);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn stubborn() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img,id=stubborn --log-file log", "");
    done(&bench.ask("device restart NAME stubborn"));
    assert_eq!(count(&bench, "stubborn does not finish its work in time: it is killed"), 1);
    assert_eq!(count(&bench, "stubborn was replaced within"), 1);
    signal(&child, Signal::SIGTERM);
    finish(child);
}

fn upgrade() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --console --log-file log", "");
    let before = ALL.map(|id| bench.pid(id));
    fs::copy(bench.path("bulkhead-device"), bench.path("new-device")).unwrap();
    done(&bench.ask("device upgrade NAME rng --program new-device"));
    assert_eq!(device(&bench, "rng")["version"], "9.9.9");
    assert_ne!(device(&bench, "disk0")["version"], "9.9.9");
    // The one beside the program, for all.
    done(&bench.ask("device upgrade NAME --all"));
    for (id, before) in ALL.into_iter().zip(before) {
        assert_ne!(bench.pid(id), before);
        assert_eq!(device(&bench, id)["version"], "9.9.9");
        murder(&bench, id);
        wait_for("the successor", || count(&bench, &format!("{id} was replaced within")) >= 2);
        assert_eq!(device(&bench, id)["version"], "9.9.9");
    }
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn bad_program() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --log-file log", "");
    let before = bench.pid("disk0");
    let start = Instant::now();
    let mut command = bench.bulkhead(&format!("device upgrade {} disk0 --program bulkhead", bench.name));
    let run: Run = command.output().unwrap().into();
    assert_eq!(run.code, 2, "{}", run.err);
    assert!(run.err.contains("is no bulkhead-device"), "{}", run.err);
    let run = bench.ask("device upgrade NAME disk0 --program nothing");
    assert_eq!(run.code, 2, "{}", run.err);
    assert!(run.err.contains("'nothing': No such file"), "{}", run.err);
    // What says that it is one, and does not serve: it wants libraries, or ends at once.
    let connection = Connection::to_name(&bench.name).unwrap();
    for program in [PathBuf::from("/bin/true"), bench.path("bulkhead")] {
        let file = fs::File::open(&program).unwrap();
        let info = ProgramInfo { version: "lies".to_owned(), protocol: PROTOCOL };
        let request = Request::DeviceUpgrade { device: None, program: info };
        let answer = connection.ask_within(&request, Some(file.as_fd()), Duration::from_secs(10));
        let refused = answer.unwrap_err().to_string();
        for id in ["disk0", "rng", "serial"] {
            assert!(refused.contains(&format!("{id}: the new process")), "{}: {refused}", program.display());
        }
        assert_eq!(refused.matches("the old process goes on").count(), 3, "{refused}");
    }
    assert_eq!((bench.pid("disk0"), count(&bench, "was replaced within")), (before, 0));
    assert!(start.elapsed().as_secs() < 5);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn other_protocol() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --log-file log", "");
    let run = bench.ask_with("device upgrade NAME --all", "bulkhead-device 7.0.0 (control protocol 700)");
    assert_eq!(run.code, 2, "{}", run.err);
    assert!(run.err.contains("version 7.0.0 and speaks control protocol 700"), "{}", run.err);
    assert_eq!(count(&bench, "asked"), 0);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn refusals() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng", "");
    let run = bench.ask("device restart NAME disk1");
    assert_eq!(run.code, 7);
    assert!(run.err.contains("no device 'disk1': did you mean 'disk0'?"), "{}", run.err);
    let run = bench.ask("device restart NAME core");
    assert!(run.err.contains("no device 'core'"), "{}", run.err);
    assert_eq!(bench.ask("device restart nobody rng").code, 7);
    assert_eq!(bench.ask("device upgrade NAME").code, 2);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}
