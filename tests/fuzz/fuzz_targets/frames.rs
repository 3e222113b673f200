//! Any bytes as a stream of frames. See `tacit::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tacit::fuzz::frames(input));
