//! The client's side of a flow's begin: OPEN, and the wait for its answer.

use std::{io, time::Duration};

use socket2::SockRef;
use tacit_core::{
    refusal::RefusalReason,
    wire::{
        flow_state::FlowState,
        frame::Control,
        open::{DenyReason, Open, OptimisticMode},
    },
};
use tacit_kernel::socket::peer::{ask_peer, peer_state};

use super::{OptimisticData, Session};
use crate::{TunnelError, receive_buffer::Received, socket};

/// Limit for the answer to OPEN. It exceeds the server's limit for connecting to the destination.
pub(crate) const OPEN_MAX: Duration = Duration::from_secs(30);
/// Time in which the kernel of a peer acknowledges OPEN, beside [`OPEN_ROUND_TRIPS`], unless the peer is gone. The kernel repeats a lost
/// packet after a round trip and at least 200 ms, and an acknowledgement can be delayed by 40 ms.
pub(super) const OPEN_ACKNOWLEDGED: Duration = Duration::from_millis(300);
/// Round trips for the same: one before the repetition, one until its acknowledgement, and one for their variation.
const OPEN_ROUND_TRIPS: u32 = 3;

/// Limit of a peer's silence after OPEN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    /// None but the limit for the answer.
    Allowed,
    /// A few round trips without an acknowledgement.
    Bounded,
}

/// The reason why no flow was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server rejected this flow; the session can carry others.
    #[error("the destination's agent refused the flow: {0}")]
    Denied(DenyReason),
    /// The session ended before the server answered. The flow may be retried on a new session.
    #[error("the session ended before the destination's agent answered: {0}")]
    Stale(#[source] TunnelError),
    /// The peer's kernel did not acknowledge OPEN. The flow may be tried on a new session, unless data of it was sent.
    #[error("the peer of an idle session does not answer")]
    Silent,
    /// The tunnel failed, and a retry on a new session would fail too.
    #[error(transparent)]
    Tunnel(TunnelError),
    /// The application reset its connection before the answer; the server was informed.
    #[error("the application has reset its connection")]
    Abandoned,
}

impl OpenError {
    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::Denied(reason) => reason.reason(),
            Self::Stale(_) => RefusalReason::Stale,
            Self::Silent => RefusalReason::PeerUnreachable,
            Self::Tunnel(error) => error.reason(),
            Self::Abandoned => RefusalReason::ResetBySource,
        }
    }
}

impl From<TunnelError> for OpenError {
    fn from(error: TunnelError) -> Self {
        match error {
            gone @ (TunnelError::Io(_) | TunnelError::Closed) => Self::Stale(gone),
            other => Self::Tunnel(other),
        }
    }
}

impl Session {
    /// Client: opens a flow and waits for the answer, at most `OPEN_MAX`, or until the peer has not acknowledged OPEN for a few round
    /// trips. Data that `optimistic` has already sent leaves with OPEN. In that case later data is also sent before the answer
    /// arrives.
    ///
    /// If the session is dropped before the answer, its connection is reset. A peer that has not received OPEN by then does not
    /// receive it later.
    ///
    /// # Errors
    /// [`OpenError::Silent`] if the peer does not acknowledge: [`Session::answered`] waits on. Others are final;
    /// [`Session::is_idle`] reports whether the session can still be used.
    pub async fn open(
        &mut self,
        open: &Open,
        optimistic: Option<&mut OptimisticData<'_>>,
    ) -> Result<(), OpenError> {
        let optimistic =
            optimistic.and_then(|optimistic| optimistic.app_read_now().map(|first| (optimistic, first)));
        let optimistic_data = if optimistic.is_some() { OptimisticMode::On } else { OptimisticMode::Off };
        self.send(&Control::Open(Open { optimistic_data, ..*open }))?;
        let opening = Opening(self);
        let answer = opening.0.wait_for_answer(optimistic, Silence::Bounded).await?;
        drop(opening);
        self.take_answer(&answer, optimistic_data)
    }

