//! Buffer of received records. Records are opened and parsed in place, without I/O.
//!
//! DATA payload is never copied. [`ReceiveBuffer::payloads`] returns slices of it for one write, and
//! [`ReceiveBuffer::consume`] removes the written bytes. Records may arrive in any pieces. Each record holds exactly one frame.

use std::{io::IoSlice, ops::Range};

use tacit_core::wire::frame::{self, Control, HEADER_BYTES};

use super::{
    TunnelError,
    batch::FRAMES_MAX,
    buffers::{Buffer, Size},
    record::{self, Opened, RecordError},
};

/// If less room than this is left behind the last byte, the bytes are moved to the front. A full record and its padding.
const ROOM_MIN_BYTES: usize = frame::RECORD_BYTES + 512;

/// The next frame in order of arrival.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A frame other than DATA.
    Control(Control),
    /// DATA frames: see [`ReceiveBuffer::payloads`].
    Data,
}

/// The item that follows the opened payload.
enum Following {
    Control(Control),
    /// The peer has closed the session.
    Closed,
    Failed(TunnelError),
}

/// Bytes that are received and not yet forwarded.
#[derive(Default)]
pub(crate) struct ReceiveBuffer {
    /// `None` if the buffer is empty or holds only part of a record.
    buffer: Option<Buffer>,
    /// The bytes from `start` to `end` are not opened.
    start: usize,
    end: usize,
    payloads: Payloads,
    next: Option<Following>,
    /// The start of an incomplete record, kept here so that a waiting flow holds no buffer.
    partial: Vec<u8>,
    size: Size,
    /// Large buffers may be used.
    may_grow: bool,
    /// A large buffer would have been used.
    is_short: bool,
}

impl ReceiveBuffer {
    /// Returns a buffer that starts with the bytes received behind the handshake.
    pub(crate) fn with(partial: Vec<u8>) -> Self {
        Self { partial, ..Self::default() }
    }

    /// Returns the bytes received behind the handshake, before a record was opened.
    pub(crate) fn into_unopened(self) -> Vec<u8> {
        self.partial
    }

    /// Returns true if no byte is buffered.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end && self.partial.is_empty() && self.payloads.is_empty() && self.next.is_none()
    }

    /// Returns the space for received bytes, never empty. Call it only when [`ReceiveBuffer::next`] returns `None`.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let buffer = match self.buffer.take() {
            // The rest is less than a record, so it fits at the front with room to spare.
            Some(mut buffer) => {
                if buffer.len() - self.end < ROOM_MIN_BYTES {
                    buffer.copy_within(self.start..self.end, 0);
                    (self.start, self.end) = (0, self.end - self.start);
                }
                buffer
            }
            None => {
                let mut buffer = Buffer::take(self.size);
                (self.start, self.end) = (0, self.partial.len());
                buffer[..self.end].copy_from_slice(&self.partial);
                self.partial = Vec::new();
                buffer
            }
        };
        &mut self.buffer.insert(buffer)[self.end..]
    }

    /// Records that `received_bytes` were written to a room of `room_bytes`.
    pub(crate) fn filled(&mut self, received_bytes: usize, room_bytes: usize) {
        self.end += received_bytes;
        let next = self.size.after(received_bytes, room_bytes);
        self.is_short = next == Size::Large && !self.may_grow;
        self.size = if self.may_grow { next } else { next.small() };
    }

    /// Returns true if the last bytes would have been followed by a larger read.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short
    }

    /// Permits large buffers, or ends that.
    pub(crate) fn set_may_grow(&mut self, may_grow: bool) {
        self.may_grow = may_grow;
        self.size = if may_grow { self.size } else { self.size.small() };
    }

    /// Returns the buffer to its cache until more bytes arrive.
    pub(crate) fn pause(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.partial = buffer[self.start..self.end].to_vec();
            (self.start, self.end) = (0, 0);
        }
        if self.payloads.is_empty() {
            self.payloads = Payloads::default();
        }
    }

    /// Returns the next frame. `open` decrypts a record. Returns `None` if more bytes are needed, and [`Received::Data`] until
    /// its payload is consumed.
    ///
    /// # Errors
    /// The error of `open`, or an invalid frame, after everything before it is consumed.
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
            Some(Following::Control(control)) => Ok(Some(Received::Control(control))),
            Some(Following::Closed) => Err(TunnelError::Closed),
            Some(Following::Failed(error)) => Err(error),
        }
    }

    /// Opens the complete records, up to the first that is not DATA.
    fn open_records(&mut self, mut open: impl FnMut(&mut [u8]) -> Result<Opened, RecordError>) {
        if self.buffer.is_none() && !self.partial.is_empty() {
            self.room();
        }
        let Some(buffer) = &mut self.buffer else { return };
        while self.next.is_none() && !self.payloads.is_full() {
            let rest = &mut buffer[self.start..self.end];
            let record = match record::record_bytes(rest) {
                Ok(Some(record_bytes)) if record_bytes <= rest.len() => &mut rest[..record_bytes],
                Ok(_) => return,
                Err(error) => {
                    self.next = Some(Following::Failed(error.into()));
                    return;
                }
            };
            let at = self.start;
            self.start += record.len();
            self.next = match open(record) {
                Ok(Opened::Nothing) => None,
                Ok(Opened::Closed) => Some(Following::Closed),
                Err(error) => Some(Following::Failed(error.into())),
                Ok(Opened::Data(content)) => match frame_of(&record[content.clone()]) {
                    Ok(None) => {
                        self.payloads.push(at + content.start + HEADER_BYTES..at + content.end);
                        None
                    }
                    Ok(Some(control)) => Some(Following::Control(control)),
                    Err(error) => Some(Following::Failed(error.into())),
                },
            };
        }
    }

    /// Returns true if opened payload is waiting.
    pub(crate) fn has_payload(&self) -> bool {
        !self.payloads.is_empty()
    }

    /// Points `slices` at the opened payload; returns the number of slices used.
    pub(crate) fn payloads<'a>(&'a self, slices: &mut [IoSlice<'a>; FRAMES_MAX]) -> usize {
        let Some(buffer) = &self.buffer else { return 0 };
        let mut used = 0;
        for (slice, payload) in slices.iter_mut().zip(self.payloads.iter()) {
            *slice = IoSlice::new(&buffer[payload]);
            used += 1;
        }
        used
    }

    /// Returns true if everything up to FIN is opened.
    pub(crate) fn fin_follows(&self) -> bool {
        matches!(self.next, Some(Following::Control(Control::Fin)))
    }

    /// Removes `written_bytes` of the payload that [`ReceiveBuffer::payloads`] returned.
    pub(crate) fn consume(&mut self, written_bytes: usize) {
        self.payloads.consume(written_bytes);
        self.release();
    }

    /// Returns the buffer to its cache if it is empty.
    fn release(&mut self) {
        if self.start == self.end && self.payloads.is_empty() {
            (self.start, self.end) = (0, 0);
            self.buffer = None;
        }
    }
}

