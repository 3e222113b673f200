//! Flows to servers that speak HBONE, such as pods of Istio ambient: each is a stream of a connection that the pod has to the server, or
//! of a new one.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tacit_core::{
    refusal::{Refusal, RefusalReason},
    wire::open::Open,
};
use tacit_tunnel::{
    Outgoing,
    hbone::{Asked, Connect, Connected, FlowStream, OpenError, Place},
};
use tokio::time::{Instant, timeout_at};

use crate::{
    enrol::Pod,
    proxy::{
        Proxy, authorize,
        hbone::{self, Connecting, Found, HboneConnections},
        sessions::PoolKey,
    },
};

/// Connections of the pool that are tried for one flow.
const TRIES: usize = 3;

/// A flow that the server has accepted.
pub(super) struct Stream {
    pub(super) stream: FlowStream,
    pub(super) place: Place,
}

/// Result of a try on the connections that the pod has.
pub(super) enum Tried {
    /// The server has accepted the flow.
    Accepted(Box<Stream>),
    /// A new connection is needed.
    Fresh(Fresh),
}

/// A need for a new connection.
#[derive(Default)]
pub(super) struct Fresh {
    /// Other flows wait for it.
    pub(super) connecting: Option<Connecting>,
    /// The flow was asked for on a connection whose peer is silent.
    pub(super) silent: Option<(Box<Asked>, Place)>,
    /// The server is known to speak HBONE, or the directory says so.
    pub(super) is_hbone: bool,
}

/// Opens the flow on a connection that the pod has to the server, if the server is known to speak HBONE. `is_hbone` if the directory says
/// so. Waits at most `limit` for connections that other flows make.
///
/// # Errors
/// The refusal of the server, or the end of the time.
pub(super) async fn on_existing(
    path: &Arc<Proxy>,
    pod: &Pod,
    key: &PoolKey,
    open: &Open,
    (is_hbone, limit): (bool, Duration),
) -> Result<Tried, Refusal> {
    let deadline = Instant::now() + limit;
    let fresh = |connecting, silent| Ok(Tried::Fresh(Fresh { connecting, silent, is_hbone: true }));
    let (mut tries, mut has_failed, mut silent) = (0, false, None);
    loop {
        let window_bytes = path.shares.stream_window_bytes(pod.cgroup);
        match HboneConnections::find(path, key, window_bytes, is_hbone) {
            Found::Unknown => return Ok(Tried::Fresh(Fresh::default())),
            Found::Connect(connecting) => return fresh(Some(connecting), silent),
            // Whatever that flow gets, this one has to ask on the silent connection first.
            Found::Wait(_) if silent.is_some() => return fresh(None, silent),
            Found::Wait(mut told) => match timeout_at(deadline, told.wait_for(|is_made| *is_made)).await {
                Ok(Ok(_)) => {}
                // A second failure would be that of the server: each flow finds out by itself.
                Ok(Err(_)) if has_failed => return fresh(None, None),
                Ok(Err(_)) => has_failed = true,
                Err(_) => {
                    let detail = format!("{}: no connection within {limit:?}", key.identity);
                    let refusal = Refusal::new(RefusalReason::PeerUnreachable, detail);
                    return Err(refusal.because_of(&io::ErrorKind::TimedOut.into()));
                }
            },
            Found::Place(_) if silent.is_some() || tries == TRIES => return fresh(None, silent),
            Found::Place(place) => {
                tries += 1;
                let answer = match ask(pod, &place, open).await {
                    Ok(mut asked) => match asked.acknowledged().await {
                        Err(OpenError::Silent) => {
                            path.hbone.close_to(key);
                            silent = Some((asked, place));
                            continue;
                        }
                        answer => answer,
                    },
                    Err(error) => Err(error),
                };
                match answer {
                    Ok(stream) => return Ok(Tried::Accepted(Box::new(Stream { stream, place }))),
                    Err(error) if error.is_of_connection() => {
                        tracing::debug!(%error, "another connection is tried");
                    }
                    Err(error) => return Err(refused(key, error)),
                }
            }
        }
    }
}

