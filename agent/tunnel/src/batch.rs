//! A batch of records in one buffer. Payload is read directly into its slots. Frame headers are then written before the
//! payload, and each record is sealed in place. One write sends all records.
//!
//! ```text
//! | record header, frame header, payload, tail | record header, frame header, payload, tail | ...
//! ```

use std::io::IoSliceMut;

use tacit_core::wire::frame::{self, FrameType, PAYLOAD_MAX_BYTES, encode_header};

use super::record;

/// Maximum number of DATA frames in a batch. One read fills them and one write sends them. With 32 frames (half a MiB), the
/// cost of a system call is negligible.
pub(crate) const FRAMES_MAX: usize = 32;
/// Bytes before the payload of a record.
const BEFORE_BYTES: usize = record::HEADER_BYTES + frame::HEADER_BYTES;
/// Bytes of a full record with one full frame.
const RECORD_BYTES: usize = record::HEADER_BYTES + frame::RECORD_BYTES + record::TAIL_BYTES;

/// Returns the size of a buffer for `frames` full frames.
pub(crate) const fn bytes(frames: usize) -> usize {
    frames * RECORD_BYTES
}

/// Returns the payload slots of `batch` and their total bytes. Slots beyond the end of `batch` are empty.
pub(crate) fn payload_slots(batch: &mut [u8]) -> ([IoSliceMut<'_>; FRAMES_MAX], usize) {
    let mut records = batch.chunks_exact_mut(RECORD_BYTES);
    let room_bytes = records.len() * PAYLOAD_MAX_BYTES;
    let slots = std::array::from_fn(|_| {
        let payload = records.next().map(|record| &mut record[BEFORE_BYTES..][..PAYLOAD_MAX_BYTES]);
        IoSliceMut::new(payload.unwrap_or_default())
    });
    (slots, room_bytes)
}

/// Returns the first byte of the first slot.
pub(crate) fn first_payload_byte(batch: &[u8]) -> u8 {
    batch[BEFORE_BYTES]
}

/// Writes the frame headers for `payload_bytes` read into the slots of `batch`, and passes each record to `seal`. Returns
/// the total bytes of the records.
pub(crate) fn seal_frames<E>(
    batch: &mut [u8],
    payload_bytes: usize,
    mut seal: impl FnMut(&mut [u8]) -> Result<(), E>,
) -> Result<usize, E> {
    let (mut left, mut end) = (payload_bytes, 0);
    for record in batch.chunks_exact_mut(RECORD_BYTES) {
        if left == 0 {
            break;
        }
        let here = left.min(PAYLOAD_MAX_BYTES);
        record[record::HEADER_BYTES..BEFORE_BYTES].copy_from_slice(&encode_header(FrameType::Data, here));
        let record_bytes = BEFORE_BYTES + here + record::TAIL_BYTES;
        seal(&mut record[..record_bytes])?;
        end += record_bytes;
        left -= here;
    }
    Ok(end)
}

/// Returns the number of records for `payload_bytes`.
pub(crate) fn records(payload_bytes: usize) -> u64 {
    payload_bytes.div_ceil(PAYLOAD_MAX_BYTES) as u64
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use tacit_core::wire::frame::{HEADER_BYTES, header};

    #[test]
    fn a_batch_is_full_frames_and_a_rest() {
        for (payload_bytes, expected) in [
            (0, vec![]),
            (1, vec![1]),
            (PAYLOAD_MAX_BYTES, vec![PAYLOAD_MAX_BYTES]),
            (PAYLOAD_MAX_BYTES + 5, vec![PAYLOAD_MAX_BYTES, 5]),
            (4 * PAYLOAD_MAX_BYTES, vec![PAYLOAD_MAX_BYTES; 4]),
        ] {
            let mut batch = vec![0; bytes(4)];
            let mut value = 0_u8;
            let (mut slots, room_bytes) = payload_slots(&mut batch);
            assert_eq!(room_bytes, slots.iter().map(|slot| slot.len()).sum::<usize>());
            for byte in slots.iter_mut().flat_map(|slot| slot.iter_mut()) {
                *byte = value;
                value = value.wrapping_add(1);
            }
            let (mut lengths, mut payload) = (vec![], Vec::<u8>::new());
            let sealed_bytes = seal_frames(&mut batch, payload_bytes, |record| {
                let frame = &record[record::HEADER_BYTES..record.len() - record::TAIL_BYTES];
                let head = header(frame).expect("well formed").expect("complete");
                payload.extend(&frame[HEADER_BYTES..]);
                lengths.push(head.payload_bytes);
                Ok::<_, Infallible>(())
            });
            let tails = expected.len() * (BEFORE_BYTES + record::TAIL_BYTES);
            assert_eq!(sealed_bytes, Ok(payload_bytes + tails));
            assert_eq!((lengths.len() as u64, lengths), (records(payload_bytes), expected));
            assert!(payload.iter().enumerate().all(|(at, byte)| *byte == (at % 256) as u8));
        }
    }
}
