//! TLS 1.3 records after the handshake (RFC 8446 section 5), sealed and opened in place. The layer does no I/O and buffers only
//! handshake messages that arrive in pieces.
//!
//! rustls runs the handshake and keeps the key schedule ([`KernelConnection`]). This layer keeps the traffic keys and the
//! sequence numbers. It answers KeyUpdate, and sends KeyUpdate before a key reaches its record limit. It accepts tickets without
//! using them, and handles alerts. Any other message ends the connection with the alert that the RFC requires.
//! A connection adapter would copy each byte twice more and read only a few KiB per system call.

#[cfg(any(test, fuzzing))]
pub(crate) mod fixed;
#[cfg(test)]
mod tests;

use std::ops::Range;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ExtractedSecrets, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

/// Type, legacy version and length.
pub(crate) const HEADER_BYTES: usize = 5;
/// The inner content type and the AEAD's tag.
pub(crate) const TAIL_BYTES: usize = 1 + TAG_BYTES;
/// Maximum content of a record.
pub(crate) const CONTENT_MAX_BYTES: usize = 1 << 14;

/// Tag size of every AEAD of TLS 1.3.
const TAG_BYTES: usize = 16;
/// Maximum bytes behind a header (RFC 8446 section 5.2).
const SEALED_MAX_BYTES: usize = CONTENT_MAX_BYTES + 256;
/// Maximum consecutive records without data. It exceeds the initial tickets of a server, and equals the limit of rustls.
const WITHOUT_DATA_MAX: u32 = 32;
/// Maximum size of a handshake message after the handshake, enough for a ticket with its extensions.
const MESSAGE_MAX_BYTES: usize = 1 << 16;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// The reason why the record layer ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The record was modified, or sealed with another key.
    #[error("a record cannot be decrypted: it was modified in transit, or the peer used other keys")]
    Decrypt,
    /// The record is longer than the RFC allows.
    #[error("a record is longer than TLS allows")]
    Overflow,
    /// The message is not allowed in the current state.
    #[error("{0} is not allowed here")]
    Unexpected(&'static str),
    /// The message cannot be parsed.
    #[error("invalid {0}")]
    Malformed(&'static str),
    /// Too many consecutive records without data.
    #[error("{WITHOUT_DATA_MAX} records in a row carry no data")]
    Flood,
    /// The peer ended the connection with an alert.
    #[error("the peer sent the alert {0:?}")]
    Alert(AlertDescription),
    /// Local keys cannot be derived, or have reached their limit.
    #[error("the keys cannot be used: {0}")]
    Keys(&'static str),
}

impl RecordError {
    /// Returns the alert to send (RFC 8446 section 6), or `None` if the peer has ended the connection.
    pub(super) fn alert(&self) -> Option<AlertDescription> {
        match self {
            Self::Decrypt => Some(AlertDescription::BadRecordMac),
            Self::Overflow => Some(AlertDescription::RecordOverflow),
            Self::Unexpected(_) | Self::Flood => Some(AlertDescription::UnexpectedMessage),
            Self::Malformed(_) => Some(AlertDescription::DecodeError),
            Self::Keys(_) => Some(AlertDescription::InternalError),
            Self::Alert(_) => None,
        }
    }
}

/// The content of an opened record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Data, at this range of the record.
    Data(Range<usize>),
    /// A message that the record layer has handled.
    Nothing,
    /// close_notify.
    Closed,
}

/// The key schedule of one connection.
pub(super) enum Schedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
    /// Fixed keys, for tests without a handshake.
    #[cfg(any(test, fuzzing))]
    Fixed,
}

/// Both directions of one connection.
pub(crate) struct Records {
    sending: Keys,
    receiving: Keys,
    schedule: Schedule,
    /// The received part of an incomplete handshake message.
    message: Vec<u8>,
    without_data: u32,
    /// The peer has requested a KeyUpdate.
    owes_key_update: bool,
    closed: bool,
}

impl Records {
    pub(super) fn new(secrets: ExtractedSecrets, schedule: Schedule) -> Result<Self, RecordError> {
        let limit = schedule.confidentiality_limit()?;
        Ok(Self {
            sending: Keys::new(secrets.tx, limit)?,
            receiving: Keys::new(secrets.rx, u64::MAX)?,
            schedule,
            message: Vec::new(),
            without_data: 0,
            owes_key_update: false,
            closed: false,
        })
    }

    /// Seals `record`, which consists of room for a header, the content, and room for the tail.
    pub(crate) fn seal(&mut self, content: ContentType, record: &mut [u8]) -> Result<(), RecordError> {
        self.sending.seal(content, record)
    }

    /// Returns a sealed record of `content`.
    pub(crate) fn sealed(&mut self, kind: ContentType, content: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut record = vec![0; HEADER_BYTES + content.len() + TAIL_BYTES];
        record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
        self.seal(kind, &mut record)?;
        Ok(record)
    }

