//! Istio's CA API as it is on the wire: the messages of `istio.v1.auth.IstioCertificateService/CreateCertificate`
//! (istio/api, security/v1alpha1/ca.proto), and gRPC's framing and status of a call with one message each way
//! (gRPC over HTTP/2, PROTOCOL-HTTP2.md). Both ends use it: the issuer beside this file and the authority.

use std::collections::BTreeMap;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;

/// Path of the one method.
pub const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Media type of requests and answers.
pub const CONTENT_TYPE: &str = "application/grpc";
/// Longest message taken, in bytes: a request is some 700, an answer with a chain and two roots some 4,000.
pub const MESSAGE_MAX_BYTES: usize = 256 * 1024;
/// Field of the metadata that names whom the certificate is for, as ztunnel sends it.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Compressed flag and length.
const PREFIX_BYTES: usize = 5;

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct CertificateRequest {
    /// PKCS #10 request in PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Lifetime asked for, in seconds; 0 for what the authority gives.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// The identity that the caller requests.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<ProtobufStruct>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct CertificateResponse {
    /// PEM texts: the certificate, what leads to the root, and in the last one the roots to trust.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, Message)]
pub struct ProtobufStruct {
    /// The fields.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, ProtobufValue>,
}

/// `google.protobuf.Value`, of which only texts are of use here; other kinds are skipped as unknown fields.
#[derive(Clone, PartialEq, Message)]
pub struct ProtobufValue {
    /// `string_value`.
    #[prost(string, optional, tag = "3")]
    pub string_value: Option<String>,
}

impl CertificateRequest {
    /// A request for a certificate of `identity`, as ztunnel makes it.
    #[must_use]
    pub fn for_identity(identity: &str, csr: String, validity_seconds: i64) -> Self {
        let value = ProtobufValue { string_value: Some(identity.to_owned()) };
        let metadata = ProtobufStruct { fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), value)]) };
        Self { csr, validity_duration: validity_seconds, metadata: Some(metadata) }
    }

    /// Returns the identity that the caller requests for another workload; `None` if it requests its own.
    #[must_use]
    pub fn impersonated(&self) -> Option<&str> {
        self.metadata.as_ref()?.fields.get(IMPERSONATED_IDENTITY)?.string_value.as_deref()
    }
}

/// The gRPC status codes in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Success.
    Ok,
    /// The request is malformed.
    InvalidArgument,
    /// The caller may not have it.
    PermissionDenied,
    /// Too many requests.
    ResourceExhausted,
    /// No such method.
    Unimplemented,
    /// A fault of the server.
    Internal,
    /// Not now; may be retried.
    Unavailable,
    /// Nobody knows who the caller is.
    Unauthenticated,
    /// Any other.
    Other(u16),
}

const CODES: [(Code, u16, &str); 8] = [
    (Code::Ok, 0, "OK"),
    (Code::InvalidArgument, 3, "INVALID_ARGUMENT"),
    (Code::PermissionDenied, 7, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, 8, "RESOURCE_EXHAUSTED"),
    (Code::Unimplemented, 12, "UNIMPLEMENTED"),
    (Code::Internal, 13, "INTERNAL"),
    (Code::Unavailable, 14, "UNAVAILABLE"),
    (Code::Unauthenticated, 16, "UNAUTHENTICATED"),
];

impl Code {
    /// The number of `grpc-status`.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Other(number) => number,
            known => CODES.iter().find(|(code, ..)| *code == known).map_or(2, |(_, number, _)| *number),
        }
    }

    /// The code that a `grpc-status` header says; `None` when it is no number.
    #[must_use]
    pub fn parse(header: &[u8]) -> Option<Self> {
        let number: u16 = std::str::from_utf8(header).ok()?.parse().ok()?;
        let known = CODES.iter().find(|(_, known, _)| *known == number);
        Some(known.map_or(Self::Other(number), |(code, ..)| *code))
    }

    /// Its name in gRPC.
    #[must_use]
    pub fn name(self) -> &'static str {
        CODES.iter().find(|(code, ..)| *code == self).map_or("another status", |(.., name)| *name)
    }
}

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not one frame exactly.
    #[error("{0} bytes are not one gRPC message")]
    Frame(usize),
    /// Compressed, which was not offered.
    #[error("the message is compressed, which was not offered")]
    Compressed,
    /// Not what the protocol file says.
    #[error("the message cannot be decoded: {0}")]
    Decode(String),
}

/// The frame of one message.
#[must_use]
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).expect("messages made here are far below 4 GiB"));
    message.encode(&mut out).expect("the buffer grows as needed");
    out.freeze()
}

/// The one message that `bytes` are the frame of.
///
/// # Errors
/// [`MessageError`].
pub fn unframe<M: Message + Default>(bytes: &[u8]) -> Result<M, MessageError> {
    let no_frame = || MessageError::Frame(bytes.len());
    let (prefix, body) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or_else(no_frame)?;
    let [compressed, length @ ..] = *prefix;
    if u32::try_from(body.len()) != Ok(u32::from_be_bytes(length)) {
        return Err(no_frame());
    }
    if compressed != 0 {
        return Err(MessageError::Compressed);
    }
    M::decode(body).map_err(|e| MessageError::Decode(e.to_string()))
}

