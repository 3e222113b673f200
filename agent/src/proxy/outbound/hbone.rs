//! Flows to servers that speak HBONE, such as pods of Istio ambient: each is a stream of a connection that the pod has to the server, or
//! of a new one.

use std::{future::Future, io, pin::pin, sync::Arc};

use tacit_core::{
    refusal::{Refusal, RefusalReason},
    shares::connections::Connection,
    wire::open::Open,
};
use tacit_tunnel::{
    Outgoing,
    hbone::{Asked, Connect, Connected, FlowStream, OpenError, Place},
};

use crate::{
    enrol::Pod,
    proxy::{
        Proxy,
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
    /// The server is known to speak HBONE.
    pub(super) is_hbone: bool,
}

/// Opens the flow on a connection that the pod has to the server, if the server is known to speak HBONE. `is_hbone` if the directory says
/// so.
///
/// # Errors
/// The refusal of the server.
pub(super) async fn on_existing(
    path: &Arc<Proxy>,
    pod: &Pod,
    key: &PoolKey,
    open: &Open,
    is_hbone: bool,
) -> Result<Tried, Refusal> {
    let mut tries = 0;
    loop {
        let window_bytes = path.shares.stream_window_bytes(pod.cgroup);
        match HboneConnections::find(path, key, window_bytes, is_hbone) {
            Found::Unknown => return Ok(Tried::Fresh(Fresh::default())),
            Found::Connect(connecting) => {
                return Ok(Tried::Fresh(Fresh { connecting: Some(connecting), ..fresh() }));
            }
            Found::Wait(mut told) => {
                if told.wait_for(|is_made| *is_made).await.is_err() {
                    return Ok(Tried::Fresh(fresh()));
                }
            }
            Found::Place(place) => {
                tries += 1;
                let answer = match ask(pod, &place, open).await {
                    Ok(mut asked) => match asked.acknowledged().await {
                        Err(OpenError::Silent) => {
                            path.hbone.close_to(key);
                            return Ok(Tried::Fresh(Fresh { silent: Some((asked, place)), ..fresh() }));
                        }
                        answer => answer,
                    },
                    Err(error) => Err(error),
                };
                match answer {
                    Ok(stream) => return Ok(Tried::Accepted(Box::new(Stream { stream, place }))),
                    Err(OpenError::Stale(error)) => {
                        tracing::debug!(%error, "a connection of the pool has ended");
                        if tries == TRIES {
                            return Ok(Tried::Fresh(fresh()));
                        }
                    }
                    Err(error) => return Err(refused(key, error)),
                }
            }
        }
    }
}

fn fresh() -> Fresh {
    Fresh { is_hbone: true, ..Fresh::default() }
}

/// Result of the wait for a silent connection and for a new one.
pub(super) enum Raced {
    /// The peer of the silent connection has the request.
    Answered(Result<Box<Stream>, Refusal>),
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
    let is_dead =
        |answer: &Result<_, OpenError>| matches!(answer, Err(OpenError::Silent | OpenError::Stale(_)));
    let answered = |answer: Result<FlowStream, OpenError>| {
        let answer = answer.map_err(|error| refused(key, error));
        Raced::Answered(answer.map(|stream| Box::new(Stream { stream, place })))
    };
    let connected = tokio::select! {
        biased;
        answer = asked.answered() => {
            return if is_dead(&answer) { Raced::Fresh(connect.await) } else { answered(answer) };
        }
        connected = &mut connect => connected,
    };
    if connected.is_err() {
        return Raced::Fresh(connected);
    }
    let answer = asked.answered_if_received().await;
    if is_dead(&answer) { Raced::Fresh(connected) } else { answered(answer) }
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
    let permit = path.shares.connection(Connection { pod: pod.cgroup, source: None })?;
    let window_bytes = path.shares.stream_window_bytes(pod.cgroup);
    let begun = connected.begin(window_bytes).await.map_err(|error| Refusal::new(error.reason(), error))?;
    let Some(place) = begun.0.place(window_bytes) else {
        return Err(Refusal::new(
            RefusalReason::Expired,
            "the server's certificate has expired, or was revoked after the handshake",
        ));
    };
    hbone::start(path, key, begun, permit, connecting);
    let mut asked = ask(pod, &place, open).await.map_err(|error| refused(key, error))?;
    let mut answer = asked.acknowledged().await;
    if matches!(answer, Err(OpenError::Silent)) {
        answer = asked.answered_if_received().await;
    }
    let stream = answer.map_err(|error| refused(key, error))?;
    Ok(Box::new(Stream { stream, place }))
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
