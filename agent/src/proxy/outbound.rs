//! A captured connection: find out where it wanted to go, decide how, and carry it there.
//!
//! ```text
//! accept on the pod's loopback ─ destination from the kernel ─ a service's? its endpoint ─ route
//!     SameNode ─ policy ─ application in the other pod        ─ relay in clear, inside this node
//!     Tunnel   ─ session from the pool or a new one ─ OPEN    ─ relay in frames
//!     Clear    ─ connection from the pod's namespace          ─ relay in clear
//!     Refuse   ─ reset
//! ```
//! The application's connect() has succeeded by then. Whatever fails resets it before its first byte comes back; of a
//! service other endpoints are tried before (`service`).

use std::{
    future::{Future, pending},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tacit_core::{
    balance::PickedEndpoint,
    directory::{Directory, Workload},
    policy::{self, Flow, FlowSource},
    route::{self, Route, RouteInput},
    spiffe::SpiffeId,
};
use tacit_kernel::socket::connect;
use tacit_tunnel::{Session, relay, socket};
use tokio::net::TcpStream;

use crate::{
    enrol::{self, Pod},
    proxy::{
        PoolKey, Proxy, Refused,
        authorize::{self, Changes, Denial},
        canonical, deny_reason,
    },
    telemetry::{FlowSpec, LiveFlow, Reporter, Security},
};

/// How long an address that the directory does not know is waited for. Above the delay of a watch (tens of ms), below
/// what a person takes for a hang.
const DISCOVERY: Duration = Duration::from_secs(1);
/// How long a TCP connection to a peer's tunnel port may take: three SYNs are lost by then.
const PEER_CONNECT: Duration = Duration::from_secs(10);

mod service;
mod session;

/// The two ends of a flow, as both applications see them.
#[derive(Clone, Copy)]
struct Ends {
    source: SocketAddr,
    destination: SocketAddr,
}

/// One try to make a way.
#[derive(Clone, Copy)]
struct Attempt<'a> {
    /// How long connecting may take.
    limit: Duration,
    /// The application, if what it says may be sent before the way stands; `None` when there may be another try, since nothing
    /// is sent twice.
    optimistic: Option<&'a TcpStream>,
}

/// What is ready to carry a flow.
enum Way {
    Plain(TcpStream, FlowSpec),
    /// To an application of this pod, whose policies hold as long as the flow lives.
    SameNode(TcpStream, FlowSpec, Arc<Pod>, Changes),
    /// With the number of bytes that were sent before it stood.
    Tunnel(Box<Session>, u64, FlowSpec, PoolKey),
}

/// Why a captured connection was reset.
struct Failure {
    reason: &'static str,
    detail: String,
    /// Who was refused, where that is proven.
    identity: Option<SpiffeId>,
    fault: Fault,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The destination's: it does not answer. Another endpoint of the same service may.
    Destination,
    /// It would be the same with every destination, or must not be tried again.
    Other,
}

impl Failure {
    fn new(reason: &'static str, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), identity: None, fault: Fault::Other }
    }

    fn of_destination(reason: &'static str, detail: impl ToString) -> Self {
        Self { fault: Fault::Destination, ..Self::new(reason, detail) }
    }
}

/// Serves one captured connection to its end.
pub async fn handle(path: Arc<Proxy>, pod: Arc<Pod>, app: TcpStream, client: SocketAddr) {
    relay::connection_started();
    // Boxed, so that a flow does not keep room for what is needed only until there is a way.
    let carried = Box::pin(set_out(path, pod, app, client)).await;
    if let Some(carried) = carried {
        carried.await;
    }
}

/// A flow on its way; it lasts as long as the flow.
type Carried = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Finds a way and sets out; `None` when the connection was refused.
async fn set_out(path: Arc<Proxy>, pod: Arc<Pod>, app: TcpStream, client: SocketAddr) -> Option<Carried> {
    let Some((source, destination)) = find_destination(&path, &pod, &app, client) else {
        let at = app.local_addr().map_or(client, canonical);
        path.refuse(app, refused(client, at, Failure::new("no_destination", "not a captured connection")));
        return None;
    };
    match find_way(&path, &pod, Ends { source, destination }, &app).await {
        Ok((way, held)) => Some(carry(path, pod, app, way, held.map(Box::new))),
        Err(failure) => {
            path.refuse(app, refused(source, destination, failure));
            None
        }
    }
}

/// A way to a pod, or to an endpoint of a service, which counts the flow while it lives.
async fn find_way(
    path: &Proxy,
    pod: &Pod,
    ends: Ends,
    app: &TcpStream,
) -> Result<(Way, Option<PickedEndpoint>), Failure> {
    let directory = discover(path, ends.destination).await;
    if let Some(service) = directory.service_for(ends.destination) {
        return service::reach(path, pod, service, ends, app).await;
    }
    let route = find_route(path, pod, &directory, ends.destination);
    let attempt = Attempt { limit: PEER_CONNECT, optimistic: Some(app) };
    reach(path, pod, route, ends, attempt).await.map(|way| (way, None))
}