/// Parses `content` as exactly one frame; returns `None` for DATA.
fn frame_of(content: &[u8]) -> Result<Option<Control>, frame::FrameError> {
    let head = frame::only(content)?;
    Control::decode(head.kind, &content[HEADER_BYTES..])
}

/// The positions of opened payload in order of arrival, at most [`FRAMES_MAX`].
#[derive(Default)]
struct Payloads {
    /// The first span. Short exchanges have no other, so they allocate nothing.
    head: Span,
    /// The following spans. [`ReceiveBuffer::pause`] frees their memory, because idle flows keep this value.
    tail: Vec<Span>,
    /// Number of consumed spans of `tail`.
    consumed: usize,
}

/// Offsets in the buffer; `start` equals `end` in an empty span.
#[derive(Clone, Copy, Default)]
struct Span {
    start: u32,
    end: u32,
}

impl Span {
    fn is_empty(self) -> bool {
        self.start == self.end
    }

    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Removes up to `bytes`; returns the bytes left for the following spans.
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

    /// Appends a span. Call it only if the list is not full.
    fn push(&mut self, span: Range<usize>) {
        let span = Span { start: span.start as u32, end: span.end as u32 };
        if self.is_empty() {
            self.head = span;
        } else {
            self.tail.push(span);
        }
    }

    fn iter(&self) -> impl Iterator<Item = Range<usize>> + use<'_> {
        let head = Some(self.head).filter(|head| !head.is_empty());
        head.into_iter().chain(self.tail[self.consumed..].iter().copied()).map(Span::range)
    }

    fn consume(&mut self, bytes: usize) {
        let mut bytes = self.head.consume(bytes);
        while bytes > 0
            && let Some(span) = self.tail.get_mut(self.consumed)
        {
            bytes = span.consume(bytes);
            self.consumed += usize::from(span.is_empty());
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
    use crate::record::{HEADER_BYTES as RECORD_HEADER, TAIL_BYTES};
    use tacit_core::wire::frame::FrameType;

    /// Returns a record in the format of `open` below, without encryption.
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

    /// Feeds `bytes` in pieces of `piece` and consumes at most `bite` at a time. Returns the payload, control frames and error.
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
    fn a_session_end_is_reported_after_the_data_before_it_is_consumed() {
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
            assert_eq!(
                (got.as_slice(), error.map(|e| e.reason().label())),
                (b"abc".as_slice(), Some(reason))
            );
        }
    }
}
