//! Any records behind a handshake. See `tacit::tunnel::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit::tunnel::fuzz::records(input));