/// Result of the wait for a silent connection and for a new one.
pub(super) enum Raced {
    /// The peer of the silent connection has the request. The new connection is not needed.
    Answered { answer: Result<Box<Stream>, Refusal>, spare: Option<Outgoing> },
    /// The new connection.
    Fresh(Result<Outgoing, Refusal>),
}

/// Waits for the answer on a silent connection and for a new connection. The new one is used only if the peer's kernel then does not
/// confirm that it has the request. What was sent on the silent one may still arrive, since other flows need the connection. Its server
/// reads the reset of the stream right behind the request.
pub(super) async fn raced(
    key: &PoolKey,
    (mut asked, place): (Box<Asked>, Place),
    connect: impl Future<Output = Result<Outgoing, Refusal>>,
) -> Raced {
    let mut connect = pin!(connect);
    let is_dead = |answer: &Result<_, OpenError>| {
        answer.as_ref().is_err_and(|error| matches!(error, OpenError::Silent) || error.is_of_connection())
    };
    let answered = |answer: Result<FlowStream, OpenError>, spare| {
        let answer = answer.map_err(|error| refused(key, error));
        Raced::Answered { answer: answer.map(|stream| Box::new(Stream { stream, place })), spare }
    };
    let connected = tokio::select! {
        biased;
        answer = asked.answered() => {
            return if is_dead(&answer) { Raced::Fresh(connect.await) } else { answered(answer, None) };
        }
        connected = &mut connect => connected,
    };
    if connected.is_err() {
        return Raced::Fresh(connected);
    }
    let answer = asked.answered_if_received().await;
    if is_dead(&answer) { Raced::Fresh(connected) } else { answered(answer, connected.ok()) }
}

/// Opens the flow on a new connection.
///
/// # Errors
/// The refusal of the server, or the end of the connection.
pub(super) async fn on_new(
    path: &Arc<Proxy>,
    pod: &Pod,
    key: &PoolKey,
    open: &Open,
    connected: Connected,
    connecting: Option<Connecting>,
) -> Result<Box<Stream>, Refusal> {
    let window_bytes = path.shares.stream_window_bytes(pod.cgroup);
    let begun = connected.begin(window_bytes).await.map_err(|error| Refusal::new(error.reason(), error))?;
    begun.0.peer().chain().check(SystemTime::now()).map_err(|found| authorize::untrusted(&found))?;
    let Some(place) = begun.0.place(window_bytes) else {
        return Err(Refusal::new(RefusalReason::Expired, "the server's certificate has expired"));
    };
    hbone::start(path, key, begun, connecting);
    let mut asked = ask(pod, &place, open).await.map_err(|error| refused(key, error))?;
    let mut answer = asked.acknowledged().await;
    if matches!(answer, Err(OpenError::Silent)) {
        answer = asked.answered_if_received().await;
    }
    let stream = answer.map_err(|error| refused(key, error))?;
    Ok(Box::new(Stream { stream, place }))
}

/// Keeps a connection for the next flows.
pub(super) async fn keep(
    path: &Arc<Proxy>,
    pod: &Pod,
    key: &PoolKey,
    connected: Connected,
    connecting: Option<Connecting>,
) {
    match connected.begin(path.shares.stream_window_bytes(pod.cgroup)).await {
        Ok(begun) => hbone::start(path, key, begun, connecting),
        Err(error) => tracing::debug!(%error, "connection ended"),
    }
}

async fn ask(pod: &Pod, place: &Place, open: &Open) -> Result<Box<Asked>, OpenError> {
    let connect = Connect { destination: open.destination, client: Some(open.client), trace: open.trace };
    place.ask(&connect, &hbone::baggage(&pod.workload)).await.map(Box::new)
}

fn refused(key: &PoolKey, error: OpenError) -> Refusal {
    let refusal = Refusal::new(error.reason(), format!("{}: {error}", key.identity));
    match error {
        // The application's kernel asks again, as for a host that does not answer.
        OpenError::Silent => refusal.because_of(&io::ErrorKind::TimedOut.into()),
        _ => refusal,
    }
}