    /// Returns a sealed alert.
    pub(super) fn alert(&mut self, description: AlertDescription) -> Result<Vec<u8>, RecordError> {
        // TLS 1.3 ignores the level. Level 1 (warning) is customary for close_notify only.
        let level = if description == AlertDescription::CloseNotify { 1 } else { 2 };
        self.sealed(ContentType::Alert, &[level, description.into()])
    }

    /// Returns the KeyUpdate to send before `more` further records, if the peer has requested it or the key would reach its
    /// limit. New keys apply afterwards.
    pub(crate) fn key_update(&mut self, more: u64) -> Result<Option<Vec<u8>>, RecordError> {
        // One record is reserved for the KeyUpdate.
        let used_up = self.sending.left() <= more;
        if !self.owes_key_update && !used_up {
            return Ok(None);
        }
        // update_not_requested, because the peer manages its own keys.
        let record = self.sealed(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0])?;
        let secrets = self.schedule.update_sending()?;
        self.sending = Keys::new(secrets, self.sending.limit)?;
        self.owes_key_update = false;
        Ok(Some(record))
    }

    /// Returns true if the peer has requested a KeyUpdate.
    pub(super) fn owes_key_update(&self) -> bool {
        self.owes_key_update
    }

    /// Opens a complete `record`. After an error no further record can be opened.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        if self.closed {
            return Err(RecordError::Unexpected("a record after close_notify"));
        }
        // Middlebox compatibility records occur only during the handshake.
        if record.first() != Some(&u8::from(ContentType::ApplicationData)) {
            return Err(RecordError::Unexpected("a plaintext record"));
        }
        let (kind, content) = self.receiving.open(record)?;
        if kind != ContentType::Handshake && !self.message.is_empty() {
            return Err(RecordError::Unexpected("a record inside a handshake message"));
        }
        if kind == ContentType::ApplicationData && !content.is_empty() {
            self.without_data = 0;
            return Ok(Opened::Data(content));
        }
        self.without_data += 1;
        if self.without_data > WITHOUT_DATA_MAX {
            return Err(RecordError::Flood);
        }
        match kind {
            ContentType::ApplicationData => Ok(Opened::Nothing),
            ContentType::Alert => self.alerted(&record[content]),
            ContentType::Handshake => self.handshake(&record[content]).map(|()| Opened::Nothing),
            _ => Err(RecordError::Unexpected("a record of this type")),
        }
    }

    fn alerted(&mut self, content: &[u8]) -> Result<Opened, RecordError> {
        let &[_, description] = content else {
            return Err(RecordError::Malformed("alert"));
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.closed = true;
                Ok(Opened::Closed)
            }
            // Followed by close_notify (RFC 8446 section 6.1).
            AlertDescription::UserCanceled => Ok(Opened::Nothing),
            other => Err(RecordError::Alert(other)),
        }
    }

    fn handshake(&mut self, content: &[u8]) -> Result<(), RecordError> {
        if content.is_empty() {
            return Err(RecordError::Unexpected("an empty handshake record"));
        }
        self.message.extend_from_slice(content);
        let mut rest = std::mem::take(&mut self.message);
        while let Some(&[kind, high, middle, low]) = rest.first_chunk::<4>() {
            let body_bytes = u32::from_be_bytes([0, high, middle, low]) as usize;
            if body_bytes > MESSAGE_MAX_BYTES {
                return Err(RecordError::Malformed("handshake message"));
            }
            let Some(body) = rest.get(4..4 + body_bytes) else { break };
            let is_last = rest.len() == 4 + body_bytes;
            self.message(kind, body, is_last)?;
            rest.drain(..4 + body_bytes);
        }
        self.message = if rest.is_empty() { Vec::new() } else { rest };
        Ok(())
    }

    fn message(&mut self, kind: u8, body: &[u8], is_last: bool) -> Result<(), RecordError> {
        match (kind, &mut self.schedule) {
            // The following bytes are sealed with other keys, so KeyUpdate must end its record (RFC 8446 section 5.1).
            (KEY_UPDATE, _) if !is_last => Err(RecordError::Unexpected("a message behind KeyUpdate")),
            (KEY_UPDATE, schedule) => {
                self.owes_key_update |= match body {
                    [0] => false,
                    [1] => true,
                    _ => return Err(RecordError::Malformed("KeyUpdate")),
                };
                self.receiving = Keys::new(schedule.update_receiving()?, u64::MAX)?;
                Ok(())
            }
            (NEW_SESSION_TICKET, Schedule::Client(connection)) => connection
                .handle_new_session_ticket(body)
                .map_err(|_| RecordError::Malformed("NewSessionTicket")),
            _ => Err(RecordError::Unexpected("this handshake message")),
        }
    }
}

