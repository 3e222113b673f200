//! Entry points of the fuzz targets in `tests/fuzz`. The tests replay the committed corpus.
//!
//! Each entry point takes arbitrary bytes and panics if an invariant is broken. A decoded value must encode to the same
//! bytes, a parser must return the same result twice, and every mistake must name its line.

use std::io::IoSlice;

use tacit_core::wire::frame::{FrameType, HEADER_BYTES};

use super::{batch::FRAMES_MAX, record::fixed};
use crate::receive_buffer::{ReceiveBuffer, Received};

/// Fuzzes records after the handshake. The input holds, for each record, a byte for its type, a byte for its length, and the
/// content. The records are sealed without any protocol checks, received in pieces, and opened. The received data must equal
/// the data that was sealed.
pub fn records(input: &[u8]) {
    let Ok((mut ours, mut theirs)) = fixed::pair() else { panic!("keys") };
    let mut receive_buffer = ReceiveBuffer::default();
    let mut rest = input;
    while let Some((&[kind, length], after)) = rest.split_first_chunk::<2>() {
        let (content, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        // TLS uses types 20 to 24; type 0 is padding.
        let kind = if kind % 6 == 5 { 0 } else { 20 + kind % 6 };
        let Ok(record) = theirs.sealed(kind.into(), content) else { return };
        for piece in record.chunks(100) {
            let room = receive_buffer.room();
            room[..piece.len()].copy_from_slice(piece);
            let room_bytes = room.len();
            receive_buffer.filled(piece.len(), room_bytes);
            loop {
                match receive_buffer.next(|record| ours.open(record)) {
                    Ok(None) => break,
                    Ok(Some(Received::Control(control))) => assert_ne!(control.kind(), FrameType::Data),
                    Ok(Some(Received::Data)) => {
                        let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
                        let used = receive_buffer.payloads(&mut slices);
                        let shown: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
                        assert_eq!(shown, content[HEADER_BYTES..]);
                        receive_buffer.consume(shown.len());
                    }
                    Err(_) => return,
                }
            }
            receive_buffer.pause();
        }
        // A peer that was asked for new keys uses them from here on.
        if let Ok(Some(mut answer)) = ours.key_update(0) {
            assert!(theirs.open(&mut answer).is_ok());
        }
    }
    assert!(receive_buffer.is_empty());
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus");
        tacit_testing::replay(&corpus.join(target), run);
    }

    #[test]
    fn the_corpus_of_records_is_replayed() {
        replay("records", records);
    }

    #[test]
    fn any_records_are_opened_or_refused_and_never_panic() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..20_000 {
            let input: Vec<u8> = (0..48)
                .map(|at| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // Small numbers make valid lengths and contents likely.
                    (state >> 32) as u8 % if at % 4 == 1 { 9 } else { 26 }
                })
                .collect();
            records(&input);
        }
    }
}
