//! The frames of wire format `tacit/1`: pure encoding and decoding, no I/O.
//!
//! ```text
//! +--------+-----------------+---------------------+
//! | type 1 | length 3, bytes | payload 0 to 16,380 |      a TLS record holds exactly one frame
//! +--------+-----------------+---------------------+
//!
//! 1 OPEN    client -> server   version 1, destination 16 + 2, client 16 + 2, trace id 16, DATA ahead 0 or 1   (54 bytes)
//! 2 ACCEPT  server -> client   nothing: the destination answered, data may flow
//! 3 DENY    server -> client   reason 1
//! 4 DATA    both               1 to 16,380 bytes of the flow
//! 5 FIN     both               nothing: no more DATA from this side
//! 6 RESET   both               nothing: the flow was reset on this side, the session ends
//! 7 DONE    server -> client   nothing: both FINs passed and every byte reached the destination
//! 8 URGENT  both               1 byte of the flow, which the application sent as urgent data (MSG_OOB)
//! ```
//! URGENT is sent only to a peer that has agreed on ALPN `tacit/1.1`. Other peers get the byte in DATA.
//! Numbers are big-endian. An IPv4 address is written v4-mapped. DONE is what lets a client reuse a session safely: without
//! it, a flow could be put behind bytes that the previous flow's destination has not yet read.

use super::open::{DenyReason, InvalidOpen, OPEN_BYTES, Open};

/// Type and length of a frame.
pub const HEADER_BYTES: usize = 4;
/// Largest payload: with the header it fills one TLS record (2^14 bytes, RFC 8446 section 5.1).
pub const PAYLOAD_MAX_BYTES: usize = RECORD_BYTES - HEADER_BYTES;
/// A full frame.
pub const RECORD_BYTES: usize = 1 << 14;

/// The type of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table at the top of the file says what each is")]
pub enum FrameType {
    Open = 1,
    Accept = 2,
    Deny = 3,
    Data = 4,
    Fin = 5,
    Reset = 6,
    Done = 7,
    Urgent = 8,
}

impl FrameType {
    fn of(code: u8) -> Option<Self> {
        use FrameType::{Accept, Data, Deny, Done, Fin, Open, Reset, Urgent};
        [Open, Accept, Deny, Data, Fin, Reset, Done, Urgent].into_iter().find(|kind| *kind as u8 == code)
    }

    fn allows(self, payload_bytes: usize) -> bool {
        match self {
            Self::Open => payload_bytes == OPEN_BYTES,
            Self::Deny | Self::Urgent => payload_bytes == 1,
            // An empty DATA frame would cost work and carry nothing.
            Self::Data => (1..=PAYLOAD_MAX_BYTES).contains(&payload_bytes),
            Self::Accept | Self::Fin | Self::Reset | Self::Done => payload_bytes == 0,
        }
    }
}

/// Any frame but DATA, whose payload is not copied and so never becomes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table at the top of the file says what each is")]
pub enum Control {
    Open(Open),
    Accept,
    Deny(DenyReason),
    Fin,
    Reset,
    Done,
    Urgent(u8),
}

/// The mistake of received bytes that are no frame. The session cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No such type.
    #[error("frame type {0} is unknown")]
    Type(u8),
    /// The length does not fit the type.
    #[error("a frame of type {kind:?} cannot have {payload_bytes} bytes")]
    Length {
        /// Its type.
        kind: FrameType,
        /// The length it claims.
        payload_bytes: usize,
    },
    /// A record with more or less than one frame.
    #[error("a record of {record_bytes} bytes is not one frame")]
    NotOne {
        /// Length of the record, in bytes.
        record_bytes: usize,
    },
    /// The payload of OPEN is invalid.
    #[error(transparent)]
    Open(#[from] InvalidOpen),
}

/// Type and length of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Its type.
    pub kind: FrameType,
    /// Bytes of payload after the header.
    pub payload_bytes: usize,
}

/// The header at the head of `input`; `None` while it is incomplete.
///
/// # Errors
/// [`FrameError`] as soon as the bytes that are there are wrong.
#[inline]
pub fn header(input: &[u8]) -> Result<Option<FrameHeader>, FrameError> {
    let Some(first) = input.first() else {
        return Ok(None);
    };
    let kind = FrameType::of(*first).ok_or(FrameError::Type(*first))?;
    let Some(&[_, high, middle, low]) = input.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let payload_bytes = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
    if kind.allows(payload_bytes) {
        Ok(Some(FrameHeader { kind, payload_bytes }))
    } else {
        Err(FrameError::Length { kind, payload_bytes })
    }
}

/// The header of the frame that is all of `content`, what one record holds.
///
/// # Errors
/// [`FrameError`].
pub fn only(content: &[u8]) -> Result<FrameHeader, FrameError> {
    match header(content)? {
        Some(head) if content.len() == HEADER_BYTES + head.payload_bytes => Ok(head),
        _ => Err(FrameError::NotOne { record_bytes: content.len() }),
    }
}

impl Control {
    /// Its type.
    #[must_use]
    pub fn kind(&self) -> FrameType {
        match self {
            Self::Open(_) => FrameType::Open,
            Self::Accept => FrameType::Accept,
            Self::Deny(_) => FrameType::Deny,
            Self::Fin => FrameType::Fin,
            Self::Reset => FrameType::Reset,
            Self::Done => FrameType::Done,
            Self::Urgent(_) => FrameType::Urgent,
        }
    }

