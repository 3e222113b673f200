//! Received records on their way to the application: opened and taken apart where they were received, no I/O.
//!
//! DATA payload is never copied: [`ReceiveBuffer::payloads`] shows where it lies, for one write to take as much as it can, and
//! [`ReceiveBuffer::consume`] says how much it took. Records may arrive in any pieces; each holds exactly one frame.

use std::{io::IoSlice, ops::Range};

use tacit_core::wire::frame::{self, Control, HEADER_BYTES};

use super::{
    TunnelError,
    batch::FRAMES_MAX,
    buffers::{Buffer, Size},
    tls::record::{self, Opened, RecordError},
};

/// With less room than this behind the last byte, the bytes move to the front first: a full record and its padding.
const ROOM_MIN_BYTES: usize = frame::RECORD_BYTES + 512;

/// The next thing in the order of arrival.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A frame other than DATA.
    Control(Control),
    /// DATA frames: see [`ReceiveBuffer::payloads`].
    Data,
}

/// What stands behind the payload that is opened.
enum Next {
    Control(Control),
    /// The peer has closed the session.
    Closed,
    Failed(TunnelError),
}

/// What was received and not yet passed on.
#[derive(Default)]
pub(crate) struct ReceiveBuffer {
    /// `None` when nothing is in it, or less than a record that waits for its rest.
    buffer: Option<Buffer>,
    /// What is not opened.
    start: usize,
    end: usize,
    payloads: Payloads,
    next: Option<Next>,
    /// The beginning of a record while the peer does not go on: a buffer is not held for it.
    beginning: Vec<u8>,
    size: Size,
}

impl ReceiveBuffer {
    /// Begins with bytes that came behind the handshake.
    pub(crate) fn with(beginning: Vec<u8>) -> Self {
        Self { beginning, ..Self::default() }
    }

    /// True when no byte waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end && self.beginning.is_empty() && self.payloads.is_empty() && self.next.is_none()
    }

    /// Where received bytes go; never empty. Only while [`ReceiveBuffer::next`] has nothing.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let buffer = match self.buffer.take() {
            // What is left is less than a record, so the front has room for it and more.
            Some(mut buffer) => {
                if buffer.len() - self.end < ROOM_MIN_BYTES {
                    buffer.copy_within(self.start..self.end, 0);
                    (self.start, self.end) = (0, self.end - self.start);
                }
                buffer
            }
            None => {
                let mut buffer = Buffer::take(self.size);
                (self.start, self.end) = (0, self.beginning.len());
                buffer[..self.end].copy_from_slice(&self.beginning);
                self.beginning = Vec::new();
                buffer
            }
        };
        &mut self.buffer.insert(buffer)[self.end..]
    }

    /// `received_bytes` were written to a room of `room_bytes`.
    pub(crate) fn filled(&mut self, received_bytes: usize, room_bytes: usize) {
        self.end += received_bytes;
        self.size = self.size.after(received_bytes, room_bytes);
    }

    /// Nothing more is there now: the buffer is given back.
    pub(crate) fn pause(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.beginning = buffer[self.start..self.end].to_vec();
            (self.start, self.end) = (0, 0);
        }
        if self.payloads.is_empty() {
            self.payloads = Payloads::default();
        }
    }

    /// The next frame, by records that `open` decrypts; `None` until more arrives. [`Received::Data`] is returned until its
    /// payload is consumed.
    ///
    /// # Errors
    /// What `open` says, or that a record is no frame; once all that came before is taken.
    pub(crate) fn next(
        &mut self,
        open: impl FnMut(&mut [u8]) -> Result<Opened, RecordError>,
    ) -> Result<Option<Received>, TunnelError> {
        if self.payloads.is_empty() && self.next.is_none() {
            self.open_records(open);
        }
        if !self.payloads.is_empty() {
            return Ok(Some(Received::Data));
        }
        let next = self.next.take();
        self.release();
        match next {
            None => Ok(None),
            Some(Next::Control(control)) => Ok(Some(Received::Control(control))),
            Some(Next::Closed) => Err(TunnelError::Closed),
            Some(Next::Failed(error)) => Err(error),
        }
    }

    /// Opens the records that are complete, up to one that is no DATA.
    fn open_records(&mut self, mut open: impl FnMut(&mut [u8]) -> Result<Opened, RecordError>) {
        if self.buffer.is_none() && !self.beginning.is_empty() {
            self.room();
        }
        let Some(buffer) = &mut self.buffer else { return };
        while self.next.is_none() && !self.payloads.is_full() {
            let rest = &mut buffer[self.start..self.end];
            let record = match record::record_bytes(rest) {
                Ok(Some(record_bytes)) if record_bytes <= rest.len() => &mut rest[..record_bytes],
                Ok(_) => return,
                Err(error) => {
                    self.next = Some(Next::Failed(error.into()));
                    return;
                }
            };
            let at = self.start;
            self.start += record.len();
            self.next = match open(record) {
                Ok(Opened::Nothing) => None,
                Ok(Opened::Closed) => Some(Next::Closed),
                Err(error) => Some(Next::Failed(error.into())),
                Ok(Opened::Data(content)) => match frame_of(&record[content.clone()]) {
                    Ok(None) => {
                        self.payloads.push(at + content.start + HEADER_BYTES..at + content.end);
                        None
                    }
                    Ok(Some(control)) => Some(Next::Control(control)),
                    Err(error) => Some(Next::Failed(error.into())),
                },
            };
        }
    }

    /// True when payload is opened.
    pub(crate) fn has_payload(&self) -> bool {
        !self.payloads.is_empty()
    }

    /// Points `slices` at the payload that is opened; returns how many are used.
    pub(crate) fn payloads<'a>(&'a self, slices: &mut [IoSlice<'a>; FRAMES_MAX]) -> usize {
        let Some(buffer) = &self.buffer else { return 0 };
        let mut used = 0;
        for (slice, payload) in slices.iter_mut().zip(self.payloads.iter()) {
            *slice = IoSlice::new(&buffer[payload]);
            used += 1;
        }
        used
    }

    /// True when all up to FIN has been opened.
    pub(crate) fn ends_behind(&self) -> bool {
        matches!(self.next, Some(Next::Control(Control::Fin)))
    }

    /// `written_bytes` of what [`ReceiveBuffer::payloads`] showed were taken.
    pub(crate) fn consume(&mut self, written_bytes: usize) {
        self.payloads.consume(written_bytes);
        self.release();
    }

    /// Gives the buffer back when nothing is in it.
    fn release(&mut self) {
        if self.start == self.end && self.payloads.is_empty() {
            (self.start, self.end) = (0, 0);
            self.buffer = None;
        }
    }
}