    /// Client: waits for the answer to an OPEN without optimistic data, after [`OpenError::Silent`]. Cancel-safe.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn answered(&mut self) -> Result<(), OpenError> {
        let answer = self.wait_for_answer(None, Silence::Allowed).await?;
        socket::deliver_if_dropped(self.tls.tcp());
        self.take_answer(&answer, OptimisticMode::Off)
    }

    /// Client: does the same, and asks the peer's kernel whether it has OPEN.
    ///
    /// # Errors
    /// [`OpenError::Silent`] if it does not confirm that in a few round trips. Others are those of [`Session::answered`].
    pub async fn answered_if_received(&mut self) -> Result<(), OpenError> {
        // A connection that cannot be asked has ended, which the wait reports.
        let _ = ask_peer(self.tls.tcp());
        let answer = self.wait_for_answer(None, Silence::Bounded).await?;
        socket::deliver_if_dropped(self.tls.tcp());
        self.take_answer(&answer, OptimisticMode::Off)
    }

    fn take_answer(&mut self, answer: &Received, optimistic_data: OptimisticMode) -> Result<(), OpenError> {
        match answer {
            Received::Control(Control::Deny(reason)) => {
                self.end_after_deny(optimistic_data);
                Err(OpenError::Denied(*reason))
            }
            // `flow_state` has rejected everything except ACCEPT.
            _ => Ok(()),
        }
    }

    /// Looks at an answer to OPEN that has not come in `waited`. Returns the time at which to look again.
    ///
    /// # Errors
    /// [`OpenError`], if it is not waited for any longer.
    pub(super) fn check_answer(&self, waited: Duration, silence: Silence) -> Result<Duration, OpenError> {
        match look(self.tls.tcp(), waited, silence).map_err(TunnelError::Io)? {
            Look::Again(at) => Ok(at),
            Look::Silent => Err(OpenError::Silent),
            Look::TooLate => {
                Err(OpenError::Tunnel(TunnelError::Timeout { what: "the answer to OPEN", limit: OPEN_MAX }))
            }
        }
    }
}

/// A session that waits for its first answer. If the wait ends without one, the connection is reset when it is dropped: the kernel
/// would repeat OPEN on a connection that is only closed.
struct Opening<'a>(&'a mut Session);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if matches!(self.0.state, FlowState::Opening { .. }) {
            socket::reset_if_dropped(self.0.tls.tcp());
        }
    }
}

/// Result of a look at an answer that has not come.
pub(crate) enum Look {
    /// To be looked at again at this time after the request.
    Again(Duration),
    /// The peer has not acknowledged the request for a few round trips.
    Silent,
    /// The limit for the answer has passed.
    TooLate,
}

/// Looks at an answer that has not come at `socket` in `waited`.
///
/// # Errors
/// The kernel's.
pub(crate) fn look<'s>(
    socket: impl Into<SockRef<'s>>,
    waited: Duration,
    silence: Silence,
) -> io::Result<Look> {
    if waited >= OPEN_MAX {
        return Ok(Look::TooLate);
    }
    if silence == Silence::Allowed {
        return Ok(Look::Again(OPEN_MAX));
    }
    let peer = peer_state(socket)?;
    if !peer.is_asked {
        // The peer has acknowledged the request, and waits for its application.
        return Ok(Look::Again(OPEN_MAX));
    }
    // An acknowledgement that was on its way when the request was sent is not one of the request.
    let unheard = peer.heard.min(waited);
    let patience = patience(peer.round_trip);
    Ok(if unheard < patience { Look::Again(waited + patience - unheard) } else { Look::Silent })
}

/// Returns the time after which a peer that has not acknowledged OPEN is silent.
pub(crate) fn patience(round_trip: Duration) -> Duration {
    OPEN_ACKNOWLEDGED + OPEN_ROUND_TRIPS * round_trip
}