    /// The frame of `kind` with this payload; `None` for DATA or a payload that is not complete.
    ///
    /// # Errors
    /// [`FrameError`] when the payload says nothing of the kind.
    pub fn decode(kind: FrameType, payload: &[u8]) -> Result<Option<Self>, FrameError> {
        Ok(match kind {
            FrameType::Data => None,
            FrameType::Open => payload.first_chunk().map(Open::decode).transpose()?.map(Self::Open),
            FrameType::Deny => payload.first().map(|code| Self::Deny(DenyReason::of(*code))),
            FrameType::Accept => Some(Self::Accept),
            FrameType::Fin => Some(Self::Fin),
            FrameType::Reset => Some(Self::Reset),
            FrameType::Done => Some(Self::Done),
            FrameType::Urgent => payload.first().copied().map(Self::Urgent),
        })
    }

    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Open(open) => {
                out.extend(encode_header(FrameType::Open, OPEN_BYTES));
                open.encode(out);
            }
            Self::Deny(reason) => {
                out.extend(encode_header(FrameType::Deny, 1));
                out.push(reason.code());
            }
            Self::Urgent(byte) => {
                out.extend(encode_header(FrameType::Urgent, 1));
                out.push(*byte);
            }
            Self::Accept | Self::Fin | Self::Reset | Self::Done => out.extend(encode_header(self.kind(), 0)),
        }
    }
}

/// The header of a frame of `kind` with this many bytes of payload.
#[must_use]
#[inline]
pub fn encode_header(kind: FrameType, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    let [.., high, middle, low] = payload_bytes.to_be_bytes();
    [kind as u8, high, middle, low]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::open::{OptimisticMode, TraceId};

    fn open() -> Open {
        Open {
            destination: "10.77.2.3:80".parse().expect("an address"),
            client: "[fd77:1::2]:40000".parse().expect("an address"),
            trace: TraceId([0xab; 16]),
            optimistic_data: OptimisticMode::On,
        }
    }

    fn read_back(bytes: &[u8]) -> Result<Option<Control>, FrameError> {
        match header(bytes)? {
            Some(head) => Control::decode(head.kind, &bytes[HEADER_BYTES..]),
            None => Ok(None),
        }
    }

    #[test]
    fn every_control_frame_is_read_back_as_it_was_written() {
        let mut all =
            vec![Control::Open(open()), Control::Accept, Control::Fin, Control::Reset, Control::Done];
        all.extend((0..=255).map(|code| Control::Deny(DenyReason::of(code))));
        all.extend((0..=255).map(Control::Urgent));
        for frame in all {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            for cut in 0..bytes.len() {
                let partial = read_back(&bytes[..cut]);
                assert!(matches!(partial, Ok(None)), "{frame:?} cut at {cut}: {partial:?}");
            }
            assert_eq!(read_back(&bytes), Ok(Some(frame)));
        }
    }

    #[test]
    fn the_layout_of_open_is_fixed() {
        let mut bytes = Vec::new();
        Control::Open(open()).encode(&mut bytes);
        assert_eq!(bytes[..5], [1, 0, 0, 54, 1]);
        assert_eq!(bytes[5..23], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 77, 2, 3, 0, 80]);
        assert_eq!(bytes[23..41], [0xfd, 0x77, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x9c, 0x40]);
        assert_eq!(bytes[41..57], [0xab; 16]);
        assert_eq!(bytes[57..], [1]);
    }

    #[test]
    fn wrong_frames_are_refused_by_name() {
        let length = |kind, payload_bytes| Err(FrameError::Length { kind, payload_bytes });
        for (bytes, expected) in [
            (vec![0], Err(FrameError::Type(0))),
            (vec![9, 0], Err(FrameError::Type(9))),
            (vec![255, 0, 0, 0], Err(FrameError::Type(255))),
            (vec![1, 0, 0, 53], length(FrameType::Open, 53)),
            (vec![1, 0, 0, 55], length(FrameType::Open, 55)),
            (vec![2, 0, 0, 1], length(FrameType::Accept, 1)),
            (vec![3, 0, 0, 0], length(FrameType::Deny, 0)),
            (vec![4, 0, 0, 0], length(FrameType::Data, 0)),
            (vec![4, 0, 0x3f, 0xfd], length(FrameType::Data, 16381)),
            (vec![4, 0xff, 0xff, 0xff], length(FrameType::Data, 0xff_ffff)),
            (vec![5, 0, 1, 0], length(FrameType::Fin, 256)),
            (vec![6, 1, 0, 0], length(FrameType::Reset, 65536)),
            (vec![7, 0, 0, 2], length(FrameType::Done, 2)),
            (vec![8, 0, 0, 0], length(FrameType::Urgent, 0)),
            (vec![8, 0, 0, 2], length(FrameType::Urgent, 2)),
        ] {
            assert_eq!(read_back(&bytes), expected, "{bytes:?}");
        }
        let mut bytes = Vec::new();
        Control::Open(open()).encode(&mut bytes);
        let mut newer = bytes.clone();
        newer[4] = 2;
        assert_eq!(read_back(&newer), Err(InvalidOpen::Version(2).into()));
        let mut odd = bytes.clone();
        odd[57] = 2;
        assert_eq!(read_back(&odd), Err(InvalidOpen::OptimisticData(2).into()));
        bytes[21..23].fill(0);
        assert!(matches!(read_back(&bytes), Err(FrameError::Open(InvalidOpen::Destination(_)))));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200_000 {
            let mut bytes = [0_u8; 64];
            for byte in &mut bytes {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (state >> 56) as u8;
            }
            // Mostly plausible headers, so that payloads are reached too.
            bytes[0] %= 10;
            if state & 1 == 0 {
                bytes[1..4].copy_from_slice(&[0, 0, 54]);
            }
            let length = usize::from(bytes[63]) % bytes.len();
            let _ = read_back(&bytes[..length]);
        }
    }
}
