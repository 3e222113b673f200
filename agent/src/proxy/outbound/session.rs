//! A session to the agent of a destination, on which that agent has accepted the flow: an idle one of the pool, or a new one.

use std::{io, net::SocketAddr, sync::Arc};

use tacit_core::{
    refusal::{Refusal, RefusalReason},
    spiffe::SpiffeId,
    wire::open::{DenyReason, Open, OptimisticMode},
};
use tacit_identity::credentials::Credentials;
use tacit_tunnel::{OpenError, Session, random_trace_id, session::OptimisticData, socket};

use super::Attempt;
use crate::{
    enrol::Pod,
    proxy::{Addresses, Proxy, security, sessions::PoolKey},
    telemetry::{FlowSpec, Reporter},
};

/// Port of the tunnel.
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

/// A session on which the destination's agent has accepted the flow.
pub(super) struct Tunnel {
    pub(super) session: Box<Session>,
    /// Bytes of the application that were sent before the agent accepted.
    pub(super) optimistic_bytes: u64,
    pub(super) spec: FlowSpec,
    pub(super) key: PoolKey,
}

/// Opens the flow on a session to a server that must be `expected`.
pub(super) async fn tunnel(
    path: &Proxy,
    pod: &Pod,
    addresses: Addresses,
    expected: &SpiffeId,
    attempt: Attempt<'_>,
) -> Result<Tunnel, Refusal> {
    let Addresses { source, destination } = addresses;
    let identity = pod.workload.identity.clone();
    let own = path.snapshots.credentials(&identity).ok_or_else(|| {
        let detail = format!("{identity} has no valid certificate; see `tacit status`");
        Refusal::new(RefusalReason::NoCertificate, detail)
    })?;
    let key = PoolKey {
        pod: pod.cgroup,
        netns: pod.netns.cookie(),
        server: destination.ip(),
        identity: expected.clone(),
        serial: own.serial.clone(),
    };
    let open =
        Open { destination, client: source, trace: random_trace_id(), optimistic_data: OptimisticMode::Off };
    let (session, optimistic_bytes) = Box::pin(opened(path, pod, &own, &key, &open, attempt)).await?;
    let spec = FlowSpec {
        ends: path.ends(Reporter::Source, addresses, Some(identity), Some(session.peer().clone())),
        security: security(session.tls()),
        trace: open.trace.0,
    };
    Ok(Tunnel { session, optimistic_bytes, spec, key })
}

/// A session on which the peer has accepted the flow, and how many bytes of the application were sent before.
async fn opened(
    path: &Proxy,
    pod: &Pod,
    own: &Arc<Credentials>,
    key: &PoolKey,
    open: &Open,
    attempt: Attempt<'_>,
) -> Result<(Box<Session>, u64), Refusal> {
    let mut optimistic = attempt.optimistic.map(OptimisticData::new);
    // An idle session may have died unnoticed. That costs a try, not the flow, unless bytes of it were taken: the
    // destination may have read those, so they are not sent twice. After a session whose peer is silent, the pool has no other.
    while let Some(mut session) = path.sessions.take(key) {
        match session.open(open, optimistic.as_mut()).await {
            Ok(()) => return Ok((session, taken_bytes(&optimistic))),
            Err(OpenError::Denied(reason)) => return Err(denied(path, key, session, reason)),
            Err(error) if taken_bytes(&optimistic) > 0 => return Err(Refusal::new(error.reason(), error)),
            Err(error) => {
                tracing::debug!(%error, "idle session was dead");
                if matches!(error, OpenError::Silent) {
                    path.sessions.close_to(key.pod, key.server);
                }
            }
        }
    }
    let peer = SocketAddr::new(open.destination.ip(), TUNNEL);
    // Before the connection: a peer's time for the handshake begins with it.
    let turn = path.shares.outgoing_handshake(pod.cgroup).await?;
    let tcp = path.dialer.to_tunnel(pod, peer, attempt.limit).await.map_err(|e| {
        let detail = format!("{peer}: {e}; does an agent run on that node?");
        Refusal::new(RefusalReason::PeerUnreachable, detail).because_of(&e)
    })?;
    socket::begin_small(&tcp, path.shares.unread_bytes(pod.cgroup));
    path.limit_silence(&tcp);
    let connected = Session::connect(tcp, own, &key.identity).await;
    drop(turn);
    let mut session = connected.map_err(|e| Refusal::new(e.reason(), e))?;
    match session.open(open, optimistic.as_mut()).await {
        Ok(()) => Ok((session, taken_bytes(&optimistic))),
        Err(OpenError::Denied(reason)) => Err(denied(path, key, session, reason)),
        Err(OpenError::Stale(error) | OpenError::Tunnel(error)) => Err(Refusal::new(error.reason(), error)),
        // The application's kernel asks again, as for a host that does not answer.
        Err(error @ OpenError::Silent) => {
            Err(Refusal::new(error.reason(), error).because_of(&io::ErrorKind::TimedOut.into()))
        }
        Err(error @ OpenError::Abandoned) => Err(Refusal::new(error.reason(), error)),
    }
}

fn taken_bytes(optimistic: &Option<OptimisticData<'_>>) -> u64 {
    optimistic.as_ref().map_or(0, |optimistic| optimistic.taken_bytes)
}

/// A denied flow leaves its session as good as before, if nothing was sent before the answer.
fn denied(path: &Proxy, key: &PoolKey, session: Box<Session>, reason: DenyReason) -> Refusal {
    if session.is_idle() {
        path.sessions.keep(key.clone(), session);
    } else {
        session.close();
    }
    Refusal::new(reason.reason(), format!("{} denied it", key.identity))
}
