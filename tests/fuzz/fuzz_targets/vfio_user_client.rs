//! libFuzzer's entry to `bulkhead_fuzz::vfio_user_client`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bulkhead_fuzz::vfio_user_client(input));
