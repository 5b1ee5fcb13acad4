//! The supervisor on real processes: this program plays the core and the devices behind the real `bulkhead`.
//!
//! `cargo test -p bulkhead-vmm --test supervisor -- [WORD]…` runs the cases whose name contains one of the words.
//! It contains unsafe code: stand-ins that do what a process must not.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api;
mod events;
mod foreign;
mod harness;
mod hosts;
mod hung;
mod launch;
mod orders;
mod restart;
mod shortage;
mod stand_in;
mod streams;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.first() {
        Some(title) if title.starts_with("bulkhead-vmm[") => return stand_in::core(),
        Some(title) if title.starts_with("bulkhead-device[") => return stand_in::device(),
        _ => {}
    }
    if arguments.get(1).is_some_and(|argument| argument == "--version") {
        let version = std::env::var("STAND_IN_VERSION");
        println!("{}", version.as_deref().unwrap_or("bulkhead-device 9.9.9 (control protocol 1)"));
        return;
    }
    let words: Vec<&String> =
        arguments.iter().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let cases = [
        launch::CASES,
        restart::CASES,
        hung::CASES,
        orders::CASES,
        events::CASES,
        shortage::CASES,
        streams::CASES,
        api::CASES,
        hosts::CASES,
        foreign::CASES,
    ];
    for (name, case) in cases.concat() {
        if words.is_empty() || words.iter().any(|word| name.contains(word.as_str())) {
            case();
            match harness::skipped() {
                Some(reason) => println!("{name} ... skipped: {reason}"),
                None => println!("{name} ... ok"),
            }
        }
    }
}
