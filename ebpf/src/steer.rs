//! sk_lookup in a pod's network namespace: redirects inbound connections to the agent.

use aya_ebpf::programs::SkLookupContext;
use tacit_abi::{
    Address, Inbound, InboundFacts, PodCells, Reason, Steer, Steered, Tuple, decide_inbound, listener_index,
};

use crate::{
    context::SkLookup,
    count::count,
    lookup,
    maps::{CAPTURED, CAPTURERS, DISCARD, LISTENERS, STEERED},
    node_flows, recent,
};

const IPPROTO_TCP: u32 = 6;

struct Facts;

impl InboundFacts for Facts {
    #[inline(always)]
    fn steered(&self, local: &Address) -> Option<Steered> {
        // SAFETY: copied at once; the agent replaces entries whole.
        unsafe { STEERED.get(local) }.copied()
    }

    #[inline(always)]
    fn is_captured(&self, key: &Tuple) -> bool {
        // SAFETY: only presence is read.
        unsafe { CAPTURED.get(key) }.is_some()
    }

    #[inline(always)]
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32> {
        lookup::port_mode(slot, port)
    }

    #[inline(always)]
    fn is_node_flow(&self, pod: PodCells, flow: &Inbound) -> bool {
        node_flows::is_node_flow(pod, &flow.node_flow())
    }

    #[inline(always)]
    fn in_mesh(&self, address: &Address) -> bool {
        lookup::in_mesh(address)
    }

    #[inline(always)]
    fn is_stale(&self) -> bool {
        lookup::is_stale()
    }

    #[inline(always)]
    fn is_in_handshake(&self, flow: &Inbound) -> bool {
        recent::has(flow)
    }
}

/// Runs the program; false resets the connection.
#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> bool {
    let lookup = SkLookup(ctx);
    if lookup.protocol() != IPPROTO_TCP {
        return true;
    }
    match decide_inbound(&Facts, &lookup.inbound()) {
        Steer::Pass(reason) => {
            count(reason);
            true
        }
        Steer::Drop(reason) => {
            count(reason);
            false
        }
        Steer::Discard(reason) => redirected(DISCARD.redirect_sk_lookup(ctx, 0, 0).is_ok(), reason),
        Steer::Agent(slot, listener, reason) => {
            redirected(LISTENERS.redirect_sk_lookup(ctx, listener_index(slot, listener), 0).is_ok(), reason)
        }
        Steer::Capture(slot, reason) => {
            redirected(CAPTURERS.redirect_sk_lookup(ctx, slot, 0).is_ok(), reason)
        }
    }
}

/// Counts a redirection; false, which resets the connection, if the agent has no listener.
#[inline(always)]
fn redirected(found: bool, reason: Reason) -> bool {
    count(if found { reason } else { Reason::InboundNoAgent });
    found
}
