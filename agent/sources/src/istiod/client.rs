//! The connection to istiod: one stream of `DeltaAggregatedResources` that feeds the directory and the policies.
//!
//! ```text
//! dial ─> HTTP/2 ─> requests ─> response ─> read on a thread for blocking work ─> stores ─> ACK or NACK ─┐
//!  ▲                              ▲──────────────────────────────────────────────────────────────────────┘
//!  └── pause ── failed            quiet for a second, or five seconds, connected or not ─> what belongs together has arrived
//! ```
//! The state of the session stays while istiod is away. Pauses double from half a second to half a minute, with jitter. A store that is
//! behind slows the stream down.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tacit_grpc::{CallError, Channel, Code, KeepAlive, Receiver, Sender, Settings};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    address::{AddressContent, AddressObject},
    messages::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node},
    policies::{Listing, PolicyDocument, PolicyResource},
    session::{Accepted, Content, ReadResource, ResourceType, Session, TypeStatus, read},
    settle::{LONGEST, settle},
};
use crate::{
    directory::objects::{Object, ResourceKind},
    kubernetes::{Change, Pause, Update, random},
};

/// Path of the method.
const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Longest response, in bytes. 200,000 addresses of some 290 bytes each fit. istiod sends all of them in one message.
pub(super) const RESPONSE_MAX_BYTES: usize = 64 << 20;
/// Limit for a connection with TLS and HTTP/2.
const DIAL: Duration = Duration::from_secs(15);
/// Limit for the first response of a connection. istiod answers from memory, once it has read the cluster.
const FIRST_RESPONSE: Duration = Duration::from_secs(60);
/// Limit for a request to be taken in.
const SEND: Duration = Duration::from_secs(30);
/// PINGs find a server that is gone without a word. istiod accepts one in 15 s.
const KEEP_ALIVE: KeepAlive =
    KeepAlive::Every { interval: Duration::from_secs(60), timeout: Duration::from_secs(20) };
/// Silence after which everything that belongs together has arrived. istiod sends the types of one push within milliseconds.
const SETTLE: Duration = Duration::from_secs(1);
/// A connection that lived for this long may end. istiod closes each one after half an hour or so.
const LONG: Duration = Duration::from_secs(30);

/// A byte stream to a server.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// An open connection to istiod.
pub struct Dialled {
    /// The bytes, after TLS.
    pub io: Box<dyn Io>,
    /// Metadata of calls, such as the token.
    pub metadata: HeaderMap,
}

/// Opens connections to istiod. Credentials are read at each call. The error is for the operator.
pub type Dial = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Dialled, String>> + Send>> + Send + Sync>;

/// The state of the connection, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectionState {
    /// Time of the first response of the current connection. `None` without one.
    pub connected_since: Option<SystemTime>,
    /// Number of connections that have had a response.
    pub connections: u64,
    /// Resources of each type.
    pub types: Vec<TypeStatus>,
    /// Number of rejected responses.
    pub rejections: u64,
    /// Time and text of the latest rejection.
    pub last_rejection: Option<(SystemTime, String)>,
    /// The reason for which the latest connection ended.
    pub last_error: Option<String>,
}

/// The receivers of resources.
pub(super) struct Sinks {
    pub(super) directory: mpsc::Sender<Update<ResourceKind, Object>>,
    /// `None` if policies are from elsewhere.
    pub(super) policies: Option<mpsc::Sender<Update<PolicyResource, PolicyDocument>>>,
}

/// The agent's place, which decides which workloads are its own.
#[derive(Debug, Clone)]
pub(super) struct OwnPlace {
    pub(super) node: Arc<str>,
    pub(super) cluster: String,
    pub(super) network: String,
}

/// Follows istiod until the receivers are dropped.
pub(super) struct Client {
    dial: Dial,
    /// Scheme and authority of requests.
    origin: String,
    own: OwnPlace,
    session: Session,
    sinks: Sinks,
    state: watch::Sender<ConnectionState>,
    settle: Duration,
    long: Duration,
    /// Changes with each response.
    touched: watch::Sender<()>,
}

/// The way a connection ended.
enum End {
    /// The receivers were dropped.
    Unwanted,
    Failed(String),
}

impl From<String> for End {
    fn from(problem: String) -> Self {
        Self::Failed(problem)
    }
}

impl Client {
    pub(super) fn new(
        (dial, origin): (Dial, String),
        node: Node,
        own: OwnPlace,
        sinks: Sinks,
        state: watch::Sender<ConnectionState>,
    ) -> Self {
        let types = &ResourceType::ALL[..if sinks.policies.is_some() { 2 } else { 1 }];
        let session = Session::new(node, types);
        Self {
            dial,
            origin,
            own,
            session,
            sinks,
            state,
            settle: SETTLE,
            long: LONG,
            touched: watch::Sender::new(()),
        }
    }

