//! connect4 and connect6: redirect connections to the agent.
//!
//! The destination is stored in the socket itself (socket storage). There it cannot be evicted, needs no cleanup, and is
//! found by getpeername and getsockname. `established` publishes it once the source port is known.

use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::warn;
use tacit_abi::{
    Address, Connect, ConnectFacts, Exception, ExceptionHook, Names, Pod, Reason, connect_error,
    decide_connect, names_kind, pod_flag, pod_secret, tcp_port,
};

use crate::{
    ALLOW, DENY,
    context::{self, Family, SockAddr},
    count::{count, count_exception},
    log_budget, lookup,
    maps::{SETTINGS, pod_of},
    pending,
};

const IPPROTO_TCP: u32 = 6;
/// Multipath TCP. The same connect() opens its first subflow.
const IPPROTO_MPTCP: u32 = 262;
const SOCK_STREAM: u32 = 1;

struct Facts<'a>(&'a SockAddr<'a>);

impl ConnectFacts for Facts<'_> {
    #[inline(always)]
    fn pod(&self) -> Option<Pod> {
        pod_of(context::current_ancestor_cgroup).map(|(_, pod)| pod)
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        let protocol = self.0.protocol();
        self.0.socket_type() == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP)
    }

    #[inline(always)]
    fn in_mesh(&self, address: &Address) -> bool {
        lookup::in_mesh(address) || lookup::is_node_service(address, self.0.port(), IPPROTO_TCP)
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        self.0.netns_cookie()
    }

    #[inline(always)]
    fn is_in_node_netns(&self) -> bool {
        self.0.netns_cookie() == SETTINGS.load().node_netns_cookie
    }

    #[inline(always)]
    fn is_agent(&self) -> bool {
        lookup::is_agent_cgroup(context::current_cgroup())
    }

    #[inline(always)]
    fn default_is_strict(&self) -> bool {
        lookup::default_is_strict()
    }

    #[inline(always)]
    fn is_allowed_clear(&self, destination: &Address) -> bool {
        lookup::is_allowed_clear(destination, self.0.port(), IPPROTO_TCP)
    }

    #[inline(always)]
    fn is_stale(&self) -> bool {
        lookup::is_stale()
    }

    #[inline(always)]
    fn is_bound_to_link(&self) -> bool {
        self.0.is_bound_to_link()
    }

    #[inline(always)]
    fn is_share_used_up(&self, slot: u32) -> bool {
        pending::is_captured_share_used_up(slot)
    }
}

/// Runs either hook.
#[inline(always)]
pub fn run(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    let destination = sock.address(family);
    match decide_connect(&Facts(&sock), &destination) {
        Connect::Leave(reason) => leave(&sock, reason),
        Connect::Inside(reason) => {
            count_exception(Exception::Loopback, ExceptionHook::Connect);
            leave(&sock, reason)
        }
        Connect::Deny(reason) => deny(ctx, &sock, &destination, reason),
        Connect::Capture(pod) => capture(&sock, family, destination, &pod),
    }
}

#[inline(always)]
fn leave(sock: &SockAddr<'_>, reason: Reason) -> i32 {
    // A socket can be connected again after AF_UNSPEC, and its stored names are then wrong.
    if !matches!(reason, Reason::ConnectNotEnrolled) {
        sock.delete_names();
    }
    count(reason);
    ALLOW
}

#[inline(always)]
fn deny(ctx: &SockAddrContext, sock: &SockAddr<'_>, destination: &Address, reason: Reason) -> i32 {
    count(reason);
    if log_budget::take_line(pod_of(context::current_ancestor_cgroup).map_or(u32::MAX, |(_, pod)| pod.slot)) {
        warn!(
            ctx,
            "connect to [{:i}]:{} denied, reason {}",
            destination.octets(),
            sock.port(),
            reason as u32
        );
    }
    if SETTINGS.load().has_set_retval != 0 {
        context::set_error(connect_error(reason));
    }
    DENY
}

/// Returns the port of `::1` for a socket of the pod's address `own`: that of the destination, or the next one that is free where
/// the application uses its own port for several connections.
#[inline(always)]
fn spread_port(sock: &SockAddr<'_>, destination: &Address, own: &Address) -> u16 {
    let preferred = destination.capture_port_v6(sock.port()) - tcp_port::CAPTURE_V6_FIRST;
    for step in 0..tcp_port::CAPTURE_V6_COUNT {
        let port = tcp_port::CAPTURE_V6_FIRST + (preferred + step) % tcp_port::CAPTURE_V6_COUNT;
        if !sock.is_port_in_use(own, port) {
            return port;
        }
    }
    tcp_port::CAPTURE_V6_FIRST + preferred
}

#[inline(always)]
fn capture(sock: &SockAddr<'_>, family: Family, destination: Address, pod: &Pod) -> i32 {
    let port = sock.port();
    let own = if destination.is_v4() { pod.v4 } else { pod.v6 };
    let names = Names {
        peer: destination,
        own,
        peer_port: u32::from(port),
        kind: names_kind::CAPTURED,
        slot: pod.slot,
        pad: 0,
    };
    if !sock.store_names(names) {
        return deny(sock.0, sock, &destination, Reason::ConnectNoStorage);
    }
    let secret = pod_secret(lookup::seed(), pod.slot);
    let is_v6 = matches!(family, Family::V6) && !destination.is_v4();
    // The steering program identifies the pod by its address.
    let spread = is_v6 && pod.has(pod_flag::SPREAD) && sock.bind_to(&own);
    // A socket that its application bound to a port of any address takes an IPv4 target: each destination has its own one, so that
    // the port can be used for several. A socket that cannot shares the one port on which the agent listens.
    let target = if is_v6 && !spread && SETTINGS.load().has_tcp6_sock != 0 && sock.takes_v4_mapped() {
        destination.capture_target_v4(port, secret)
    } else {
        destination.capture_target(port, secret)
    };
    sock.set_address(family, &target);
    sock.set_port(if spread { spread_port(sock, &destination, &own) } else { pod.effective_capture_port() });
    count(Reason::ConnectCaptured);
    ALLOW
}
