//! Which rules of the seccomp policies does a workload never need?
//!
//! ```text
//! unused-rules [--calls] [--with FILE]… [--record FILE] COMMAND [ARGUMENT]…
//! ```
//!
//! Runs the command and watches all its descendants with ptrace(2). When a thread loads one of our filters, which is told by
//! its instructions, each system call that the thread makes from then on is held against the rules of that policy's JSON file.
//! At the end it prints the rules that nothing needed. A rule with a reason why no workload shows it (`"unseen"`) is no
//! finding; one without, and such a reason at a rule that was seen, are.
//! The audit log is not needed, and neither is another build of the programs. `--calls` prints what each policy saw. With
//! `--record` the counts start from what the file says and go back to it, so that several workloads count together; `--with`
//! only adds those of a file.

mod rules;
mod trace;

use std::process::ExitCode;

use rules::Policies;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).peekable();
    let calls = arguments.next_if(|word| word == "--calls").is_some();
    let mut with = Vec::new();
    while arguments.next_if(|word| word == "--with").is_some() {
        with.extend(arguments.next());
    }
    let record = arguments.next_if(|word| word == "--record").and_then(|_| arguments.next());
    let command: Vec<String> = arguments.collect();
    if command.is_empty() {
        eprintln!("usage: unused-rules [--calls] [--with FILE]… [--record FILE] COMMAND [ARGUMENT]…");
        return ExitCode::from(2);
    }
    let outcome = Policies::read().and_then(|mut policies| {
        for file in with.iter().chain(&record) {
            policies.add_record(file)?;
        }
        let status = trace::run(&command, &mut policies)?;
        if let Some(file) = &record {
            policies.write_record(file)?;
        }
        if calls {
            policies.print_calls();
        }
        let findings = policies.report();
        if status != 0 {
            println!("unused-rules: the workload itself ended with {status}");
        }
        Ok(status == 0 && findings == 0)
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(sentence) => {
            eprintln!("unused-rules: {sentence}");
            ExitCode::from(2)
        }
    }
}
