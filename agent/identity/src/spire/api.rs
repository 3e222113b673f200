//! Messages of SPIRE's Delegated Identity API (spiffe/spire-api-sdk, spire/api/agent/delegatedidentity/v1/delegatedidentity.proto,
//! spire/api/types/{selector,x509svid}.proto) and of the SPIFFE Workload API (spiffe/go-spiffe, proto/spiffe/workload/workload.proto).
//!
//! Only the fields that the agent reads or sends are here; others are skipped. Messages with private keys print without them.

use std::{collections::BTreeMap, fmt};

use prost::Message;

/// Path of the stream of SVIDs by selectors.
pub const SUBSCRIBE_SVIDS: &str =
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs";
/// Path of the stream of bundles.
pub const SUBSCRIBE_BUNDLES: &str =
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles";
/// Path of the stream of the caller's own SVIDs and bundles.
pub const FETCH_SVIDS: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// Header that every request of the Workload API needs (SPIFFE Workload Endpoint, section 6.1).
pub const WORKLOAD_HEADER: &str = "workload.spiffe.io";
/// Longest message, in bytes: the limit that grpc-go has.
pub const MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// `spire.api.types.Selector`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Message)]
pub struct Selector {
    /// Name of the plugin that makes the selector.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Value of the selector.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `SubscribeToX509SVIDsRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct SvidsRequest {
    /// The workload's selectors. An entry matches if its selectors are among them.
    #[prost(message, repeated, tag = "1")]
    pub selectors: Vec<Selector>,
}

/// `SubscribeToX509SVIDsResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct SvidsResponse {
    /// The SVIDs of all entries that match.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<SvidWithKey>,
}

/// `X509SVIDWithKey`.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct SvidWithKey {
    /// The certificates.
    #[prost(message, optional, tag = "1")]
    pub svid: Option<Svid>,
    /// PKCS #8 in DER.
    #[prost(bytes = "vec", tag = "2")]
    pub key: Vec<u8>,
}

/// `spire.api.types.X509SVID`. Identity and expiry are read from the certificate.
#[derive(Clone, PartialEq, Message)]
pub struct Svid {
    /// The certificate, and the intermediate ones, in DER.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub chain: Vec<Vec<u8>>,
}

/// `SubscribeToX509BundlesRequest`, and `X509SVIDRequest` of the Workload API.
#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// `SubscribeToX509BundlesResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct BundlesResponse {
    /// CA certificates in DER, one after the other, by trust domain (`spiffe://example.org`).
    #[prost(btree_map = "string, bytes", tag = "1")]
    pub bundles: BTreeMap<String, Vec<u8>>,
}

/// `X509SVIDResponse` of the Workload API.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadResponse {
    /// The caller's SVIDs.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<WorkloadSvid>,
    /// CA certificates in DER of other trust domains, by trust domain.
    #[prost(btree_map = "string, bytes", tag = "3")]
    pub federated: BTreeMap<String, Vec<u8>>,
}

/// `X509SVID` of the Workload API.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct WorkloadSvid {
    /// SPIFFE id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The certificate, and the intermediate ones, in DER, one after the other.
    #[prost(bytes = "vec", tag = "2")]
    pub chain: Vec<u8>,
    /// PKCS #8 in DER.
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    /// CA certificates in DER of the SVID's trust domain, one after the other.
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
}

impl fmt::Debug for SvidWithKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidWithKey").field("svid", &self.svid).finish_non_exhaustive()
    }
}

impl fmt::Debug for WorkloadSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadSvid").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Selector {
    /// Returns a selector of the plugin `k8s`, such as `k8s:ns:shop`.
    #[must_use]
    pub fn k8s(kind: &str, value: &str) -> Self {
        Self { r#type: "k8s".to_owned(), value: format!("{kind}:{value}") }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.r#type, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_protocol_files_number_their_fields() {
        // x509_svids { x509_svid { cert_chain: "AB" cert_chain: "C" id { trust_domain: "t" } expires_at: 5 hint: "h" }
        // x509_svid_key: "KEY" } federates_with: "o"
        let svid =
            [&[0x0a, 2], &b"AB"[..], &[0x0a, 1], b"C", &[0x12, 3, 0x0a, 1], b"t", &[0x18, 5, 0x22, 1], b"h"];
        let svid = svid.concat();
        let length = u8::try_from(svid.len()).expect("short");
        let with_key = [&[0x0a, length], svid.as_slice(), &[0x12, 3], b"KEY"].concat();
        let length = u8::try_from(with_key.len()).expect("short");
        let answer = [&[0x0a, length], with_key.as_slice(), &[0x12, 1], b"o"].concat();
        let read = SvidsResponse::decode(answer.as_slice()).expect("decodes");
        assert_eq!(read.svids[0].key, b"KEY");
        assert_eq!(read.svids[0].svid.as_ref().expect("sent").chain, [b"AB".to_vec(), b"C".to_vec()]);

        let entry = [&[0x0a, 10], &b"spiffe://t"[..], &[0x12, 2], b"CA"].concat();
        let bundles = [&[0x0a, 16], entry.as_slice()].concat();
        let read = BundlesResponse::decode(bundles.as_slice()).expect("decodes");
        assert_eq!(read.bundles["spiffe://t"], b"CA");

        let own = [&[0x0a, 1], &b"i"[..], &[0x12, 1], b"C", &[0x1a, 1], b"K", &[0x22, 1], b"B"].concat();
        let answer = [&[0x0a, 12], own.as_slice(), &[0x12, 3], b"crl", &[0x1a, 16], &entry].concat();
        let read = WorkloadResponse::decode(answer.as_slice()).expect("decodes");
        let found = (&*read.svids[0].id, &*read.svids[0].chain, &*read.svids[0].key, &*read.svids[0].bundle);
        assert_eq!(found, ("i", &b"C"[..], &b"K"[..], &b"B"[..]));
        assert_eq!(read.federated["spiffe://t"], b"CA");

        let request = SvidsRequest { selectors: vec![Selector::k8s("ns", "shop")] };
        assert_eq!(
            request.encode_to_vec(),
            [&[0x0a, 14, 0x0a, 3], &b"k8s"[..], &[0x12, 7], b"ns:shop"].concat()
        );
        assert_eq!(request.selectors[0].to_string(), "k8s:ns:shop");
    }

    #[test]
    fn keys_are_never_printed() {
        let key = b"SECRET".to_vec();
        let delegated = SvidsResponse { svids: vec![SvidWithKey { svid: None, key: key.clone() }] };
        let own = WorkloadSvid { id: "i".to_owned(), key: key.clone(), ..WorkloadSvid::default() };
        let bytes = format!("{key:?}");
        for printed in [format!("{delegated:?}"), format!("{own:?}")] {
            assert!(!printed.contains("SECRET") && !printed.contains(&bytes), "{printed}");
        }
    }
}
