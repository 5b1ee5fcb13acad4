//! Writes the inputs that a target begins with into a folder: `seeds TARGET FOLDER`.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_fuzz::TARGETS;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [name, folder] = words.as_slice() else {
        eprintln!("usage: seeds TARGET FOLDER");
        return ExitCode::from(2);
    };
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        eprintln!("seeds: no target {name}");
        return ExitCode::FAILURE;
    };
    for (number, seed) in (target.seeds)().iter().enumerate() {
        if let Err(error) = std::fs::write(PathBuf::from(folder).join(format!("seed{number}")), seed) {
            eprintln!("seeds: {folder}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
