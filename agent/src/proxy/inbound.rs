//! Inbound connections of a pod: tunnel sessions from peers, and plaintext that the kernel steered to the agent.
//!
//! ```text
//! 15008  handshake ─ identity ─┐ one session, flow after flow:
//!                              └ OPEN ─ is it for this pod, from that peer's address? ─ policy ─ application ─ relay
//!        or, by ALPN `h2`, many flows: see `hbone`
//! plaintext under STRICT, or to a pod that authorization policies select ─ policy ─ application, or reset and
//!        logged with who and why
//! ```

mod hbone;

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::SystemTime,
};

use tacit_abi::tcp_port;
use tacit_core::{
    policy::{Flow, FlowSource, PolicyVerdict},
    refusal::{Refusal, RefusalReason},
    spiffe::{SpiffeId, TrustDomain},
    wire::open::{DenyReason, Open},
};
use tacit_identity::peer_trust::PeerChain;
use tacit_kernel::socket::AppStream;
use tacit_tunnel::{Incoming, Session, TunnelError, relay, session::SERVER_IDLE, socket};
use tokio::net::TcpStream;

use crate::{
    enrol::Pod,
    proxy::{Addresses, Proxy, authorize, canonical, ends_in_pod, not_connected, security},
    telemetry::{Ends, FlowSpec, Reporter, Security},
};

/// Serves one tunnel session to its end. What is needed only before and between flows is boxed: a flow keeps no room for it.
pub async fn tunnel(path: Arc<Proxy>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let (mut session, at) = match Box::pin(greet(&path, &pod, tcp, peer)).await {
        Some((Incoming::Tacit(session), at)) => (session, at),
        Some((Incoming::Hbone(accepted), at)) => {
            return Box::pin(hbone::serve(path, pod, accepted, peer, at)).await;
        }
        None => return,
    };
    while let Some(begun) = Box::pin(next_flow(&path, &pod, session, peer.ip(), at)).await {
        let ended = match begun {
            Begun::Flow(carried) => carried.await,
            Begun::Denied(session) => Some(session),
        };
        match ended {
            // The session has announced its end to the peer.
            Some(_) if path.drain.stop.is_cancelled() => return,
            Some(again) => session = again,
            None => return,
        }
    }
}

/// The authenticated peer, and the address of the pod that it came to.
async fn greet(path: &Proxy, pod: &Pod, tcp: TcpStream, peer: SocketAddr) -> Option<(Incoming, IpAddr)> {
    let at = tcp.local_addr().map(canonical).ok()?;
    let addresses = Addresses { source: peer, destination: at };
    let refuse = |tcp, refusal| {
        path.refuse(tcp, Reporter::Destination, addresses, refusal);
        None
    };
    if let Err(refusal) = came_from_outside(pod, at) {
        return refuse(tcp, refusal);
    }
    let turn = match path.shares.handshake(pod.cgroup, peer.ip()).await {
        Ok(turn) => turn,
        Err(refusal) => return refuse(tcp, refusal),
    };
    let Some(own) = path.snapshots.credentials(&pod.workload.identity) else {
        let detail = format!("{} has no valid certificate; see `tacit status`", pod.workload.identity);
        return refuse(tcp, Refusal::new(RefusalReason::NoCertificate, detail));
    };
    socket::begin_small(&tcp, path.shares.unread_bytes(pod.cgroup));
    let accepted = Incoming::accept(tcp, &own).await;
    drop(turn);
    match accepted {
        Ok(mut incoming) => {
            if let Incoming::Tacit(session) = &mut incoming {
                session.end_with_flow_after(path.drain.stop.clone());
            }
            Some((incoming, at.ip()))
        }
        Err(error) => {
            path.report(Reporter::Destination, addresses, Refusal::new(error.reason(), error));
            None
        }
    }
}

/// The result of a peer's request for a flow.
enum Begun<'a> {
    /// The relay of the flow, until its end. It returns the session if it can carry another flow.
    Flow(Pin<Box<dyn Future<Output = Option<Box<Session>>> + Send + 'a>>),
    /// The flow was denied. The session can carry another flow.
    Denied(Box<Session>),
}

/// The next flow of a session; `None` at its end.
async fn next_flow<'a>(
    path: &'a Proxy,
    pod: &'a Pod,
    mut session: Box<Session>,
    peer: IpAddr,
    at: IpAddr,
) -> Option<Begun<'a>> {
    let chain = session.peer_chain().clone();
    let next = tokio::select! {
        next = session.next(SERVER_IDLE) => next,
        revoked = authorize::peer_revoked(&path.rechecks, pod, &chain) => {
            tracing::debug!(peer = %session.peer(), detail = revoked.detail, "session closed");
            session.close();
            return None;
        }
        () = path.drain.idle.cancelled() => return None,
        () = pod.closed.cancelled() => return None,
    };
    match next {
        Ok(Some(open)) => begin(path, pod, session, &open, peer, at).await,
        Ok(None) => None,
        // A peer may close the session between two flows in any way. Only invalid bytes are an error.
        Err(error @ (TunnelError::Io(_) | TunnelError::Closed | TunnelError::Timeout { .. })) => {
            tracing::debug!(peer = %session.peer(), %error, "session ended between flows");
            None
        }
        Err(error) => {
            let (source, destination) = (SocketAddr::new(peer, 0), SocketAddr::new(at, tcp_port::TUNNEL));
            let refusal = Refusal::new(error.reason(), error).of(session.peer());
            path.report(Reporter::Destination, Addresses { source, destination }, refusal);
            None
        }
    }
}

