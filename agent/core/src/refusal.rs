//! The reasons why an agent refuses a connection, and the refusal that carries one from the decision to logs and metrics.
//!
//! Every producer names its reason with [`RefusalReason`]: routes, policy, the choice of an endpoint, the wire format, the tunnel
//! and the proxy. The metric label `reason` is [`RefusalReason::label`] and nothing else. `deploy/docs/troubleshooting.md`
//! explains every reason to operators; a test compares the two.

use std::io;

use crate::spiffe::SpiffeId;

/// The side whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The destination does not answer. Another endpoint of the same service may be tried.
    Destination,
    /// Every other endpoint would be refused too, or must not be tried.
    Other,
}

/// End of the application's `connect()`, if it waits for the destination's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectEnd {
    /// It fails with ECONNREFUSED.
    Refused,
    /// It fails with ENETUNREACH.
    NetworkUnreachable,
    /// It fails with EHOSTUNREACH.
    HostUnreachable,
    /// It goes on: the application's kernel asks again, as often and as long as the application wants.
    Unanswered,
}

impl ConnectEnd {
    /// Returns the end that fits the error of a connection that the agent tried for the application.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NetworkUnreachable => Self::NetworkUnreachable,
            io::ErrorKind::HostUnreachable => Self::HostUnreachable,
            io::ErrorKind::TimedOut => Self::Unanswered,
            _ => Self::Refused,
        }
    }
}

macro_rules! reasons {
    ($($variant:ident, $label:literal, $fault:ident, $help:literal;)+) => {
        /// The reason for a refusal. The set is closed, so it bounds the metric label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum RefusalReason { $(#[doc = $help] $variant,)+ }

        impl RefusalReason {
            /// All reasons.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Returns the stable label for logs and metrics.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            /// Returns the side whose fault the refusal is.
            #[must_use]
            pub fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)+ }
            }
        }
    };
}

