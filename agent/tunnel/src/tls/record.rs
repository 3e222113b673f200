//! TLS 1.3 records once the handshake is over (RFC 8446 section 5): sealed and opened in place. No I/O, no buffer of its
//! own but for a handshake message that came in pieces.
//!
//! rustls makes the handshake and keeps the key schedule ([`KernelConnection`]); here are its traffic keys, the sequence
//! numbers, and what a peer may still say beside data: KeyUpdate (answered, and sent before a key has sealed as many records
//! as it may), tickets (taken, never used), alerts. Whatever else it says ends the connection with the alert the RFC names.
//! A connection adapter would copy each byte twice more and read a few KiB a system call; that was half the agent's time.

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
/// The most a record carries.
pub(crate) const CONTENT_MAX_BYTES: usize = 1 << 14;

/// Tag of every AEAD of TLS 1.3.
const TAG_BYTES: usize = 16;
/// The most that may follow a header (RFC 8446 section 5.2).
const SEALED_MAX_BYTES: usize = CONTENT_MAX_BYTES + 256;
/// Records without data in a row; above the tickets a server sends at first, far below a flood. As many as rustls takes.
const WITHOUT_DATA_MAX: u32 = 32;
/// The longest handshake message after the handshake, a ticket with its extensions; none of ours comes near it.
const MESSAGE_MAX_BYTES: usize = 1 << 16;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Why the record layer gives up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Changed on its way, or sealed with another key.
    #[error("a record cannot be decrypted: it was changed on its way, or the peer lost its keys")]
    Decrypt,
    /// Longer than the RFC allows.
    #[error("a record is longer than TLS allows")]
    Overflow,
    /// Something that may not come now.
    #[error("{0} is not allowed here")]
    Unexpected(&'static str),
    /// Something that cannot be read.
    #[error("{0} cannot be read")]
    Malformed(&'static str),
    /// Many records, and no data in any.
    #[error("{WITHOUT_DATA_MAX} records in a row carry no data")]
    Flood,
    /// The peer ends the connection, and says why.
    #[error("the peer sent the alert {0:?}")]
    Alert(AlertDescription),
    /// Keys cannot be made, or are used up. Ours.
    #[error("the keys cannot be used: {0}")]
    Keys(&'static str),
}

impl RecordError {
    /// The alert that tells the peer (RFC 8446 section 6); `None` when it has ended the connection itself.
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

/// What a record held.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Data, at this place of the record.
    Data(Range<usize>),
    /// Something for this layer.
    Nothing,
    /// The peer will send no more, and said so.
    Closed,
}

/// The key schedule of one connection.
pub(super) enum Schedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
    /// The same keys again and again, for tests without a handshake.
    #[cfg(any(test, fuzzing))]
    Fixed,
}

/// Both directions of one connection.
pub(crate) struct Records {
    sending: Keys,
    receiving: Keys,
    schedule: Schedule,
    /// A handshake message of which the end has not come.
    message: Vec<u8>,
    without_data: u32,
    /// The peer has asked for new keys of ours.
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

    /// Seals `record`: room for a header, the content, room for the tail.
    pub(crate) fn seal(&mut self, content: ContentType, record: &mut [u8]) -> Result<(), RecordError> {
        self.sending.seal(content, record)
    }

    /// A sealed record of `content`.
    pub(crate) fn sealed(&mut self, kind: ContentType, content: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut record = vec![0; HEADER_BYTES + content.len() + TAIL_BYTES];
        record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
        self.seal(kind, &mut record)?;
        Ok(record)
    }

    /// A sealed alert.
    pub(super) fn alert(&mut self, description: AlertDescription) -> Result<Vec<u8>, RecordError> {
        // The level means nothing in TLS 1.3; 1 (warning) is customary for close_notify alone.
        let level = if description == AlertDescription::CloseNotify { 1 } else { 2 };
        self.sealed(ContentType::Alert, &[level, description.into()])
    }

    /// The KeyUpdate to send before `more` further records: when the peer has asked for it, or when the key would seal more
    /// than it may. New keys hold from then on.
    pub(crate) fn key_update(&mut self, more: u64) -> Result<Option<Vec<u8>>, RecordError> {
        // One more for the KeyUpdate itself.
        let used_up = self.sending.left() <= more;
        if !self.owes_key_update && !used_up {
            return Ok(None);
        }
        // update_not_requested: the peer looks after its own keys.
        let record = self.sealed(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0])?;
        let secrets = self.schedule.update_sending()?;
        self.sending = Keys::new(secrets, self.sending.limit)?;
        self.owes_key_update = false;
        Ok(Some(record))
    }

    /// Has the peer asked for new keys of ours?
    pub(super) fn owes_key_update(&self) -> bool {
        self.owes_key_update
    }

    /// Opens `record`, which is complete. After an error nothing more can be opened.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        if self.closed {
            return Err(RecordError::Unexpected("a record after close_notify"));
        }
        // Middlebox compatibility records stand in the handshake alone.
        if record.first() != Some(&u8::from(ContentType::ApplicationData)) {
            return Err(RecordError::Unexpected("a record in clear"));
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
            return Err(RecordError::Malformed("an alert"));
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.closed = true;
                Ok(Opened::Closed)
            }
            // Followed by the close_notify that counts (RFC 8446 section 6.1).
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
                return Err(RecordError::Malformed("a handshake message"));
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
            // What follows it is sealed with other keys, so it ends its record (RFC 8446 section 5.1).
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
        updated.map_err(|_| RecordError::Keys("the next cannot be derived"))
    }

    fn update_receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        let updated = match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
            #[cfg(any(test, fuzzing))]
            Self::Fixed => Ok((0, fixed::secret())),
        };
        updated.map_err(|_| RecordError::Keys("the next cannot be derived"))
    }
}

/// One direction: key, initialisation vector and how many records it has seen.
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
            _ => return Err(RecordError::Keys("the cipher suite is unknown")),
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

    /// The nonce of the next record (RFC 8446 section 5.3), used once.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        if self.sequence >= self.limit {
            return Err(RecordError::Keys("used up"));
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
            sealed_bytes.checked_sub(TAIL_BYTES).ok_or(RecordError::Malformed("our record"))?;
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

    /// The type of the content and where it stands in `record`.
    fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), RecordError> {
        let nonce = self.nonce()?;
        let (header, sealed) =
            record.split_at_mut_checked(HEADER_BYTES).ok_or(RecordError::Malformed("a record"))?;
        if sealed.len() > SEALED_MAX_BYTES {
            return Err(RecordError::Overflow);
        }
        let inner =
            self.key.open_in_place(nonce, Aad::from(&*header), sealed).map_err(|_| RecordError::Decrypt)?;
        // Zeros behind the type are padding.
        let at = inner.iter().rposition(|byte| *byte != 0);
        let at = at.ok_or(RecordError::Unexpected("a record of nothing but padding"))?;
        if at > CONTENT_MAX_BYTES {
            return Err(RecordError::Overflow);
        }
        Ok((inner[at].into(), HEADER_BYTES..HEADER_BYTES + at))
    }
}

/// How long the record at the head of `input` is, with its header; `None` while too little is there to tell.
///
/// # Errors
/// [`RecordError::Overflow`] for a length that no record may have.
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