/// `text` as a `grpc-message` header has it: everything but printable ASCII is percent-encoded.
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

/// Decodes a `grpc-message` header. Broken escapes stay as they are.
#[must_use]
pub fn decode_text(header: &[u8]) -> String {
    let mut out = Vec::with_capacity(header.len());
    let mut rest = header;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail.get(..2).filter(|_| first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        rest = if byte.is_some() { &tail[2..] } else { tail };
        out.push(byte.unwrap_or(first));
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `IstioCertificateRequest { csr: "CSR", validity_duration: 86400, metadata: Some(Struct { fields:
    /// {"ImpersonatedIdentity": string_value "spiffe://a/ns/b/sa/c"} }) }`, written out by the encoding rules of protobuf.
    fn ztunnel_request() -> Vec<u8> {
        let identity = b"spiffe://a/ns/b/sa/c";
        let value = [&[0x1a, 20], identity.as_slice()].concat();
        let entry = [&[0x0a, 20], b"ImpersonatedIdentity".as_slice(), &[0x12, 22], &value].concat();
        let fields = [&[0x0a, 46], entry.as_slice()].concat();
        [&[0x0a, 3], b"CSR".as_slice(), &[0x18, 0x80, 0xa3, 0x05], &[0x22, 48], &fields].concat()
    }

    #[test]
    fn a_request_as_ztunnel_encodes_it_is_understood_and_written_the_same() {
        let bytes = ztunnel_request();
        let framed = [&[0, 0, 0, 0, u8::try_from(bytes.len()).expect("short")], bytes.as_slice()].concat();
        let request: CertificateRequest = unframe(&framed).expect("decodes");
        assert_eq!((request.csr.as_str(), request.validity_duration), ("CSR", 86_400));
        assert_eq!(request.impersonated(), Some("spiffe://a/ns/b/sa/c"));
        let ours = CertificateRequest::for_identity("spiffe://a/ns/b/sa/c", "CSR".to_owned(), 86_400);
        assert_eq!(ours.encode_to_vec(), bytes);
        assert_eq!(frame(&ours), framed);
    }

    #[test]
    fn an_answer_as_istiod_encodes_it_is_understood() {
        let bytes = [&[0, 0, 0, 0, 12, 0x0a, 4], b"LEAF".as_slice(), &[0x0a, 4], b"ROOT"].concat();
        let answer: CertificateResponse = unframe(&bytes).expect("decodes");
        assert_eq!(answer.cert_chain, ["LEAF", "ROOT"]);
    }

    #[test]
    fn other_kinds_of_values_and_unknown_fields_are_skipped() {
        // metadata { "ClusterID": number_value 1.0 }, then an unknown field 15.
        let value = [&[0x11], 1f64.to_le_bytes().as_slice()].concat();
        let entry = [&[0x0a, 9], b"ClusterID".as_slice(), &[0x12, 9], &value].concat();
        let fields = [&[0x0a, 22], entry.as_slice()].concat();
        let bytes = [&[0, 0, 0, 0, 28, 0x22, 24], fields.as_slice(), &[0x78, 1]].concat();
        let request: CertificateRequest = unframe(&bytes).expect("decodes");
        assert_eq!(request.impersonated(), None);
    }

    #[test]
    fn what_is_not_one_whole_plain_message_is_refused() {
        for (bytes, refused) in [
            (&b""[..], MessageError::Frame(0)),
            (&[0, 0, 0, 0], MessageError::Frame(4)),
            (&[0, 0, 0, 0, 1], MessageError::Frame(5)),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], MessageError::Frame(10)),
            (&[1, 0, 0, 0, 0], MessageError::Compressed),
        ] {
            assert_eq!(unframe::<CertificateRequest>(bytes), Err(refused), "{bytes:?}");
        }
        let broken = unframe::<CertificateRequest>(&[0, 0, 0, 0, 2, 0x0a, 9]);
        assert!(matches!(broken, Err(MessageError::Decode(_))));
    }

    #[test]
    fn texts_and_codes_survive_their_headers() {
        for text in ["", "plain", "100 % \u{e9}\n", "%zz"] {
            let header = encode_text(text);
            assert!(header.bytes().all(|b| (b' '..=b'~').contains(&b)), "{header:?}");
            assert_eq!(decode_text(header.as_bytes()), text);
        }
        assert_eq!(decode_text(b"%zz%4"), "%zz%4");
        for (code, number, _) in CODES {
            assert_eq!(code.number(), number);
            assert_eq!(Code::parse(number.to_string().as_bytes()), Some(code));
        }
        assert_eq!(Code::parse(b"4"), Some(Code::Other(4)));
        assert_eq!(Code::parse(b"x"), None);
    }
}
