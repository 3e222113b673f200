//! Any text as a policy file. See `tacit::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit::fuzz::policy(input));
