//! sock_ops: passes the stored names of a connecting socket to the accepting side.
//!
//! ```text
//! application --TCP_CONNECT--> CAPTURED[tuple] = destination   --agent accepts and removes the entry
//! agent dials --TCP_CONNECT--> DIALLED[tuple]  = client        --PASSIVE_ESTABLISHED at the application's socket:
//!                                                                the entry moves into that socket's storage
//! either      --CLOSE--------> the entry is removed if it still exists; the agent is told that a connection it did not
//!                              accept has ended
//! others with plaintext       --PASSIVE_ESTABLISHED--> the application's socket is marked for the guard
//! ```
//! TCP_CONNECT runs after the source port is chosen and before the SYN is sent. PASSIVE_ESTABLISHED runs while the new
//! socket is locked, so `accept()` cannot return before it. No side ever waits for an entry.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    programs::SockOpsContext,
};
use tacit_abi::{Destination, Names, NodeFlow, Reason, Tuple, names_kind, protocol, tcp_port};

use crate::{
    context::{Ends, SockOps},
    count::count,
    held, lookup,
    maps::{CAPTURED, DIALLED, STEERED},
};

/// Return value of the program. The kernel ignores it for the operations that are handled here.
const DONE: u32 = 1;

/// Runs the program.
#[inline(always)]
pub fn run(ctx: &SockOpsContext) -> u32 {
    let sock = SockOps(ctx);
    let ends = sock.ends();
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => publish(&sock, &ends),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => inherit_names(&sock, &ends),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => remove_pending(&sock, &ends),
        _ => {}
    }
    DONE
}

#[inline(always)]
fn publish(sock: &SockOps<'_>, ends: &Ends) {
    let Some(names) = sock.names() else { return };
    let entry = Destination { address: names.peer, port: names.peer_port, pad: 0 };
    let key = ends.connecting(sock.netns_cookie());
    let (stored, lost) = match names.kind {
        // A captured socket that is no longer bound to its pod's address must not publish an entry for another address.
        names_kind::CAPTURED if key.is_spread() && !key.local.same(&names.own) => return,
        names_kind::CAPTURED => {
            (CAPTURED.insert(&key.of_captured(), &entry, BPF_ANY.into()), Reason::PendingFull)
        }
        names_kind::DIALLED => (DIALLED.insert(&key, &entry, BPF_ANY.into()), Reason::NamesFull),
        _ => return,
    };
    sock.use_reno();
    match stored {
        // The flag makes the kernel call this program at CLOSE. If it cannot be set, the entry leaks until it is overwritten.
        Ok(()) => sock.set_callback_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32),
        Err(_) => count(lost),
    }
}

#[inline(always)]
fn inherit_names(sock: &SockOps<'_>, ends: &Ends) {
    let key = ends.accepting(sock.netns_cookie());
    // This socket is the agent's end of a captured connection.
    if key.is_spread() {
        return;
    }
    // The agent dials applications from loopback addresses only.
    if !key.local.is_loopback() {
        return mark_accepted(sock, &key);
    }
    // SAFETY: the entry is copied before it is removed, and only this socket's handshake removes it.
    let Some(client) = (unsafe { DIALLED.get(&key) }).copied() else { return };
    let names = Names {
        peer: client.address,
        peer_port: client.port,
        kind: names_kind::ACCEPTED,
        ..Names::default()
    };
    sock.use_reno();
    if !sock.store_names(names) {
        count(Reason::NamesFull);
    }
    let _ = DIALLED.remove(&key);
}

/// Marks a connection that the steering program passed to an application of an enrolled pod, as plaintext, or to the agent,
/// as a tunnel. Without the mark, for example for lack of memory, the guard takes its packets for connections of the pod and
/// drops those into the mesh.
#[inline(always)]
fn mark_accepted(sock: &SockOps<'_>, key: &Tuple) {
    // SAFETY: only presence is read.
    if unsafe { STEERED.get(&key.remote) }.is_none() {
        return;
    }
    let (node, pod) = ((key.local, key.local_port), (key.remote, key.remote_port));
    let kind = if key.remote_port == u32::from(tcp_port::TUNNEL) {
        names_kind::TUNNEL
    } else if lookup::is_node_flow(&NodeFlow::new(node, pod, protocol::TCP)) {
        names_kind::NODE
    } else {
        names_kind::CLEAR
    };
    let _ = sock.store_names(Names { kind, ..Names::default() });
}

#[inline(always)]
fn remove_pending(sock: &SockOps<'_>, ends: &Ends) {
    let Some(names) = sock.names() else { return };
    let key = ends.connecting(sock.netns_cookie());
    match names.kind {
        // The agent has not accepted the connection, and may be connecting to its destination.
        names_kind::CAPTURED if CAPTURED.remove(&key.of_captured()).is_ok() => held::ended(&key, &names.own),
        names_kind::DIALLED => {
            let _ = DIALLED.remove(&key);
        }
        _ => {}
    }
}