reasons! {
    // The source, before the destination is reached.
    NoDestination, "no_destination", Other, "The kernel has no destination for the connection.";
    DestinationUnknown, "destination_unknown", Other, "The directory has no workload at the address, and the source is STRICT.";
    DestinationNotEnrolled, "destination_not_enrolled", Other, "The destination is not enrolled, and the source is STRICT.";
    DestinationGone, "destination_gone", Destination, "The destination on the same node is no longer enrolled.";
    DestinationUnclear, "destination_unclear", Destination, "More than one workload or service claims the address.";
    DestinationUnproven, "destination_unproven", Other, "The directory gives the address to another pod than the one of this node.";
    ThroughWaypoint, "through_waypoint", Other, "Clients must reach the destination through a waypoint, which the agent does not speak to.";
    OtherNetwork, "other_network", Other, "The destination is in another network, behind a gateway that the agent does not speak to.";
    ReservedPort, "reserved_port", Other, "The destination port is one of the agent's.";
    OpeningLimit, "opening_limit", Other, "Too many connections of the pod wait for their destinations.";
    NoCertificate, "no_certificate", Other, "The pod's identity has no valid certificate.";
    NoEndpoint, "no_endpoint", Other, "No endpoint of the service is ready, or all were tried.";
    ServicePortUnknown, "service_port_unknown", Other, "The service has no such TCP port.";
    NotTunnelled, "not_tunnelled", Other, "The destination takes plaintext alone, as its agent has proven, and plaintext is not allowed.";
    PeerUnreachable, "peer_unreachable", Destination, "The tunnel port of the destination did not answer.";
    // The answer of the destination's agent, and failures to reach an application.
    Policy, "policy", Other, "The destination's agent denied the flow by policy.";
    UnknownDestination, "unknown_destination", Destination, "The destination is not a workload behind this tunnel.";
    ConnectionRefused, "connection_refused", Destination, "No application listens at the destination.";
    Unreachable, "unreachable", Destination, "The application cannot be reached.";
    PendingDials, "pending_dials", Destination, "The pod has its share of connections that its applications have not accepted.";
    OwnRules, "own_rules", Other, "Nobody listens at the destination in the pod itself, and rules of the pod (REDIRECT, DNAT) rewrite what arrives. They do not run for a tunnel.";
    TimedOut, "timed_out", Destination, "The application did not answer in time.";
    Draining, "draining", Destination, "The destination's agent is shutting down.";
    Overloaded, "overloaded", Destination, "The destination's agent is at one of its bounds.";
    Internal, "internal", Destination, "The destination's agent failed.";
    Other, "other", Other, "The destination's agent answered with a reason of a newer version.";
    Stale, "stale", Other, "An idle session ended after data of the flow was sent on it.";
    ResetBySource, "reset_by_source", Other, "The application reset its connection before the answer.";
    // The destination.
    PlaintextInStrict, "plaintext_in_strict", Other, "Plaintext to a port in STRICT.";
    DeniedByPolicy, "denied_by_policy", Other, "A policy denies the flow.";
    NotAllowedByPolicy, "not_allowed_by_policy", Other, "ALLOW policies select the destination, and no rule matches.";
    NotSteered, "not_steered", Other, "The connection to the agent's listener did not come from outside the pod.";
    HandshakeLimit, "handshake_limit", Other, "Too many handshakes of the same source or pod are in progress.";
    PodConnections, "pod_connections", Other, "The pod has its share of this agent's connections.";
    SourceConnections, "source_connections", Other, "The source address has its share of connections to pods of this node.";
    ForgedDestination, "forged_destination", Other, "OPEN has another address than the session.";
    ForgedClient, "forged_client", Other, "OPEN has another client address than the session's peer.";
    // The tunnel, on either side.
    IdentityMismatch, "identity_mismatch", Other, "The peer proved another identity than the expected one.";
    OtherTrustDomain, "other_trust_domain", Other, "The peer is of another trust domain.";
    Expired, "expired", Other, "The peer's certificate has expired.";
    NotYetValid, "not_yet_valid", Other, "The peer's certificate is not valid yet.";
    CertificateRevoked, "certificate_revoked", Other, "A certificate of the peer's chain is revoked.";
    RevocationUnknown, "revocation_unknown", Other, "No current revocation list of an issuer in the peer's chain.";
    UnknownIssuer, "unknown_issuer", Other, "The peer's certificate chains to no known root.";
    UriNames, "uri_names", Other, "The peer's certificate does not have exactly one URI.";
    NotAnIdentity, "not_an_identity", Other, "The URI in the peer's certificate is not a SPIFFE ID.";
    NoClientCertificate, "no_client_certificate", Other, "The client sent no certificate.";
    InvalidCertificate, "invalid_certificate", Other, "The peer's certificate has another defect.";
    RefusedByPeer, "refused_by_peer", Other, "The peer ended the session with a TLS alert.";
    TlsMismatch, "tls_mismatch", Other, "The peers share no TLS parameters.";
    Alpn, "alpn", Other, "The peer uses another wire format.";
    Tls, "tls", Other, "The peer violated TLS.";
    Timeout, "timeout", Other, "A handshake or an answer exceeded its time limit.";
    Io, "io", Other, "The connection failed.";
    Closed, "closed", Other, "The peer closed the session inside a flow.";
    Protocol, "protocol", Other, "The peer sent a frame that is malformed or out of order.";
}

impl RefusalReason {
    /// Returns true if the destination or its node does not answer at all.
    #[must_use]
    pub fn is_silence(self) -> bool {
        matches!(self, Self::PeerUnreachable | Self::Unreachable | Self::TimedOut | Self::Timeout)
    }

