//! One call of the CA API: a TCP connection, TLS 1.3, HTTP/2, one request, one answer.
//!
//! A connection for each call: a node asks some hundred times a day, and a fresh connection meets a replaced authority,
//! a new root file and a moved service without any notice.

use std::{io, sync::Arc, time::SystemTime};

use http::{
    HeaderMap,
    header::{AUTHORIZATION, DATE, HeaderValue},
};
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{InvalidDnsNameError, ServerName},
    version::TLS13,
};
use tacit_grpc::{Channel, Code, KeepAlive, Settings, Status, client::Answer};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{
    api::{self, CertificateRequest, CertificateResponse},
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
    /// The connection broke, or the answer is not one of a CA.
    #[error("the call of the authority failed: {0}; is this address a CA?")]
    Grpc(#[source] tacit_grpc::CallError),
    /// The authority said no.
    #[error("the authority refused, {}: {message}", code.name())]
    Refused {
        /// gRPC's code.
        code: Code,
        /// Its words.
        message: String,
    },
}

impl From<tacit_grpc::CallError> for CallError {
    fn from(error: tacit_grpc::CallError) -> Self {
        match error {
            tacit_grpc::CallError::Status(Status { code, message }) => Self::Refused { code, message },
            error => Self::Grpc(error),
        }
    }
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
    let settings = Settings {
        origin: format!("https://{}", target.address),
        message_max_bytes: api::MESSAGE_MAX_BYTES,
        keep_alive: KeepAlive::Off,
    };
    let channel = Channel::open(connect(&target).await?, settings).await?;
    let metadata = metadata(target);
    let Answer { headers, outcome } = channel.unary(api::PATH, &metadata, message).await;
    let date = headers.get(DATE).and_then(|date| parse_date(date.to_str().ok()?));
    Ok(CallResponse { outcome: outcome.map_err(CallError::from), date })
}

/// Connects to the target. Returns the connection, and the metadata of its calls.
pub(super) async fn dial(
    target: CallTarget<'_>,
) -> Result<(tokio_rustls::client::TlsStream<TcpStream>, HeaderMap), CallError> {
    let connected = connect(&target).await?;
    Ok((connected, metadata(target)))
}

fn metadata(target: CallTarget<'_>) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    metadata.insert(AUTHORIZATION, target.token);
    if let Some(cluster) = target.cluster {
        metadata.insert("clusterid", cluster);
    }
    metadata
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
