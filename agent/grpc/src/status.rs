//! Status of a call: the code, and the text of `grpc-message`.

use std::fmt;

use http::{HeaderMap, HeaderValue};

/// Name of the field of the code.
pub const STATUS: &str = "grpc-status";
/// Name of the field of the text.
pub const MESSAGE: &str = "grpc-message";
/// Longest text that is kept, in bytes; the rest is cut. Texts go to logs and status pages.
const TEXT_MAX_BYTES: usize = 1024;

/// Codes of gRPC (doc/statuscodes.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Success.
    Ok,
    /// The call was cancelled.
    Cancelled,
    /// An error without a code of its own.
    Unknown,
    /// The request is malformed.
    InvalidArgument,
    /// The deadline passed.
    DeadlineExceeded,
    /// The requested object does not exist.
    NotFound,
    /// The object exists already.
    AlreadyExists,
    /// The caller is not allowed to make the call.
    PermissionDenied,
    /// Too many requests, or no space.
    ResourceExhausted,
    /// The server is not in the required state.
    FailedPrecondition,
    /// The operation was aborted.
    Aborted,
    /// A value is out of range.
    OutOfRange,
    /// The method does not exist.
    Unimplemented,
    /// A fault of the server.
    Internal,
    /// The server is unavailable; the call may be retried.
    Unavailable,
    /// Data was lost.
    DataLoss,
    /// The caller is not authenticated.
    Unauthenticated,
    /// A code that gRPC does not define.
    Other(u16),
}

const CODES: [(Code, &str); 17] = [
    (Code::Ok, "OK"),
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

impl Code {
    /// Returns the number of `grpc-status`.
    #[must_use]
    pub fn number(self) -> u16 {
        if let Self::Other(number) = self {
            return number;
        }
        // The list has every other variant, in the order of the numbers.
        let position = CODES.iter().position(|(code, _)| *code == self);
        position.and_then(|number| u16::try_from(number).ok()).unwrap_or(2)
    }

    /// Returns the code of a number.
    #[must_use]
    pub fn of(number: u16) -> Self {
        CODES.get(usize::from(number)).map_or(Self::Other(number), |(code, _)| *code)
    }

    /// Parses the value of `grpc-status`; `None` if it is not a number.
    #[must_use]
    pub fn parse(value: &[u8]) -> Option<Self> {
        std::str::from_utf8(value).ok()?.parse().ok().map(Self::of)
    }

    /// Returns the name of the code in gRPC.
    #[must_use]
    pub fn name(self) -> &'static str {
        CODES.iter().find(|(code, _)| *code == self).map_or("an undefined status", |(_, name)| *name)
    }
}

/// End of a call: a code, and a text for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The code.
    pub code: Code,
    /// The text, at most 1,024 bytes; empty if the server sent none.
    pub message: String,
}

impl Status {
    /// Success.
    pub const OK: Self = Self { code: Code::Ok, message: String::new() };

    /// Returns a status with a text.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Reads the status of headers or trailers; `None` if they have none, or one that is not a number.
    #[must_use]
    pub fn read(fields: &HeaderMap) -> Option<Self> {
        let code = Code::parse(fields.get(STATUS)?.as_bytes())?;
        let message = fields.get(MESSAGE).map(|text| decode_text(text.as_bytes())).unwrap_or_default();
        Some(Self { code, message: cut(message) })
    }

    /// Returns the trailers that carry the status.
    #[must_use]
    pub fn trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        trailers.insert(STATUS, HeaderValue::from(self.code.number()));
        if let Ok(text) = HeaderValue::try_from(encode_text(&self.message)) {
            trailers.insert(MESSAGE, text);
        }
        trailers
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.name())?;
        if let Code::Other(number) = self.code {
            write!(f, " {number}")?;
        }
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

fn cut(mut text: String) -> String {
    let end = (0..=TEXT_MAX_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

/// Encodes `text` for a `grpc-message` field: everything but printable ASCII is percent-encoded.
#[must_use]
pub fn encode_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Decodes a `grpc-message` field. Broken escapes stay as they are.
#[must_use]
pub fn decode_text(value: &[u8]) -> String {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail.get(..2).filter(|_| first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        let digits = escaped.filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = digits.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        rest = if byte.is_some() { &tail[2..] } else { tail };
        out.push(byte.unwrap_or(first));
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_survives_its_field_and_broken_escapes_stay() {
        for text in ["", "plain", "100 % \u{e9}\n", "%zz"] {
            let value = encode_text(text);
            assert!(value.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{value:?}");
            assert_eq!(decode_text(value.as_bytes()), text);
        }
        for (value, text) in [("%zz%4", "%zz%4"), ("%+1", "%+1"), ("%e2%82%AC", "\u{20ac}"), ("%", "%")] {
            assert_eq!(decode_text(value.as_bytes()), text);
        }
        assert_eq!(decode_text(b"%ff"), "\u{fffd}");
    }

    #[test]
    fn a_code_survives_its_field() {
        for (number, (code, name)) in CODES.iter().enumerate() {
            assert_eq!(usize::from(code.number()), number);
            assert_eq!(Code::parse(number.to_string().as_bytes()), Some(*code));
            assert_eq!(code.name(), *name);
        }
        assert_eq!(Code::parse(b"7"), Some(Code::PermissionDenied));
        assert_eq!(Code::parse(b"16"), Some(Code::Unauthenticated));
        assert_eq!(Code::parse(b"17"), Some(Code::Other(17)));
        assert_eq!(Code::Other(17).number(), 17);
        for value in [&b"x"[..], b"", b"-1", b"70000", b"\xff"] {
            assert_eq!(Code::parse(value), None, "{value:?}");
        }
    }

    #[test]
    fn a_status_survives_its_trailers_and_a_long_text_is_cut() {
        let status = Status::new(Code::NotFound, "no entry \u{e9}");
        assert_eq!(Status::read(&status.trailers()), Some(status.clone()));
        assert_eq!(status.to_string(), "NOT_FOUND: no entry \u{e9}");
        assert_eq!(Status::new(Code::Other(99), "").to_string(), "an undefined status 99");
        assert_eq!(Status::read(&HeaderMap::new()), None);
        let long = Status::new(Code::Internal, "\u{e9}".repeat(TEXT_MAX_BYTES));
        let read = Status::read(&long.trailers()).expect("a status");
        assert_eq!(read.message.len(), TEXT_MAX_BYTES);
        let odd = Status::new(Code::Internal, format!("x{}", long.message));
        assert_eq!(Status::read(&odd.trailers()).expect("a status").message.len(), TEXT_MAX_BYTES - 1);
    }
}
