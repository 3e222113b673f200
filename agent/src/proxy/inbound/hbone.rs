//! Flows of peers that speak HBONE, such as pods of Istio ambient. One connection carries many of them.
//!
//! A request is held to the same checks as OPEN. Its answer is a status, see [`answer`]. Each stream counts as a connection of the pod,
//! and of its source. The connection's task answers nothing itself: each stream has a task of its own on the same worker.

use std::{
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tacit_abi::tcp_port;
use tacit_core::{
    refusal::{Refusal, RefusalReason},
    shares::connections::Connection,
    spiffe::SpiffeId,
    wire::Role,
};
use tacit_kernel::socket::AppStream;
use tacit_tunnel::{
    TunnelError,
    hbone::{self, Accepted, Connect, FlowRequest, Peer, Refused},
    relay,
    session::SERVER_IDLE,
    socket,
};
use tokio::time::{Instant, sleep};

use super::{Proven, check_port};
use crate::{
    enrol::Pod,
    proxy::{Addresses, Proxy, authorize, ends_in_pod, security, shares::ConnectionPermit},
    telemetry::{Ends, FlowSpec, Reporter},
};

/// Limit for the flows of a peer that is not trusted any more to end by themselves. They need a few milliseconds.
const REVOKED_MAX: Duration = Duration::from_secs(1);

/// Serves one connection to its end. After a drain has begun, or without a stream for [`SERVER_IDLE`], the peer opens no more streams.
pub(super) async fn serve(
    path: Arc<Proxy>,
    pod: Arc<Pod>,
    accepted: Box<Accepted>,
    peer: SocketAddr,
    at: IpAddr,
) {
    let identity = accepted.identity().clone();
    let mut server = match accepted.begin(path.shares.stream_window_bytes(pod.cgroup)).await {
        Ok(server) => server,
        Err(error) => return report_end(&path, &identity, error, peer, at),
    };
    let client = server.client().clone();
    let mut revoked = pin!(authorize::peer_revoked(&path.rechecks, &pod, client.chain()));
    let (mut is_draining, mut is_closed, mut is_revoked) = (false, false, false);
    let mut idle = pin!(sleep(SERVER_IDLE));
    loop {
        let next = tokio::select! {
            next = server.next() => next,
            () = path.drain.cut.cancelled() => return,
            // Flows on the connection end by themselves, and report that.
            revoked = &mut revoked, if !is_revoked => {
                tracing::debug!(peer = %identity, detail = revoked.detail, "connection closed");
                if !server.has_streams() {
                    return;
                }
                (is_revoked, is_closed, is_draining) = (true, true, true);
                server.drain();
                idle.as_mut().reset(Instant::now() + REVOKED_MAX);
                continue;
            }
            // The pod takes no more flows. Those that are open go on.
            () = pod.closed.cancelled(), if !is_closed => {
                (is_closed, is_draining) = (true, true);
                server.drain();
                continue;
            }
            () = path.drain.stop.cancelled(), if !is_draining => {
                is_draining = true;
                server.drain();
                continue;
            }
            () = &mut idle, if is_revoked || !is_draining => {
                if is_revoked {
                    return;
                }
                idle.as_mut().reset(Instant::now() + SERVER_IDLE);
                if !server.has_streams() {
                    is_draining = true;
                    server.drain();
                }
                continue;
            }
        };
        match next {
            Ok(Some(request)) => {
                if !is_revoked {
                    idle.as_mut().reset(Instant::now() + SERVER_IDLE);
                }
                let stream = Stream {
                    path: path.clone(),
                    pod: pod.clone(),
                    client: server.client().clone(),
                    peer,
                    at,
                };
                let window_bytes = path.shares.stream_window_bytes(pod.cgroup);
                match (is_closed, server.set_window(window_bytes)) {
                    (false, true) => stream.start(request),
                    (true, _) => stream.refuse(
                        request,
                        Refusal::new(RefusalReason::DestinationGone, "the pod is no longer enrolled"),
                    ),
                    (false, false) => {
                        let detail = "the client has not acknowledged a smaller window, which the pod's connections need";
                        stream.refuse(request, Refusal::new(RefusalReason::PodConnections, detail));
                    }
                }
            }
            Ok(None) => return,
            Err(error) => return report_end(&path, server.client().identity(), error, peer, at),
        }
    }
}

/// Reports the end of a connection by the peer's fault. Flows on it report themselves.
fn report_end(path: &Proxy, client: &SpiffeId, error: TunnelError, peer: SocketAddr, at: IpAddr) {
    let reason = error.reason();
    if matches!(reason, RefusalReason::Io | RefusalReason::Closed | RefusalReason::Timeout) {
        return tracing::debug!(peer = %client, %error, "connection ended");
    }
    let addresses = Addresses { source: peer, destination: SocketAddr::new(at, tcp_port::TUNNEL) };
    path.report(Reporter::Destination, addresses, Refusal::new(reason, error).of(client));
}

/// The surroundings of a stream.
struct Stream {
    path: Arc<Proxy>,
    pod: Arc<Pod>,
    client: Arc<Peer>,
    /// The connection's peer.
    peer: SocketAddr,
    /// The address of the pod that the connection came to.
    at: IpAddr,
}

impl Stream {
    /// Starts the task of a request on this thread.
    fn start(self, request: FlowRequest) {
        let Self { path, pod, peer, .. } = &self;
        let connection = Connection { pod: pod.cgroup, source: Some(peer.ip()) };
        match (path.shares.connection(connection), request.connect()) {
            (Ok(permit), Ok(connect)) => {
                path.clone().drain.tasks.spawn(self.carry(request, connect, permit));
            }
            (Err(refusal), _) => self.refuse(request, refusal),
            (_, Err(bad)) => self.refuse(request, Refusal::new(RefusalReason::Protocol, bad)),
        }
    }

    /// Refuses a request whose destination is not known.
    fn refuse(&self, request: FlowRequest, refusal: Refusal) {
        request.refuse(answer(refusal.reason));
        let addresses =
            Addresses { source: self.peer, destination: SocketAddr::new(self.at, tcp_port::TUNNEL) };
        self.path.report(Reporter::Destination, addresses, refusal.of(self.client.identity()));
    }

    /// Carries the flow of a request to its end. `_permit` counts it.
    async fn carry(self, mut request: FlowRequest, connect: Connect, _permit: ConnectionPermit) {
        let Self { path, pod, client, peer, at } = &self;
        relay::connection_started();
        // The kernel vouches for the address of the connection. The port is for the application's logs.
        let source = connect.client.filter(|claimed| claimed.ip() == peer.ip()).unwrap_or(*peer);
        let addresses = Addresses { source, destination: connect.destination };
        let proven = Proven {
            identity: client.identity(),
            not_after: client.not_after(),
            chain: client.chain(),
            own: pod.workload.identity.trust_domain(),
            peer: peer.ip(),
            at: *at,
        };
        let flow = proven
            .check("CONNECT", source, connect.destination)
            .and_then(|flow| check_port(&flow).map(|()| flow))
            .and_then(|flow| check_tunnelled(pod, addresses).map(|()| flow));
        // The destination of a rejected request need not be this pod.
        let own = flow.as_ref().ok().map(|_| pod.workload.identity.clone());
        let ends = path.ends(Reporter::Destination, addresses, Some(client.identity().clone()), own);
        let refuse = |request: FlowRequest, refusal: &Refusal| {
            path.telemetry.refused(&ends, refusal);
            request.refuse(answer(refusal.reason));
        };
        let proof = flow.map(|flow| (flow, client.chain().clone()));
        let admitted = match proof.and_then(|proof| authorize::admit(&path.telemetry, pod, proof, &ends)) {
            Ok(admitted) => admitted,
            Err(refusal) => return refuse(request, &refusal),
        };
        let dialled = tokio::select! {
            dialled = path.dial_application(pod, connect.destination, source) => dialled,
            () = request.abandoned() => return,
            () = path.drain.cut.cancelled() => return,
        };
        let application = match dialled {
            Ok(application) => application,
            Err(error) => return refuse(request, &authorize::not_delivered(pod, &error)),
        };
        relay::connection_proceeds();
        Box::pin(self.relay(request, &connect, application, ends, admitted)).await;
    }

    async fn relay(
        &self,
        request: FlowRequest,
        connect: &Connect,
        application: AppStream,
        ends: Ends,
        admitted: authorize::Admitted,
    ) {
        let Self { path, pod, client, .. } = self;
        let Ok(stream) = request.accept(&crate::proxy::hbone::baggage(&pod.workload)) else {
            return socket::reset(application);
        };
        let live = path.telemetry.open_flow(FlowSpec {
            ends,
            security: security(client.tls()),
            trace: connect.trace.0,
        });
        let watched = path.watch(pod, ends_in_pod(connect.destination, &application));
        let end = tokio::select! {
            end = hbone::relay(application, stream, Role::Server, live.counters(), watched.watching()) => end.label(),
            () = path.drain.cut.cancelled() => "cut",
            refusal = admitted.revoked(&path.rechecks, pod) => {
                return authorize::revoke(&path.telemetry, live, &refusal);
            }
        };
        live.close(end);
    }
}

/// Refuses a flow to a pod that must be reached as plaintext. HBONE has no answer for that, and such peers send no plaintext instead.
fn check_tunnelled(pod: &Pod, Addresses { source, destination }: Addresses) -> Result<(), Refusal> {
    let refuse = |reason: &str| Err(Refusal::new(RefusalReason::NotTunnelled, reason));
    match (pod.not_tunnelled(), authorize::plaintext_alone(pod, source.ip(), destination)) {
        (Some(reason), _) => refuse(&reason),
        (None, Some(reason)) => refuse(reason),
        (None, None) => Ok(()),
    }
}

/// Returns the answer to a request that is refused for `reason`, as ztunnel gives it.
fn answer(reason: RefusalReason) -> Refused {
    match reason {
        RefusalReason::Protocol | RefusalReason::ForgedDestination => Refused::BadRequest,
        RefusalReason::DeniedByPolicy
        | RefusalReason::NotAllowedByPolicy
        | RefusalReason::PlaintextInStrict
        | RefusalReason::Expired
        | RefusalReason::CertificateRevoked
        | RefusalReason::RevocationUnknown => Refused::Policy,
        _ => Refused::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_an_answer_of_hbone() {
        for (reason, expected) in [
            (RefusalReason::Protocol, Refused::BadRequest),
            (RefusalReason::ForgedDestination, Refused::BadRequest),
            (RefusalReason::DeniedByPolicy, Refused::Policy),
            (RefusalReason::NotAllowedByPolicy, Refused::Policy),
            (RefusalReason::Expired, Refused::Policy),
            (RefusalReason::CertificateRevoked, Refused::Policy),
            (RefusalReason::RevocationUnknown, Refused::Policy),
            (RefusalReason::ReservedPort, Refused::Unavailable),
            (RefusalReason::ConnectionRefused, Refused::Unavailable),
            (RefusalReason::PodConnections, Refused::Unavailable),
            (RefusalReason::NotTunnelled, Refused::Unavailable),
        ] {
            assert_eq!(answer(reason), expected, "{reason:?}");
        }
    }
}
