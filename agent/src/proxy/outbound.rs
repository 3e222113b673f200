//! Captured connections: resolve the destination, choose an endpoint, connect an upstream, relay.
//!
//! ```text
//! held SYN, or accept on the pod's loopback ─ destination from the kernel ─ a service's? its endpoint ─ route
//!     SameNode  ─ policy ─ application in the other pod       ─ relay as plaintext, inside this node
//!     Tunnel    ─ session from the pool or a new one ─ OPEN   ─ relay in frames
//!     Hbone     ─ stream of a connection or a new one ─ CONNECT ─ relay in the stream
//!     Plaintext ─ connection from the pod's namespace         ─ relay as plaintext
//!     Refuse    ─ reset
//! ```
//! For a held SYN, the application's `connect()` ends as the upstream does (`opening`). With `connect: early` it has succeeded
//! before, and a failure resets the application before it receives a byte. Of a service, other endpoints are tried before
//! the connection fails (`endpoints`).

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tacit_abi::tcp_port;
use tacit_core::{
    balance::{EndpointRequest, PickedEndpoint},
    directory::{Directory, Workload},
    policy::{self, Flow, FlowSource, PolicyDenial},
    refusal::{Refusal, RefusalReason},
    route::{self, PlaintextCause, Route, RouteInput},
    wire::Role,
};
use tacit_identity::peer_trust::PeerChain;
use tacit_kernel::{held::HeldEnds, socket::AppStream};
use tacit_tunnel::{
    hbone::relay as relay_stream,
    relay::{self, App, PodBulk, Remote},
    socket,
};

use crate::{
    enrol::Pod,
    proxy::{
        Addresses, Proxy,
        authorize::{self, Admitted},
        canonical, ends_in_pod, not_connected,
    },
    recheck::{Depends, Revoked},
    telemetry::{FlowSpec, LiveFlow, Reporter, Security},
};
use endpoints::{Endpoints, Rest};
use session::{Carrier, Tunnel};

/// Time to wait for an address that the directory does not know. It is above the delay of a watch (tens of ms), and
/// below a delay that users notice as a hang.
const DISCOVERY: Duration = Duration::from_secs(1);
/// Limit for a TCP connection to a peer's tunnel port: three SYNs are lost by then.
const PEER_CONNECT: Duration = Duration::from_secs(10);
/// Limit for an endpoint to answer while another one is left: the first SYN and its repetition after a second are lost
/// by then.
const TRY_CONNECT: Duration = Duration::from_secs(2);

mod endpoints;
mod hbone;
pub mod opening;
mod session;

/// One try to connect an upstream.
#[derive(Clone, Copy)]
struct Attempt<'a> {
    /// Limit for connecting.
    limit: Duration,
    /// The application, if its data may be sent before the upstream accepts. `None` if another try may follow, since nothing
    /// is sent twice.
    optimistic: Option<&'a AppStream>,
}

impl<'a> Attempt<'a> {
    /// Returns a try after which `rest` is left. `app` is the application's connection, if there is one by now.
    fn before(rest: Rest, app: Option<&'a AppStream>) -> Self {
        match rest {
            Rest::More => Self { limit: TRY_CONNECT, optimistic: None },
            Rest::Nothing => Self { limit: PEER_CONNECT, optimistic: app },
        }
    }
}

/// A connected destination, ready to carry the flow.
enum Upstream {
    Plaintext(AppStream, FlowSpec),
    /// An application of this pod, whose policies hold as long as the flow lives.
    SameNode(AppStream, FlowSpec, Arc<Pod>, Admitted),
    Tunnel(Tunnel),
}

/// Serves one captured connection to its end.
pub async fn handle(path: Arc<Proxy>, pod: Arc<Pod>, app: AppStream, client: SocketAddr) {
    relay::connection_started();
    // Boxed, so that a flow does not keep room for what is needed only until the upstream is connected.
    let carried = Box::pin(set_out(path, pod, app, client)).await;
    if let Some(carried) = carried {
        carried.await;
    }
}

