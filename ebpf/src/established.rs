//! sock_ops: hands what a connecting socket knows to the accepting side.
//!
//! ```text
//! application --TCP_CONNECT--> CAPTURED[tuple] = destination   --agent accepts, takes the entry
//! agent dials --TCP_CONNECT--> DIALLED[tuple]  = client        --PASSIVE_ESTABLISHED at the application's socket:
//!                                                                entry moves into that socket's storage
//! either      --CLOSE--------> entry is removed, if it is still there
//! a mesh peer in clear        --PASSIVE_ESTABLISHED--> the application's socket is marked for the guard
//! ```
//! TCP_CONNECT comes after the source port is chosen and before the SYN leaves; PASSIVE_ESTABLISHED comes while the
//! new socket is locked, so `accept()` cannot return before. Nobody ever waits for an entry.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    programs::SockOpsContext,
};
use tacit_abi::{Address, Destination, Names, Reason, names_kind, tcp_port};

use crate::{
    context::{self, Ends, SockOps},
    count::count,
    maps::{CAPTURED, DIALLED},
};

/// sock_ops programs have no verdict; the kernel reads a reply only for other operations than ours.
const DONE: u32 = 1;

/// Entry of the program.
#[inline(always)]
pub fn run(ctx: &SockOpsContext) -> u32 {
    let sock = SockOps(ctx);
    let ends = sock.ends();
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => publish(&sock, &ends),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => take_over(&sock, &ends),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => withdraw(&sock, &ends),
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
        // What the socket was bound to when it was captured: no other pod's address is published in its name.
        names_kind::CAPTURED if key.is_spread() && !key.local.same(&names.own) => return,
        names_kind::CAPTURED => {
            (CAPTURED.insert(&key.of_captured(), &entry, BPF_ANY.into()), Reason::PendingFull)
        }
        names_kind::DIALLED => (DIALLED.insert(&key, &entry, BPF_ANY.into()), Reason::NamesFull),
        _ => return,
    };
    sock.ends_on_loopback();
    match stored {
        // Without the flag the entry would only be overwritten, never removed: a lost flag costs memory, not safety.
        Ok(()) => sock.watch_state(BPF_SOCK_OPS_STATE_CB_FLAG as i32),
        Err(_) => count(lost),
    }
}

#[inline(always)]
fn take_over(sock: &SockOps<'_>, ends: &Ends) {
    // The agent dials a pod's applications from loopback addresses.
    let key = ends.accepting(sock.netns_cookie());
    // The agent's end of a captured connection.
    if key.is_spread() {
        return;
    }
    if !key.local.is_loopback() {
        return mark_clear(sock, &key.local, key.remote_port);
    }
    // SAFETY: the entry is copied before it is removed, and only this socket's handshake removes it.
    let Some(client) = (unsafe { DIALLED.get(&key) }).copied() else { return };
    let names = Names {
        peer: client.address,
        peer_port: client.port,
        kind: names_kind::ACCEPTED,
        ..Names::default()
    };
    sock.ends_on_loopback();
    if !sock.remember_names(names) {
        count(Reason::NamesFull);
    }
    let _ = DIALLED.remove(&key);
}

/// The steering program let this connection through to the application, so its port takes plaintext: the guard must
/// know its packets from those that the pod sends on its own account. Without memory for the mark they are dropped.
#[inline(always)]
fn mark_clear(sock: &SockOps<'_>, client: &Address, own_port: u32) {
    if own_port == u32::from(tcp_port::TUNNEL) || !context::in_mesh(client) {
        return;
    }
    let names = Names { kind: names_kind::CLEAR, ..Names::default() };
    let _ = sock.remember_names(names);
}

#[inline(always)]
fn withdraw(sock: &SockOps<'_>, ends: &Ends) {
    let Some(names) = sock.names() else { return };
    let key = ends.connecting(sock.netns_cookie());
    let _ = match names.kind {
        names_kind::CAPTURED => CAPTURED.remove(&key.of_captured()),
        names_kind::DIALLED => DIALLED.remove(&key),
        _ => Ok(()),
    };
}
