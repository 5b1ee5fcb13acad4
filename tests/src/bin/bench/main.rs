//! Comparisons with other monitors, in one run, interleaved, medians.
//!
//! ```text
//! bench stock [ROUNDS]   stock kernels: needs hardware virtualization or the lab (default 5 rounds)
//! bench bare [ROUNDS]    bare payloads on this machine's own KVM (default 20 rounds)
//! bench exits [ROUNDS]   what an access costs that the core answers (default 5 rounds)
//! bench blk [ROUNDS]     disks under one load generator, beside qemu-storage-daemon and fio (default 5 rounds)
//! bench services [ROUNDS] device services at rest: start and memory (default 11 rounds)
//! bench static           sizes, policies, lines of code
//! ```
//!
//! Prints Markdown tables. `tools/bench` runs all of them and writes `docs/benchmarks.md`.

mod bare;
mod bare_kvm;
mod blk;
mod blk_fio;
mod blk_load;
mod contenders;
mod exits;
mod measure;
mod services;
mod sources;
mod stock;
mod table;

use std::process::ExitCode;

use bulkhead_tests::harness::{Outcome, Places};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let rounds = arguments.next().and_then(|word| word.parse().ok());
    let only = arguments.next().unwrap_or_default();
    match Places::find().and_then(|places| run(&what, rounds, &only, &places)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("bench: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: &str, rounds: Option<usize>, only: &str, places: &Places) -> Outcome {
    match what {
        "stock" => stock::run(places, rounds.unwrap_or(5)),
        "cached" => stock::boot(
            places,
            rounds.unwrap_or(5),
            "The same in the lab of the tests: cached files, few old translations",
        ),
        "bare" => bare::run(places, rounds.unwrap_or(20)),
        "exits" => exits::run(places, rounds.unwrap_or(5)),
        "static" => sources::run(places),
        "blk" => blk::run(places, rounds.unwrap_or(5), only),
        "services" => services::run(places, rounds.unwrap_or(11)),
        _ => Err("say stock, cached, bare, exits, blk, services or static".into()),
    }
}
