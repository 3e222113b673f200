//! The drivers of the attacks, and what each of them is told.

/// The driver of an attack.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Driver {
    /// The step alone, as a process of the pod.
    Step(&'static str),
    /// The TCP step to another port of the victim.
    Port(u16),
    /// A step that is told the pod's own address and its gateway.
    WithOwnAddress(&'static str),
    /// A step that is told an address which is not the pod's.
    WithForeignAddress(&'static str),
    /// A raw packet with the node's own address as source.
    NodesAddress,
    /// A step in a cgroup below the pod's.
    NestedCgroup(&'static str),
    /// A step whose process is moved to another cgroup before it begins.
    Moved(&'static str, MovedTo),
    /// A step in a network namespace made inside the pod.
    NestedNetns,
    /// A socket made outside the pod's cgroup, in its namespace, passed in.
    PassedFd(PassedFd),
    /// Both ends connect.
    Simultaneous,
    /// By another tenant of the victim's node, or by the node itself.
    Neighbour(Neighbour),
    /// A pod or an address uses up its share of what pods have in common.
    Share(Shared),
    /// A connection to a pod that came before its agent.
    Boot(Start),
    /// A step while, or after, something happens to the attacker's agent.
    Lifecycle(Misfortune),
}

/// Another tenant's attack. The victim and the tenant are STRICT, the open pod is PERMISSIVE, the neighbour is in no
/// directory; all are on one bridge.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Neighbour {
    /// A step of the neighbour to an address of the victim.
    In(&'static str, To),
    /// A step of the tenant to an address of the neighbour.
    Out(&'static str, To),
    /// A pod says in ARP, or in neighbour discovery, that it has the victim's address.
    Claim(Who, Tags),
    /// A raw packet of the open pod with a source that is not its own.
    Spoofed,
    /// The same in a frame of its own making.
    SpoofedFrame(Tags),
    /// A frame of the open pod with the victim's hardware address as source.
    ForeignHardware,
    /// A datagram with the node's address as source.
    NodeAddress(From, Layout),
    /// A connection with the node's address as source, whose answers reach the neighbour.
    NodeAddressTcp,
    /// Fragments with the source of a connection of the node, whose answers reach the neighbour.
    NodeFlowFragments,
    /// A step of a pod with the node's network.
    HostNetwork(&'static str, Layout),
    /// A step of the node itself.
    Probe(&'static str, Layout),
    /// A packet of the attacker in another to a node: a UDP port, `ip` or `gre`.
    Encapsulated(&'static str),
    /// A datagram with the source of a destination that is allowed in clear.
    AllowedSource,
    /// A datagram to a destination that is allowed in clear, and its answer.
    AllowedQuery,
    /// A connection of a STRICT pod to a port whose mode is DISABLE.
    DisabledPort,
    /// A STRICT pod translates the destination of what the agent sends for it as plaintext.
    TranslatedDial(Dial),
    /// A step of another node's pod, which the victim's node forwards under its own address.
    Masqueraded(&'static str, Layout),
    /// Connections while the victim's port of the tunnels is flooded with SYNs.
    Flooded,
    /// SYN cookies of the flooded port, sent again with other text.
    ReplayedCookies,
}

/// A destination that the agent dials as plaintext for a STRICT pod.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dial {
    /// An endpoint outside of the mesh, of a service.
    Outside,
    /// A port whose mode is DISABLE.
    Disabled,
}

/// The address of the other end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum To {
    /// IPv6 link-local.
    LinkLocal,
    /// Outside of the mesh's ranges, on the link.
    OnLink,
    /// Multicast, to everyone on the link.
    Multicast,
    /// IPv4 broadcast.
    Broadcast,
}

/// The pod that claims.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Who {
    /// STRICT.
    Tenant,
    /// PERMISSIVE.
    Open,
}

/// The number of 802.1Q tags of VLAN 0, which the receiver's kernel removes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tags(pub(crate) u8);

/// From where.
#[derive(Debug, Clone, Copy)]
pub(crate) enum From {
    /// A pod on the victim's bridge.
    Bridge,
    /// A pod of another node.
    Wire,
}

/// The layout of the victim's link to its node.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layout {
    /// Point to point.
    Routed,
    /// By a bridge.
    Bridged,
}

/// The cgroup into which a process is moved.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MovedTo {
    /// Out of the pods' cgroup.
    Outside,
    /// Into another pod.
    OtherPod,
}

/// The kind of socket that is passed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PassedFd {
    /// A TCP socket that was connected before.
    Connected,
    /// A UDP socket.
    Datagram,
}

/// A start of the agent of a new pod.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start {
    /// Not yet.
    Late,
    /// Without a certificate for any pod, because its issuer is away.
    WithoutCertificates,
}

/// An event for agents, or for their kernel state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Misfortune {
    /// A pod of which the agent was told nothing runs a step.
    UnknownPod(&'static str),
    /// The pod's own cgroup has a program that sends every connection to the victim.
    ProgramInPod,
    /// A cgroup above the pods' has such a program: it runs after Tacit's.
    ProgramAbove,
    /// The table of pending connections is full.
    PendingFull,
    /// The agent is stopped (SIGSTOP), and its heartbeat stale.
    Stopped(&'static str),
    /// The agent is killed, and its heartbeat stale.
    Killed(&'static str),
    /// The pins are deleted under the agent, which is then killed.
    PinsDeleted,
    /// The agent is started again with a directory that names nobody.
    EmptyDirectory(&'static str),
    /// The pod makes a namespace with its own addresses, and a link whose other end has the index of a neighbour's host end.
    /// Then the agent comes.
    CopiedNamespace,
    /// No agent was ever here when the connection was made; then one comes, and then the marker is sent.
    LateAgent,
}

/// A resource that has shares.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shared {
    /// Handshakes of incoming tunnels, by source address.
    Handshakes,
    /// Handshakes of outgoing tunnels, by pod.
    OutgoingHandshakes,
    /// Captured connections that wait for their destination, by pod.
    PendingConnections,
    /// Connections that the agent carries, and so its descriptors, by pod.
    Connections,
    /// Connections that a pod's applications have not accepted, by that pod.
    PendingDials,
    /// Datagram flows whose answers the kernel expects, by pod.
    Answers,
}
