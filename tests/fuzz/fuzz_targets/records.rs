//! Any records behind a handshake. See `tacit_tunnel::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit_tunnel::fuzz::records(input));
