//! Received bytes on their way from the tunnel to the application: split into frames in place, no I/O.
//!
//! DATA payload is never copied out: [`Inbox::payloads`] shows where it lies, for one write to take as much as it can, and
//! [`Inbox::consume`] says how much it took. A frame may arrive in any pieces.

use std::io::IoSlice;

use super::{
    batch::BATCH_FRAMES,
    buffers::Buffer,
    frame::{self, Control, FrameError, HEADER_BYTES, Kind},
};

/// With less room than this behind the last byte, the bytes move to the front first. Above any control frame.
const ROOM_MIN_BYTES: usize = 4096;

/// The next thing in the order of arrival.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A frame other than DATA.
    Control(Control),
    /// A DATA frame: see [`Inbox::payloads`].
    Data,
}

/// The bytes received and not yet passed on.
#[derive(Default)]
pub(crate) struct Inbox {
    /// `None` when empty.
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    /// Payload of the current DATA frame that is not consumed, received or not.
    payload_bytes: usize,
}

impl Inbox {
    /// True when no byte waits and no frame is half received.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end && self.payload_bytes == 0
    }

    /// Where received bytes go; never empty while payload and frames are taken out first.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        if buffer.len() - self.end < ROOM_MIN_BYTES {
            buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut buffer[self.end..]
    }

    /// `received_bytes` were written to the room.
    pub(crate) fn filled(&mut self, received_bytes: usize) {
        self.end += received_bytes;
        self.release();
    }

    /// The next frame; `None` until more arrives. [`Received::Data`] is returned until its payload is consumed.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are no frame.
    pub(crate) fn next(&mut self) -> Result<Option<Received>, FrameError> {
        if self.payload_bytes > 0 {
            return Ok((self.start < self.end).then_some(Received::Data));
        }
        let Some(head) = frame::header(self.bytes())? else {
            return Ok(None);
        };
        if head.kind == Kind::Data {
            self.start += HEADER_BYTES;
            self.payload_bytes = head.payload_bytes;
            return self.next();
        }
        let frame = Control::decode(head.kind, &self.bytes()[HEADER_BYTES..])?;
        if frame.is_some() {
            self.start += HEADER_BYTES + head.payload_bytes;
            self.release();
        }
        Ok(frame.map(Received::Control))
    }

    /// Points `slices` at the payload of the current DATA frame and of those that follow it at once; returns how many
    /// slices are used.
    pub(crate) fn payloads<'a>(&'a self, slices: &mut [IoSlice<'a>; BATCH_FRAMES]) -> usize {
        let mut rest = self.bytes();
        let mut payload_bytes = self.payload_bytes;
        let mut used = 0;
        while used < BATCH_FRAMES && payload_bytes > 0 && !rest.is_empty() {
            let (payload, after) = rest.split_at(payload_bytes.min(rest.len()));
            slices[used] = IoSlice::new(payload);
            used += 1;
            (payload_bytes, rest) = match frame::header(after) {
                Ok(Some(head)) if head.kind == Kind::Data => (head.payload_bytes, &after[HEADER_BYTES..]),
                // Incomplete, something else or wrong: for `next` to say.
                _ => break,
            };
        }
        used
    }

    /// `written_bytes` of what [`Inbox::payloads`] showed were taken.
    pub(crate) fn consume(&mut self, written_bytes: usize) {
        let mut left = written_bytes;
        while left > 0 {
            if self.payload_bytes == 0 {
                // Shown by `payloads`, so this is a DATA frame.
                let Ok(Some(head)) = frame::header(self.bytes()) else {
                    break;
                };
                self.start += HEADER_BYTES;
                self.payload_bytes = head.payload_bytes;
            }
            let here = left.min(self.payload_bytes);
            self.start += here;
            self.payload_bytes -= here;
            left -= here;
        }
        self.release();
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// Gives the buffer back when nothing is in it.
    fn release(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.buffer = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::batch::{BATCH_BYTES, frames, payload_slots};

    fn stream() -> (Vec<u8>, Vec<u8>) {
        let mut batch = vec![0; BATCH_BYTES];
        let mut value = 7_u8;
        for byte in payload_slots(&mut batch).iter_mut().flat_map(|slot| slot.iter_mut()) {
            value = value.wrapping_mul(5).wrapping_add(3);
            *byte = value;
        }
        let payload = payload_slots(&mut batch).iter().flat_map(|slot| slot.to_vec()).take(40_000).collect();
        let mut bytes = Vec::new();
        Control::Accept.encode(&mut bytes);
        bytes.extend(frames(&mut batch, 40_000));
        Control::Fin.encode(&mut bytes);
        Control::Done.encode(&mut bytes);
        (bytes, payload)
    }

    /// Feeds `bytes` in pieces of `piece`, takes at most `bite` at a time, and returns payload and control frames.
    fn run(bytes: &[u8], piece: usize, bite: usize) -> (Vec<u8>, Vec<Control>) {
        let (mut inbox, mut payload, mut controls) = (Inbox::default(), Vec::new(), Vec::new());
        for part in bytes.chunks(piece) {
            inbox.room()[..part.len()].copy_from_slice(part);
            inbox.filled(part.len());
            while let Some(received) = inbox.next().expect("well formed") {
                match received {
                    Received::Control(control) => controls.push(control),
                    Received::Data => {
                        let mut slices = [IoSlice::new(&[]); BATCH_FRAMES];
                        let used = inbox.payloads(&mut slices);
                        assert!(used > 0);
                        let shown: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
                        let taken = shown.len().min(bite);
                        payload.extend(&shown[..taken]);
                        inbox.consume(taken);
                    }
                }
            }
        }
        assert!(inbox.is_empty() && inbox.buffer.is_none());
        (payload, controls)
    }

    #[test]
    fn any_pieces_in_and_any_bites_out_give_the_same_flow() {
        let (bytes, payload) = stream();
        for piece in [1, 3, 4, 1000, 16_384, 50_000] {
            for bite in [1_000, 16_380, 16_381, usize::MAX] {
                let (got, controls) = run(&bytes, piece, bite);
                assert!(got == payload, "piece {piece}, bite {bite}");
                assert_eq!(controls, [Control::Accept, Control::Fin, Control::Done]);
            }
        }
    }

    #[test]
    fn a_wrong_frame_behind_data_is_found_once_the_data_is_taken() {
        let mut inbox = Inbox::default();
        let bytes = [4, 0, 0, 1, b'x', 99];
        inbox.room()[..bytes.len()].copy_from_slice(&bytes);
        inbox.filled(bytes.len());
        assert_eq!(inbox.next(), Ok(Some(Received::Data)));
        let mut slices = [IoSlice::new(&[]); BATCH_FRAMES];
        assert_eq!(inbox.payloads(&mut slices), 1);
        inbox.consume(1);
        assert_eq!(inbox.next(), Err(FrameError::Type(99)));
    }
}
