//! A session to the agent of a destination, on which that agent has accepted the flow: an idle one of the pool, or a new one.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tacit_abi::tcp_port;
use tacit_core::{
    refusal::{ConnectEnd, Refusal, RefusalReason},
    spiffe::SpiffeId,
    wire::open::{DenyReason, Open, OptimisticMode},
};
use tacit_identity::credentials::Credentials;
use tacit_tunnel::{OpenError, Session, random_trace_id, session::OptimisticData, socket};
use tokio::time::sleep;

use super::Attempt;
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
    // Only `connect: early` asks.
    let may_lose_data = attempt.optimistic.is_some() && path.is_untunnelled(open.destination.ip());
    let mut optimistic = attempt.optimistic.filter(|_| !may_lose_data).map(OptimisticData::new);
    // An idle session may have died unnoticed. That costs a try, not the flow, unless bytes of it were taken: the
    // destination may have read those, so they are not sent twice.
    let mut silent = None;
    while silent.is_none()
        && let Some(mut session) = path.sessions.take(key)
    {
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
    let mut session = match silent {
        None => fresh.await?,
        Some(silent) => match raced(silent, fresh).await {
            Raced::Fresh(session) => session?,
            Raced::Answered { session, opened, spare } => {
                spare.into_iter().for_each(|spare| path.sessions.keep(key.clone(), spare));
                return settled(path, key, session, opened, 0, may_lose_data);
            }
        },
    };
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
    Answered { session: Box<Session>, opened: Result<(), OpenError>, spare: Option<Box<Session>> },
    /// The new session. The peer of the silent one has not received OPEN, and will not.
    Fresh(Result<Box<Session>, Refusal>),
}

/// Waits for the answer of a silent session and for a new session. The new one is used only if the peer's kernel then does not
/// confirm that it has received OPEN on the other. So an application accepts a connection twice only if all confirmations of the first
/// are lost, and none of the second.
async fn raced(
    mut silent: Box<Session>,
    fresh: impl Future<Output = Result<Box<Session>, Refusal>>,
) -> Raced {
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
) -> Result<(Box<Session>, u64), Refusal> {
    match opened {
        Ok(()) => {
            if may_lose_data {
                path.note_tunnelled(key.server, true);
            }
            Ok((session, taken_bytes))
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
) -> Result<Box<Session>, Refusal> {
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
            Ok(session) => return Ok(session),
            Err(refusal) => refusal,
        },
        answered = &mut silent => match answered {
            Ok(session) => return Ok(session),
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
) -> Result<Box<Session>, Refusal> {
    let tcp = path.dialer.to_tunnel(pod, at, limit).await.map_err(|e| {
        let detail = format!("{at}: {e}; does an agent run on that node?");
        Refusal::new(RefusalReason::PeerUnreachable, detail).because_of(&e)
    })?;
    socket::begin_small(&tcp, path.shares.unread_bytes(pod.cgroup));
    path.limit_silence(&tcp);
    Session::connect(tcp, own, &key.identity).await.map_err(|e| Refusal::new(e.reason(), e))
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