/// The directory, once it knows the address: a bounded wait for an unknown one.
async fn discover(path: &Proxy, destination: SocketAddr) -> Arc<Directory> {
    let directory = path.directory.current();
    let wait = !directory.knows(destination.ip()) && path.is_mesh(destination.ip());
    if wait { enrol::discover(&path.directory, destination.ip(), DISCOVERY).await } else { directory }
}

/// Makes a way to the destination, as was decided for it.
async fn reach(
    path: &Proxy,
    pod: &Pod,
    route: Route,
    ends: Ends,
    attempt: Attempt<'_>,
) -> Result<Way, Failure> {
    match route {
        Route::SameNode => hand_over(path, pod, ends).await,
        Route::Tunnel(expected) => session::tunnel(path, pod, ends, &expected, attempt).await,
        Route::Plaintext(why) => clear(path, pod, ends, why, attempt.limit).await,
        // Another endpoint of the service may be clear.
        Route::Refuse(route::UNCLEAR) => Err(Failure::of_destination(
            route::UNCLEAR,
            "more than one pod or service claims the destination's address",
        )),
        Route::Refuse(reason) => {
            let mode = pod.modes.load().default;
            Err(Failure::new(reason, format!("mode of {} is {mode:?}", pod.workload.name)))
        }
    }
}

/// Moves the flow's bytes to its end. Each way's future is boxed by itself: a flow keeps no room for the others'.
fn carry(
    path: Arc<Proxy>,
    pod: Arc<Pod>,
    app: TcpStream,
    way: Way,
    held: Option<Box<PickedEndpoint>>,
) -> Carried {
    match way {
        Way::Plain(server, spec) => {
            let flow = path.telemetry.open_flow(spec);
            Box::pin(relay_plain(path, app, server, flow, pending(), held))
        }
        Way::SameNode(server, spec, target, changes) => Box::pin(async move {
            let (client, destination) = (spec.source.address.ip(), spec.destination.address);
            let flow = path.telemetry.open_flow(spec);
            let asked = || Flow { source: FlowSource::SameNode(&pod.workload.identity), client, destination };
            let revoked = authorize::revoked(&target, asked, changes);
            relay_plain(path, app, server, flow, revoked, held).await;
        }),
        Way::Tunnel(session, optimistic_bytes, spec, key) => {
            let live = path.telemetry.open_flow(spec);
            live.counters().sent.fetch_add(optimistic_bytes, Relaxed);
            Box::pin(async move {
                let (end, session) = tokio::select! {
                    ended = relay::tunnelled(app, session, live.counters()) => ended,
                    () = path.drain.cut.cancelled() => return live.close("cut"),
                };
                live.close(end.label());
                if let Some(session) = session
                    && !pod.closed.is_cancelled()
                {
                    session::keep(&path, key, session);
                }
                drop(held);
            })
        }
    }
}

/// The flow's two ends as both applications see them. `None` also for a client that took another's address as its own
/// (IP_TRANSPARENT): answers to it would leave the pod, in clear.
fn find_destination(
    path: &Proxy,
    pod: &Pod,
    app: &TcpStream,
    client: SocketAddr,
) -> Option<(SocketAddr, SocketAddr)> {
    let at = canonical(app.local_addr().ok()?);
    let destination = path.kernel.maps.destination(pod.netns.cookie(), client, at)?;
    if !client.ip().is_loopback() && !pod.workload.addresses.contains(&client.ip()) {
        return None;
    }
    let source = SocketAddr::new(pod.address_like(destination.ip())?, client.port());
    Some((source, destination))
}

fn find_route(path: &Proxy, pod: &Pod, directory: &Directory, destination: SocketAddr) -> Route {
    let workload = directory.at(destination.ip());
    let modes = workload.map(|w| path.policies.current().modes(w));
    route::decide(&RouteInput {
        port: destination.port(),
        destination: workload.map(|w| &**w),
        is_unclear: directory.is_unclear_at(destination),
        outside_mesh: !path.is_mesh(destination.ip()),
        on_this_node: path.table.load().at(destination.ip()).is_some(),
        destination_mode: modes.map_or(policy::Mode::Strict, |m| m.at(destination.port())),
        source_is_strict: pod.is_strict(),
    })
}

fn refused(source: SocketAddr, destination: SocketAddr, failure: Failure) -> Refused {
    Refused {
        reporter: Reporter::Source,
        source,
        destination,
        identity: failure.identity,
        reason: failure.reason,
        detail: failure.detail,
    }
}