/// The frame that is all of `content`; `None` for DATA.
fn frame_of(content: &[u8]) -> Result<Option<Control>, frame::FrameError> {
    let head = frame::only(content)?;
    Control::decode(head.kind, &content[HEADER_BYTES..])
}

/// Where opened payload stands, in the order of arrival; at most [`FRAMES_MAX`] places.
#[derive(Default)]
struct Payloads {
    /// The first place, most often the only one: an exchange of a few bytes takes no memory for places.
    head: Place,
    /// Those behind it. [`ReceiveBuffer::pause`] gives their memory back, as a flow keeps this while it is idle.
    tail: Vec<Place>,
    /// How many of `tail` are consumed.
    consumed: usize,
}

/// Offsets; empty when nothing stands there.
#[derive(Clone, Copy, Default)]
struct Place {
    start: u32,
    end: u32,
}

impl Place {
    fn is_empty(self) -> bool {
        self.start == self.end
    }

    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Takes up to `bytes` off; returns how many of those belong to what follows.
    fn consume(&mut self, bytes: usize) -> usize {
        let here = bytes.min(self.range().len());
        self.start += here as u32;
        bytes - here
    }
}

impl Payloads {
    fn is_empty(&self) -> bool {
        self.head.is_empty() && self.consumed == self.tail.len()
    }

    fn is_full(&self) -> bool {
        1 + self.tail.len() == FRAMES_MAX
    }

    /// Only while there is room.
    fn push(&mut self, place: Range<usize>) {
        let place = Place { start: place.start as u32, end: place.end as u32 };
        if self.is_empty() {
            self.head = place;
        } else {
            self.tail.push(place);
        }
    }

