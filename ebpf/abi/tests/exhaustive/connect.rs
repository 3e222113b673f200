//! Connections that a pod opens.

use tacit_abi::{Address, Connect, ConnectFacts, Exception, ExceptionHook, Pod, Reason, decide_connect};

use crate::{
    Row, assert_no_dead_line,
    facts::facts,
    first,
    packets::{self, LOOPBACK_V4, OTHER_LINK_LOCAL, OTHER_V4, OTHER_V6, POD_V4, POD_V6},
};

/// A pod and the destination that it connects to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pod: Option<Pod>,
    destination: Address,
}

impl Call {
    fn has(&self, flag: u32) -> bool {
        self.pod.is_some_and(|pod| pod.flags & flag != 0)
    }

    fn is_to_itself(&self) -> bool {
        let is = |own: Address| own != Address::NONE && own == self.destination;
        self.pod.is_some_and(|pod| is(pod.v4) || is(pod.v6))
    }
}

facts! {
    /// Facts of a call of `connect`.
    Facts of Call {
        tcp: bool,
        in_mesh: bool,
        in_own_namespace: bool,
        in_nodes_namespace: bool,
        agent: bool,
        mesh_is_strict: bool,
        allowed_clear: bool,
        stale: bool,
        bound_to_link: bool,
        share_used_up: bool,
    }
}

impl ConnectFacts for Facts {
    fn pod(&self) -> Option<Pod> {
        self.subject.pod
    }
    fn is_tcp(&self) -> bool {
        self.tcp()
    }
    fn in_mesh(&self, address: &Address) -> bool {
        assert_eq!(*address, self.subject.destination);
        self.in_mesh()
    }
    fn netns_cookie(&self) -> u64 {
        let own = self.subject.pod.map_or(0, |pod| pod.netns_cookie);
        if self.in_own_namespace() { own } else { own + 1 }
    }
    fn is_in_node_netns(&self) -> bool {
        self.in_nodes_namespace()
    }
    fn is_agent(&self) -> bool {
        self.agent()
    }
    fn default_is_strict(&self) -> bool {
        self.mesh_is_strict()
    }
    fn is_allowed_clear(&self, destination: &Address) -> bool {
        assert_eq!(*destination, self.subject.destination);
        self.allowed_clear()
    }
    fn is_stale(&self) -> bool {
        self.stale()
    }
    fn is_bound_to_link(&self) -> bool {
        self.bound_to_link()
    }
    fn is_share_used_up(&self, slot: u32) -> bool {
        assert_eq!(Some(slot), self.subject.pod.map(|pod| pod.slot));
        self.share_used_up()
    }
}

type Line = Row<Facts, Connect>;

const EXEMPT: u32 = tacit_abi::pod_flag::EXEMPT;
const STRICT: u32 = tacit_abi::pod_flag::EGRESS_STRICT;

/// Connections that are left as without Tacit. The guard sees their packets.
static LEFT_ALONE: [Line; 11] = [
    Line::new(
        "a pod that is not enrolled",
        |f| f.subject.has(EXEMPT),
        |_| Connect::Leave(Reason::ConnectNotEnrolled),
    ),
    Line::new(
        "a pod that no source has named, where the mesh is not STRICT, and an agent",
        |f| f.subject.pod.is_none() && (!f.mesh_is_strict() || f.agent()),
        |_| Connect::Leave(Reason::ConnectNotEnrolled),
    ),
    Line::new(
        "a pod that no source has named, in the node's own network",
        |f| f.subject.pod.is_none() && f.in_nodes_namespace(),
        |f| left(f, Reason::ConnectNotEnrolled),
    ),
    Line::new("another protocol than TCP", |f| !f.tcp(), |f| left(f, Reason::ConnectNotStream)),
    Line::new("outside the mesh", |f| !f.in_mesh(), |f| left(f, Reason::ConnectOutsideMesh)),
    Line::new("a pod to itself", |f| f.subject.is_to_itself(), |f| left(f, Reason::ConnectOwnAddress)),
    Line::new(
        "a destination of `allowClear`",
        |f| f.subject.pod.is_some() && f.allowed_clear(),
        |_| Connect::Leave(Reason::ConnectAllowedClear),
    ),
    Line::new(
        "a destination of `allowClear`, of a pod that no source has named",
        Facts::allowed_clear,
        |f| left(f, Reason::ConnectNotEnrolled),
    ),
    Line::new(
        "a pod that may send plaintext, from a network namespace that it made",
        |f| is_served_and_open(f) && !f.in_own_namespace(),
        |_| Connect::Leave(Reason::ConnectNested),
    ),
    Line::new(
        "a pod that may send plaintext, while no agent serves it",
        |f| may_send_plaintext(f) && f.stale(),
        |_| Connect::Leave(Reason::ConnectStaleClear),
    ),
    Line::new(
        "a pod that may send plaintext, from a socket that cannot reach the agent on the loopback",
        |f| may_send_plaintext(f) && f.bound_to_link(),
        |_| Connect::Leave(Reason::ConnectDeviceClear),
    ),
];

