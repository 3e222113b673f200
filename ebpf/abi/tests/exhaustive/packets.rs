//! Pods and packets: one of each kind that a decision may tell apart.

use tacit_abi::{Address, Hook, Link, Mode, Packet, Pod, Segment, pod_flag, protocol, tcp_port};

use crate::facts::{Every, RawMode, subsets};

/// Port of an application.
pub(crate) const APPLICATION: u16 = 80;
/// Port of another end.
const OTHER_PORT: u16 = 53;
/// Slot of every pod.
pub(crate) const SLOT: u32 = 3;
/// UDP ports on which nodes decapsulate, as the security model lists them.
pub(crate) const ENCAPSULATION_PORTS: [u16; 9] = [1701, 3544, 4789, 4790, 5555, 6080, 6081, 6635, 8472];
/// Protocols that carry packets, by their numbers at IANA: IPIP, 6in4, GRE, EtherIP, L2TP, MPLS, Ethernet.
pub(crate) const ENCAPSULATION_PROTOCOLS: [u8; 7] = [4, 41, 47, 97, 115, 137, 143];
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

const fn v4(a: u8, b: u8, c: u8, d: u8) -> Address {
    Address::from_v4_be(u32::from_ne_bytes([a, b, c, d]))
}

const fn v6(first: u16, last: u8) -> Address {
    let [a, b] = first.to_be_bytes();
    Address::from_octets([a, b, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
}

pub(crate) const POD_V4: Address = v4(10, 77, 1, 2);
pub(crate) const POD_V6: Address = v6(0xfd77, 2);
pub(crate) const OTHER_V4: Address = v4(10, 77, 1, 9);
pub(crate) const OTHER_V6: Address = v6(0xfd77, 9);
pub(crate) const LOOPBACK_V4: Address = v4(127, 0, 0, 1);
const UNSPECIFIED_V4: Address = v4(0, 0, 0, 0);
const BROADCAST: Address = v4(255, 255, 255, 255);
const MULTICAST_V4: Address = v4(224, 0, 0, 251);
const MULTICAST_V6: Address = v6(0xff02, 251);
/// Link-local address of the pod.
pub(crate) const OWN_LINK_LOCAL: Address = v6(0xfe80, 2);
pub(crate) const OTHER_LINK_LOCAL: Address = v6(0xfe80, 9);

/// Addresses of the pod's side, those that others claim, and those without an owner.
const LOCAL_V4: [Address; 3] = [POD_V4, OTHER_V4, UNSPECIFIED_V4];
const LOCAL_V6: [Address; 5] = [POD_V6, OTHER_V6, Address::NONE, OWN_LINK_LOCAL, OTHER_LINK_LOCAL];
/// Addresses of the other side. Those of the mesh, of the node and of `allowClear` differ in facts only.
const REMOTE_V4: [Address; 6] = [POD_V4, OTHER_V4, UNSPECIFIED_V4, LOOPBACK_V4, MULTICAST_V4, BROADCAST];
const REMOTE_V6: [Address; 6] =
    [POD_V6, OTHER_V6, Address::NONE, Address::LOOPBACK_V6, MULTICAST_V6, OTHER_LINK_LOCAL];

/// Returns a packet between each pair of addresses of one family.
pub(crate) fn pairs() -> Vec<(Address, Address)> {
    let of = |locals: &[Address], remotes: &[Address]| -> Vec<_> {
        locals.iter().flat_map(|local| remotes.iter().map(|remote| (*local, *remote))).collect()
    };
    [of(&LOCAL_V4, &REMOTE_V4), of(&LOCAL_V6, &REMOTE_V6)].concat()
}

/// Returns every pod: all flags, all modes, with and without an address of each family. The first is the unknown one.
pub(crate) fn pods() -> Vec<Pod> {
    let addresses = [(true, true), (true, false), (false, true), (false, false)];
    let mut all = vec![Pod::unknown()];
    for (has_v4, has_v6) in addresses {
        for mode in RawMode::all() {
            for flags in subsets(&pod_flag::ALL) {
                all.push(Pod {
                    netns_cookie: 7,
                    v4: if has_v4 { POD_V4 } else { Address::NONE },
                    v6: if has_v6 { POD_V6 } else { Address::NONE },
                    slot: SLOT,
                    mode: mode.0,
                    flags,
                    capture_port: 0,
                });
            }
        }
    }
    all
}

/// Returns one packet of each kind, without addresses.
pub(crate) fn kinds() -> Vec<Packet> {
    let packet = |protocol, local_port, remote_port| Packet {
        local: Address::NONE,
        remote: Address::NONE,
        protocol,
        local_port,
        remote_port,
        segment: Segment::Data,
        is_discovery: false,
    };
    let mut all = Vec::new();
    for segment in Segment::all() {
        for port in [APPLICATION, tcp_port::TUNNEL] {
            all.push(Packet { segment, ..packet(protocol::TCP, port, OTHER_PORT) });
        }
    }
    // Later fragments have no ports.
    all.extend([protocol::TCP, protocol::UDP].map(|number| packet(number, 0, 0)));
    all.push(packet(protocol::UDP, APPLICATION, OTHER_PORT));
    all.extend(ENCAPSULATION_PORTS.map(|port| packet(protocol::UDP, APPLICATION, port)));
    all.extend([protocol::ICMP, protocol::ICMP_V6].map(|number| packet(number, 0, 0)));
    all.push(Packet { is_discovery: true, ..packet(protocol::ICMP_V6, 0, 0) });
    all.extend(ENCAPSULATION_PROTOCOLS.map(|number| packet(number, 0, 0)));
    all.extend([SCTP, UDP_LITE, protocol::UNKNOWN].map(|number| packet(number, 0, 0)));
    all
}

/// Runs `check` for every pod with every kind of packet between every pair of addresses. Returns the sum of its results.
pub(crate) fn each(check: impl Fn(Pod, Packet) -> u64) -> u64 {
    let (pods, kinds) = (pods(), kinds());
    let mut sum = 0;
    for pair in pairs() {
        for kind in &kinds {
            sum += pods.iter().map(|pod| check(*pod, between(pair, *kind))).sum::<u64>();
        }
    }
    sum
}

/// Returns the packets of every protocol number between two addresses.
pub(crate) fn protocols() -> impl Iterator<Item = Packet> {
    (0..=u8::MAX).map(|protocol| Packet { protocol, ..between((POD_V4, OTHER_V4), kinds()[0]) })
}

/// Returns UDP packets to every port.
pub(crate) fn udp_ports() -> impl Iterator<Item = Packet> {
    let udp = Packet { protocol: protocol::UDP, segment: Segment::Data, ..kinds()[0] };
    (0..=u16::MAX).map(move |remote_port| Packet { remote_port, ..between((POD_V4, OTHER_V4), udp) })
}

/// Returns the packet with these addresses.
pub(crate) fn between((local, remote): (Address, Address), packet: Packet) -> Packet {
    Packet { local, remote, ..packet }
}

/// A packet of a pod, at a hook.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject {
    pub(crate) pod: Pod,
    pub(crate) hook: Hook,
    pub(crate) packet: Packet,
}

impl Subject {
    pub(crate) fn of(&self, numbers: &[u8]) -> bool {
        numbers.contains(&self.packet.protocol)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.of(&[protocol::TCP])
    }

    pub(crate) fn is_udp(&self) -> bool {
        self.of(&[protocol::UDP])
    }

    pub(crate) fn is_icmp(&self) -> bool {
        self.of(&[protocol::ICMP, protocol::ICMP_V6])
    }

    /// Returns true for protocols that have neither connections nor errors of the kernel.
    pub(crate) fn is_datagram(&self) -> bool {
        !self.is_tcp() && !self.is_icmp()
    }

    pub(crate) fn has_data(&self) -> bool {
        matches!(self.packet.segment, Segment::Syn | Segment::Data)
    }

    /// Returns true if the address is one that the directory gives to the pod.
    pub(crate) fn is_own(&self, address: &Address) -> bool {
        self.pod.v4 != Address::NONE && *address == self.pod.v4
            || self.pod.v6 != Address::NONE && *address == self.pod.v6
    }

    /// Returns true if the other end can be a neighbour whatever the mesh's ranges are.
    pub(crate) fn is_to_everyone_or_link_local(&self) -> bool {
        [MULTICAST_V4, MULTICAST_V6, BROADCAST, OWN_LINK_LOCAL, OTHER_LINK_LOCAL]
            .contains(&self.packet.remote)
    }

    pub(crate) fn is_exempt(&self) -> bool {
        self.pod.flags & pod_flag::EXEMPT != 0
    }

    pub(crate) fn is_unnamed(&self) -> bool {
        self.pod.flags & pod_flag::UNKNOWN != 0
    }

    pub(crate) fn sends_no_plaintext(&self) -> bool {
        self.pod.flags & pod_flag::EGRESS_STRICT != 0
    }

    pub(crate) fn has_udp_allowed(&self) -> bool {
        self.pod.flags & pod_flag::UDP_ALLOWED != 0
    }

    pub(crate) fn is_selected_by_policies(&self) -> bool {
        self.pod.flags & pod_flag::JUDGED != 0
    }

    /// Returns true unless the mode of the pod, or of the port if it has one, takes plaintext.
    pub(crate) fn is_strict(&self, of_port: Option<RawMode>) -> bool {
        !of_port.unwrap_or(RawMode(self.pod.mode)).takes_plaintext()
    }
}

/// The agent's knowledge of a pod's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LinkKind {
    /// The node is the only neighbour.
    Routed,
    /// Other pods are neighbours, and the pod's link-local address is known.
    Bridged,
    /// Other pods are neighbours, and the pod's link-local address is not known.
    BridgedEarly,
}

