//! Any bytes as a stream of frames. See `tacit_core::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit_core::fuzz::frames(input));
