//! Any records behind a handshake. See `tacit::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit::fuzz::records(input));
