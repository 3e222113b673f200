//! The attacks. To add one: a line here, and a step (`step`) or a driver (`driver`, `lifecycle`) that it names.

mod drivers;

pub(crate) use drivers::{
    Dial, Driver, From, Layout, Misfortune, MovedTo, Neighbour, PassedFd, Shared, Start, Tags, To, Who,
};

use crate::Family::{self, Mapped, V4, V6};

/// One attack.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    pub(crate) group: &'static str,
    pub(crate) families: &'static [Family],
    pub(crate) driver: Driver,
    pub(crate) stopped: Stopped,
    /// It is an ordinary flow: through Tacit it must reach the victim's application.
    pub(crate) must_arrive: bool,
}

impl Attack {
    /// The group and the name.
    pub(crate) fn full_name(&self) -> String {
        format!("{}::{}", self.group, self.name)
    }
}

/// The first place where Tacit can stop the attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// Before it is on the pod's link.
    AtSocket,
    /// On the host end of the pod's link.
    OnLink,
    /// Before the victim's application gets it. Others may send it in clear.
    BeforeApplication,
    /// Nowhere: it is allowed in clear and must arrive, as without Tacit.
    Nowhere,
    /// At the attacker's share of a resource. The victim's flow must arrive.
    AtShare,
}

const ALL: &[Family] = &[V4, V6, Mapped];
const V4_V6: &[Family] = &[V4, V6];
const ONLY_V4: &[Family] = &[V4];
const ONLY_V6: &[Family] = &[V6];

const fn attack(
    group: &'static str,
    name: &'static str,
    families: &'static [Family],
    driver: Driver,
    stopped: Stopped,
) -> Attack {
    Attack { name, group, families, driver, stopped, must_arrive: false }
}

const fn socket(name: &'static str, families: &'static [Family], driver: Driver) -> Attack {
    attack("sockets", name, families, driver, Stopped::AtSocket)
}

const fn link(name: &'static str, families: &'static [Family], driver: Driver) -> Attack {
    attack("sockets", name, families, driver, Stopped::OnLink)
}

const fn flow(name: &'static str, families: &'static [Family], driver: Driver) -> Attack {
    Attack { must_arrive: true, ..socket(name, families, driver) }
}

const fn identity(
    name: &'static str,
    families: &'static [Family],
    driver: Driver,
    stopped: Stopped,
) -> Attack {
    attack("identity", name, families, driver, stopped)
}

const fn hostile(
    group: &'static str,
    name: &'static str,
    families: &'static [Family],
    stopped: Stopped,
    what: Neighbour,
) -> Attack {
    attack(group, name, families, Driver::Neighbour(what), stopped)
}

const fn neighbour(
    name: &'static str,
    families: &'static [Family],
    stopped: Stopped,
    what: Neighbour,
) -> Attack {
    hostile("neighbour", name, families, stopped, what)
}

const fn node(name: &'static str, what: Neighbour) -> Attack {
    hostile("node", name, V4_V6, Stopped::BeforeApplication, what)
}

const fn probe(name: &'static str, step: &'static str, layout: Layout) -> Attack {
    hostile("node", name, V4_V6, Stopped::Nowhere, Neighbour::Probe(step, layout))
}

const fn tenant(
    name: &'static str,
    families: &'static [Family],
    stopped: Stopped,
    what: Neighbour,
) -> Attack {
    hostile("tenant", name, families, stopped, what)
}

const fn boot(name: &'static str, start: Start) -> Attack {
    attack("boot", name, V4_V6, Driver::Boot(start), Stopped::BeforeApplication)
}

const fn share(name: &'static str, shared: Shared) -> Attack {
    attack("shares", name, V4_V6, Driver::Share(shared), Stopped::AtShare)
}

const fn lifecycle(name: &'static str, families: &'static [Family], what: Misfortune) -> Attack {
    attack("lifecycle", name, families, Driver::Lifecycle(what), Stopped::AtSocket)
}

