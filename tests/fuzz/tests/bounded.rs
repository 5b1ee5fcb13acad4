//! A bounded run of every fuzz target, the same in every run. An input that panics is written to a file and named.

#![cfg(test)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bulkhead_fuzz::{TARGETS, mutate};

fn run(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = (target.seeds)();
    let mut random = mutate::Random(0x00B0_114E_AD00 ^ u64::from(target.inputs));
    let mutated = (0..target.inputs).map(|_| mutate::input(&mut random, &seeds));
    for input in seeds.iter().cloned().chain(mutated) {
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.input"));
            fs::write(&path, &input).unwrap();
            panic!("{name} does not survive the {} bytes in {}", input.len(), path.display());
        }
    }
}

macro_rules! bounded {
    ($($name:ident)*) => { $(#[test] fn $name() { run(stringify!($name)); })* };
}

bounded! { accesses configuration fw_cfg kernels vfio_user_client vfio_user_server vhost_user_backend vhost_user_frontend }

#[test]
fn every_target_has_a_program_for_libfuzzer_and_a_bounded_run() {
    for target in &TARGETS {
        let program =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets").join(format!("{}.rs", target.name));
        assert!(fs::read_to_string(program).unwrap().contains(&format!("bulkhead_fuzz::{}(", target.name)));
        assert!(include_str!("bounded.rs").contains(&format!(" {} ", target.name)), "{}", target.name);
    }
}
