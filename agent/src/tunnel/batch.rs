//! A batch of DATA frames in one buffer: payload is read straight into its place, then the headers are written before it.

use std::io::IoSliceMut;

use super::frame::{HEADER_BYTES, Kind, PAYLOAD_MAX_BYTES, RECORD_BYTES, encode_header};

/// How many DATA frames one batch holds at most: one read fills them, one TLS write sends them.
pub(crate) const BATCH_FRAMES: usize = 8;
/// A buffer for one batch.
pub(crate) const BATCH_BYTES: usize = BATCH_FRAMES * RECORD_BYTES;

/// The places in `batch` ([`BATCH_BYTES`]) where payload goes, with room for a header before each.
pub(crate) fn payload_slots(batch: &mut [u8]) -> [IoSliceMut<'_>; BATCH_FRAMES] {
    let mut records = batch.chunks_exact_mut(RECORD_BYTES);
    std::array::from_fn(|_| {
        IoSliceMut::new(records.next().map_or(&mut [], |record| &mut record[HEADER_BYTES..]))
    })
}

/// Writes the headers for `payload_bytes` read into the slots of `batch`, and returns the frames, ready to send. Each is
/// full but the last, so that a TLS record written from them holds exactly one.
pub(crate) fn frames(batch: &mut [u8], payload_bytes: usize) -> &[u8] {
    let mut left = payload_bytes.min(BATCH_FRAMES * PAYLOAD_MAX_BYTES);
    let mut used = 0;
    for record in batch.chunks_exact_mut(RECORD_BYTES) {
        if left == 0 {
            break;
        }
        let here = left.min(PAYLOAD_MAX_BYTES);
        record[..HEADER_BYTES].copy_from_slice(&encode_header(Kind::Data, here));
        used += HEADER_BYTES + here;
        left -= here;
    }
    &batch[..used]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::frame::header;

    #[test]
    fn a_batch_is_full_frames_and_a_rest() {
        for (payload_bytes, expected) in [
            (0, vec![]),
            (1, vec![1]),
            (PAYLOAD_MAX_BYTES, vec![PAYLOAD_MAX_BYTES]),
            (PAYLOAD_MAX_BYTES + 5, vec![PAYLOAD_MAX_BYTES, 5]),
            (BATCH_FRAMES * PAYLOAD_MAX_BYTES, vec![PAYLOAD_MAX_BYTES; BATCH_FRAMES]),
        ] {
            let mut batch = vec![0; BATCH_BYTES];
            let mut value = 0_u8;
            for byte in payload_slots(&mut batch).iter_mut().flat_map(|slot| slot.iter_mut()) {
                *byte = value;
                value = value.wrapping_add(1);
            }
            let mut rest = frames(&mut batch, payload_bytes);
            let (mut lengths, mut payload) = (vec![], Vec::<u8>::new());
            while let Some(head) = header(rest).expect("well formed") {
                let (frame, next) = rest.split_at(HEADER_BYTES + head.payload_bytes);
                payload.extend(&frame[HEADER_BYTES..]);
                lengths.push(head.payload_bytes);
                rest = next;
            }
            assert_eq!(lengths, expected);
            assert!(payload.iter().enumerate().all(|(at, byte)| *byte == (at % 256) as u8));
        }
    }
}
