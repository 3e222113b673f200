//! The route of a captured connection, as a pure decision on its destination.

use tacit_abi::tcp_port;

use crate::{
    directory::{Protocol, Workload},
    policy::Mode,
    refusal::RefusalReason,
    spiffe::SpiffeId,
};

/// The facts about a captured connection.
#[derive(Debug, Clone, Copy)]
pub struct RouteInput<'a> {
    /// Port asked for.
    pub port: u16,
    /// The directory's entry for the address asked for.
    pub destination: Option<&'a Workload>,
    /// True if more than one workload or service claims the address.
    pub is_unclear: bool,
    /// True if the address is outside the mesh's ranges, as an endpoint of a service may be. Such an address has no protection.
    pub outside_mesh: bool,
    /// True if the destination is enrolled on this node.
    pub on_this_node: bool,
    /// True if the source's own routes lead to a link inside its pod.
    pub inside_pod: bool,
    /// The destination's mode at that port.
    pub destination_mode: Mode,
    /// True if the source pod sends no plaintext into the mesh.
    pub source_is_strict: bool,
}

/// The route of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Handed over inside this agent.
    SameNode,
    /// Through the tunnel, to a server that proves this identity.
    Tunnel(SpiffeId),
    /// The same, to the agent of another mesh, by HBONE.
    Hbone(SpiffeId),
    /// As plaintext, as without Tacit.
    Plaintext(PlaintextCause),
    /// Reset.
    Refuse(RefusalReason),
}

/// The reason why plaintext is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaintextCause {
    /// The address is outside the mesh.
    DestinationOutsideMesh,
    /// The address is inside the source's pod, and the source is not STRICT.
    DestinationInsidePod,
    /// The directory has no workload at the address, and the source is not STRICT.
    DestinationUnknown,
    /// The destination is not enrolled, and the source is not STRICT.
    DestinationNotEnrolled,
    /// The destination's agent has proven that the destination takes plaintext alone, and the source is not STRICT.
    DestinationNotTunnelled,
    /// The destination's mode at the port is DISABLE: the operator wants no encryption there.
    DestinationModeDisable,
}

impl PlaintextCause {
    /// Returns the stable label for logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::DestinationOutsideMesh => "destination_outside_mesh",
            Self::DestinationInsidePod => "destination_inside_pod",
            Self::DestinationUnknown => "destination_unknown",
            Self::DestinationNotEnrolled => "destination_not_enrolled",
            Self::DestinationNotTunnelled => "destination_not_tunnelled",
            Self::DestinationModeDisable => "destination_mode_disable",
        }
    }
}

/// Returns the route. A tunnel that fails resets the connection and never falls back to plaintext.
#[must_use]
pub fn decide(input: &RouteInput<'_>) -> Route {
    if input.inside_pod && !input.source_is_strict {
        return Route::Plaintext(PlaintextCause::DestinationInsidePod);
    }
    // Not as plaintext and not to one of the claimants: the address may be another's.
    if input.is_unclear {
        return Route::Refuse(RefusalReason::DestinationUnclear);
    }
    let unless_strict = |cause, reason| {
        if input.source_is_strict { Route::Refuse(reason) } else { Route::Plaintext(cause) }
    };
    let Some(destination) = input.destination else {
        if input.outside_mesh {
            return Route::Plaintext(PlaintextCause::DestinationOutsideMesh);
        }
        return unless_strict(PlaintextCause::DestinationUnknown, RefusalReason::DestinationUnknown);
    };
    match destination.protocol {
        Protocol::None => {
            unless_strict(PlaintextCause::DestinationNotEnrolled, RefusalReason::DestinationNotEnrolled)
        }
        Protocol::Hbone if tcp_port::is_reserved(input.port) => Route::Refuse(RefusalReason::ReservedPort),
        Protocol::Hbone if input.destination_mode == Mode::Disable => {
            Route::Plaintext(PlaintextCause::DestinationModeDisable)
        }
        Protocol::Hbone => Route::Hbone(destination.identity.clone()),
        // A program of the pod may listen at the tunnel's port if the pod is left alone. Its own agent knows.
        Protocol::Tacit if is_agents(input) => Route::Refuse(RefusalReason::ReservedPort),
        Protocol::Tacit if input.on_this_node => Route::SameNode,
        Protocol::Tacit if input.destination_mode == Mode::Disable => {
            Route::Plaintext(PlaintextCause::DestinationModeDisable)
        }
        Protocol::Tacit => Route::Tunnel(destination.identity.clone()),
    }
}

