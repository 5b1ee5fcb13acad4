//! libFuzzer's entry to `bulkhead_fuzz::vhost_user_frontend`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bulkhead_fuzz::vhost_user_frontend(input));
