//! A session to the agent of a destination, on which that agent has accepted the flow: an idle one of the pool, or a new one. A new
//! connection may turn out to speak HBONE, see `hbone`.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tacit_abi::tcp_port;
use tacit_core::{
    refusal::{ConnectEnd, Refusal, RefusalReason},
    spiffe::SpiffeId,
    wire::open::{DenyReason, Open, OptimisticMode},
};
use tacit_identity::credentials::Credentials;
use tacit_tunnel::{OpenError, Outgoing, Session, TlsInfo, random_trace_id, session::OptimisticData, socket};
use tokio::time::sleep;

use super::{
    Attempt,
    hbone::{self, Fresh, Stream, Tried},
};
use crate::{
    enrol::Pod,
    proxy::{Addresses, Proxy, security, sessions::PoolKey},
    telemetry::{FlowSpec, Reporter},
};

/// Port of the tunnel.
const TUNNEL: u16 = tcp_port::TUNNEL;
/// Time without a session after which the port of answers is asked too. A handshake takes a few milliseconds, and a program that
/// is no agent may be silent.
const SILENCE: Duration = Duration::from_millis(250);
/// Limit for a connection to the port of answers. The agent listens there, or the kernel refuses.
const ANSWER_CONNECT: Duration = Duration::from_secs(2);

/// A flow that the destination's agent has accepted.
pub(super) struct Tunnel {
    pub(super) carrier: Carrier,
    pub(super) spec: FlowSpec,
    pub(super) key: PoolKey,
}

/// The tunnel of one flow.
pub(super) enum Carrier {
    /// A session of its own.
    Session {
        session: Box<Session>,
        /// Bytes of the application that were sent before the agent accepted.
        optimistic_bytes: u64,
    },
    /// A stream of HBONE.
    Stream(Box<Stream>),
}

impl Carrier {
    fn peer(&self) -> (&SpiffeId, &TlsInfo) {
        match self {
            Self::Session { session, .. } => (session.peer(), session.tls()),
            Self::Stream(flow) => (flow.place.peer().identity(), flow.place.peer().tls()),
        }
    }
}

/// Opens the flow on a session to a server that must be `expected`. `is_hbone` if the directory says that it speaks HBONE.
pub(super) async fn tunnel(
    path: &Arc<Proxy>,
    pod: &Pod,
    addresses: Addresses,
    (expected, is_hbone): (&SpiffeId, bool),
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
    let tried = match !is_hbone && path.hbone.is_empty() {
        true => Tried::Fresh(Fresh::default()),
        false => Box::pin(hbone::on_existing(path, pod, &key, &open, (is_hbone, attempt.limit))).await?,
    };
    let carrier = match tried {
        Tried::Accepted(stream) => Carrier::Stream(stream),
        Tried::Fresh(fresh) => Box::pin(opened(path, pod, &own, &key, &open, attempt, fresh)).await?,
    };
    let (peer, tls) = carrier.peer();
    let ends = path.ends(Reporter::Source, addresses, Some(identity), Some(peer.clone()));
    let spec = FlowSpec { ends, security: security(tls), trace: open.trace.0 };
    Ok(Tunnel { carrier, spec, key })
}