/// The relay of a flow; it lasts as long as the flow.
type Carried = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Connects an upstream and returns the relay to it, or refuses the connection.
async fn set_out(path: Arc<Proxy>, pod: Arc<Pod>, app: AppStream, client: SocketAddr) -> Option<Carried> {
    let Some(addresses) = find_destination(&path, &pod, &app, client) else {
        let at = app.local_addr().map_or(client, canonical);
        let refusal = Refusal::new(RefusalReason::NoDestination, "not a captured connection");
        path.refuse(app, Reporter::Source, Addresses { source: client, destination: at }, refusal);
        return None;
    };
    match reach(&path, &pod, addresses, Some(&app)).await {
        Ok((upstream, endpoint)) => {
            // A flow of this node is not watched.
            let is_watched = !matches!(upstream, Upstream::SameNode(..));
            let ends = if is_watched { ends_in_pod(client, &app) } else { None };
            Some(carry(path, pod, (app, ends), upstream, endpoint.map(Box::new)))
        }
        Err(refusal) => {
            path.refuse(app, Reporter::Source, addresses, refusal);
            None
        }
    }
}

/// Resolves the destination and connects to it: to the pod, or to the first endpoint of the service that accepts. The
/// endpoint counts as loaded until it is dropped.
async fn reach(
    path: &Arc<Proxy>,
    pod: &Pod,
    addresses: Addresses,
    app: Option<&AppStream>,
) -> Result<(Upstream, Option<PickedEndpoint>), Refusal> {
    let Addresses { source, destination } = addresses;
    let is_inside = pod.is_inside(destination.ip()) && !pod.is_strict(&path.snapshots.directory.current());
    // Nothing is to be discovered about the inside of a pod.
    let directory = match is_inside {
        true => path.snapshots.directory.current(),
        false => discover(path, destination).await,
    };
    // Also for the pods of this node: a waypoint enforces policies that the destination's agent does not have.
    if let Some(detour) = directory.detour(destination).filter(|_| !is_inside) {
        return Err(Refusal::new(detour.reason(), detour));
    }
    let Some(service) = directory.service_for(destination).filter(|_| !is_inside) else {
        let route = find_route(path, pod, &directory, destination);
        let attempt = Attempt::before(Rest::Nothing, app);
        let upstream = connect_route(path, pod, route, addresses, attempt).await?;
        return Ok((upstream, None));
    };
    let (client, node) = (source.ip(), &*pod.workload.node);
    let request = EndpointRequest { service, address: destination, client, node };
    let mut endpoints = Endpoints::new(&path.balancer, request);
    loop {
        let candidate = endpoints.choose()?;
        let addresses = Addresses { source, destination: candidate.address() };
        let directory = discover(path, candidate.address()).await;
        let route = find_route(path, pod, &directory, candidate.address());
        let attempt = Attempt::before(candidate.rest(), app);
        match connect_route(path, pod, route, addresses, attempt).await {
            Ok(upstream) => return Ok((upstream, Some(endpoints.connected(candidate)))),
            Err(refusal) => endpoints.refused(&candidate, refusal)?,
        }
    }
}

/// The directory, once it knows the address: a bounded wait for an unknown one.
async fn discover(path: &Proxy, destination: SocketAddr) -> Arc<Directory> {
    path.snapshots.discover(destination.ip(), DISCOVERY).await
}

/// Connects to the destination by its route.
async fn connect_route(
    path: &Arc<Proxy>,
    pod: &Pod,
    route: Route,
    addresses: Addresses,
    attempt: Attempt<'_>,
) -> Result<Upstream, Refusal> {
    match route {
        Route::SameNode => match connect_same_node(path, pod, addresses).await {
            Err(refusal) if refusal.reason == RefusalReason::NotTunnelled => {
                connect_untunnelled(path, pod, addresses, refusal, attempt.limit).await
            }
            connected => connected,
        },
        Route::Tunnel(expected) => {
            match session::tunnel(path, pod, addresses, (&expected, false), attempt).await {
                Ok(tunnel) => Ok(Upstream::Tunnel(tunnel)),
                Err(refusal) if refusal.reason == RefusalReason::NotTunnelled => {
                    connect_untunnelled(path, pod, addresses, refusal, attempt.limit).await
                }
                Err(refusal) => Err(refusal),
            }
        }
        Route::Hbone(expected) => {
            session::tunnel(path, pod, addresses, (&expected, true), attempt).await.map(Upstream::Tunnel)
        }
        Route::Plaintext(cause) => connect_plaintext(path, pod, addresses, cause, attempt.limit).await,
        Route::Refuse(reason @ RefusalReason::DestinationUnclear) => {
            Err(Refusal::new(reason, "more than one pod or service claims the destination's address"))
        }
        Route::Refuse(reason) => {
            let mode = pod.policy().modes.default;
            Err(Refusal::new(reason, format!("mode of {} is {mode:?}", pod.workload.name)))
        }
    }
}