    #[cfg(test)]
    pub(super) fn with_times(self, settle: Duration, long: Duration) -> Self {
        Self { settle, long, ..self }
    }

    pub(super) async fn run(self) {
        let settling = settle(self.touched.subscribe(), self.sinks.policies.clone(), (self.settle, LONGEST));
        tokio::select! {
            () = self.connections() => {}
            () = settling => {}
        }
    }

    /// Opens one connection after the other.
    async fn connections(mut self) {
        let mut pause = Pause::default();
        loop {
            let begin = Instant::now();
            let End::Failed(problem) = self.follow(&mut pause).await else { return };
            let was_connected = self.state.borrow().connected_since.is_some();
            self.state.send_modify(|state| {
                state.connected_since = None;
                state.last_error = Some(problem.clone());
            });
            if was_connected && begin.elapsed() >= self.long {
                // Only a failure to connect again makes the state outdated.
                tracing::debug!(problem, "the connection to istiod has ended");
                pause = Pause::default();
            } else if self.failed(problem).await.is_none() {
                return;
            }
            sleep(pause.next(random())).await;
        }
    }

    /// Follows one connection to its end.
    async fn follow(&mut self, pause: &mut Pause) -> End {
        match self.stream(pause).await {
            Ok(()) => End::Unwanted,
            Err(end) => end,
        }
    }

    async fn stream(&mut self, pause: &mut Pause) -> Result<(), End> {
        let (mut sender, mut receiver) = self.open().await?;
        for request in self.session.connect() {
            send(&mut sender, &request).await?;
        }
        let first_limit = Instant::now() + FIRST_RESPONSE;
        let mut is_answered = false;
        loop {
            let message = tokio::select! {
                message = receiver.message() => message,
                () = sleep_until(first_limit), if !is_answered => {
                    return Err(format!("no response to the subscription within {FIRST_RESPONSE:?}").into());
                }
                () = self.sinks.directory.closed() => return Ok(()),
            };
            let response = match message {
                Ok(Some(response)) => response,
                Ok(None) => return Err("istiod ended the stream".to_owned().into()),
                Err(error) => return Err(explained(&error).into()),
            };
            // Also before: the rest of what belongs together may be in this response.
            self.touched.send_replace(());
            let answer = self.response(response).await?;
            self.touched.send_replace(());
            if !std::mem::replace(&mut is_answered, true) {
                *pause = Pause::default();
                self.connected();
            }
            send(&mut sender, &answer).await?;
        }
    }

    async fn open(
        &self,
    ) -> Result<(Sender<DeltaDiscoveryRequest>, Receiver<DeltaDiscoveryResponse>), String> {
        let settings = Settings {
            origin: self.origin.clone(),
            message_max_bytes: RESPONSE_MAX_BYTES,
            keep_alive: KEEP_ALIVE,
        };
        let opened = timeout(DIAL, async {
            let Dialled { io, metadata } = (self.dial)().await?;
            let channel = Channel::open(io, settings).await.map_err(|error| error.to_string())?;
            let call = channel.bidirectional(PATH, &metadata).await;
            call.map_err(|error| explained(&error))
        });
        opened.await.unwrap_or_else(|_| Err(format!("no connection within {DIAL:?}")))
    }

    fn connected(&self) {
        self.state.send_modify(|state| {
            state.connected_since = Some(SystemTime::now());
            state.connections += 1;
            state.last_error = None;
        });
    }

    /// Takes in a response. Returns the ACK or NACK.
    async fn response(&mut self, response: DeltaDiscoveryResponse) -> Result<DeltaDiscoveryRequest, End> {
        let network = self.own.network.clone();
        let read = spawn_blocking(move || read(response, &network)).await;
        let read = read.map_err(|panic| format!("a response cannot be read: {panic}"))?;
        let Accepted { of, resources, gone, is_first, answer, rejected } = self.session.accept(read);
        if let Some(text) = &rejected {
            tracing::warn!(problem = text, "rejected a response of istiod");
        }
        let types = self.session.status();
        self.state.send_modify(|state| {
            state.types = types;
            if let Some(text) = rejected {
                state.rejections += 1;
                state.last_rejection = Some((SystemTime::now(), text));
            }
        });
        match of {
            Some(ResourceType::Address) => self.addresses(resources, gone, is_first).await?,
            Some(ResourceType::Authorization) => self.authorizations(resources, gone, is_first).await?,
            None => {}
        }
        Ok(answer)
    }

