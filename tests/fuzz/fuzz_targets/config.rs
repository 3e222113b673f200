//! Any text as a configuration file. See `tacit::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit::fuzz::config(input));
