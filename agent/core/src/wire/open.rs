//! The request that opens a flow, and the reasons to deny it. Pure.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use crate::refusal::RefusalReason;

/// Payload of OPEN: version, two addresses with ports, trace id, what comes ahead of the answer.
pub const OPEN_BYTES: usize = 1 + 18 + 18 + 16 + 1;
/// The only version of OPEN there is; another layout gets another number.
const OPEN_VERSION: u8 = 1;

/// Names one flow in the logs of both nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(pub [u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A client's request to open a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The destination of the application's `connect()`.
    pub destination: SocketAddr,
    /// The application's own address; a claim for logs, never a credential.
    pub client: SocketAddr,
    /// Ties the logs of both nodes together.
    pub trace: TraceId,
    /// The data that the client sends before the answer.
    pub optimistic_data: OptimisticMode,
}

/// The data that follows OPEN before the answer. It saves a round trip, and ACCEPT may wait for the first bytes of the
/// destination's response. After a DENY the session ends, because the receiver cannot tell where the data of the
/// denied flow ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OptimisticMode {
    /// The client sends nothing, and waits for the answer.
    #[default]
    Off,
    /// The client sends the application's DATA at once, then FIN or RESET.
    On,
}

/// A server's reason to refuse a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// Policy does not allow this client.
    Policy,
    /// The destination is no workload behind this tunnel.
    UnknownDestination,
    /// Nothing listens at the destination.
    ConnectionRefused,
    /// The destination cannot be reached.
    Unreachable,
    /// The destination did not answer in time.
    TimedOut,
    /// The agent is shutting down.
    Draining,
    /// The agent is at one of its bounds.
    Overloaded,
    /// The agent failed; its log says how.
    Internal,
    /// The pod takes plaintext alone. The client connects as without Tacit if its pod may.
    NotTunnelled,
    /// A reason of a newer version.
    Other(u8),
}

impl DenyReason {
    /// Returns the answer to a client whose flow the server refuses for `reason`. A peer learns no more than it needs.
    #[must_use]
    pub fn answer(reason: RefusalReason) -> Self {
        match reason {
            RefusalReason::Policy
            | RefusalReason::PlaintextInStrict
            | RefusalReason::DeniedByPolicy
            | RefusalReason::NotAllowedByPolicy
            | RefusalReason::ForgedClient
            | RefusalReason::Expired => Self::Policy,
            RefusalReason::UnknownDestination
            | RefusalReason::ForgedDestination
            | RefusalReason::ReservedPort => Self::UnknownDestination,
            RefusalReason::ConnectionRefused | RefusalReason::OwnRules => Self::ConnectionRefused,
            RefusalReason::Unreachable => Self::Unreachable,
            RefusalReason::TimedOut => Self::TimedOut,
            RefusalReason::Draining => Self::Draining,
            RefusalReason::Overloaded
            | RefusalReason::PodConnections
            | RefusalReason::SourceConnections
            | RefusalReason::PendingDials => Self::Overloaded,
            RefusalReason::NotTunnelled => Self::NotTunnelled,
            // A server refuses a flow that was opened for no other reason.
            _ => Self::Internal,
        }
    }

    /// Returns the reason for which the client refuses the connection.
    #[must_use]
    pub fn reason(self) -> RefusalReason {
        match self {
            Self::Policy => RefusalReason::Policy,
            Self::UnknownDestination => RefusalReason::UnknownDestination,
            Self::ConnectionRefused => RefusalReason::ConnectionRefused,
            Self::Unreachable => RefusalReason::Unreachable,
            Self::TimedOut => RefusalReason::TimedOut,
            Self::Draining => RefusalReason::Draining,
            Self::Overloaded => RefusalReason::Overloaded,
            Self::Internal => RefusalReason::Internal,
            Self::NotTunnelled => RefusalReason::NotTunnelled,
            Self::Other(_) => RefusalReason::Other,
        }
    }

    pub(super) fn code(self) -> u8 {
        match self {
            Self::Policy => 1,
            Self::UnknownDestination => 2,
            Self::ConnectionRefused => 3,
            Self::Unreachable => 4,
            Self::TimedOut => 5,
            Self::Draining => 6,
            Self::Overloaded => 7,
            Self::Internal => 8,
            Self::NotTunnelled => 9,
            Self::Other(code) => code,
        }
    }

    pub(super) fn of(code: u8) -> Self {
        match code {
            1 => Self::Policy,
            2 => Self::UnknownDestination,
            3 => Self::ConnectionRefused,
            4 => Self::Unreachable,
            5 => Self::TimedOut,
            6 => Self::Draining,
            7 => Self::Overloaded,
            8 => Self::Internal,
            9 => Self::NotTunnelled,
            code => Self::Other(code),
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(code) => write!(f, "other ({code})"),
            known => f.write_str(known.reason().label()),
        }
    }
}

/// The reason why the payload of OPEN is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOpen {
    /// The version is unknown.
    #[error("OPEN of version {0} is unknown")]
    Version(u8),
    /// The byte for optimistic data is neither 0 nor 1.
    #[error("invalid byte {0} for optimistic data in OPEN: expected 0 or 1")]
    OptimisticData(u8),
    /// The destination has no address or no port.
    #[error("invalid destination {0} in OPEN: expected an address and a port")]
    Destination(SocketAddr),
}

impl Open {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(OPEN_VERSION);
        for address in [self.destination, self.client] {
            let ip = match address.ip() {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            out.extend(ip.octets());
            out.extend(address.port().to_be_bytes());
        }
        out.extend(self.trace.0);
        out.push(self.optimistic_data as u8);
    }

    pub(super) fn decode(payload: &[u8; OPEN_BYTES]) -> Result<Self, InvalidOpen> {
        if payload[0] != OPEN_VERSION {
            return Err(InvalidOpen::Version(payload[0]));
        }
        let mut trace = [0; 16];
        trace.copy_from_slice(&payload[37..53]);
        let destination = decode_address(&payload[1..19]);
        if destination.port() == 0 || destination.ip().is_unspecified() {
            return Err(InvalidOpen::Destination(destination));
        }
        let optimistic_data = match payload[53] {
            0 => OptimisticMode::Off,
            1 => OptimisticMode::On,
            other => return Err(InvalidOpen::OptimisticData(other)),
        };
        Ok(Self {
            destination,
            client: decode_address(&payload[19..37]),
            trace: TraceId(trace),
            optimistic_data,
        })
    }
}

fn decode_address(bytes: &[u8]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&bytes[..16]);
    let port = u16::from_be_bytes([bytes[16], bytes[17]]);
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(ip)).to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_by_policy_is_answered_without_the_rule() {
        for (reason, answer) in [
            (RefusalReason::DeniedByPolicy, DenyReason::Policy),
            (RefusalReason::NotAllowedByPolicy, DenyReason::Policy),
            (RefusalReason::PlaintextInStrict, DenyReason::Policy),
            (RefusalReason::Expired, DenyReason::Policy),
            (RefusalReason::ForgedClient, DenyReason::Policy),
            (RefusalReason::ForgedDestination, DenyReason::UnknownDestination),
            (RefusalReason::ReservedPort, DenyReason::UnknownDestination),
        ] {
            assert_eq!(DenyReason::answer(reason), answer, "{reason:?}");
        }
    }

    #[test]
    fn both_agents_report_a_failure_to_reach_the_application_alike() {
        for code in 1..=9 {
            let answer = DenyReason::of(code);
            assert_eq!(DenyReason::answer(answer.reason()), answer);
        }
    }
}
