//! The conversation of one session: which frame may come next. Pure.
//!
//! ```text
//!          OPEN (client)             ACCEPT (server)
//!  Idle ------------------> Opening ------------------> Flow { client ended: no, server ended: no }
//!   ^                          |  DATA, FIN, RESET        |  DATA of a side that has not ended: stays
//!   |        DENY (server)     |  (client): as in Flow,   |  FIN of a side: that side has ended
//!   +--------------------------+  where ACCEPT leads      |  RESET of either side: Over
//!   |                                  DONE (server)      v
//!   +------------------------------------------------- Flow { client ended: yes, server ended: yes }
//! ```
//! URGENT may come wherever DATA may. A RESET of the client may cross the server's DONE and come in Idle: the session is then Over as well.
//! Any other frame is a protocol error and ends the session. Both ends run the same machine over the frames
//! they send and those they receive.

use super::frame::FrameType;

/// The sender of a frame: the side that connected or the side that accepted the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Connected; the agent of the source.
    Client,
    /// Accepted; the agent of the destination.
    Server,
}

impl Role {
    /// The other one.
    #[must_use]
    #[inline]
    pub fn peer(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// The state of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowState {
    /// No flow; the session can be used.
    Idle,
    /// A flow was asked for and not yet answered.
    Opening {
        /// The client has sent FIN.
        client_ended: bool,
    },
    /// A flow runs; a side that has sent FIN sends no more data.
    Flow {
        /// The client has sent FIN.
        client_ended: bool,
        /// The server has sent FIN.
        server_ended: bool,
    },
    /// The flow was reset; nothing more may come.
    Closed,
}

/// A frame that may not come now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind:?} from the {from:?} is not allowed in phase {state:?}")]
pub struct UnexpectedFrame {
    /// The state in which the frame came.
    pub state: FlowState,
    /// The sender of the frame.
    pub from: Role,
    /// Its type.
    pub kind: FrameType,
}

impl FlowState {
    /// The state after a frame of `kind` from `from`.
    ///
    /// # Errors
    /// [`UnexpectedFrame`] when it may not come now.
    #[inline]
    pub fn after(self, from: Role, kind: FrameType) -> Result<Self, UnexpectedFrame> {
        use Role::{Client, Server};
        Ok(match (self, from, kind) {
            (Self::Idle, Client, FrameType::Open) => Self::Opening { client_ended: false },
            // OptimisticMode of the answer, as OPEN has said.
            (Self::Opening { client_ended: false }, Client, FrameType::Data | FrameType::Urgent) => self,
            (Self::Opening { client_ended: false }, Client, FrameType::Fin) => {
                Self::Opening { client_ended: true }
            }
            (Self::Opening { client_ended }, Server, FrameType::Accept) => {
                Self::Flow { client_ended, server_ended: false }
            }
            (Self::Opening { .. }, Server, FrameType::Deny) => Self::Idle,
            (Self::Flow { client_ended: false, .. }, Client, FrameType::Data | FrameType::Urgent)
            | (Self::Flow { server_ended: false, .. }, Server, FrameType::Data | FrameType::Urgent) => self,
            (Self::Flow { client_ended: false, server_ended }, Client, FrameType::Fin) => {
                Self::Flow { client_ended: true, server_ended }
            }
            (Self::Flow { client_ended, server_ended: false }, Server, FrameType::Fin) => {
                Self::Flow { client_ended, server_ended: true }
            }
            // In `Idle` it crossed the server's DONE: the source reset a flow that had just ended.
            (Self::Flow { .. }, _, FrameType::Reset)
            | (Self::Idle | Self::Opening { .. }, Client, FrameType::Reset) => Self::Closed,
            (Self::Flow { client_ended: true, server_ended: true }, Server, FrameType::Done) => Self::Idle,
            (state, from, kind) => return Err(UnexpectedFrame { state, from, kind }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn flow(client_ended: bool, server_ended: bool) -> FlowState {
        FlowState::Flow { client_ended, server_ended }
    }

    const fn opening(client_ended: bool) -> FlowState {
        FlowState::Opening { client_ended }
    }

    #[test]
    fn all_pairs_of_phase_and_frame() {
        use FrameType::*;
        use Role::*;
        let allowed = [
            (FlowState::Idle, Client, Open, opening(false)),
            (FlowState::Idle, Client, Reset, FlowState::Closed),
            (opening(false), Client, Data, opening(false)),
            (opening(false), Client, Urgent, opening(false)),
            (opening(false), Client, Fin, opening(true)),
            (opening(false), Client, Reset, FlowState::Closed),
            (opening(false), Server, Accept, flow(false, false)),
            (opening(false), Server, Deny, FlowState::Idle),
            (opening(true), Client, Reset, FlowState::Closed),
            (opening(true), Server, Accept, flow(true, false)),
            (opening(true), Server, Deny, FlowState::Idle),
            (flow(false, false), Client, Data, flow(false, false)),
            (flow(false, false), Server, Data, flow(false, false)),
            (flow(false, false), Client, Urgent, flow(false, false)),
            (flow(false, false), Server, Urgent, flow(false, false)),
            (flow(false, false), Client, Fin, flow(true, false)),
            (flow(false, false), Server, Fin, flow(false, true)),
            (flow(false, false), Client, Reset, FlowState::Closed),
            (flow(false, false), Server, Reset, FlowState::Closed),
            (flow(true, false), Server, Data, flow(true, false)),
            (flow(true, false), Server, Urgent, flow(true, false)),
            (flow(true, false), Server, Fin, flow(true, true)),
            (flow(true, false), Client, Reset, FlowState::Closed),
            (flow(true, false), Server, Reset, FlowState::Closed),
            (flow(false, true), Client, Data, flow(false, true)),
            (flow(false, true), Client, Urgent, flow(false, true)),
            (flow(false, true), Client, Fin, flow(true, true)),
            (flow(false, true), Client, Reset, FlowState::Closed),
            (flow(false, true), Server, Reset, FlowState::Closed),
            (flow(true, true), Client, Reset, FlowState::Closed),
            (flow(true, true), Server, Reset, FlowState::Closed),
            (flow(true, true), Server, Done, FlowState::Idle),
        ];
        let phases = [
            FlowState::Idle,
            opening(false),
            opening(true),
            flow(false, false),
            flow(true, false),
            flow(false, true),
            flow(true, true),
            FlowState::Closed,
        ];
        for state in phases {
            for from in [Client, Server] {
                for kind in [Open, Accept, Deny, Data, Fin, Reset, Done, Urgent] {
                    let next = allowed.iter().find(|row| (row.0, row.1, row.2) == (state, from, kind));
                    let expected = next.map(|row| row.3).ok_or(UnexpectedFrame { state, from, kind });
                    assert_eq!(state.after(from, kind), expected);
                }
            }
        }
    }
}
