//! libFuzzer's entry to `bulkhead_fuzz::accesses`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bulkhead_fuzz::accesses(input));
