//! A captured connection: find out where it wanted to go, decide how, and carry it there.
//!
//! ```text
//! accept on the pod's loopback ─ destination from the kernel ─ route
//!     SameNode ─ policy ─ application in the other pod        ─ relay in clear, inside this node
//!     Tunnel   ─ session from the pool or a new one ─ OPEN    ─ relay in frames
//!     Clear    ─ connection from the pod's namespace          ─ relay in clear
//!     Refuse   ─ reset
//! ```
//! The application's connect() has succeeded by then. Whatever fails resets it before its first byte comes back.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use tokio::net::TcpStream;

use crate::{
    datapath::{DataPath, PoolKey, Refused, canonical, deny_reason, security},
    enrol::{Pod, discover},
    identity::credentials::Credentials,
    kernel::socket::connect,
    policy::{self, Source, Verdict},
    relay,
    route::{self, Facts, Route},
    telemetry::{FlowSpec, Reporter, Security},
    tunnel::{
        Ahead, DenyReason, Open, OpenError, Session, TraceId,
        batch::payload_slots,
        buffers::{Buffer, Size},
        socket,
    },
    workers::Workers,
};

/// How long an address that the directory does not know is waited for. Above the delay of a watch (tens of ms), below
/// what a person takes for a hang.
const DISCOVERY: Duration = Duration::from_secs(1);
/// How long a TCP connection to a peer's tunnel port may take: three SYNs are lost by then.
const PEER_CONNECT: Duration = Duration::from_secs(10);
/// Port of the tunnel.
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

/// A captured connection whose destination is known.
struct Captured {
    app: TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
}

/// Why a captured connection was reset.
struct Failure {
    reason: &'static str,
    detail: String,
}

impl Failure {
    fn new(reason: &'static str, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string() }
    }
}

/// Serves one captured connection to its end.
pub async fn handle(path: Arc<DataPath>, pod: Arc<Pod>, app: TcpStream, client: SocketAddr) {
    socket::begin(&app);
    let Some((source, destination)) = find_destination(&path, &pod, &app, client) else {
        let at = app.local_addr().map_or(client, canonical);
        path.refuse(app, refused(client, at, Failure::new("no_destination", "not a captured connection")));
        return;
    };
    let flow = Captured { app, source, destination };
    match find_route(&path, &pod, destination).await {
        Route::SameNode => hand_over(&path, &pod, flow).await,
        Route::Tunnel(expected) => {
            let key = |own: &Credentials| PoolKey {
                worker: Workers::current(),
                pod: pod.cgroup,
                server: destination.ip(),
                identity: expected.clone(),
                serial: own.serial.clone(),
            };
            tunnel(&path, &pod, flow, key).await;
        }
        Route::Clear(why) => clear(&path, &pod, flow, why).await,
        Route::Refuse(reason) => {
            let failure = Failure::new(
                reason,
                format!("mode of {} is {:?}", pod.workload.name, pod.modes.load().default),
            );
            path.refuse(flow.app, refused(source, destination, failure));
        }
    }
}

