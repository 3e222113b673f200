//! A server of delta xDS that does what a test says, with faults.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::HeaderMap;
use prost::Message as _;
use tacit_core::{
    directory::{Connect, Directory, Labels, Protocol, Workload as Pod},
    policy::{Mode, Policies},
    spiffe::SpiffeId,
};
use tacit_grpc::{
    Status,
    server::{Connection, Replies, Requests},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex, split},
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    client::{Client, ConnectionState, Dial, Dialled, OwnPlace, RESPONSE_MAX_BYTES, Sinks},
    messages::{
        Action, Address, AddressKind, Any, Authorization, Clause, DeltaDiscoveryRequest,
        DeltaDiscoveryResponse, Match, MatchType, Resource, Rule, Scope, StringMatch, Workload,
    },
    policies::ReducedStore,
    session::{ResourceType, node},
};
use crate::{
    kubernetes::publish,
    policy::MeshSettings,
    reload::{Opening, Watched},
};

/// Settings of a mesh without any.
pub(super) fn mesh_settings() -> MeshSettings {
    MeshSettings {
        root_namespace: "istio-system".into(),
        minimum: Mode::Disable,
        aliases: std::sync::Arc::default(),
    }
}

/// Limit for everything that a test waits for. Nothing takes that long unless it never comes.
const LIMIT: Duration = Duration::from_secs(60);

/// A fault of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The connection ends after this many bytes of the server.
    CutAfter(usize),
    /// A connection that takes this many bytes at a time.
    Narrow(usize),
}

/// The agent's side under test, and the server's.
pub(super) struct Harness {
    connections: mpsc::UnboundedReceiver<(Fault, DuplexStream)>,
    fault: Arc<Mutex<Fault>>,
    directory: Option<Opening<Directory>>,
    policies: Option<Opening<Policies>>,
    pub(super) state: watch::Receiver<ConnectionState>,
    client: tokio::task::JoinHandle<()>,
}