impl Schedule {
    fn confidentiality_limit(&self) -> Result<u64, RecordError> {
        let suite = match self {
            Self::Client(connection) => connection.negotiated_cipher_suite(),
            Self::Server(connection) => connection.negotiated_cipher_suite(),
            #[cfg(any(test, fuzzing))]
            Self::Fixed => return Ok(1 << 24),
        };
        let suite = suite.tls13().ok_or(RecordError::Keys("not TLS 1.3"))?;
        Ok(suite.common.confidentiality_limit)
    }

    fn update_sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        let updated = match self {
            Self::Client(connection) => connection.update_tx_secret(),
            Self::Server(connection) => connection.update_tx_secret(),
            #[cfg(any(test, fuzzing))]
            Self::Fixed => Ok((0, fixed::secret())),
        };
        updated.map_err(|_| RecordError::Keys("the next key cannot be derived"))
    }

    fn update_receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        let updated = match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
            #[cfg(any(test, fuzzing))]
            Self::Fixed => Ok((0, fixed::secret())),
        };
        updated.map_err(|_| RecordError::Keys("the next key cannot be derived"))
    }
}

/// Keys of one direction: key, initialisation vector and sequence number.
#[derive(Debug)]
struct Keys {
    key: LessSafeKey,
    vector: [u8; NONCE_LEN],
    sequence: u64,
    /// Records that may be sealed with one key (RFC 8446 section 5.5).
    limit: u64,
}

impl Keys {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets), limit: u64) -> Result<Self, RecordError> {
        let (algorithm, key, vector): (&'static Algorithm, _, _) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Keys("the cipher suite is unsupported")),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| RecordError::Keys("a key has a wrong length"))?;
        let vector =
            vector.as_ref().try_into().map_err(|_| RecordError::Keys("a vector has a wrong length"))?;
        Ok(Self { key: LessSafeKey::new(key), vector, sequence, limit })
    }

    fn left(&self) -> u64 {
        self.limit.saturating_sub(self.sequence)
    }

    /// Returns the nonce of the next record (RFC 8446 section 5.3). Each nonce is used once.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        if self.sequence >= self.limit {
            return Err(RecordError::Keys("the key has sealed its maximum of records"));
        }
        let mut nonce = self.vector;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    fn seal(&mut self, kind: ContentType, record: &mut [u8]) -> Result<(), RecordError> {
        let sealed_bytes = record.len().saturating_sub(HEADER_BYTES);
        let content_bytes =
            sealed_bytes.checked_sub(TAIL_BYTES).ok_or(RecordError::Malformed("local record"))?;
        if content_bytes > CONTENT_MAX_BYTES {
            return Err(RecordError::Overflow);
        }
        let [high, low] = (sealed_bytes as u16).to_be_bytes();
        let (header, sealed) = record.split_at_mut(HEADER_BYTES);
        header.copy_from_slice(&[ContentType::ApplicationData.into(), 3, 3, high, low]);
        sealed[content_bytes] = kind.into();
        let (content, tag) = sealed.split_at_mut(content_bytes + 1);
        let nonce = self.nonce()?;
        let made = self.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), content);
        tag.copy_from_slice(made.map_err(|_| RecordError::Keys("a record cannot be sealed"))?.as_ref());
        Ok(())
    }

    /// Opens `record`; returns the content type and the range of the content.
    fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), RecordError> {
        let nonce = self.nonce()?;
        let (header, sealed) =
            record.split_at_mut_checked(HEADER_BYTES).ok_or(RecordError::Malformed("record"))?;
        if sealed.len() > SEALED_MAX_BYTES {
            return Err(RecordError::Overflow);
        }
        let inner =
            self.key.open_in_place(nonce, Aad::from(&*header), sealed).map_err(|_| RecordError::Decrypt)?;
        // Zeros behind the content type are padding.
        let at = inner.iter().rposition(|byte| *byte != 0);
        let at = at.ok_or(RecordError::Unexpected("a record of nothing but padding"))?;
        if at > CONTENT_MAX_BYTES {
            return Err(RecordError::Overflow);
        }
        Ok((inner[at].into(), HEADER_BYTES..HEADER_BYTES + at))
    }
}

/// Returns the length of the record at the start of `input`, header included, or `None` if the header is incomplete.
///
/// # Errors
/// [`RecordError::Overflow`] if the length exceeds the TLS limit.
pub(crate) fn record_bytes(input: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[_, _, _, high, low]) = input.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let sealed_bytes = usize::from(u16::from_be_bytes([high, low]));
    if sealed_bytes > SEALED_MAX_BYTES {
        return Err(RecordError::Overflow);
    }
    Ok(Some(HEADER_BYTES + sealed_bytes))
}
