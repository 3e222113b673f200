//! The eBPF object as tests see it: which helpers its sections call, and a copy with one instruction replaced.
//!
//! Reads the few fields of ELF64 that this takes, in the machine's own byte order, which is the object's too.

use std::ops::Range;

const INSTRUCTION_BYTES: usize = 8;
const CALL: u8 = 0x85;

/// Every call of a helper: section name and the helper's number.
pub(super) fn helper_calls(object: &[u8]) -> Vec<(String, i32)> {
    let code = sections(object).into_iter().filter(|section| section.is_code);
    let mut calls = Vec::new();
    for section in code {
        for instruction in object[section.bytes].chunks_exact(INSTRUCTION_BYTES) {
            // The source register says what is called: 0 is a helper.
            if instruction[0] == CALL && source_register(instruction[1]) == 0 {
                calls.push((section.name.clone(), i32::from_ne_bytes(array(instruction, 4))));
            }
        }
    }
    calls
}

/// The object with another first instruction in `section`. Aligned as the loader needs it.
pub(super) fn with_first_instruction(object: &[u8], section: &str, new: [u8; INSTRUCTION_BYTES]) -> Vec<u8> {
    let found =
        sections(object).into_iter().find(|s| s.name == section && s.is_code).expect("a code section");
    let mut copy = object.to_vec();
    copy[found.bytes][..INSTRUCTION_BYTES].copy_from_slice(&new);
    copy
}

struct Section {
    name: String,
    is_code: bool,
    bytes: Range<usize>,
}

fn sections(object: &[u8]) -> Vec<Section> {
    const HEADER_BYTES: usize = 64;
    const EXECUTABLE: u64 = 4;
    let word = |at: usize| usize::try_from(u64::from_ne_bytes(array(object, at))).expect("64-bit");
    let half = |at: usize| u16::from_ne_bytes(array(object, at)) as usize;
    let name_at = |at: usize| u32::from_ne_bytes(array(object, at)) as usize;
    let header = |index: usize| word(40) + index * HEADER_BYTES;
    let names = word(header(half(62)) + 24);
    let section = |at: usize| {
        let name = &object[names + name_at(at)..];
        let end = name.iter().position(|byte| *byte == 0).expect("names end");
        Section {
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            is_code: word(at + 8) as u64 & EXECUTABLE != 0,
            bytes: word(at + 24)..word(at + 24) + word(at + 32),
        }
    };
    (0..half(60)).map(|index| section(header(index))).collect()
}

fn source_register(registers: u8) -> u8 {
    if cfg!(target_endian = "big") { registers & 0xf } else { registers >> 4 }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("N bytes")
}