/// Relays the flow of the application's connection, whose ends are given, to its end. Each upstream's future is boxed by itself: a flow
/// keeps no room for the others'.
fn carry(
    path: Arc<Proxy>,
    pod: Arc<Pod>,
    (app, ends): (AppStream, Option<HeldEnds>),
    upstream: Upstream,
    endpoint: Option<Box<PickedEndpoint>>,
) -> Carried {
    match upstream {
        Upstream::Plaintext(server, spec) => {
            path.limit_silence(&server);
            let watched = path.watch(&pod, ends);
            Box::pin(async move {
                let destination = spec.ends.destination.address;
                let flow = path.telemetry.open_flow(spec);
                let (relayed, bulk) = (path.clone(), path.shares.bulk.of(pod.cgroup));
                let revoked = plaintext_revoked(&path, &pod, destination);
                let remote = Some((App::Destination, watched.watching()));
                relay_plain(relayed, (app, server), (flow, bulk), revoked, remote).await;
                drop(endpoint);
            })
        }
        Upstream::SameNode(server, spec, target, admitted) => Box::pin(async move {
            let flow = (path.telemetry.open_flow(spec), path.shares.bulk.of(pod.cgroup));
            let revoked = admitted.revoked(&path.rechecks, &target);
            relay_plain(path, (app, server), flow, revoked, None).await;
            drop(endpoint);
        }),
        Upstream::Tunnel(Tunnel { carrier: Carrier::Stream(flow), spec, key }) => {
            let live = path.telemetry.open_flow(spec);
            let watched = path.watch(&pod, ends);
            Box::pin(async move {
                let hbone::Stream { stream, place } = *flow;
                let end = tokio::select! {
                    end = relay_stream(app, stream, Role::Client, live.counters(), watched.watching()) => end,
                    () = path.drain.cut.cancelled() => return live.close("cut"),
                    refusal = authorize::peer_revoked(&path.rechecks, &pod, place.peer().chain()) => {
                        return authorize::revoke(&path.telemetry, live, &refusal);
                    }
                };
                if end.is_silence() {
                    path.hbone.close_to(&key);
                    avoid(endpoint.as_deref(), &live);
                }
                live.close(end.label());
                drop((place, endpoint));
            })
        }
        Upstream::Tunnel(Tunnel { carrier: Carrier::Session { session, optimistic_bytes }, spec, key }) => {
            let live = path.telemetry.open_flow(spec);
            live.counters().sent.fetch_add(optimistic_bytes, Relaxed);
            let bulk = path.shares.bulk.of(pod.cgroup);
            let watched = path.watch(&pod, ends);
            let chain = session.peer_chain().clone();
            Box::pin(async move {
                let (end, session) = tokio::select! {
                    ended = relay::tunnelled(app, session, live.counters(), &bulk, watched.watching()) => ended,
                    () = path.drain.cut.cancelled() => return live.close("cut"),
                    refusal = authorize::peer_revoked(&path.rechecks, &pod, &chain) => {
                        return authorize::revoke(&path.telemetry, live, &refusal);
                    }
                };
                if end.is_silence() {
                    path.sessions.close_to(&key);
                    avoid(endpoint.as_deref(), &live);
                }
                live.close(end.label());
                if let Some(session) = session
                    && !pod.closed.is_cancelled()
                {
                    path.sessions.keep(key, session);
                }
                drop(endpoint);
            })
        }
    }
}

/// Has the next connections of the flow's client avoid an endpoint that does not answer.
fn avoid(endpoint: Option<&PickedEndpoint>, flow: &LiveFlow) {
    if let Some(endpoint) = endpoint {
        endpoint.avoid(flow.spec().ends.source.address.ip(), Instant::now());
    }
}

/// Returns the flow's addresses as both applications see them.
fn find_destination(path: &Proxy, pod: &Pod, app: &AppStream, client: SocketAddr) -> Option<Addresses> {
    let destination = path.dialer.destination(app)?;
    Some(Addresses { source: source(pod, client, destination)?, destination })
}