impl Every for LinkKind {
    const COUNT: usize = 3;
    fn nth(index: usize) -> Self {
        [Self::Routed, Self::Bridged, Self::BridgedEarly][index]
    }
}

/// Hardware address of a link's pod.
pub(crate) const HARDWARE: u64 = 0x0200_0000_0002;

impl LinkKind {
    pub(crate) fn link(self) -> Link {
        let link = Link { cgroup: 1, ..Link::default() };
        match self {
            Self::Routed => link,
            Self::Bridged => {
                Link { hardware: HARDWARE, has_neighbours: 1, link_local: OWN_LINK_LOCAL, ..link }
            }
            Self::BridgedEarly => Link { hardware: HARDWARE, has_neighbours: 1, ..link },
        }
    }

    /// Returns true for the link-local addresses that the pod may have on the link.
    pub(crate) fn gives(self, address: &Address) -> bool {
        match self {
            // Nobody else is there to be misled.
            Self::Routed => [OWN_LINK_LOCAL, OTHER_LINK_LOCAL].contains(address),
            Self::Bridged => *address == OWN_LINK_LOCAL,
            Self::BridgedEarly => false,
        }
    }
}

/// Returns true for an unspecified address, the source of a host that has no address yet.
pub(crate) fn is_unspecified(address: &Address) -> bool {
    *address == Address::NONE || *address == UNSPECIFIED_V4
}

#[test]
fn pods_have_all_modes_and_flags() {
    assert_eq!(pods().len(), 1 + 4 * (Mode::COUNT + 2) * (1 << pod_flag::ALL.len()));
    assert_eq!(
        pod_flag::ALL.iter().fold(0, |all, flag| all | flag),
        2_u32.pow(pod_flag::ALL.len() as u32) - 1
    );
}
