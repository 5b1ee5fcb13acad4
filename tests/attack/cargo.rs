//! Runs the attack suite of this build, so that `cargo test` does.
#![allow(missing_docs)]

#[test]
fn every_attack_fails() {
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_attack")).status();
    assert!(status.is_ok_and(|status| status.success()), "the suite says above what did not hold");
}