    /// Returns how a waiting `connect()` ends. What passes with time is not answered, so that the application's kernel asks
    /// again: without Tacit a full backlog or a lost packet has this effect. A tunnel that breaks before the answer is such a
    /// case.
    #[must_use]
    pub fn connect_end(self) -> ConnectEnd {
        match self {
            Self::Unreachable => ConnectEnd::HostUnreachable,
            Self::PendingDials
            | Self::TimedOut
            | Self::Draining
            | Self::Overloaded
            | Self::OpeningLimit
            | Self::Timeout
            | Self::Io
            | Self::Closed => ConnectEnd::Unanswered,
            _ => ConnectEnd::Refused,
        }
    }
}

/// A connection that is refused, or an open one that policy no longer allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The reason.
    pub reason: RefusalReason,
    /// Text for the operator: the policy, the address, the error.
    pub detail: String,
    /// The proven identity of the source, for logs. `None` if the source proved none before the refusal.
    pub source: Option<SpiffeId>,
    /// End of the source's `connect()`, if it still waits.
    pub connect_end: ConnectEnd,
}

impl Refusal {
    /// Returns the refusal of a source that has proven no identity.
    pub fn new(reason: RefusalReason, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), source: None, connect_end: reason.connect_end() }
    }

    /// Returns the same refusal because a connection failed with `error`, which decides how `connect()` ends.
    #[must_use]
    pub fn because_of(self, error: &io::Error) -> Self {
        Self { connect_end: ConnectEnd::of(error), ..self }
    }

    /// Returns the same refusal of a source that has proven `identity`.
    #[must_use]
    pub fn of(self, identity: &SpiffeId) -> Self {
        Self { source: Some(identity.clone()), ..self }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn labels_are_distinct_and_fit_a_metric_label() {
        let labels: HashSet<_> = RefusalReason::ALL.iter().map(|reason| reason.label()).collect();
        assert_eq!(labels.len(), RefusalReason::ALL.len());
        assert!(labels.iter().all(|label| label.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
    }

    #[test]
    fn only_destinations_that_do_not_answer_leave_another_endpoint_to_try() {
        let retryable = RefusalReason::ALL.iter().filter(|reason| reason.fault() == Fault::Destination);
        let labels: Vec<_> = retryable.map(|reason| reason.label()).collect();
        let expected = [
            "destination_gone",
            "destination_unclear",
            "peer_unreachable",
            "unknown_destination",
            "connection_refused",
            "unreachable",
            "pending_dials",
            "timed_out",
            "draining",
            "overloaded",
            "internal",
        ];
        assert_eq!(labels, expected);
    }

    #[test]
    fn a_connect_ends_as_the_failed_connection_did() {
        for (kind, end) in [
            (io::ErrorKind::ConnectionRefused, ConnectEnd::Refused),
            (io::ErrorKind::ConnectionReset, ConnectEnd::Refused),
            (io::ErrorKind::NetworkUnreachable, ConnectEnd::NetworkUnreachable),
            (io::ErrorKind::HostUnreachable, ConnectEnd::HostUnreachable),
            (io::ErrorKind::TimedOut, ConnectEnd::Unanswered),
        ] {
            let refusal = Refusal::new(RefusalReason::PeerUnreachable, "down").because_of(&kind.into());
            assert_eq!(refusal.connect_end, end, "{kind:?}");
        }
        assert_eq!(Refusal::new(RefusalReason::Policy, "denied").connect_end, ConnectEnd::Refused);
        assert_eq!(Refusal::new(RefusalReason::Unreachable, "gone").connect_end, ConnectEnd::HostUnreachable);
    }

    #[test]
    fn only_what_passes_with_time_is_not_answered() {
        let unanswered = RefusalReason::ALL.iter().filter(|r| r.connect_end() == ConnectEnd::Unanswered);
        let labels: Vec<_> = unanswered.map(|reason| reason.label()).collect();
        assert_eq!(
            labels,
            [
                "opening_limit",
                "pending_dials",
                "timed_out",
                "draining",
                "overloaded",
                "timeout",
                "io",
                "closed"
            ]
        );
    }
}