/// A tunnel on which the peer has accepted the flow: an idle session, or a new connection.
async fn opened(
    path: &Arc<Proxy>,
    pod: &Pod,
    own: &Arc<Credentials>,
    key: &PoolKey,
    open: &Open,
    attempt: Attempt<'_>,
    mut need: Fresh,
) -> Result<Carrier, Refusal> {
    // Only `connect: early` asks.
    let may_lose_data = attempt.optimistic.is_some() && path.is_untunnelled(open.destination.ip());
    let mut optimistic = attempt.optimistic.filter(|_| !may_lose_data).map(OptimisticData::new);
    // An idle session may have died unnoticed. That costs a try, not the flow, unless bytes of it were taken: the
    // destination may have read those, so they are not sent twice.
    let mut silent = None;
    while silent.is_none()
        && need.silent.is_none()
        && let Some(mut session) = path.sessions.take(key)
    {
        // The server speaks `tacit/1`: nobody waits for an answer that is not theirs.
        need.connecting = None;
        let opened = session.open(open, optimistic.as_mut()).await;
        let taken_bytes = taken_bytes(&optimistic);
        match opened {
            Err(OpenError::Silent) if taken_bytes == 0 => {
                path.sessions.close_to(key);
                silent = Some(session);
            }
            opened if taken_bytes == 0 && is_dead(&opened) => {}
            opened => return settled(path, key, session, opened, taken_bytes, may_lose_data),
        }
    }
    let fresh = async {
        // Before the connection: a peer's time for the handshake begins with it.
        let _turn = path.shares.outgoing_handshake(pod.cgroup).await?;
        greet(path, pod, own, key, attempt.limit).await
    };
    let outgoing = match (silent, need.silent) {
        (None, None) => fresh.await?,
        (None, Some(silent)) => match hbone::raced(key, silent, fresh).await {
            hbone::Raced::Fresh(outgoing) => outgoing?,
            hbone::Raced::Answered { answer, spare } => {
                if let Some(Outgoing::Hbone(spare)) = spare {
                    hbone::keep(path, pod, key, *spare, need.connecting).await;
                }
                return answer.map(Carrier::Stream);
            }
        },
        (Some(silent), _) => match raced(silent, fresh).await {
            Raced::Fresh(outgoing) => outgoing?,
            Raced::Answered { session, opened, spare } => {
                if let Some(Outgoing::Tacit(spare)) = spare {
                    path.sessions.keep(key.clone(), spare);
                }
                return settled(path, key, session, opened, 0, may_lose_data);
            }
        },
    };
    let mut session = match outgoing {
        Outgoing::Tacit(session) => session,
        Outgoing::Hbone(connected) => {
            let stream = hbone::on_new(path, pod, key, open, *connected, need.connecting).await?;
            return Ok(Carrier::Stream(stream));
        }
    };
    if need.is_hbone {
        need.connecting = None;
        path.hbone.forget(key);
    }
    let mut opened = session.open(open, optimistic.as_mut()).await;
    let taken_bytes = taken_bytes(&optimistic);
    if matches!(opened, Err(OpenError::Silent)) && taken_bytes == 0 {
        opened = session.answered_if_received().await;
    }
    settled(path, key, session, opened, taken_bytes, may_lose_data)
}

/// Result of the wait for a silent session and for a new one.
enum Raced {
    /// The silent session, whose peer has received OPEN, and a new session that is not needed.
    Answered { session: Box<Session>, opened: Result<(), OpenError>, spare: Option<Outgoing> },
    /// The new connection. The peer of the silent session has not received OPEN, and will not.
    Fresh(Result<Outgoing, Refusal>),
}

/// Waits for the answer of a silent session and for a new session. The new one is used only if the peer's kernel then does not
/// confirm that it has received OPEN on the other. So an application accepts a connection twice only if all confirmations of the first
/// are lost, and none of the second.
async fn raced(mut silent: Box<Session>, fresh: impl Future<Output = Result<Outgoing, Refusal>>) -> Raced {
    tokio::pin!(fresh);
    let ready = tokio::select! {
        biased;
        opened = silent.answered() => {
            if !is_dead(&opened) {
                return Raced::Answered { session: silent, opened, spare: None };
            }
            return Raced::Fresh(fresh.await);
        }
        fresh = &mut fresh => fresh,
    };
    let Ok(fresh) = ready else { return Raced::Fresh(ready) };
    let opened = silent.answered_if_received().await;
    if is_dead(&opened) {
        return Raced::Fresh(Ok(fresh));
    }
    Raced::Answered { session: silent, opened, spare: Some(fresh) }
}

/// Returns true if an idle session has not opened the flow, and a new one may.
fn is_dead(opened: &Result<(), OpenError>) -> bool {
    match opened {
        Err(error @ (OpenError::Silent | OpenError::Stale(_))) => {
            tracing::debug!(%error, "idle session was dead");
            true
        }
        _ => false,
    }
}

