//! Istio's CA API as it is on the wire: the messages of `istio.v1.auth.IstioCertificateService/CreateCertificate`
//! (istio/api, security/v1alpha1/ca.proto). Both ends use it: the issuer beside this file and the authority. gRPC itself is in
//! `tacit-grpc`.

use std::collections::BTreeMap;

use prost::Message;

/// Path of the one method.
pub const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Longest message taken, in bytes: a request is some 700, an answer with a chain and two roots some 4,000.
pub const MESSAGE_MAX_BYTES: usize = 256 * 1024;
/// Field of the metadata that names whom the certificate is for, as ztunnel sends it.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

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

#[cfg(test)]
mod tests {
    use tacit_grpc::frame::{frame, unframe};

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
}