/// Returns the source of a flow as both applications see it. Returns `None` for a client with a foreign source address
/// (IP_TRANSPARENT), because answers to it would leave the pod as plaintext.
fn source(pod: &Pod, client: SocketAddr, destination: SocketAddr) -> Option<SocketAddr> {
    if !client.ip().is_loopback() && !pod.workload.addresses.contains(&client.ip()) {
        return None;
    }
    Some(SocketAddr::new(pod.address_like(destination.ip())?, client.port()))
}

/// Waits until a flow that is carried as plaintext must end, and returns the reason. The route was decided before, so the
/// first check is made at once.
fn plaintext_revoked(path: &Arc<Proxy>, pod: &Arc<Pod>, destination: SocketAddr) -> Revoked {
    let (known, of) = (Arc::clone(path), Arc::clone(pod));
    path.rechecks.revoked(
        (pod.cgroup, Depends::OnDirectory),
        || false,
        move || {
            let reason = plaintext_denied(&known, &of, destination)?;
            Some(Refusal::new(reason, "carried as plaintext before the directory or a policy changed"))
        },
    )
}

/// Returns the reason why a flow to `destination` must not be carried as plaintext: the destination or the pod is STRICT, or
/// the address is another's. Under PERMISSIVE a flow that could be tunnelled now may go on.
fn plaintext_denied(path: &Proxy, pod: &Pod, destination: SocketAddr) -> Option<RefusalReason> {
    let known = path.snapshots.directory.current();
    match find_route(path, pod, &known, destination) {
        Route::Plaintext(_) => None,
        Route::Refuse(reason) => Some(reason),
        Route::Tunnel(_) | Route::Hbone(_) | Route::SameNode => {
            let policies = path.snapshots.policies.current();
            let mode =
                known.at(destination.ip()).map(|workload| policies.modes(workload).at(destination.port()));
            (pod.is_strict(&known) || mode == Some(policy::Mode::Strict))
                .then(|| PolicyDenial::PlaintextInStrict.reason())
        }
    }
}

fn find_route(path: &Proxy, pod: &Pod, directory: &Directory, destination: SocketAddr) -> Route {
    let workload = directory.at(destination.ip());
    let modes = workload.map(|w| path.snapshots.policies.current().modes(w));
    route::decide(&RouteInput {
        port: destination.port(),
        destination: workload.map(|w| &**w),
        is_unclear: directory.is_unclear_at(destination),
        // The directory has a new range before the kernel has it.
        outside_mesh: !path.snapshots.is_mesh(destination.ip())
            && !directory.ranges().contains(destination.ip())
            && !directory.is_node_port(destination),
        inside_pod: pod.is_inside(destination.ip()),
        on_this_node: path.pods.load().at(destination.ip()).is_some(),
        destination_mode: modes.map_or(policy::Mode::Strict, |m| m.at(destination.port())),
        source_is_strict: pod.is_strict(directory),
    })
}

/// Both pods are on this node: identity, mode and policies apply, no byte touches a wire.
async fn connect_same_node(path: &Proxy, pod: &Pod, addresses: Addresses) -> Result<Upstream, Refusal> {
    let Addresses { source, destination } = addresses;
    let target = path.pods.load().at(destination.ip()).cloned();
    let target = target.ok_or_else(|| {
        Refusal::new(RefusalReason::DestinationGone, "the destination is no longer enrolled here")
    })?;
    // The pod's namespace has the address, which proves nothing about others: the directory has to agree.
    let directory = path.snapshots.directory.current();
    if !directory.at(destination.ip()).is_some_and(|known| is_same_pod(known, &target.workload)) {
        let detail = format!("the directory does not give this address to {}", target.workload.full_name());
        return Err(Refusal::new(RefusalReason::DestinationUnproven, detail));
    }
    if let Some(reason) = target.not_tunnelled() {
        return Err(Refusal::new(RefusalReason::NotTunnelled, reason));
    }
    if let Some(reason) = authorize::plaintext_alone(&target, source.ip(), destination) {
        return Err(Refusal::new(RefusalReason::NotTunnelled, reason));
    }
    if tcp_port::is_reserved(destination.port()) {
        return Err(Refusal::new(RefusalReason::ReservedPort, "the destination's agent has this port"));
    }
    let (identity, theirs) = (pod.workload.identity.clone(), target.workload.identity.clone());
    let ends = path.ends(Reporter::Source, addresses, Some(identity.clone()), Some(theirs));
    let flow = Flow { source: FlowSource::SameNode(identity), client: source.ip(), destination };
    // Nothing but the kernel proves the flow.
    let proof = (flow, PeerChain::default());
    let admitted = authorize::admit(&path.telemetry, &target, proof, &ends)?;
    let connected = path.dial_application(&target, destination, source).await;
    let server = connected.map_err(|error| authorize::not_delivered(&target, &error))?;
    let spec = FlowSpec { ends, security: Security::SameNode, trace: [0; 16] };
    Ok(Upstream::SameNode(server, spec, target, admitted))
}