/// Decides on the flow that `open` asks for, and reaches its application.
async fn begin<'a>(
    path: &'a Proxy,
    pod: &'a Pod,
    mut session: Box<Session>,
    open: &Open,
    peer: IpAddr,
    at: IpAddr,
) -> Option<Begun<'a>> {
    let chain = session.peer_chain().clone();
    let proven = Proven {
        identity: session.peer(),
        not_after: session.peer_not_after(),
        chain: &chain,
        own: pod.workload.identity.trust_domain(),
        peer,
        at,
    };
    let claims = proven.check("OPEN", open.client, open.destination);
    if claims.is_ok() {
        // The certificate is of all pods of an account. So the answer counts only for the pod at whose address it is given.
        if let Some(reason) = pod.not_tunnelled() {
            return turn_away(path, pod, session, open, &reason).await.map(Begun::Denied);
        }
        if let Some(reason) = authorize::plaintext_alone(pod, open.client.ip(), open.destination) {
            return turn_away(path, pod, session, open, reason).await.map(Begun::Denied);
        }
    }
    relay::connection_started();
    let addresses = Addresses { source: open.client, destination: open.destination };
    let checked = claims.and_then(|flow| check_port(&flow).map(|()| flow));
    // The destination of a rejected OPEN need not be this pod.
    let own = checked.as_ref().ok().map(|_| pod.workload.identity.clone());
    let ends = path.ends(Reporter::Destination, addresses, Some(session.peer().clone()), own);
    let admitted =
        checked.and_then(|flow| authorize::admit(&path.telemetry, pod, (flow, chain.clone()), &ends));
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => return deny(path, session, open, &ends, &refusal).await.map(Begun::Denied),
    };
    let application = match path.dial_application(pod, open.destination, open.client).await {
        Ok(application) => application,
        Err(error) => {
            let refusal = authorize::not_delivered(pod, &error);
            return deny(path, session, open, &ends, &refusal).await.map(Begun::Denied);
        }
    };
    if session.accept_flow(open).is_err() {
        socket::reset(application);
        return None;
    }
    relay::connection_proceeds();
    let live =
        path.telemetry.open_flow(FlowSpec { ends, security: security(session.tls()), trace: open.trace.0 });
    let bulk = path.shares.bulk.of(pod.cgroup);
    let watched = path.watch(pod, ends_in_pod(open.destination, &application));
    Some(Begun::Flow(Box::pin(async move {
        let (end, session) = tokio::select! {
            ended = relay::tunnelled(application, session, live.counters(), &bulk, watched.watching()) => ended,
            () = path.drain.cut.cancelled() => {
                live.close("cut");
                return None;
            }
            refusal = admitted.revoked(&path.rechecks, pod) => {
                authorize::revoke(&path.telemetry, live, &refusal);
                return None;
            }
        };
        live.close(end.label());
        session
    })))
}

/// Answers a peer that the pod takes plaintext alone. Reports a refusal if the mode does not take that either.
async fn turn_away(
    path: &Proxy,
    pod: &Pod,
    mut session: Box<Session>,
    open: &Open,
    reason: &str,
) -> Option<Box<Session>> {
    let peer = session.peer().clone();
    let flow =
        Flow { source: FlowSource::Plaintext, client: open.client.ip(), destination: open.destination };
    if pod.policy().decide(&flow) != PolicyVerdict::Allow {
        let addresses = Addresses { source: open.client, destination: open.destination };
        let refusal = Refusal::new(RefusalReason::NotTunnelled, reason).of(&peer);
        path.report(Reporter::Destination, addresses, refusal);
    }
    let answered = session.deny(open, DenyReason::NotTunnelled).await;
    (answered.is_ok() && session.is_idle()).then_some(session)
}

/// The facts that a connection proves. Everything in a request on it is a claim.
struct Proven<'a> {
    /// Identity of the client.
    identity: &'a SpiffeId,
    /// End of the client's certificate.
    not_after: SystemTime,
    /// The certificates and the root that the client is trusted by.
    chain: &'a PeerChain,
    /// The mesh's own trust domain.
    own: &'a TrustDomain,
    /// Address of the client.
    peer: IpAddr,
    /// Address of the pod that the connection came to.
    at: IpAddr,
}