/// The server's side of one stream.
pub(super) struct Stream {
    pub(super) headers: HeaderMap,
    requests: Requests<DeltaDiscoveryRequest>,
    /// `None` after the end of the call.
    replies: Option<Replies<DeltaDiscoveryResponse>>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.client.abort();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Harness {
    pub(super) fn start() -> Self {
        Self::start_with(Duration::from_secs(3600))
    }

    /// Starts a client for which a connection may end after `long`.
    pub(super) fn start_with(long: Duration) -> Self {
        let (sender, connections) = mpsc::unbounded_channel();
        let fault = Arc::new(Mutex::new(Fault::None));
        let (directory_sender, directory) = mpsc::channel(1024);
        let (policy_sender, policies) = mpsc::channel(1024);
        let store = ReducedStore::new(mesh_settings(), "a".into());
        let policies = publish("istiod".to_owned(), store, policies);
        let directory = crate::directory::testing::publish_istiod(directory);
        let (state_sender, state) = watch::channel(ConnectionState::default());
        let own = OwnPlace { node: "a".into(), cluster: "c".to_owned(), network: String::new() };
        let sinks = Sinks { directory: directory_sender, policies: Some(policy_sender) };
        let id = node("ztunnel~10.0.0.1~agent.ns~ns.svc.cluster.local".to_owned(), "c", &[]);
        let dialled = (dial(sender, Arc::clone(&fault)), "https://istiod:15012".to_owned());
        let client = Client::new(dialled, id, own, sinks, state_sender);
        let client = tokio::spawn(client.with_times(Duration::from_millis(50), long).run());
        let (directory, policies) = (Some(directory), Some(policies));
        Self { connections, fault, directory, policies, state, client }
    }

    /// Sets the fault of the connections from now on.
    pub(super) fn set_fault(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Waits for the client's next stream.
    pub(super) async fn stream(&mut self) -> Stream {
        let (_, io) = within(self.connections.recv()).await.expect("a connection");
        Self::serve(io).await
    }

    /// Waits for the client's next stream with this fault. Connections that were made before are closed.
    pub(super) async fn faulty_stream(&mut self, wanted: Fault) -> Stream {
        loop {
            let (fault, io) = within(self.connections.recv()).await.expect("a connection");
            if fault == wanted {
                return Self::serve(io).await;
            }
        }
    }

    async fn serve(io: DuplexStream) -> Stream {
        let mut connection = within(Connection::open(io, RESPONSE_MAX_BYTES)).await.expect("HTTP/2");
        let call = within(connection.next()).await.expect("a call");
        assert_eq!(
            call.path,
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        );
        let headers = call.headers.clone();
        let (requests, replies) = call.start();
        // Drives the connection.
        let connection = tokio::spawn(async move { while connection.next().await.is_some() {} });
        Stream { headers, requests, replies: Some(replies), connection }
    }

    /// Waits for both values to be complete.
    pub(super) async fn complete(&mut self) -> (Watched<Directory>, Watched<Policies>) {
        let (directory, policies) = (self.directory.take(), self.policies.take());
        let directory = within(directory.expect("once").complete()).await.expect("running");
        (directory, within(policies.expect("once").complete()).await.expect("running"))
    }

    /// Waits until the state of the connection is as wanted.
    pub(super) async fn state_with(&mut self, wanted: impl Fn(&ConnectionState) -> bool) -> ConnectionState {
        within(self.state.wait_for(wanted)).await.expect("running").clone()
    }
}

impl Stream {
    pub(super) async fn request(&mut self) -> DeltaDiscoveryRequest {
        within(self.requests.message()).await.expect("readable").expect("a request")
    }

    pub(super) async fn send(&mut self, response: &DeltaDiscoveryResponse) {
        let replies = self.replies.as_mut().expect("not ended");
        within(replies.send(response)).await.expect("the client reads");
    }

    /// Sends a response that may be cut.
    pub(super) async fn try_send(&mut self, response: &DeltaDiscoveryResponse) {
        let replies = self.replies.as_mut().expect("not ended");
        let _ = within(replies.send(response)).await;
    }

    /// Sends a response and returns the answer.
    pub(super) async fn exchange(&mut self, response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        self.send(response).await;
        let answer = self.request().await;
        assert_eq!((&answer.response_nonce, &answer.type_url), (&response.nonce, &response.type_url));
        answer
    }

    /// Ends the call with a status.
    pub(super) async fn finish(mut self, status: &Status) {
        let replies = self.replies.take().expect("not ended");
        within(replies.finish(status)).await.expect("the client reads");
        // The connection lives until the client has closed it.
        let _ = within(&mut self.connection).await;
    }

    /// Drops the call, which resets it.
    pub(super) fn reset(mut self) {
        drop(self.replies.take());
    }
}

pub(super) async fn within<F: Future>(future: F) -> F::Output {
    timeout(LIMIT, future).await.expect("in time")
}

fn dial(connections: mpsc::UnboundedSender<(Fault, DuplexStream)>, fault: Arc<Mutex<Fault>>) -> Dial {
    Arc::new(move || {
        let fault = *fault.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = if let Fault::Narrow(bytes) = fault { bytes } else { 1 << 20 };
        let (client, mut server) = duplex(buffer);
        if let Fault::CutAfter(bytes) = fault {
            server = cut_after(server, bytes);
        }
        let sent = connections.send((fault, server)).map_err(|_| "the test is over".to_owned());
        let future = async move {
            sent?;
            let mut metadata = HeaderMap::new();
            metadata.insert("authorization", http::HeaderValue::from_static("Bearer token"));
            Ok(Dialled { io: Box::new(client), metadata })
        };
        Box::pin(future) as Pin<Box<dyn Future<Output = Result<Dialled, String>> + Send>>
    })
}

/// Returns the server's end of a connection that breaks after `bytes` bytes from the server.
fn cut_after(outer: DuplexStream, bytes: usize) -> DuplexStream {
    let (inner, server) = duplex(1 << 20);
    tokio::spawn(async move {
        let (mut from_client, mut to_client) = split(outer);
        let (mut from_server, mut to_server) = split(inner);
        let up = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let mut left = bytes;
        let mut buffer = vec![0; 4096];
        while left > 0 {
            let most = left.min(buffer.len());
            let Ok(count @ 1..) = from_server.read(&mut buffer[..most]).await else { break };
            left -= count;
            if to_client.write_all(&buffer[..count]).await.is_err() {
                break;
            }
        }
        up.abort();
    });
    server
}

pub(super) fn response(
    of: ResourceType,
    nonce: &str,
    resources: Vec<Resource>,
    removed: &[&str],
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: format!("v{nonce}"),
        resources,
        type_url: of.url().to_owned(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        nonce: nonce.to_owned(),
    }
}

fn resource(of: ResourceType, name: &str, version: &str, value: Vec<u8>) -> Resource {
    let any = Any { type_url: of.url().to_owned(), value };
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(any),
        ..Resource::default()
    }
}

/// A pod of the node `node` with the address 10.77.x.y, which lists `policies`.
pub(super) fn pod(number: u16, node: &str, policies: &[&str]) -> Resource {
    let [high, low] = number.to_be_bytes();
    let name = format!("web-{number}");
    let uid = format!("c//Pod/shop/{name}");
    let workload = Workload {
        uid: uid.clone(),
        name,
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 77, high, low]],
        tunnel_protocol: 1,
        service_account: "web".to_owned(),
        node: node.to_owned(),
        cluster_id: "c".to_owned(),
        authorization_policies: policies.iter().map(|name| (*name).to_owned()).collect(),
        ..Workload::default()
    };
    let address = Address { kind: Some(AddressKind::Workload(Box::new(workload))) };
    resource(ResourceType::Address, &uid, "1", address.encode_to_vec())
}

/// A DENY policy for sources without a principal, as istiod converts STRICT.
pub(super) fn strict(name: &str, scope: Scope) -> Resource {
    let match_type = Some(MatchType::Presence(()));
    let one = Match { not_principals: vec![StringMatch { match_type }], ..Match::default() };
    let rule = Rule { clauses: vec![Clause { matches: vec![one] }] };
    policy(name, scope, vec![rule])
}

/// A DENY policy with these rules.
pub(super) fn policy(name: &str, scope: Scope, rules: Vec<Rule>) -> Resource {
    let (namespace, short) = name.split_once('/').expect("namespace and name");
    let message = Authorization {
        name: short.to_owned(),
        namespace: namespace.to_owned(),
        scope: scope as i32,
        action: Action::Deny as i32,
        rules,
        ..Authorization::default()
    };
    resource(ResourceType::Authorization, name, "1", message.encode_to_vec())
}

/// A resource that cannot be read.
pub(super) fn broken(of: ResourceType, name: &str) -> Resource {
    resource(of, name, "2", vec![0xff, 0xff])
}

/// The pod of the directory that corresponds to [`pod`].
pub(super) fn own_pod(number: u16) -> Pod {
    let [high, low] = number.to_be_bytes();
    Pod {
        name: format!("web-{number}").into(),
        namespace: "shop".into(),
        identity: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid"),
        addresses: vec![[10, 77, high, low].into()],
        node: "a".into(),
        labels: Labels::default(),
        cgroup: std::path::PathBuf::from("web"),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Connect::default(),
    }
}
