//! The claims of a CONNECT request. Pure.
//!
//! `forwarded` and `traceparent` are optional, and what cannot be read of them is ignored. The authority must be an address and a port.

use std::net::SocketAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::FORWARDED,
    uri::{self, Authority},
};
use tacit_core::wire::TraceId;

use crate::random_trace_id;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// W3C Baggage: describes the sender's workload for the metrics of the other.
pub(super) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// A request for a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect {
    /// The destination.
    pub destination: SocketAddr,
    /// The address that the client's application has, as `forwarded` claims.
    pub client: Option<SocketAddr>,
    /// The trace id of `traceparent`, or a new one.
    pub trace: TraceId,
}

/// The reason why a request is answered with 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Another method.
    #[error("the method is {0}, expected CONNECT")]
    Method(Method),
    /// An extended CONNECT (RFC 8441).
    #[error("a CONNECT with :protocol, expected none")]
    Protocol,
    /// No authority.
    #[error("the request has no :authority")]
    NoAuthority,
    /// An authority that names no pod.
    #[error("the authority \"{0}\" is not an address and a port of a pod")]
    Authority(String),
}

impl Connect {
    /// Returns the request with `baggage`, which describes the source.
    pub(super) fn request(&self, baggage: &str) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        let authority = Authority::try_from(self.destination.to_string()).ok();
        let mut target = uri::Parts::default();
        target.authority = authority;
        *request.uri_mut() = Uri::from_parts(target).unwrap_or_default();
        let [trace, span] = [self.trace.0, random_trace_id().0].map(u128::from_be_bytes);
        let span = span as u64 | 1;
        let fields = [
            (FORWARDED, self.client.map(|client| format!("for=\"{client}\""))),
            (TRACEPARENT, Some(format!("00-{trace:032x}-{span:016x}-00"))),
            (BAGGAGE, Some(baggage.to_owned()).filter(|text| !text.is_empty())),
        ];
        for (name, text) in fields {
            // A label can have letters that no field has: it is left out then.
            if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
                request.headers_mut().insert(name, value);
            }
        }
        request
    }

    /// Reads a request.
    ///
    /// # Errors
    /// [`BadRequest`].
    pub(super) fn parse<B>(request: &Request<B>) -> Result<Self, BadRequest> {
        if request.method() != Method::CONNECT {
            return Err(BadRequest::Method(request.method().clone()));
        }
        if request.extensions().get::<h2::ext::Protocol>().is_some() {
            return Err(BadRequest::Protocol);
        }
        let authority = request.uri().authority().ok_or(BadRequest::NoAuthority)?.as_str();
        let bad = || BadRequest::Authority(authority.chars().take(80).collect());
        let destination: SocketAddr = authority.parse().map_err(|_| bad())?;
        // The same pod has one name: a v4-mapped address is another one.
        if destination.ip().to_canonical() != destination.ip() {
            return Err(bad());
        }
        Ok(Self {
            destination,
            client: client(request.headers()),
            trace: trace(request.headers()).unwrap_or_else(random_trace_id),
        })
    }
}

/// Returns the address in `forwarded: for="10.77.1.2:40000"` (RFC 7239), which may have more parameters. A port is required.
fn client(fields: &HeaderMap) -> Option<SocketAddr> {
    let text = fields.get(FORWARDED)?.to_str().ok()?;
    // The first element is that of the client.
    let mut parameters = text.split(',').next()?.split(';');
    let value = parameters.find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then_some(value.trim())
    })?;
    let unquoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
    unquoted.parse().ok()
}

/// Returns the trace id in `traceparent: 00-<32 hex digits>-<16 hex digits>-00` (W3C Trace Context).
fn trace(fields: &HeaderMap) -> Option<TraceId> {
    let text = fields.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let (version, trace) = (parts.next()?, parts.next()?);
    let is_lower_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if version.len() != 2 || version == "ff" || trace.len() != 32 || !is_lower_hex(trace) {
        return None;
    }
    let bytes = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
    Some(TraceId(bytes.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(authority: &str) -> http::request::Builder {
        Request::builder().method(Method::CONNECT).uri(authority)
    }

    fn parsed(request: http::request::Builder) -> Result<Connect, BadRequest> {
        Connect::parse(&request.body(()).expect("valid"))
    }

    #[test]
    fn the_authority_is_an_address_and_a_port() {
        for good in ["10.77.2.3:80", "[fd77::3]:8080", "10.77.2.3:0"] {
            assert_eq!(parsed(connect(good)).expect(good).destination, good.parse().expect("an address"));
        }
        for bad in ["web.shop:80", "10.77.2.3", "[::ffff:10.77.2.3]:80", "user@10.77.2.3:80", "010.77.2.3:80"]
        {
            assert_eq!(parsed(connect(bad)), Err(BadRequest::Authority(bad.to_owned())));
        }
        let get = Request::builder().method(Method::GET).uri("https://10.77.2.3:80/");
        assert_eq!(parsed(get), Err(BadRequest::Method(Method::GET)));
        assert_eq!(parsed(Request::builder().method(Method::CONNECT).uri("/")), Err(BadRequest::NoAuthority));
    }

    #[test]
    fn the_client_is_that_of_forwarded() {
        let v4 = Some("10.77.1.2:40000".parse().expect("an address"));
        let v6 = Some("[fd77::2]:40000".parse().expect("an address"));
        for (text, client) in [
            ("for=\"10.77.1.2:40000\"", v4),
            ("for=\"10.77.1.2:40000\";host=web.shop", v4),
            ("proto=h2; For=\"[fd77::2]:40000\"", v6),
            ("for=\"10.77.1.2:40000\", for=\"10.77.9.9:1\"", v4),
            ("for=10.77.1.2:40000", v4),
            ("for=\"10.77.1.2\"", None),
            ("for=_hidden", None),
            ("", None),
        ] {
            let request = connect("10.77.2.3:80").header(FORWARDED, text);
            assert_eq!(parsed(request).expect("valid").client, client, "{text}");
        }
    }

    #[test]
    fn the_trace_is_that_of_traceparent_or_a_new_one() {
        let id = "0123456789abcdef0123456789abcdef";
        let given =
            |text: String| parsed(connect("10.77.2.3:80").header("traceparent", text)).expect("valid").trace;
        let expected = TraceId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
        assert_eq!(given(format!("00-{id}-0123456789abcdef-00")), expected);
        for malformed in
            ["00".to_owned(), format!("ff-{id}-0123456789abcdef-00"), format!("00-{}-1-00", "0".repeat(32))]
        {
            assert_ne!(given(malformed), expected);
        }
    }
}