/// All attacks, in the order they are run. Those on agents are last: they stop them.
pub(crate) static ATTACKS: &[Attack] = &[
    flow("tcp", ALL, Driver::Step("tcp")),
    flow("mptcp", ALL, Driver::Step("mptcp")),
    flow("io-uring", ALL, Driver::Step("io-uring")),
    flow("fastopen-sendto", ALL, Driver::Step("fastopen-sendto")),
    flow("fastopen-sendmsg", ALL, Driver::Step("fastopen-sendmsg")),
    flow("fastopen-connect", ALL, Driver::Step("fastopen-connect")),
    flow("unspec-reconnect", ALL, Driver::Step("unspec")),
    flow("mark-tcp", ALL, Driver::Step("marks-tcp")),
    socket("mark-udp", ALL, Driver::Step("marks-udp")),
    socket("source-bind", ALL, Driver::WithOwnAddress("bind")),
    socket("bind-to-device", ALL, Driver::Step("bindtodevice")),
    socket("ip-transparent", V4_V6, Driver::WithForeignAddress("transparent")),
    socket("udp", ALL, Driver::Step("udp")),
    socket("udp-lite", ALL, Driver::Step("udplite")),
    socket("udp-fragments", ALL, Driver::Step("fragments")),
    socket("ipv6-extension-headers", ONLY_V6, Driver::Step("extension-headers")),
    socket("sctp", ALL, Driver::Step("sctp")),
    socket("dccp", ALL, Driver::Step("dccp")),
    socket("icmp-payload", V4_V6, Driver::Step("icmp")),
    socket("raw-header", V4_V6, Driver::WithOwnAddress("raw")),
    socket("raw-ack-option", V4_V6, Driver::WithOwnAddress("raw-ack")),
    link("reflected-echo", V4_V6, Driver::WithOwnAddress("reflected")),
    socket("simultaneous-open", ALL, Driver::Simultaneous),
    link("packet-udp", V4_V6, Driver::WithOwnAddress("packet-udp")),
    link("packet-tunnel-segment", V4_V6, Driver::WithOwnAddress("packet-tcp")),
    link("packet-ack-option", V4_V6, Driver::WithOwnAddress("packet-ack")),
    link("packet-later-fragment", ONLY_V4, Driver::WithOwnAddress("packet-fragment")),
    identity("dial-15056", ALL, Driver::Port(15056), Stopped::AtSocket),
    identity("dial-15058", ALL, Driver::Port(15058), Stopped::AtSocket),
    identity("plaintext-to-15008", ALL, Driver::Port(15008), Stopped::AtSocket),
    identity("spoofed-pod", V4_V6, Driver::WithForeignAddress("raw"), Stopped::AtSocket),
    identity("spoofed-node", V4_V6, Driver::NodesAddress, Stopped::AtSocket),
    Attack {
        must_arrive: true,
        ..identity("nested-cgroup", ALL, Driver::NestedCgroup("tcp"), Stopped::AtSocket)
    },
    identity("nested-cgroup-udp", ALL, Driver::NestedCgroup("udp"), Stopped::AtSocket),
    identity("left-cgroup-tcp", ALL, Driver::Moved("tcp", MovedTo::Outside), Stopped::OnLink),
    identity("left-cgroup-udp", ALL, Driver::Moved("udp", MovedTo::Outside), Stopped::OnLink),
    identity("other-pods-cgroup", ALL, Driver::Moved("tcp", MovedTo::OtherPod), Stopped::AtSocket),
    identity("other-pods-cgroup-udp", ALL, Driver::Moved("udp", MovedTo::OtherPod), Stopped::AtSocket),
    identity("nested-netns", ONLY_V4, Driver::NestedNetns, Stopped::AtSocket),
    identity("passed-fd-connected", ALL, Driver::PassedFd(PassedFd::Connected), Stopped::OnLink),
    identity("passed-fd-datagram", ALL, Driver::PassedFd(PassedFd::Datagram), Stopped::OnLink),
    neighbour("link-local-in-tcp", ONLY_V6, Stopped::BeforeApplication, Neighbour::In("tcp", To::LinkLocal)),
    neighbour("link-local-in-udp", ONLY_V6, Stopped::BeforeApplication, Neighbour::In("udp", To::LinkLocal)),
    neighbour("link-local-out-tcp", ONLY_V6, Stopped::AtSocket, Neighbour::Out("tcp", To::LinkLocal)),
    neighbour("link-local-out-udp", ONLY_V6, Stopped::AtSocket, Neighbour::Out("udp", To::LinkLocal)),
    neighbour("on-link-in-tcp", V4_V6, Stopped::BeforeApplication, Neighbour::In("tcp", To::OnLink)),
    neighbour("on-link-in-udp", V4_V6, Stopped::BeforeApplication, Neighbour::In("udp", To::OnLink)),
    neighbour("on-link-out-tcp", V4_V6, Stopped::OnLink, Neighbour::Out("tcp", To::OnLink)),
    neighbour("on-link-out-udp", V4_V6, Stopped::OnLink, Neighbour::Out("udp", To::OnLink)),
    neighbour("multicast", V4_V6, Stopped::AtSocket, Neighbour::Out("udp", To::Multicast)),
    neighbour("broadcast", ONLY_V4, Stopped::OnLink, Neighbour::Out("udp", To::Broadcast)),
    neighbour("claimed-address", V4_V6, Stopped::OnLink, Neighbour::Claim(Who::Tenant, Tags(0))),
    neighbour("claimed-address-permissive", V4_V6, Stopped::OnLink, Neighbour::Claim(Who::Open, Tags(0))),
    neighbour("claimed-address-tagged", V4_V6, Stopped::OnLink, Neighbour::Claim(Who::Open, Tags(1))),
    neighbour("claimed-address-two-tags", V4_V6, Stopped::OnLink, Neighbour::Claim(Who::Open, Tags(2))),
    neighbour("spoofed-permissive", V4_V6, Stopped::OnLink, Neighbour::Spoofed),
    neighbour("spoofed-frame", V4_V6, Stopped::OnLink, Neighbour::SpoofedFrame(Tags(0))),
    neighbour("spoofed-tagged", V4_V6, Stopped::OnLink, Neighbour::SpoofedFrame(Tags(1))),
    neighbour("spoofed-two-tags", V4_V6, Stopped::OnLink, Neighbour::SpoofedFrame(Tags(2))),
    neighbour("hardware-address-of-victim", V4_V6, Stopped::OnLink, Neighbour::ForeignHardware),
    probe("probe-tcp-routed", "tcp", Layout::Routed),
    probe("probe-tcp-bridged", "tcp", Layout::Bridged),
    probe("probe-udp-routed", "udp", Layout::Routed),
    probe("probe-udp-bridged", "udp", Layout::Bridged),
    node("node-address-bridge-udp", Neighbour::NodeAddress(From::Bridge, Layout::Bridged)),
    node("node-address-bridge-tcp", Neighbour::NodeAddressTcp),
    hostile("node", "node-flow-fragments", ONLY_V4, Stopped::BeforeApplication, Neighbour::NodeFlowFragments),
    node("node-address-wire-routed", Neighbour::NodeAddress(From::Wire, Layout::Routed)),
    node("node-address-wire-bridged", Neighbour::NodeAddress(From::Wire, Layout::Bridged)),
    node("host-network-tcp-routed", Neighbour::HostNetwork("tcp", Layout::Routed)),
    node("host-network-tcp-bridged", Neighbour::HostNetwork("tcp", Layout::Bridged)),
    node("host-network-udp-routed", Neighbour::HostNetwork("udp", Layout::Routed)),
    node("host-network-udp-bridged", Neighbour::HostNetwork("udp", Layout::Bridged)),
    tenant("encapsulated-vxlan", V4_V6, Stopped::AtSocket, Neighbour::Encapsulated("4789")),
    tenant("encapsulated-vxlan-linux", V4_V6, Stopped::AtSocket, Neighbour::Encapsulated("8472")),
    tenant("encapsulated-geneve", V4_V6, Stopped::AtSocket, Neighbour::Encapsulated("6081")),
    tenant("encapsulated-ip", V4_V6, Stopped::AtSocket, Neighbour::Encapsulated("ip")),
    tenant("encapsulated-6in4", ONLY_V4, Stopped::AtSocket, Neighbour::Encapsulated("6in4")),
    tenant("encapsulated-gre", V4_V6, Stopped::AtSocket, Neighbour::Encapsulated("gre")),
    tenant("allowed-source", V4_V6, Stopped::BeforeApplication, Neighbour::AllowedSource),
    tenant("allowed-query", V4_V6, Stopped::Nowhere, Neighbour::AllowedQuery),
    tenant("disabled-port", V4_V6, Stopped::Nowhere, Neighbour::DisabledPort),
    tenant("translated-dial-outside", V4_V6, Stopped::OnLink, Neighbour::TranslatedDial(Dial::Outside)),
    tenant("translated-dial-disabled", V4_V6, Stopped::OnLink, Neighbour::TranslatedDial(Dial::Disabled)),
    node("masqueraded-tcp-routed", Neighbour::Masqueraded("tcp", Layout::Routed)),
    node("masqueraded-tcp-bridged", Neighbour::Masqueraded("tcp", Layout::Bridged)),
    node("masqueraded-udp-routed", Neighbour::Masqueraded("udp", Layout::Routed)),
    node("masqueraded-udp-bridged", Neighbour::Masqueraded("udp", Layout::Bridged)),
    tenant("syn-flood-connections", V4_V6, Stopped::Nowhere, Neighbour::Flooded),
    tenant("syn-flood-replayed-cookies", V4_V6, Stopped::OnLink, Neighbour::ReplayedCookies),
    share("carried-connections", Shared::Connections),
    share("handshakes", Shared::Handshakes),
    share("outgoing-handshakes", Shared::OutgoingHandshakes),
    share("pending-connections", Shared::PendingConnections),
    share("pending-dials", Shared::PendingDials),
    share("expected-answers", Shared::Answers),
    lifecycle("unknown-pod-tcp", ALL, Misfortune::UnknownPod("tcp")),
    lifecycle("unknown-pod-udp", ALL, Misfortune::UnknownPod("udp")),
    Attack { must_arrive: true, ..lifecycle("hook-after-child-program", ONLY_V4, Misfortune::ProgramInPod) },
    lifecycle("hook-before-parent-program", ONLY_V4, Misfortune::ProgramAbove),
    lifecycle("pending-map-full", V4_V6, Misfortune::PendingFull),
    lifecycle("agent-stopped", ALL, Misfortune::Stopped("tcp")),
    lifecycle("agent-stopped-udp", ALL, Misfortune::Stopped("udp")),
    lifecycle("agent-killed", ALL, Misfortune::Killed("tcp")),
    lifecycle("agent-killed-udp", ALL, Misfortune::Killed("udp")),
    lifecycle("agent-killed-pins-deleted", V4_V6, Misfortune::PinsDeleted),
    lifecycle("empty-directory-tcp", V4_V6, Misfortune::EmptyDirectory("tcp")),
    lifecycle("empty-directory-udp", V4_V6, Misfortune::EmptyDirectory("udp")),
    lifecycle("before-enrolment", ALL, Misfortune::LateAgent),
    attack(
        "tenant",
        "copied-namespace",
        V4_V6,
        Driver::Lifecycle(Misfortune::CopiedNamespace),
        Stopped::OnLink,
    ),
    boot("new-pod-before-agent", Start::Late),
    boot("new-pod-without-certificate", Start::WithoutCertificates),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SECURITY_MODEL: &str = include_str!("../../../deploy/docs/security-model.md");

    #[test]
    fn the_security_model_counts_every_attack_and_names_every_group() {
        let total: usize = ATTACKS.iter().map(|attack| attack.families.len()).sum();
        let (_, table) = SECURITY_MODEL.split_once("| Kernel | Held |").expect("the table of kernels");
        let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
        assert!(!rows.is_empty());
        for row in rows {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let number = |cell: &str| cell.split(' ').next().and_then(|word| word.parse::<usize>().ok());
            let counted: usize = cells[2..5].iter().filter_map(|cell| number(cell)).sum();
            assert_eq!(counted, total, "{row}");
        }
        let groups: BTreeSet<&str> = ATTACKS.iter().map(|attack| attack.group).collect();
        for group in groups {
            assert!(SECURITY_MODEL.contains(&format!("| `attack::{group}` |")), "{group}");
        }
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<(&str, &str)> =
            ATTACKS.iter().map(|attack| (attack.group, attack.name)).collect();
        assert_eq!(names.len(), ATTACKS.len());
    }
}
