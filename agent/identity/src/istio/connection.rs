//! One call of the CA API: a TCP connection, TLS 1.3, HTTP/2, one request, one answer.
//!
//! A connection for each call: a node asks some hundred times a day, and a fresh connection meets a replaced authority,
//! a new root file and a moved service without any notice. gRPC is spoken by hand over hyper, because a gRPC library
//! would bring a service stack and TLS settings of its own for one method.

use std::{io, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http2,
    header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue, TE},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{InvalidDnsNameError, ServerName},
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::{
    api::{self, CertificateRequest, CertificateResponse, Code, MessageError},
    skew::parse_date,
};

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No TCP connection.
    #[error("cannot connect to {address}: {source}; is the authority running, and its address right?")]
    Connect {
        /// The configured address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host is no name that a certificate could have.
    #[error("{name:?} is no DNS name or IP address: {source}")]
    Name {
        /// The configured name.
        name: String,
        /// Why.
        #[source]
        source: InvalidDnsNameError,
    },
    /// No TLS session, or the server is not who it should be.
    #[error(
        "TLS with {address} failed: {source}; does the root file hold the root of the authority, and is {name} in its certificate?"
    )]
    Tls {
        /// The configured address.
        address: String,
        /// The name expected.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the authority broke: {0}")]
    Http(#[from] hyper::Error),
    /// The answer is no answer of gRPC.
    #[error("the answer is not gRPC: {0}; is this address a CA?")]
    Protocol(String),
    /// The message cannot be read.
    #[error("the answer cannot be read: {0}")]
    Message(#[from] MessageError),
    /// The authority said no.
    #[error("the authority refused, {}: {message}", code.name())]
    Refused {
        /// gRPC's code.
        code: Code,
        /// Its words.
        message: String,
    },
}

/// The address, server name and credentials of a call.
pub(super) struct CallTarget<'a> {
    pub(super) address: &'a str,
    pub(super) server_name: &'a str,
    pub(super) roots: RootCertStore,
    pub(super) token: HeaderValue,
    pub(super) cluster: Option<HeaderValue>,
}

/// The response of a call.
pub(super) struct CallResponse {
    /// The certificate, or why there is none.
    pub(super) outcome: Result<CertificateResponse, CallError>,
    /// The authority's clock, when it says it.
    pub(super) date: Option<SystemTime>,
}

/// Calls `CreateCertificate` once. Takes as long as the network lets it: the caller sets the deadline.
pub(super) async fn call(
    target: CallTarget<'_>,
    message: &CertificateRequest,
) -> Result<CallResponse, CallError> {
    let tls = connect(&target).await?;
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
    // Ends with this call, whatever becomes of it.
    let _driver = AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender.send_request(request(target, message)?).await?;
    let date = response.headers().get(DATE).and_then(|date| parse_date(date.to_str().ok()?));
    Ok(CallResponse { outcome: outcome(response).await, date })
}

async fn connect(target: &CallTarget<'_>) -> Result<tokio_rustls::client::TlsStream<TcpStream>, CallError> {
    let address = || target.address.to_owned();
    let name = ServerName::try_from(target.server_name.to_owned())
        .map_err(|source| CallError::Name { name: target.server_name.to_owned(), source })?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_root_certificates(target.roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    let tcp = TcpStream::connect(target.address)
        .await
        .map_err(|source| CallError::Connect { address: address(), source })?;
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|source| CallError::Tls {
        address: address(),
        name: target.server_name.to_owned(),
        source,
    })
}

fn request(target: CallTarget<'_>, message: &CertificateRequest) -> Result<Request<Full<Bytes>>, CallError> {
    let mut request = Request::post(format!("https://{}{}", target.address, api::PATH))
        .header(CONTENT_TYPE, api::CONTENT_TYPE)
        .header(TE, "trailers")
        .header(AUTHORIZATION, target.token);
    if let Some(cluster) = target.cluster {
        request = request.header("clusterid", cluster);
    }
    let body = Full::new(api::frame(message));
    request.body(body).map_err(|e| CallError::Protocol(format!("{} is no address: {e}", target.address)))
}

async fn outcome(response: Response<Incoming>) -> Result<CertificateResponse, CallError> {
    if response.status() != StatusCode::OK {
        return Err(CallError::Protocol(format!("HTTP status {}", response.status())));
    }
    // A refusal may come in the headers, without a body.
    if let Some(code) = status(response.headers()) {
        refuse(code, response.headers())?;
    }
    let body = Limited::new(response.into_body(), api::MESSAGE_MAX_BYTES).collect().await.map_err(|e| {
        if e.is::<LengthLimitError>() {
            return CallError::Protocol(format!("it is longer than {} bytes", api::MESSAGE_MAX_BYTES));
        }
        e.downcast::<hyper::Error>().map_or_else(|e| CallError::Protocol(e.to_string()), |e| (*e).into())
    })?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    match status(&trailers) {
        Some(code) => refuse(code, &trailers)?,
        None => return Err(CallError::Protocol("it ended without a status".to_owned())),
    }
    Ok(api::unframe(&body.to_bytes())?)
}

fn status(headers: &HeaderMap) -> Option<Code> {
    Code::parse(headers.get("grpc-status")?.as_bytes())
}

/// An error for any code but success.
fn refuse(code: Code, headers: &HeaderMap) -> Result<(), CallError> {
    let message = headers.get("grpc-message").map(|text| api::decode_text(text.as_bytes()));
    match code {
        Code::Ok => Ok(()),
        code => Err(CallError::Refused { code, message: message.unwrap_or_default() }),
    }
}
