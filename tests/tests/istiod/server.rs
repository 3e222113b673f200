//! A server of delta xDS, with its own messages: those of the agent are not used.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    thread,
};

use anyhow::Result;
use prost::Message;
use tacit_grpc::server::Connection;
use tacit_topology::Netns;
use tokio::sync::watch;

/// Name of the policy that a STRICT workload lists.
pub(crate) const STRICT: &str = "istio-system/istio_converted_static_strict";
const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// Name of the cluster, the agent's default.
const CLUSTER: &str = "Kubernetes";
const MESSAGE_MAX_BYTES: usize = 1 << 20;

/// A workload that a tunnel reaches.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) node: String,
    pub(crate) addresses: Vec<Vec<u8>>,
    pub(crate) policies: Vec<String>,
    pub(crate) has_waypoint: bool,
}

/// The state that istiod tells.
#[derive(Debug, Clone)]
pub(crate) struct Mesh {
    pub(crate) workloads: Vec<Workload>,
    /// True while it accepts streams.
    pub(crate) is_up: bool,
}

/// Servers with one state.
pub(crate) struct Istiod(watch::Sender<Mesh>);

impl Istiod {
    pub(crate) fn new(mesh: Mesh) -> Self {
        Self(watch::Sender::new(mesh))
    }

    /// Changes the state, which is sent to all streams.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Mesh)) {
        self.0.send_modify(change);
    }

    /// Starts a server in a network namespace. Returns its address.
    pub(crate) fn serve(&self, netns: &Netns) -> Result<SocketAddr> {
        let listener = netns.enter(|| TcpListener::bind("127.0.0.1:0"))??;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let mesh = self.0.subscribe();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                while let Ok((io, _)) = listener.accept().await {
                    let mesh = mesh.clone();
                    tokio::spawn(async move {
                        let mut until_down = mesh.clone();
                        tokio::select! {
                            _ = connection(io, mesh) => {}
                            _ = until_down.wait_for(|mesh| !mesh.is_up) => {}
                        }
                    });
                }
            });
        });
        Ok(address)
    }
}

async fn connection(io: tokio::net::TcpStream, mesh: watch::Receiver<Mesh>) {
    let Ok(mut connection) = Connection::open(io, MESSAGE_MAX_BYTES).await else { return };
    while let Some(call) = connection.next().await {
        tokio::spawn(stream(call, mesh.clone()));
    }
}

/// Answers the first request of each type, and sends everything again after each change. The client's answers are only read.
async fn stream(call: tacit_grpc::server::Call, mut mesh: watch::Receiver<Mesh>) {
    let (mut requests, mut replies) = call.start::<Request, Response>();
    let mut nonce = 0_u64;
    for _ in 0..2 {
        let Ok(Some(request)) = requests.message().await else { return };
        nonce += 1;
        let resources = resources(&request.type_url, &mesh.borrow_and_update().clone());
        if replies.send(&response(request.type_url, resources, nonce)).await.is_err() {
            return;
        }
    }
    loop {
        tokio::select! {
            request = requests.message() => {
                if !matches!(request, Ok(Some(_))) {
                    return;
                }
            }
            changed = mesh.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = mesh.borrow_and_update().clone();
                for of in [ADDRESS, AUTHORIZATION] {
                    nonce += 1;
                    if replies.send(&response(of.to_owned(), resources(of, &now), nonce)).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

fn response(type_url: String, resources: Vec<Resource>, nonce: u64) -> Response {
    Response { resources, type_url, nonce: nonce.to_string() }
}

fn resources(of: &str, mesh: &Mesh) -> Vec<Resource> {
    if of == AUTHORIZATION {
        let unproven = Match { not_principals: vec![Text { presence: Some(()) }] };
        let rule = Rule { clauses: vec![Clause { matches: vec![unproven] }] };
        let (namespace, name) = STRICT.split_once('/').unwrap_or_default();
        let policy = Policy {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            scope: 2,
            action: 1,
            rules: vec![rule],
        };
        return vec![resource(of, STRICT, policy.encode_to_vec())];
    }
    let of_workload = |workload: &Workload| {
        let uid = format!("{CLUSTER}//Pod/{}/{}", workload.namespace, workload.name);
        let message = WorkloadMessage {
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            addresses: workload.addresses.clone(),
            tunnel_protocol: 1,
            service_account: "client".to_owned(),
            waypoint: workload.has_waypoint.then_some(Gateway { port: 15008 }),
            node: workload.node.clone(),
            policies: workload.policies.clone(),
            cluster: CLUSTER.to_owned(),
            uid: uid.clone(),
        };
        resource(of, &uid, AddressMessage { workload: Some(message) }.encode_to_vec())
    };
    mesh.workloads.iter().map(of_workload).collect()
}

fn resource(of: &str, name: &str, value: Vec<u8>) -> Resource {
    let any = Any { type_url: of.to_owned(), value };
    Resource { version: "1".to_owned(), any: Some(any), name: name.to_owned() }
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "2")]
    type_url: String,
    #[prost(btree_map = "string, string", tag = "5")]
    versions: BTreeMap<String, String>,
    #[prost(string, tag = "6")]
    nonce: String,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    nonce: String,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(string, tag = "1")]
    version: String,
    #[prost(message, optional, tag = "2")]
    any: Option<Any>,
    #[prost(string, tag = "3")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct AddressMessage {
    #[prost(message, optional, tag = "1")]
    workload: Option<WorkloadMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct WorkloadMessage {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addresses: Vec<Vec<u8>>,
    #[prost(int32, tag = "5")]
    tunnel_protocol: i32,
    #[prost(string, tag = "7")]
    service_account: String,
    #[prost(message, optional, tag = "8")]
    waypoint: Option<Gateway>,
    #[prost(string, tag = "9")]
    node: String,
    #[prost(string, repeated, tag = "16")]
    policies: Vec<String>,
    #[prost(string, tag = "18")]
    cluster: String,
    #[prost(string, tag = "20")]
    uid: String,
}

#[derive(Clone, PartialEq, Message)]
struct Gateway {
    #[prost(uint32, tag = "3")]
    port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Policy {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(int32, tag = "3")]
    scope: i32,
    #[prost(int32, tag = "4")]
    action: i32,
    #[prost(message, repeated, tag = "5")]
    rules: Vec<Rule>,
}

#[derive(Clone, PartialEq, Message)]
struct Rule {
    #[prost(message, repeated, tag = "1")]
    clauses: Vec<Clause>,
}

#[derive(Clone, PartialEq, Message)]
struct Clause {
    #[prost(message, repeated, tag = "2")]
    matches: Vec<Match>,
}

#[derive(Clone, PartialEq, Message)]
struct Match {
    #[prost(message, repeated, tag = "4")]
    not_principals: Vec<Text>,
}

#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(message, optional, tag = "4")]
    presence: Option<()>,
}
