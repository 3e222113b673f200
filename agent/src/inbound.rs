//! What arrives at a pod: tunnel sessions from peers, and plaintext that the kernel did not let through by itself.
//!
//! ```text
//! 15008  handshake ─ identity ─┐ one session, flow after flow:
//!                              └ OPEN ─ is it for this pod, from that peer's address? ─ policy ─ application ─ relay
//! 15006  plaintext under STRICT, or to a pod that authorization policies select ─ policy ─ application, or reset and
//!        logged with who and why
//! ```

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use tacit_abi::tcp_port;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    admission::{self, Changes, Denial},
    datapath::{DataPath, HANDSHAKE_WAIT, HANDSHAKES_MAX, Refused, canonical, deny_reason, security},
    enrol::Pod,
    identity::SpiffeId,
    policy::{Flow, Source},
    relay,
    telemetry::{FlowSpec, Reporter, Security},
    tunnel::{DenyReason, Open, Session, TunnelError, session::SERVER_IDLE, socket},
};

/// Serves one tunnel session to its end.
pub async fn tunnel(path: Arc<DataPath>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let Ok(at) = tcp.local_addr().map(canonical) else { return };
    let refused = |reason, detail| Refused {
        reporter: Reporter::Destination,
        source: peer,
        destination: at,
        identity: None,
        reason,
        detail,
    };
    if let Err(detail) = came_from_outside(&pod, at) {
        return path.refuse(tcp, refused("not_steered", detail));
    }
    let Ok(Ok(permit)) = timeout(HANDSHAKE_WAIT, path.handshakes.acquire()).await else {
        let detail = format!("{HANDSHAKES_MAX} handshakes have been under way for {HANDSHAKE_WAIT:?}");
        return path.refuse(tcp, refused("handshake_limit", detail));
    };
    let Some(own) = path.identities.current(&pod.workload.identity) else {
        let detail = format!("{} has no valid certificate; see `tacit status`", pod.workload.identity);
        return path.refuse(tcp, refused("no_certificate", detail));
    };
    let accepted = Session::accept(tcp, &own).await;
    drop(permit);
    match accepted {
        Ok(session) => serve(&path, &pod, session, peer.ip(), at.ip()).await,
        Err(error) => path.report(refused(error.reason(), error.to_string())),
    }
}

async fn serve(path: &DataPath, pod: &Pod, mut session: Box<Session>, peer: IpAddr, at: IpAddr) {
    loop {
        let next = tokio::select! {
            next = session.next(SERVER_IDLE) => next,
            () = path.drain.stop.cancelled() => return,
            () = pod.closed.cancelled() => return,
        };
        let open = match next {
            Ok(Some(open)) => open,
            Ok(None) => return,
            // Between two flows a peer may go at any time, and how is its own affair. Bytes that are no flow are not.
            Err(error @ (TunnelError::Io(_) | TunnelError::Closed | TunnelError::Timeout { .. })) => {
                return tracing::debug!(peer = %session.peer(), %error, "session ended between flows");
            }
            Err(error) => {
                let (source, destination) = (SocketAddr::new(peer, 0), SocketAddr::new(at, tcp_port::TUNNEL));
                return path.report(refusal(
                    source,
                    destination,
                    session.peer(),
                    error.reason(),
                    error.to_string(),
                ));
            }
        };
        match one_flow(path, pod, session, &open, peer, at).await {
            Some(again) => session = again,
            None => return,
        }
    }
}

/// Serves one flow; gives the session back when it can carry another.
async fn one_flow(
    path: &DataPath,
    pod: &Pod,
    mut session: Box<Session>,
    open: &Open,
    peer: IpAddr,
    at: IpAddr,
) -> Option<Box<Session>> {
    let identity = session.peer().clone();
    let changes = match admit(path, pod, &session, open, peer, at) {
        Ok(changes) => changes,
        Err(denied) => return deny(path, session, open, denied).await,
    };
    let application = match path.to_application(pod, open.destination, open.client).await {
        Ok(application) => application,
        Err(error) => {
            let reason = deny_reason(&error);
            let denied = Denied { reason, label: reason.label(), detail: error.to_string() };
            return deny(path, session, open, denied).await;
        }
    };
    if session.accept_flow().is_err() {
        socket::reset(application);
        return None;
    }
    let live = path.telemetry.open_flow(FlowSpec {
        reporter: Reporter::Destination,
        source: path.party(open.client, Some(identity.clone())),
        destination: path.party(open.destination, Some(pod.workload.identity.clone())),
        security: security(session.tls()),
        trace: open.trace.0,
    });
    let flow = asked(&identity, open);
    let (end, session) = tokio::select! {
        ended = relay::tunnelled(application, session, live.counters()) => ended,
        () = path.drain.cut.cancelled() => {
            live.close("cut");
            return None;
        }
        denial = admission::revoked(pod, &flow, changes) => {
            admission::revoke(&path.telemetry, live, denial);
            return None;
        }
    };
    live.close(end.label());
    session
}

/// A flow that is not to be: what the peer is told, what is counted, what is logged.
struct Denied {
    reason: DenyReason,
    label: &'static str,
    detail: String,
}