impl Proven<'_> {
    /// Checks the claims of a request named `what`, and returns the flow that policy decides on.
    fn check(&self, what: &str, client: SocketAddr, destination: SocketAddr) -> Result<Flow, Refusal> {
        let refuse = |reason, detail: String| Err(Refusal::new(reason, detail));
        let now = SystemTime::now();
        if self.not_after <= now {
            return refuse(RefusalReason::Expired, "it has expired since the handshake".to_owned());
        }
        self.chain.check(now).map_err(|found| authorize::untrusted(&found))?;
        // The session came to this pod's address: the agent carries no flow for another address on it.
        if destination.ip() != self.at {
            let detail = format!("{what} names {destination}, the session is for {}", self.at);
            return refuse(RefusalReason::ForgedDestination, detail);
        }
        // The application will be told this address; the kernel vouches for the session's.
        if client.ip() != self.peer {
            let detail = format!("{what} names client {client}, the session comes from {}", self.peer);
            return refuse(RefusalReason::ForgedClient, detail);
        }
        let identity = self.identity.clone();
        let source = match identity.trust_domain() == self.own {
            true => FlowSource::Tunnel(identity),
            false => FlowSource::Federated(identity),
        };
        Ok(Flow { source, client: client.ip(), destination })
    }
}

/// Refuses a flow to a port of the agent, which a pod that is left alone may have.
fn check_port(flow: &Flow) -> Result<(), Refusal> {
    let port = flow.destination.port();
    if tcp_port::is_reserved(port) {
        return Err(Refusal::new(RefusalReason::ReservedPort, format!("port {port} is the agent's")));
    }
    Ok(())
}

/// Reports a refusal and answers the peer with it. Returns the session if it can carry other flows.
async fn deny(
    path: &Proxy,
    mut session: Box<Session>,
    open: &Open,
    ends: &Ends,
    refusal: &Refusal,
) -> Option<Box<Session>> {
    path.telemetry.refused(ends, refusal);
    let answered = session.deny(open, DenyReason::answer(refusal.reason)).await;
    (answered.is_ok() && session.is_idle()).then_some(session)
}

/// The agent's listeners are open to the pod's own loopback too. Nothing is carried from there: plaintext to the port of its
/// listener at a loopback address would be carried to that port, and so on without end.
fn came_from_outside(pod: &Pod, at: SocketAddr) -> Result<(), Refusal> {
    let refuse = |detail| Err(Refusal::new(RefusalReason::NotSteered, detail));
    if pod.address_like(at.ip()) != Some(at.ip()) {
        return refuse(format!("{at} is not an address of the pod"));
    }
    let is_tunnel = at.port() == tcp_port::TUNNEL || at.port() == tcp_port::ANSWER;
    if !is_tunnel && tcp_port::is_reserved(at.port()) {
        return refuse(format!("port {} is the agent's", at.port()));
    }
    Ok(())
}

/// Serves plaintext that was steered here: what mode and policies do not allow is reset. Both may have changed since the
/// kernel steered it, so they are looked at again.
pub async fn plaintext(path: Arc<Proxy>, pod: Arc<Pod>, client: AppStream, peer: SocketAddr) {
    relay::connection_started();
    let Ok(at) = client.local_addr().map(canonical) else { return };
    let addresses = Addresses { source: peer, destination: at };
    let ends = path.ends(Reporter::Destination, addresses, None, None);
    let refuse = |client, refusal: &Refusal| {
        path.telemetry.refused(&ends, refusal);
        socket::reset(client);
    };
    if let Err(refusal) = came_from_outside(&pod, at) {
        return refuse(client, &refusal);
    }
    let flow = Flow { source: FlowSource::Plaintext, client: peer.ip(), destination: at };
    let proof = (flow, PeerChain::default());
    let admitted = match authorize::admit(&path.telemetry, &pod, proof, &ends) {
        Ok(admitted) => admitted,
        Err(refusal) => return refuse(client, &refusal),
    };
    match path.dial_application(&pod, at, peer).await {
        Ok(application) => {
            let live =
                path.telemetry.open_flow(FlowSpec { ends, security: Security::Plaintext, trace: [0; 16] });
            let bulk = path.shares.bulk.of(pod.cgroup);
            socket::begin_small(&client, path.shares.unread_bytes(pod.cgroup));
            let watched = path.watch(&pod, ends_in_pod(at, &application));
            let remote = Some((relay::App::Source, watched.watching()));
            let end = tokio::select! {
                end = relay::plain(client, application, live.counters(), &bulk, remote) => end.label(),
                () = path.drain.cut.cancelled() => "cut",
                refusal = admitted.revoked(&path.rechecks, &pod) => {
                    return authorize::revoke(&path.telemetry, live, &refusal);
                }
            };
            live.close(end);
        }
        Err(error) => refuse(client, &not_connected(&error)),
    }
}