fn may_send_plaintext(facts: &Facts) -> bool {
    is_served_and_open(facts) && facts.in_own_namespace()
}

fn is_served_and_open(facts: &Facts) -> bool {
    facts.subject.pod.is_some_and(|pod| pod.netns_cookie != 0) && !facts.subject.has(STRICT)
}

/// The reason of a pod that no source has named is the same for all. What a held pod connects to inside its own namespace is
/// an exception.
fn left(facts: &Facts, reason: Reason) -> Connect {
    let reason = if facts.subject.pod.is_some() { reason } else { Reason::ConnectNotEnrolled };
    let is_held = facts.subject.pod.is_none() || facts.subject.has(STRICT);
    let is_to_loopback =
        [LOOPBACK_V4, Address::LOOPBACK_V6, Address::NONE].contains(&facts.subject.destination);
    let is_inside = is_to_loopback || facts.subject.is_to_itself() && facts.in_own_namespace();
    if is_held && is_inside { Connect::Inside(reason) } else { Connect::Leave(reason) }
}

fn specified(facts: &Facts) -> Connect {
    if let Some(left) = first(&LEFT_ALONE, facts) {
        return left;
    }
    match facts.subject.pod {
        None => Connect::Deny(Reason::ConnectUnknownPod),
        Some(pod) if pod.netns_cookie == 0 => Connect::Deny(Reason::ConnectNotServed),
        Some(_) if !facts.in_own_namespace() => Connect::Deny(Reason::ConnectForeignNetns),
        Some(_) if facts.stale() => Connect::Deny(Reason::ConnectAgentStale),
        Some(_) if facts.bound_to_link() => Connect::Deny(Reason::ConnectDevice),
        Some(_) if facts.share_used_up() => Connect::Deny(Reason::ConnectShare),
        Some(pod) => Connect::Capture(pod),
    }
}

#[test]
fn a_connection_into_the_mesh_is_captured_or_denied_but_for_what_is_listed() {
    let destinations = [
        POD_V4,
        POD_V6,
        OTHER_V4,
        OTHER_V6,
        OTHER_LINK_LOCAL,
        LOOPBACK_V4,
        Address::LOOPBACK_V6,
        Address::NONE,
    ];
    let pods = packets::pods().into_iter().map(Some).chain([None]);
    let mut combinations = 0;
    for pod in pods {
        for destination in destinations {
            combinations += Facts::each(Call { pod, destination }, |facts| {
                assert_eq!(decide_connect(facts, &destination), specified(facts), "{facts:?}");
            });
        }
    }
    assert_no_dead_line(&LEFT_ALONE);
    let of_hook = Exception::ALL.iter().filter(|all| all.text().hooks.contains(&ExceptionHook::Connect));
    assert!(of_hook.eq(&[Exception::Loopback]), "the hook counts what is inside");
    println!("{combinations} combinations");
}