/// The flow's two ends as both applications see them. `None` also for a client that took another's address as its own
/// (IP_TRANSPARENT): answers to it would leave the pod, in clear.
fn find_destination(
    path: &DataPath,
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

async fn find_route(path: &DataPath, pod: &Pod, destination: SocketAddr) -> Route {
    let known = path.directory.current().at(destination.ip()).cloned();
    let workload = match known {
        Some(workload) => Some(workload),
        None => discover(&path.directory, destination.ip(), DISCOVERY).await,
    };
    let modes = workload.as_deref().map(|w| path.policies.current().modes(w));
    route::decide(&Facts {
        port: destination.port(),
        destination: workload.as_deref(),
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
        identity: None,
        reason: failure.reason,
        detail: failure.detail,
    }
}

/// Both pods are on this node: identity and mode apply, no byte touches a wire.
async fn hand_over(path: &DataPath, pod: &Pod, flow: Captured) {
    let Captured { app, source, destination } = flow;
    let Some(target) = path.table.load().at(destination.ip()).cloned() else {
        let failure = Failure::new("destination_gone", "the destination is no longer enrolled here");
        return path.refuse(app, refused(source, destination, failure));
    };
    let identity = &pod.workload.identity;
    let verdict = policy::decide(&target.modes.load(), destination.port(), &Source::SameNode(identity));
    if let Verdict::Deny(reason) = verdict {
        return path.refuse(app, refused(source, destination, Failure::new(reason.label(), "policy")));
    }
    match path.to_application(&target, destination, source).await {
        Ok(server) => {
            let spec = FlowSpec {
                reporter: Reporter::Source,
                source: path.party(source, Some(identity.clone())),
                destination: path.party(destination, Some(target.workload.identity.clone())),
                security: Security::SameNode,
                trace: [0; 16],
            };
            relay_plain(path, app, server, spec).await;
        }
        Err(error) => {
            let failure = Failure::new(deny_reason(&error).label(), error);
            path.refuse(app, refused(source, destination, failure));
        }
    }
}

/// In clear, from the pod's own namespace, as it would have gone without Tacit.
async fn clear(path: &DataPath, pod: &Pod, flow: Captured, why: &'static str) {
    let Captured { app, source, destination } = flow;
    match connect(&pod.netns, &path.host, destination, PEER_CONNECT).await {
        Ok(server) => {
            socket::begin(&server);
            tracing::debug!(%source, %destination, why, "in clear");
            let spec = FlowSpec {
                reporter: Reporter::Source,
                source: path.party(source, None),
                destination: path.party(destination, None),
                security: Security::Plaintext,
                trace: [0; 16],
            };
            relay_plain(path, app, server, spec).await;
        }
        Err(error) => {
            let failure = Failure::new(deny_reason(&error).label(), error);
            path.refuse(app, refused(source, destination, failure));
        }
    }
}

async fn relay_plain(path: &DataPath, app: TcpStream, server: TcpStream, spec: FlowSpec) {
    let flow = path.telemetry.open_flow(spec);
    let end = tokio::select! {
        end = relay::plain(app, server, flow.counters()) => end.label(),
        () = path.drain.cut.cancelled() => "cut",
    };
    flow.close(end);
}

async fn tunnel(path: &DataPath, pod: &Pod, flow: Captured, key: impl Fn(&Credentials) -> PoolKey) {
    let Captured { app, source, destination } = flow;
    let identity = pod.workload.identity.clone();
    let Some(own) = path.identities.current(&identity) else {
        let failure = Failure::new(
            "no_certificate",
            format!("{identity} has no valid certificate; see `tacit status`"),
        );
        return path.refuse(app, refused(source, destination, failure));
    };
    let key = key(&own);
    let trace = TraceId::random();
    let open = Open { destination, client: source, trace, ahead: Ahead::Nothing };
    let (session, ahead_bytes) = match Box::pin(opened(path, pod, &app, &own, &key, &open)).await {
        Ok(opened) => opened,
        Err(failure) => return path.refuse(app, refused(source, destination, failure)),
    };
    let spec = FlowSpec {
        reporter: Reporter::Source,
        source: path.party(source, Some(identity)),
        destination: path.party(destination, Some(session.peer().clone())),
        security: security(session.tls()),
        trace: open.trace.0,
    };
    let live = path.telemetry.open_flow(spec);
    live.counters().sent.fetch_add(ahead_bytes as u64, Relaxed);
    let (end, session) = tokio::select! {
        ended = relay::tunnelled(app, session, live.counters()) => ended,
        () = path.drain.cut.cancelled() => {
            live.close("cut");
            return;
        }
    };
    live.close(end.label());
    if let Some(session) = session
        && !pod.closed.is_cancelled()
    {
        keep(path, key, session);
    }
}

/// A session on which the peer has accepted the flow, and how many bytes of the application went ahead of that.
async fn opened(
    path: &DataPath,
    pod: &Pod,
    app: &TcpStream,
    own: &Arc<Credentials>,
    key: &PoolKey,
    open: &Open,
) -> Result<(Box<Session>, usize), Failure> {
    // An idle session may have died unnoticed. That costs a try, not the flow, unless bytes of it went ahead: the
    // destination may have read those, so they are not sent twice.
    while let Some(mut session) = take(path, key) {
        let (ahead, ahead_bytes) = ready_payload(app);
        match session.open(open, ahead).await {
            Ok(()) => return Ok((session, ahead_bytes)),
            Err(OpenError::Denied(reason)) => return Err(denied(path, key, session, reason)),
            Err(error) if ahead_bytes > 0 => return Err(Failure::new(error.reason(), error)),
            Err(error) => tracing::debug!(%error, "idle session was dead"),
        }
    }
    let peer = SocketAddr::new(open.destination.ip(), TUNNEL);
    let tcp = connect(&pod.netns, &path.host, peer, PEER_CONNECT).await.map_err(|e| {
        Failure::new("peer_unreachable", format!("{peer}: {e}; does an agent run on that node?"))
    })?;
    let connected = Session::connect(tcp, own, &key.identity).await;
    let mut session = connected.map_err(|e| Failure::new(e.reason(), e))?;
    let (ahead, ahead_bytes) = ready_payload(app);
    match session.open(open, ahead).await {
        Ok(()) => Ok((session, ahead_bytes)),
        Err(OpenError::Denied(reason)) => Err(denied(path, key, session, reason)),
        Err(OpenError::Stale(error) | OpenError::Tunnel(error)) => Err(Failure::new(error.reason(), error)),
    }
}

/// What the application has sent already, in the slots of a batch.
fn ready_payload(app: &TcpStream) -> (Option<(Buffer, usize)>, usize) {
    let mut batch = Buffer::take(Size::Small);
    let (mut slots, _) = payload_slots(&mut batch);
    match socket::read_now(app, &mut slots) {
        0 => (None, 0),
        read_bytes => (Some((batch, read_bytes)), read_bytes),
    }
}

/// An idle session: one of this thread, or else one that another thread polls, which moves here.
fn take(path: &DataPath, key: &PoolKey) -> Option<Box<Session>> {
    let now = Instant::now();
    let mut pool = path.pool();
    if let Some(session) = pool.take(key, now, |session| is_usable(session)) {
        return Some(session);
    }
    let mut other = key.clone();
    let found = (0..path.workers.count()).filter(|worker| *worker != key.worker).find_map(|worker| {
        other.worker = worker;
        pool.take(&other, now, |session| is_usable(session))
    });
    drop(pool);
    found?.rehomed().inspect_err(|error| tracing::debug!(%error, "idle session lost on its way")).ok()
}

/// A denied flow leaves its session as good as before, if none of its bytes went ahead.
fn denied(path: &DataPath, key: &PoolKey, session: Box<Session>, reason: DenyReason) -> Failure {
    if session.is_idle() {
        keep(path, key.clone(), session);
    } else {
        session.close();
    }
    Failure::new(reason.label(), format!("{} denied it", key.identity))
}

fn is_usable(session: &Session) -> bool {
    session.peer_not_after() > SystemTime::now() && session.is_idle_alive()
}

/// Keeps a session for the next flow.
fn keep(path: &DataPath, key: PoolKey, session: Box<Session>) {
    let no_room = path.pool().put(key, session, Instant::now());
    if let Some(session) = no_room {
        session.close();
    }
}