/// Returns true if the directory's workload is the enrolled pod, to which bytes may be handed over.
fn is_same_pod(known: &Workload, enrolled: &Workload) -> bool {
    known.identity == enrolled.identity && known.node == enrolled.node && known.cgroup == enrolled.cgroup
}

/// Connects to a pod that takes plaintext alone, as its agent has proven. Neither end may be STRICT.
///
/// # Errors
/// `refusal` if one is.
async fn connect_untunnelled(
    path: &Proxy,
    pod: &Pod,
    addresses: Addresses,
    refusal: Refusal,
    limit: Duration,
) -> Result<Upstream, Refusal> {
    let destination = addresses.destination;
    let directory = path.snapshots.directory.current();
    let policies = path.snapshots.policies.current();
    let mode = directory.at(destination.ip()).map(|known| policies.modes(known).at(destination.port()));
    if pod.is_strict(&directory) || mode.is_none_or(|mode| mode == policy::Mode::Strict) {
        return Err(refusal);
    }
    connect_plaintext(path, pod, addresses, PlaintextCause::DestinationNotTunnelled, limit).await
}

/// Connects without a tunnel, from the pod's own namespace, as the application would without Tacit.
async fn connect_plaintext(
    path: &Proxy,
    pod: &Pod,
    addresses: Addresses,
    cause: PlaintextCause,
    limit: Duration,
) -> Result<Upstream, Refusal> {
    let Addresses { source, destination } = addresses;
    let connected = match cause {
        PlaintextCause::DestinationModeDisable => path.dialer.to_disabled_port(pod, destination, limit).await,
        _ => path.dialer.connect(pod, destination, limit).await,
    };
    let server = connected.map_err(|error| not_connected(&error))?;
    socket::reset_if_dropped(&server);
    socket::begin_small(&server, path.shares.unread_bytes(pod.cgroup));
    tracing::debug!(%source, %destination, why = cause.label(), "plaintext");
    let spec = FlowSpec {
        ends: path.ends(Reporter::Source, addresses, None, None),
        security: Security::Plaintext,
        trace: [0; 16],
    };
    Ok(Upstream::Plaintext(server, spec))
}

async fn relay_plain(
    path: Arc<Proxy>,
    (app, server): (AppStream, AppStream),
    (flow, bulk): (LiveFlow, PodBulk),
    revoked: impl Future<Output = Refusal>,
    remote: Option<Remote<'_>>,
) {
    let end = tokio::select! {
        // Policy may have changed while the upstream was connected: no byte is relayed before it is asked again.
        biased;
        refusal = revoked => return authorize::revoke(&path.telemetry, flow, &refusal),
        () = path.drain.cut.cancelled() => "cut",
        end = relay::plain(app, server, flow.counters(), &bulk, remote) => end.label(),
    };
    flow.close(end);
}

#[cfg(test)]
mod tests {
    use tacit_tunnel::Session;

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

    /// Limits the memory of a flow's tasks, beside its session and sockets: with 10,000 flows a kilobyte is ten
    /// megabytes.
    #[test]
    fn an_idle_flow_is_small() {
        fn of4<A, B, C, D, F>(_: fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let parts = [of4(handle), of4(crate::proxy::inbound::tunnel), size_of::<Session>()];
        assert!(parts[0] <= 256 && parts[1] <= 1536 && parts[2] <= 768, "{parts:?} bytes");
    }
}
