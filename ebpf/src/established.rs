//! sock_ops: passes the stored names of a connecting socket to the accepting side.
//!
//! ```text
//! application --TCP_CONNECT--> CAPTURED[tuple] = destination   --PASSIVE_ESTABLISHED at the agent's socket:
//! agent dials --TCP_CONNECT--> DIALLED[tuple]  = client        --PASSIVE_ESTABLISHED at the application's socket:
//!                                                                the entry moves into that socket's storage
//!             the same, without room for its entry --> marked: the guard drops it, and the agent refuses the connection
//! either      --CLOSE--------> the entry is removed if it still exists; the agent gets a record if a captured connection has
//!                              ended whose handshake with its listener had not
//! agent's listener            --TIMEOUT_INIT--> a captured connection's handshake has a socket, see `recent`
//! either, later               --PARSE_HDR_OPT--> the agent tells of the peer, see `silence`
//! others with plaintext       --PASSIVE_ESTABLISHED--> the application's socket is marked for the guard
//! ```
//! TCP_CONNECT runs after the source port is chosen and before the SYN is sent. PASSIVE_ESTABLISHED runs while the new
//! socket is locked, so `accept()` cannot return before it. No side ever waits for an entry.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT, BPF_TCP_CLOSE,
    },
    programs::SockOpsContext,
};
use tacit_abi::{
    Destination, Inbound, LOST_CLIENT_MARK, Names, NodeFlow, Reason, Tuple, names_kind, protocol, tcp_port,
};

use crate::{
    context::{Ends, SockOps},
    count::count,
    held,
    maps::STEERED,
    node_flows,
    pending::{self, Table},
    recent, silence,
};

/// Return value of the program. The kernel ignores it for the operations that are handled here.
const DONE: u32 = 1;

/// Runs the program.
#[inline(always)]
pub fn run(ctx: &SockOpsContext) -> u32 {
    let sock = SockOps(ctx);
    let loaded = sock.load_ends();
    let ends = loaded.ends();
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => publish(&sock, &ends),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => inherit_names(&sock, &ends),
        BPF_SOCK_OPS_TIMEOUT_INIT => note_handshake(&loaded.of_handshake()),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => remove_pending(&sock, &ends),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => silence::told(&sock),
        _ => {}
    }
    DONE
}

/// Notes a handshake with the listener for captured connections, if it is one.
#[inline(always)]
fn note_handshake(handshakes: &[Inbound; 2]) {
    for flow in handshakes {
        if flow.is_to_capture() {
            recent::note(flow);
        }
    }
}

#[inline(always)]
fn publish(sock: &SockOps<'_>, ends: &Ends) {
    let Some(names) = sock.names() else { return };
    let entry = Destination { address: names.peer, port: names.peer_port, slot: names.slot };
    let key = ends.connecting(sock.netns_cookie());
    let (stored, lost) = match names.kind {
        // A captured socket that is no longer bound to its pod's address must not publish an entry for another address.
        names_kind::CAPTURED if key.is_spread() && !key.local.same(&names.own) => return,
        names_kind::CAPTURED => {
            // Else a client that uses its ends again at once would have to send its SYN twice.
            recent::forget(&ends.arriving());
            (pending::publish(Table::Captured, &key.of_captured(), &entry), Reason::PendingFull)
        }
        names_kind::DIALLED => (pending::publish(Table::Dialled, &key, &entry), Reason::NamesFull),
        _ => return,
    };
    sock.use_reno();
    sock.limit_unsent();
    if stored {
        // The flag makes the kernel call this program at CLOSE. It is always set on a full socket.
        let told = match names.kind {
            names_kind::CAPTURED => BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG,
            _ => 0,
        };
        sock.add_callback_flag(BPF_SOCK_OPS_STATE_CB_FLAG | told);
        return;
    }
    count(lost);
    if names.kind == names_kind::DIALLED {
        sock.set_mark(LOST_CLIENT_MARK);
    }
}

#[inline(always)]
fn inherit_names(sock: &SockOps<'_>, ends: &Ends) {
    let key = ends.accepting(sock.netns_cookie());
    // The agent's end of a captured connection. A process of the pod that listens there instead gains nothing by it.
    if key.is_to_capture() {
        if let Some(destination) = pending::take(Table::Captured, &key.of_captured()) {
            keep(sock, destination, names_kind::REDIRECTED, Reason::PendingFull);
        }
        return;
    }
    // The agent dials applications from loopback addresses only.
    if !key.local.is_loopback() {
        return mark_accepted(sock, &key);
    }
    let Some(client) = pending::take(Table::Dialled, &key) else { return };
    sock.use_reno();
    sock.limit_unsent();
    sock.add_callback_flag(BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG);
    keep(sock, client, names_kind::ACCEPTED, Reason::NamesFull);
}

/// Moves an entry into the socket's storage.
#[inline(always)]
fn keep(sock: &SockOps<'_>, entry: Destination, kind: u32, lost: Reason) {
    let names = Names { peer: entry.address, peer_port: entry.port, kind, ..Names::default() };
    if !sock.store_names(names) {
        count(lost);
    }
}

/// Marks a connection that the steering program passed to an application of an enrolled pod, as plaintext, or to the agent,
/// as a tunnel. Without the mark, for example for lack of memory, the guard takes its packets for connections of the pod and
/// drops those into the mesh.
#[inline(always)]
fn mark_accepted(sock: &SockOps<'_>, key: &Tuple) {
    // SAFETY: copied at once; the agent replaces entries whole.
    let Some(steered) = unsafe { STEERED.get(&key.remote) }.copied() else { return };
    let (node, pod) = ((key.local, key.local_port), (key.remote, key.remote_port));
    // The client is the end that a tunnel's packets may go to.
    let client = Names { peer: key.local, peer_port: key.local_port, ..Names::default() };
    let kind = if key.remote_port == u32::from(tcp_port::TUNNEL) {
        names_kind::TUNNEL
    } else if node_flows::is_node_flow(steered.cells(), &NodeFlow::new(node, pod, protocol::TCP)) {
        names_kind::NODE
    } else {
        names_kind::CLEAR
    };
    let _ = sock.store_names(Names { kind, ..client });
}

#[inline(always)]
fn remove_pending(sock: &SockOps<'_>, ends: &Ends) {
    let Some(names) = sock.names() else { return };
    let key = ends.connecting(sock.netns_cookie());
    match names.kind {
        // The handshake with the agent's listener has not ended: the agent may be connecting to the destination.
        names_kind::CAPTURED => {
            if let Some(entry) = pending::take(Table::Captured, &key.of_captured()) {
                held::ended(&key, entry.slot);
            }
        }
        names_kind::DIALLED => {
            pending::take(Table::Dialled, &key);
        }
        _ => {}
    }
}
