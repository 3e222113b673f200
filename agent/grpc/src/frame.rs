//! Frames of messages: a flag for compression, four bytes of length, the message.
//!
//! Pure: the deframer gets bytes in any pieces and returns whole messages.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::Message;

/// Length of the compression flag and the length, in bytes.
const PREFIX_BYTES: usize = 5;

/// The reason why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The bytes are not exactly one frame.
    #[error("{0} bytes are not one gRPC message")]
    Frame(usize),
    /// The message is longer than the receiver allows.
    #[error("the message has {bytes} bytes, more than the maximum of {max_bytes}")]
    Long {
        /// Length that the frame states.
        bytes: usize,
        /// Maximum of the receiver.
        max_bytes: usize,
    },
    /// The message is compressed, which was not offered.
    #[error("the message is compressed, which was not offered")]
    Compressed,
    /// The flag of compression is neither 0 nor 1.
    #[error("the message starts with byte {0}, expected 0: it is not a gRPC message")]
    Flag(u8),
    /// The bytes ended within a frame.
    #[error("the messages ended within a message, after {0} bytes of it")]
    Cut(usize),
    /// The message does not match its definition.
    #[error("the message cannot be decoded: {0}")]
    Decode(String),
}

/// Returns the frame of one message.
///
/// # Panics
/// If the message has 4 GiB or more.
#[must_use]
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).expect("messages are far below 4 GiB"));
    message.encode(&mut out).expect("the buffer grows as needed");
    out.freeze()
}

/// Returns the message of which `bytes` are the frame.
///
/// # Errors
/// [`MessageError`].
pub fn unframe<M: Message + Default>(bytes: &[u8]) -> Result<M, MessageError> {
    let no_frame = || MessageError::Frame(bytes.len());
    let (prefix, body) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or_else(no_frame)?;
    if read_prefix(*prefix)? != body.len() {
        return Err(no_frame());
    }
    decode(body)
}

/// Decodes the content of a frame.
///
/// # Errors
/// [`MessageError::Decode`].
pub fn decode<M: Message + Default>(body: &[u8]) -> Result<M, MessageError> {
    M::decode(body).map_err(|e| MessageError::Decode(e.to_string()))
}

/// Returns the length that the prefix states.
fn read_prefix(prefix: [u8; PREFIX_BYTES]) -> Result<usize, MessageError> {
    let [flag, length @ ..] = prefix;
    match flag {
        0 => Ok(u32::from_be_bytes(length) as usize),
        1 => Err(MessageError::Compressed),
        flag => Err(MessageError::Flag(flag)),
    }
}

/// Splits bytes into frames. Holds at most one message, its prefix, and the bytes of the latest [`Deframer::push`].
#[derive(Debug)]
pub struct Deframer {
    held: BytesMut,
    max_bytes: usize,
}

impl Deframer {
    /// Returns a deframer that rejects messages of more than `max_bytes`.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { held: BytesMut::new(), max_bytes }
    }

    /// Adds bytes as they came. Call [`Deframer::next`] until it returns `None` before the next push.
    pub fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// Returns the content of the next whole frame; `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`MessageError`] as soon as the prefix shows it, before the message is buffered. The deframer is of no use afterwards.
    #[expect(clippy::should_implement_trait, reason = "an iterator would end at the first `None`")]
    pub fn next(&mut self) -> Result<Option<Bytes>, MessageError> {
        let Some(prefix) = self.held.first_chunk::<PREFIX_BYTES>() else {
            return Ok(None);
        };
        let bytes = read_prefix(*prefix)?;
        if bytes > self.max_bytes {
            return Err(MessageError::Long { bytes, max_bytes: self.max_bytes });
        }
        if self.held.len() - PREFIX_BYTES < bytes {
            return Ok(None);
        }
        self.held.advance(PREFIX_BYTES);
        Ok(Some(self.held.split_to(bytes).freeze()))
    }

    /// Checks that no frame is incomplete.
    ///
    /// # Errors
    /// [`MessageError::Cut`].
    pub fn end(&self) -> Result<(), MessageError> {
        if self.held.is_empty() { Ok(()) } else { Err(MessageError::Cut(self.held.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    fn text(text: &str) -> Text {
        Text { text: text.to_owned() }
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_split() {
        let messages = [text("one"), text(""), text("three")];
        let bytes: Vec<u8> = messages.iter().flat_map(frame).collect();
        for piece in 1..=bytes.len() {
            let mut deframer = Deframer::new(100);
            let mut found = Vec::new();
            for piece in bytes.chunks(piece) {
                deframer.push(piece);
                while let Some(frame) = deframer.next().expect("valid") {
                    found.push(decode::<Text>(&frame).expect("decodes"));
                }
            }
            assert_eq!(found, messages, "pieces of {piece} bytes");
            deframer.end().expect("whole");
        }
    }

    #[test]
    fn a_message_beyond_the_bound_is_rejected_by_its_prefix() {
        let mut deframer = Deframer::new(7);
        deframer.push(&frame(&text("1234 ")));
        assert!(deframer.next().expect("7 bytes are allowed").is_some());
        deframer.push(&[0, 0, 0, 0, 8]);
        assert_eq!(deframer.next(), Err(MessageError::Long { bytes: 8, max_bytes: 7 }));
        deframer = Deframer::new(7);
        deframer.push(&[0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(deframer.next(), Err(MessageError::Long { bytes: 0xffff_ffff, max_bytes: 7 }));
    }

    #[test]
    fn a_compressed_and_a_cut_frame_are_rejected() {
        let mut deframer = Deframer::new(100);
        deframer.push(&[1, 0, 0, 0, 0]);
        assert_eq!(deframer.next(), Err(MessageError::Compressed));
        deframer = Deframer::new(100);
        deframer.push(b"HTTP/");
        assert_eq!(deframer.next(), Err(MessageError::Flag(b'H')));
        let whole = frame(&text("cut"));
        for length in 1..whole.len() {
            deframer = Deframer::new(100);
            deframer.push(&whole[..length]);
            assert_eq!(deframer.next(), Ok(None));
            assert_eq!(deframer.end(), Err(MessageError::Cut(length)));
        }
    }

    #[test]
    fn only_one_whole_plain_message_is_unframed() {
        assert_eq!(unframe(&frame(&text("one"))), Ok(text("one")));
        for (bytes, refused) in [
            (&b""[..], MessageError::Frame(0)),
            (&[0, 0, 0, 0], MessageError::Frame(4)),
            (&[0, 0, 0, 0, 1], MessageError::Frame(5)),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], MessageError::Frame(10)),
            (&[1, 0, 0, 0, 0], MessageError::Compressed),
        ] {
            assert_eq!(unframe::<Text>(bytes), Err(refused), "{bytes:?}");
        }
        let broken = unframe::<Text>(&[0, 0, 0, 0, 2, 0x0a, 9]);
        assert!(matches!(broken, Err(MessageError::Decode(_))));
    }
}