/// Returns true for a port that the destination's agent has in any case.
fn is_agents(input: &RouteInput<'_>) -> bool {
    let may_be_programs = input.port == tcp_port::TUNNEL && input.destination_mode != Mode::Disable;
    tcp_port::is_reserved(input.port) && !may_be_programs
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::PathBuf};

    use super::*;
    use crate::spiffe::TrustDomain;

    fn workload(protocol: Protocol) -> Workload {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        Workload {
            name: "web".into(),
            namespace: "shop".into(),
            identity: SpiffeId::new(&domain, "shop", "web").expect("valid"),
            addresses: vec!["10.77.2.2".parse().expect("literal")],
            node: "b".into(),
            labels: crate::directory::Labels::default(),
            cgroup: PathBuf::from("shop_web"),
            protocol,
            egress: None,
            udp: None,
            connect: Default::default(),
        }
    }

    #[test]
    fn every_combination_has_its_route() {
        use Mode::{Disable, Permissive, Strict};
        let meshed = workload(Protocol::Tacit);
        let plain = workload(Protocol::None);
        let ambient = workload(Protocol::Hbone);
        let tunnel = || Route::Tunnel(meshed.identity.clone());
        let table = [
            (None, false, Permissive, Permissive, Route::Plaintext(PlaintextCause::DestinationUnknown)),
            (None, false, Permissive, Strict, Route::Refuse(RefusalReason::DestinationUnknown)),
            (
                Some(&plain),
                false,
                Permissive,
                Permissive,
                Route::Plaintext(PlaintextCause::DestinationNotEnrolled),
            ),
            (Some(&plain), false, Disable, Strict, Route::Refuse(RefusalReason::DestinationNotEnrolled)),
            (Some(&meshed), true, Strict, Strict, Route::SameNode),
            (Some(&meshed), true, Disable, Permissive, Route::SameNode),
            (Some(&meshed), false, Permissive, Permissive, tunnel()),
            (Some(&meshed), false, Strict, Permissive, tunnel()),
            (Some(&meshed), false, Permissive, Disable, tunnel()),
            (Some(&meshed), false, Disable, Strict, Route::Plaintext(PlaintextCause::DestinationModeDisable)),
            (Some(&ambient), false, Permissive, Permissive, Route::Hbone(ambient.identity.clone())),
            (Some(&ambient), false, Strict, Strict, Route::Hbone(ambient.identity.clone())),
            // The agent of the other mesh serves it, wherever it runs.
            (Some(&ambient), true, Strict, Strict, Route::Hbone(ambient.identity.clone())),
            (
                Some(&ambient),
                false,
                Disable,
                Permissive,
                Route::Plaintext(PlaintextCause::DestinationModeDisable),
            ),
        ];
        for (destination, on_this_node, destination_mode, source_mode, expected) in table {
            let source_is_strict = source_mode == Strict;
            let input = RouteInput {
                port: 80,
                destination,
                outside_mesh: false,
                is_unclear: false,
                on_this_node,
                inside_pod: false,
                destination_mode,
                source_is_strict,
            };
            assert_eq!(decide(&input), expected, "{input:?}");
        }
    }

    #[test]
    fn what_is_outside_the_mesh_and_unknown_goes_in_clear_and_nothing_else_does() {
        let meshed = workload(Protocol::Tacit);
        let decided = |destination, outside_mesh| {
            let (on_this_node, destination_mode, source_is_strict) = (false, Mode::Strict, true);
            decide(&RouteInput {
                port: 443,
                destination,
                outside_mesh,
                is_unclear: false,
                on_this_node,
                destination_mode,
                inside_pod: false,
                source_is_strict,
            })
        };
        assert_eq!(decided(None, true), Route::Plaintext(PlaintextCause::DestinationOutsideMesh));
        assert_eq!(decided(None, false), Route::Refuse(RefusalReason::DestinationUnknown));
        assert_eq!(decided(Some(&meshed), true), Route::Tunnel(meshed.identity.clone()));
        assert_eq!(
            decided(Some(&workload(Protocol::None)), true),
            Route::Refuse(RefusalReason::DestinationNotEnrolled)
        );
    }

    #[test]
    fn the_ports_of_agents_cannot_be_dialled_where_one_is() {
        let (meshed, plain) = (workload(Protocol::Tacit), workload(Protocol::None));
        let refused = Route::Refuse(RefusalReason::ReservedPort);
        let asked = Route::Tunnel(meshed.identity.clone());
        for (port, destination_mode, expected) in [
            (15009, Mode::Permissive, &refused),
            (15056, Mode::Permissive, &refused),
            (15058, Mode::Strict, &refused),
            (15060, Mode::Disable, &refused),
            (15008, Mode::Disable, &refused),
            (15008, Mode::Permissive, &asked),
            (15008, Mode::Strict, &asked),
        ] {
            let input = RouteInput {
                port,
                destination: Some(&meshed),
                outside_mesh: false,
                is_unclear: false,
                on_this_node: false,
                inside_pod: false,
                destination_mode,
                source_is_strict: false,
            };
            assert_eq!(decide(&input), *expected, "{input:?}");
            let plaintext = Route::Plaintext(PlaintextCause::DestinationNotEnrolled);
            assert_eq!(decide(&RouteInput { destination: Some(&plain), ..input }), plaintext);
        }
    }

    #[test]
    fn an_unclear_address_is_refused_whoever_asks() {
        let meshed = workload(Protocol::Tacit);
        for destination in [None, Some(&meshed)] {
            for bits in 0..8_u8 {
                let input = RouteInput {
                    port: 80,
                    destination,
                    is_unclear: true,
                    outside_mesh: bits & 1 != 0,
                    on_this_node: bits & 2 != 0,
                    inside_pod: false,
                    destination_mode: Mode::Disable,
                    source_is_strict: bits & 4 != 0,
                };
                assert_eq!(decide(&input), Route::Refuse(RefusalReason::DestinationUnclear), "{input:?}");
            }
        }
    }

    #[test]
    fn what_stays_in_the_pod_is_left_to_its_routes_unless_the_pod_is_strict() {
        let meshed = workload(Protocol::Tacit);
        for (destination, is_unclear) in [(None, false), (None, true), (Some(&meshed), false)] {
            let inside = |source_is_strict| {
                let (port, destination_mode) = (80, Mode::Strict);
                let (outside_mesh, on_this_node, inside_pod) = (false, false, true);
                decide(&RouteInput {
                    port,
                    destination,
                    is_unclear,
                    outside_mesh,
                    on_this_node,
                    inside_pod,
                    destination_mode,
                    source_is_strict,
                })
            };
            assert_eq!(inside(false), Route::Plaintext(PlaintextCause::DestinationInsidePod));
            assert!(!matches!(inside(true), Route::Plaintext(_)));
        }
    }

    #[test]
    fn each_cause_of_plaintext_has_a_label_of_its_own() {
        let causes = [
            PlaintextCause::DestinationOutsideMesh,
            PlaintextCause::DestinationInsidePod,
            PlaintextCause::DestinationUnknown,
            PlaintextCause::DestinationNotEnrolled,
            PlaintextCause::DestinationNotTunnelled,
            PlaintextCause::DestinationModeDisable,
        ];
        let labels: HashSet<&str> = causes.iter().map(|cause| cause.label()).collect();
        assert_eq!(labels.len(), causes.len(), "{labels:?}");
    }
}