    fn iter(&self) -> impl Iterator<Item = Range<usize>> + use<'_> {
        let head = Some(self.head).filter(|head| !head.is_empty());
        head.into_iter().chain(self.tail[self.consumed..].iter().copied()).map(Place::range)
    }

    fn consume(&mut self, bytes: usize) {
        let mut bytes = self.head.consume(bytes);
        while bytes > 0
            && let Some(place) = self.tail.get_mut(self.consumed)
        {
            bytes = place.consume(bytes);
            self.consumed += usize::from(place.is_empty());
        }
        if self.is_empty() {
            self.tail.clear();
            self.consumed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::record::{HEADER_BYTES as RECORD_HEADER, TAIL_BYTES};
    use tacit_core::wire::frame::FrameType;

    /// A record as `open` below takes it: sealed with nothing.
    fn record(content: &[u8]) -> Vec<u8> {
        let [high, low] = ((content.len() + TAIL_BYTES) as u16).to_be_bytes();
        [&[23, 3, 3, high, low], content, &[0; TAIL_BYTES]].concat()
    }

    fn open(record: &mut [u8]) -> Result<Opened, RecordError> {
        let content = RECORD_HEADER..record.len() - TAIL_BYTES;
        match record.get(RECORD_HEADER) {
            Some(0xee) => Err(RecordError::Decrypt),
            Some(0xcc) => Ok(Opened::Closed),
            Some(0xaa) => Ok(Opened::Nothing),
            _ => Ok(Opened::Data(content)),
        }
    }

    fn data(payload: &[u8]) -> Vec<u8> {
        record(&[&frame::encode_header(FrameType::Data, payload.len()), payload].concat())
    }

    fn control(control: Control) -> Vec<u8> {
        let mut frame = Vec::new();
        control.encode(&mut frame);
        record(&frame)
    }

    fn stream() -> (Vec<u8>, Vec<u8>) {
        let payload: Vec<u8> =
            (0..700_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut bytes = control(Control::Accept);
        for chunk in payload.chunks(frame::PAYLOAD_MAX_BYTES) {
            bytes.extend(data(chunk));
            bytes.extend(record(&[0xaa]));
        }
        bytes.extend(control(Control::Fin));
        bytes.extend(control(Control::Done));
        (bytes, payload)
    }

    /// Feeds `bytes` in pieces of `piece`, takes at most `bite` at a time; payload, control frames and the end.
    fn run(bytes: &[u8], piece: usize, bite: usize) -> (Vec<u8>, Vec<Control>, Option<TunnelError>) {
        let (mut receive_buffer, mut payload, mut controls) =
            (ReceiveBuffer::default(), Vec::new(), Vec::new());
        let mut left = bytes;
        while !left.is_empty() {
            let room = receive_buffer.room();
            let (part, rest) = left.split_at(piece.min(left.len()).min(room.len()));
            room[..part.len()].copy_from_slice(part);
            let room_bytes = room.len();
            receive_buffer.filled(part.len(), room_bytes);
            left = rest;
            loop {
                match receive_buffer.next(open) {
                    Ok(None) => break,
                    Ok(Some(Received::Control(control))) => controls.push(control),
                    Ok(Some(Received::Data)) => {
                        let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
                        let used = receive_buffer.payloads(&mut slices);
                        assert!(used > 0);
                        let shown: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
                        let taken = shown.len().min(bite);
                        payload.extend(&shown[..taken]);
                        receive_buffer.consume(taken);
                    }
                    Err(error) => return (payload, controls, Some(error)),
                }
            }
            receive_buffer.pause();
            assert!(receive_buffer.buffer.is_none(), "a flow that waits holds a buffer");
        }
        assert!(receive_buffer.is_empty());
        (payload, controls, None)
    }

    #[test]
    fn any_pieces_in_and_any_bites_out_give_the_same_flow() {
        let (bytes, payload) = stream();
        for piece in [999, 16_384, 50_000, usize::MAX] {
            for bite in [16_379, 16_380, 16_381, usize::MAX] {
                let (got, controls, end) = run(&bytes, piece, bite);
                assert!(got == payload && end.is_none(), "piece {piece}, bite {bite}");
                assert_eq!(controls, [Control::Accept, Control::Fin, Control::Done]);
            }
        }
        // ACCEPT, DATA, nothing, DATA.
        let (got, ..) = run(&bytes[..26 + 16_406 + 23 + 16_406], 1, 7);
        assert!(got == payload[..2 * frame::PAYLOAD_MAX_BYTES]);
    }

    #[test]
    fn whatever_ends_a_session_is_said_once_the_data_before_it_is_taken() {
        for (end, reason) in [
            (record(&[99]), "protocol"),
            (record(&[0xee]), "tls"),
            (record(&[0xcc]), "closed"),
            (record(&[4, 0, 0, 2, b'x']), "protocol"),
            (record(&[5, 0, 0, 0, 5, 0, 0, 0]), "protocol"),
            (record(&[5, 0, 0]), "protocol"),
            (vec![23, 3, 3, 0xff, 0xff], "tls"),
        ] {
            let (got, _, error) = run(&[data(b"abc"), end].concat(), usize::MAX, 1);
            assert_eq!((got.as_slice(), error.map(|e| e.reason())), (b"abc".as_slice(), Some(reason)));
        }
    }
}