/// Both pods are on this node: identity, mode and policies apply, no byte touches a wire.
async fn hand_over(path: &Proxy, pod: &Pod, ends: Ends) -> Result<Way, Failure> {
    let Ends { source, destination } = ends;
    let target = path.table.load().at(destination.ip()).cloned();
    let target = target.ok_or_else(|| {
        Failure::of_destination("destination_gone", "the destination is no longer enrolled here")
    })?;
    // The pod's namespace has the address, which proves nothing about others: the directory has to agree.
    if !path
        .directory
        .current()
        .at(destination.ip())
        .is_some_and(|known| is_same_pod(known, &target.workload))
    {
        return Err(Failure::new(
            "destination_unproven",
            format!("the directory does not give this address to {}", target.workload.full_name()),
        ));
    }
    let identity = &pod.workload.identity;
    let asked = Flow { source: FlowSource::SameNode(identity), client: source.ip(), destination };
    let ends = || {
        let own = Some(target.workload.identity.clone());
        (Reporter::Source, path.party(source, Some(identity.clone())), path.party(destination, own))
    };
    let admitted = authorize::admit(&path.telemetry, &target, &asked, ends);
    let changes = admitted.map_err(|denial| Failure {
        identity: Some(identity.clone()),
        ..Failure::new(denial.label, denial.detail)
    })?;
    let server = path.to_application(&target, destination, source).await.map_err(unreachable)?;
    let spec = FlowSpec {
        reporter: Reporter::Source,
        source: path.party(source, Some(identity.clone())),
        destination: path.party(destination, Some(target.workload.identity.clone())),
        security: Security::SameNode,
        trace: [0; 16],
    };
    Ok(Way::SameNode(server, spec, target, changes))
}

/// Returns true if the directory's workload is the enrolled pod, to which bytes may be handed over.
fn is_same_pod(known: &Workload, enrolled: &Workload) -> bool {
    known.identity == enrolled.identity && known.node == enrolled.node && known.cgroup == enrolled.cgroup
}

/// In clear, from the pod's own namespace, as it would have gone without Tacit.
async fn clear(
    path: &Proxy,
    pod: &Pod,
    ends: Ends,
    why: &'static str,
    limit: Duration,
) -> Result<Way, Failure> {
    let Ends { source, destination } = ends;
    let server = connect(&pod.netns, &path.host, destination, limit).await.map_err(unreachable)?;
    socket::reset_if_dropped(&server);
    tracing::debug!(%source, %destination, why, "in clear");
    let spec = FlowSpec {
        reporter: Reporter::Source,
        source: path.party(source, None),
        destination: path.party(destination, None),
        security: Security::Plaintext,
        trace: [0; 16],
    };
    Ok(Way::Plain(server, spec))
}

fn unreachable(error: std::io::Error) -> Failure {
    Failure::of_destination(deny_reason(&error).label(), error)
}

async fn relay_plain(
    path: Arc<Proxy>,
    app: TcpStream,
    server: TcpStream,
    flow: LiveFlow,
    revoked: impl Future<Output = Denial>,
    _held: Option<Box<PickedEndpoint>>,
) {
    let end = tokio::select! {
        end = relay::plain(app, server, flow.counters()) => end.label(),
        () = path.drain.cut.cancelled() => "cut",
        denial = revoked => return authorize::revoke(&path.telemetry, flow, denial),
    };
    flow.close(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pod_that_the_directory_means_gets_a_flow_of_its_node() {
        let domain = tacit_core::spiffe::TrustDomain::parse("cluster.local").expect("valid");
        let parse = |text: &str| {
            let text = format!("workloads: [{{namespace: shop, addresses: [10.77.1.2], {text}}}]");
            let parsed =
                Directory::parse(&text, std::path::Path::new("directory.yaml"), &domain).expect("valid");
            parsed.at([10, 77, 1, 2].into()).cloned().expect("known")
        };
        let enrolled = parse("name: web, serviceAccount: web, node: a, cgroup: x");
        assert!(is_same_pod(&enrolled, &enrolled));
        for other in [
            "name: web, serviceAccount: db, node: a, cgroup: x",
            "name: web, serviceAccount: web, node: a, cgroup: y",
            "name: web, serviceAccount: web, node: b, cgroup: z",
        ] {
            assert!(!is_same_pod(&parse(other), &enrolled), "{other}");
        }
    }

    /// What the tasks of a flow keep, beside its session and sockets: with 10,000 flows a kilobyte is ten megabytes.
    #[test]
    fn an_idle_flow_is_small() {
        fn of4<A, B, C, D, F>(_: fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let parts = [of4(handle), of4(crate::proxy::inbound::tunnel), size_of::<Session>()];
        assert!(parts[0] <= 256 && parts[1] <= 1536 && parts[2] <= 768, "{parts:?} bytes");
    }
}