    async fn addresses(
        &self,
        resources: Vec<ReadResource>,
        gone: Vec<Arc<str>>,
        is_first: bool,
    ) -> Result<(), End> {
        for name in gone {
            self.tell_policies(Update::Change(Change::Deleted(PolicyDocument::Unlisted {
                uid: Arc::clone(&name),
            })))
            .await?;
            self.tell_directory(Change::Deleted(object(name, AddressContent::Removed))).await?;
        }
        for ReadResource { name, content, .. } in resources {
            let content = match content {
                Ok(Content::Address(content)) => content,
                Ok(Content::Authorization(_)) => continue,
                Err(problem) => AddressContent::Unreadable(problem),
            };
            if let Some(listing) = self.listing(&content) {
                let document = PolicyDocument::Listing { uid: Arc::clone(&name), listing };
                self.tell_policies(Update::Change(Change::Applied(document))).await?;
            }
            self.tell_directory(Change::Applied(object(name, content))).await?;
        }
        if is_first {
            self.tell_directory(Change::Listed(ResourceKind::Addresses)).await?;
            self.tell_policies(Update::Change(Change::Listed(PolicyResource::Addresses))).await?;
        }
        self.tell_policies(Update::Fresh(PolicyResource::Addresses)).await?;
        self.sinks.directory.send(Update::Fresh(ResourceKind::Addresses)).await.map_err(|_| End::Unwanted)
    }

    async fn authorizations(
        &self,
        resources: Vec<ReadResource>,
        gone: Vec<Arc<str>>,
        is_first: bool,
    ) -> Result<(), End> {
        for name in gone {
            let policy = Err(String::new());
            let document = PolicyDocument::Authorization { name, policy };
            self.tell_policies(Update::Change(Change::Deleted(document))).await?;
        }
        for ReadResource { name, content, .. } in resources {
            let policy = match content {
                Ok(Content::Authorization(policy)) => Ok(policy),
                Ok(Content::Address(_)) => continue,
                Err(problem) => Err(problem),
            };
            let document = PolicyDocument::Authorization { name, policy };
            self.tell_policies(Update::Change(Change::Applied(document))).await?;
        }
        if is_first {
            self.tell_policies(Update::Change(Change::Listed(PolicyResource::Authorizations))).await?;
        }
        self.tell_policies(Update::Fresh(PolicyResource::Authorizations)).await
    }

    /// Returns the policies that a workload lists.
    fn listing(&self, content: &AddressContent) -> Option<Listing> {
        let AddressContent::Workload(record) = content else { return None };
        let is_here = record.is_pod && record.cluster == self.own.cluster && *record.node == *self.own.node;
        Some(Listing {
            namespace: record.namespace.as_str().into(),
            name: record.name.as_str().into(),
            // Of no use for others.
            addresses: if is_here { record.addresses.clone() } else { Vec::new() },
            is_here,
            policies: record.policies.iter().map(|name| name.as_str().into()).collect(),
        })
    }

    async fn tell_directory(&self, change: Change<ResourceKind, Object>) -> Result<(), End> {
        self.sinks.directory.send(Update::Change(change)).await.map_err(|_| End::Unwanted)
    }

    async fn tell_policies(&self, update: Update<PolicyResource, PolicyDocument>) -> Result<(), End> {
        let Some(policies) = &self.sinks.policies else { return Ok(()) };
        policies.send(update).await.map_err(|_| End::Unwanted)
    }

    /// Tells both stores that the connection has failed. Returns `None` if the receivers were dropped.
    async fn failed(&self, problem: String) -> Option<()> {
        let of_directory = Update::Failed(ResourceKind::Addresses, problem.clone());
        self.sinks.directory.send(of_directory).await.ok()?;
        self.tell_policies(Update::Failed(PolicyResource::Authorizations, problem)).await.ok()
    }
}

fn object(name: Arc<str>, content: AddressContent) -> Object {
    Object::Address(Box::new(AddressObject { name, content }))
}

async fn send(
    sender: &mut Sender<DeltaDiscoveryRequest>,
    request: &DeltaDiscoveryRequest,
) -> Result<(), End> {
    match timeout(SEND, sender.send(request)).await {
        // A connection that has ended has its reason at the receiver.
        Ok(_) => Ok(()),
        Err(_) => Err(format!("istiod did not take in a request within {SEND:?}").into()),
    }
}

/// Returns an error with the remedy.
fn explained(error: &CallError) -> String {
    let hint = match error.status().map(|status| status.code) {
        Some(Code::Unauthenticated) => {
            "; istiod does not accept the token: is its audience that of istiod (istio-ca), and is the agent's account in the namespace that POD_NAMESPACE names?"
        }
        Some(Code::PermissionDenied) => "; istiod does not allow this agent's account to read the mesh",
        Some(Code::Unimplemented) => "; is this the address of istiod's xDS, port 15012 or 15010?",
        Some(Code::Unavailable) => "; istiod is starting or shutting down",
        _ => "",
    };
    format!("{error}{hint}")
}
