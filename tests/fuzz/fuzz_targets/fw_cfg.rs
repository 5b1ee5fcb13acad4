//! libFuzzer's entry to `bulkhead_fuzz::fw_cfg`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bulkhead_fuzz::fw_cfg(input));
