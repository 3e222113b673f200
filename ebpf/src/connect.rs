//! connect4 and connect6: which connections go to the agent.
//!
//! The destination is remembered in the socket itself (socket storage): it cannot be evicted, needs no cleaning, and
//! the name hooks find it there. `established` publishes it once the source port is known.

use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::warn;
use tacit_abi::{Address, Connect, ConnectFacts, Names, Pod, Reason, decide_connect, names_kind, tcp_port};

use crate::{
    ALLOW, DENY,
    context::{self, Family, SockAddr},
    count::count,
    event,
    maps::{PODS, SETTINGS},
};

const IPPROTO_TCP: u32 = 6;
/// Multipath TCP: its first subflow is connected by this very call.
const IPPROTO_MPTCP: u32 = 262;
const SOCK_STREAM: u32 = 1;

/// How deep below the pods' cgroup a pod's own cgroup can be: directly, or below a QoS class as Kubernetes has it.
const POD_DEPTHS: u32 = 2;

struct Facts<'a>(&'a SockAddr<'a>);

impl ConnectFacts for Facts<'_> {
    #[inline(always)]
    fn pod(&self) -> Option<Pod> {
        let level = SETTINGS.load().pods_level;
        for depth in 1..=POD_DEPTHS {
            let id = context::current_ancestor_cgroup(level.wrapping_add(depth));
            // SAFETY: the entry is copied at once; the agent replaces entries, it never changes one in place.
            if let Some(pod) = unsafe { PODS.get(&id) } {
                return Some(*pod);
            }
        }
        None
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        let protocol = self.0.protocol();
        self.0.socket_type() == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP)
    }

    #[inline(always)]
    fn in_mesh(&self, address: &Address) -> bool {
        context::in_mesh(address)
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        self.0.netns_cookie()
    }
}

/// Entry of both hooks.
#[inline(always)]
pub fn run(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    let destination = sock.address(family);
    match decide_connect(&Facts(&sock), &destination) {
        Connect::Leave(reason) => {
            // A socket can be connected again after AF_UNSPEC; what was true then is not now.
            if !matches!(reason, Reason::ConnectNotEnrolled) {
                sock.forget_names();
            }
            count(reason);
            ALLOW
        }
        Connect::Deny(reason) => deny(ctx, &sock, &destination, reason),
        Connect::Capture(pod) => capture(&sock, family, destination, &pod),
    }
}

#[inline(always)]
fn deny(ctx: &SockAddrContext, sock: &SockAddr<'_>, destination: &Address, reason: Reason) -> i32 {
    count(reason);
    if event::admit() {
        warn!(
            ctx,
            "connect to [{:i}]:{} denied, reason {}",
            destination.octets(),
            sock.port(),
            reason as u32
        );
    }
    DENY
}

#[inline(always)]
fn capture(sock: &SockAddr<'_>, family: Family, destination: Address, pod: &Pod) -> i32 {
    let port = sock.port();
    let own = if destination.is_v4() { pod.v4 } else { pod.v6 };
    let names = Names { peer: destination, own, peer_port: u32::from(port), kind: names_kind::CAPTURED };
    if !sock.remember_names(names) {
        return deny(sock.0, sock, &destination, Reason::ConnectNoStorage);
    }
    sock.set_address(family, &destination.capture_target(port));
    sock.set_port(tcp_port::CAPTURE);
    count(Reason::ConnectCaptured);
    ALLOW
}