/// May this flow be? The peer's identity is proven; everything in OPEN is only claimed.
fn admit(
    path: &DataPath,
    pod: &Pod,
    session: &Session,
    open: &Open,
    peer: IpAddr,
    at: IpAddr,
) -> Result<Changes, Denied> {
    let deny = |reason, label, detail: String| Err(Denied { reason, label, detail });
    if session.peer_not_after() <= SystemTime::now() {
        let detail = "it has expired since the handshake".to_owned();
        return deny(DenyReason::Policy, "expired", detail);
    }
    // The session came to this pod's address: a flow for any other is not ours to carry.
    if open.destination.ip() != at {
        let detail = format!("OPEN names {}, the session is for {at}", open.destination);
        return deny(DenyReason::UnknownDestination, "forged_destination", detail);
    }
    if [tcp_port::CAPTURE, tcp_port::PLAINTEXT, tcp_port::TUNNEL].contains(&open.destination.port()) {
        let detail = format!("port {} is the agent's", open.destination.port());
        return deny(DenyReason::UnknownDestination, "reserved_port", detail);
    }
    // The application will be told this address; the kernel vouches for the session's.
    if open.client.ip() != peer {
        let detail = format!("OPEN names client {}, the session comes from {peer}", open.client);
        return deny(DenyReason::Policy, "forged_client", detail);
    }
    let flow = asked(session.peer(), open);
    let ends = || {
        let source = path.party(open.client, Some(session.peer().clone()));
        let own = Some(pod.workload.identity.clone());
        (Reporter::Destination, source, path.party(open.destination, own))
    };
    let admitted = admission::admit(&path.telemetry, pod, &flow, ends);
    admitted.map_err(|Denial { label, detail }| Denied { reason: DenyReason::Policy, label, detail })
}

/// What policy is asked about; the client's address has been checked.
fn asked<'a>(identity: &'a SpiffeId, open: &Open) -> Flow<'a> {
    Flow { source: Source::Tunnel(identity), client: open.client.ip(), destination: open.destination }
}

async fn deny(
    path: &DataPath,
    mut session: Box<Session>,
    open: &Open,
    denied: Denied,
) -> Option<Box<Session>> {
    let Denied { reason, label, detail } = denied;
    path.report(refusal(open.client, open.destination, session.peer(), label, detail));
    let answered = session.deny(open, reason).await;
    (answered.is_ok() && session.is_idle()).then_some(session)
}

fn refusal(
    source: SocketAddr,
    destination: SocketAddr,
    identity: &SpiffeId,
    reason: &'static str,
    detail: String,
) -> Refused {
    Refused {
        reporter: Reporter::Destination,
        source,
        destination,
        identity: Some(identity.clone()),
        reason,
        detail,
    }
}

/// The agent's listeners are open to the pod's own loopback too. Nothing is carried from there: plaintext to port 15006
/// of a loopback address would be carried to port 15006, and so on without end.
fn came_from_outside(pod: &Pod, at: SocketAddr) -> Result<(), String> {
    if pod.address_like(at.ip()) != Some(at.ip()) {
        return Err(format!("{at} is not an address of the pod"));
    }
    if [tcp_port::CAPTURE, tcp_port::PLAINTEXT].contains(&at.port()) {
        return Err(format!("port {} is the agent's", at.port()));
    }
    Ok(())
}

/// Serves plaintext that was steered here: what mode and policies do not allow is reset. Both may have changed since the
/// kernel steered it, so they are looked at again.
pub async fn plaintext(path: Arc<DataPath>, pod: Arc<Pod>, client: TcpStream, peer: SocketAddr) {
    let Ok(at) = client.local_addr().map(canonical) else { return };
    let refused = |reason, detail| Refused {
        reporter: Reporter::Destination,
        source: peer,
        destination: at,
        identity: None,
        reason,
        detail,
    };
    if let Err(detail) = came_from_outside(&pod, at) {
        return path.refuse(client, refused("not_steered", detail));
    }
    let flow = Flow { source: Source::Plaintext, client: peer.ip(), destination: at };
    let ends = || (Reporter::Destination, path.party(peer, None), path.party(at, None));
    let changes = match admission::admit(&path.telemetry, &pod, &flow, ends) {
        Ok(changes) => changes,
        Err(denial) => return path.refuse(client, refused(denial.label, denial.detail)),
    };
    match path.to_application(&pod, at, peer).await {
        Ok(application) => {
            let live = path.telemetry.open_flow(FlowSpec {
                reporter: Reporter::Destination,
                source: path.party(peer, None),
                destination: path.party(at, Some(pod.workload.identity.clone())),
                security: Security::Plaintext,
                trace: [0; 16],
            });
            let end = tokio::select! {
                end = relay::plain(client, application, live.counters()) => end.label(),
                () = path.drain.cut.cancelled() => "cut",
                denial = admission::revoked(&pod, &flow, changes) => {
                    return admission::revoke(&path.telemetry, live, denial);
                }
            };
            live.close(end);
        }
        Err(error) => path.refuse(client, refused(deny_reason(&error).label(), error.to_string())),
    }
}