/// Returns the session on which the peer has accepted the flow, with the bytes of the application that were `taken_bytes` before.
fn settled(
    path: &Proxy,
    key: &PoolKey,
    session: Box<Session>,
    opened: Result<(), OpenError>,
    taken_bytes: u64,
    may_lose_data: bool,
) -> Result<Carrier, Refusal> {
    match opened {
        Ok(()) => {
            if may_lose_data {
                path.note_tunnelled(key.server, true);
            }
            Ok(Carrier::Session { session, optimistic_bytes: taken_bytes })
        }
        Err(OpenError::Denied(reason)) => Err(denied(path, key, session, reason, taken_bytes)),
        // The application's kernel asks again, as for a host that does not answer.
        Err(error @ OpenError::Silent) => {
            Err(Refusal::new(error.reason(), error).because_of(&io::ErrorKind::TimedOut.into()))
        }
        Err(error) => Err(Refusal::new(error.reason(), error)),
    }
}

/// Connects to the destination's agent: at the tunnel's port, or at the port of answers if the pod is left alone and another
/// program has the tunnel's port, or nobody.
///
/// # Errors
/// The refusal at the tunnel's port.
async fn greet(
    path: &Proxy,
    pod: &Pod,
    own: &Arc<Credentials>,
    key: &PoolKey,
    limit: Duration,
) -> Result<Outgoing, Refusal> {
    let at = |port| SocketAddr::new(key.server, port);
    let tunnel = connect(path, pod, own, key, (at(TUNNEL), limit));
    let answer = || connect(path, pod, own, key, (at(tcp_port::ANSWER), limit.min(ANSWER_CONNECT)));
    let silent = async {
        sleep(SILENCE).await;
        answer().await
    };
    tokio::pin!(tunnel, silent);
    let refusal = tokio::select! {
        biased;
        connected = &mut tunnel => match connected {
            Ok(connected) => return Ok(connected),
            Err(refusal) => refusal,
        },
        answered = &mut silent => match answered {
            Ok(connected) => return Ok(connected),
            // The agent is slow.
            Err(_) => return tunnel.await,
        },
    };
    // No host, or no answer in time: the other port would not differ. Whatever else listens at the first one, the agent has to prove
    // itself at the other.
    if refusal.reason == RefusalReason::PeerUnreachable && refusal.connect_end != ConnectEnd::Refused {
        return Err(refusal);
    }
    answer().await.map_err(|_| refusal)
}

/// Connects to the agent at `at` within the limit.
async fn connect(
    path: &Proxy,
    pod: &Pod,
    own: &Arc<Credentials>,
    key: &PoolKey,
    (at, limit): (SocketAddr, Duration),
) -> Result<Outgoing, Refusal> {
    let tcp = path.dialer.to_tunnel(pod, at, limit).await.map_err(|e| {
        let detail = format!("{at}: {e}; does an agent run on that node?");
        Refusal::new(RefusalReason::PeerUnreachable, detail).because_of(&e)
    })?;
    socket::begin_small(&tcp, path.shares.unread_bytes(pod.cgroup));
    path.limit_silence(&tcp);
    Outgoing::connect(tcp, own, &key.identity).await.map_err(|e| Refusal::new(e.reason(), e))
}

fn taken_bytes(optimistic: &Option<OptimisticData<'_>>) -> u64 {
    optimistic.as_ref().map_or(0, |optimistic| optimistic.taken_bytes)
}

/// A denied flow leaves its session as good as before, if nothing was sent before the answer.
/// Data that was sent is lost, so plaintext cannot follow.
fn denied(
    path: &Proxy,
    key: &PoolKey,
    session: Box<Session>,
    reason: DenyReason,
    sent_bytes: u64,
) -> Refusal {
    if session.is_idle() {
        path.sessions.keep(key.clone(), session);
    } else {
        session.close();
    }
    if reason == DenyReason::NotTunnelled {
        path.note_tunnelled(key.server, false);
        if sent_bytes > 0 {
            let detail =
                format!("{} takes plaintext alone, and data of the flow has left with OPEN", key.identity);
            return Refusal::new(RefusalReason::Other, detail);
        }
    }
    Refusal::new(reason.reason(), format!("{} denied it", key.identity))
}
