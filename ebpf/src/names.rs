//! getpeername and getsockname, both families: applications are told the addresses they would see without Tacit.
//! `accept()` answers through getpeername too.

use aya_ebpf::programs::SockAddrContext;
use tacit_abi::names_kind;

use crate::{
    ALLOW,
    context::{Family, SockAddr},
};

/// The other end's name.
#[inline(always)]
pub fn peer(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    match sock.names() {
        Some(names) if names.kind != names_kind::CLEAR => {
            sock.set_address(family, &names.peer);
            sock.set_port(names.peer_port as u16);
        }
        // A name that was lost (a map was full, or memory was short: counted as `names_full`) must not make a client of
        // the mesh look like loopback, which applications trust. The pod's own address is what they are told instead.
        _ => {
            if let Some(own) = sock.own_address(family)
                && !sock.address(family).may_be_told_to(&own)
            {
                sock.set_address(family, &own);
            }
        }
    }
    ALLOW
}

/// The socket's own name. Only a captured connection has a wrong one: it ends at the pod's loopback. The port is right.
#[inline(always)]
pub fn own(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    if let Some(names) = sock.names()
        && names.kind == names_kind::CAPTURED
        && !names.own.is_none()
    {
        sock.set_address(family, &names.own);
    }
    ALLOW
}
