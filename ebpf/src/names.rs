//! getpeername and getsockname, both families: applications see the addresses that they would see without Tacit.
//! `accept()` also reports its address through getpeername.

use aya_ebpf::programs::SockAddrContext;
use tacit_abi::names_kind;

use crate::{
    ALLOW,
    context::{Family, SockAddr},
};

/// Rewrites the address of the other end.
#[inline(always)]
pub fn peer(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    match sock.names() {
        Some(names)
            if matches!(names.kind, names_kind::CAPTURED | names_kind::DIALLED | names_kind::ACCEPTED) =>
        {
            sock.set_address(family, &names.peer);
            sock.set_port(names.peer_port as u16);
        }
        // The names were lost because memory was short (counted as `names_full`), or a process of the pod uses an address from
        // which the agent dials. The client must look neither like loopback, which applications trust, nor like another client.
        _ => {
            let address = sock.address(family);
            if sock.own_address(family).is_some_and(|own| !address.may_be_reported_to(&own)) {
                sock.set_address(family, &address.unspecified());
            }
        }
    }
    ALLOW
}

/// Rewrites the socket's own address. Only a captured connection needs it: it ends at the pod's loopback. The port is right.
/// After a connection that failed, the socket has no address, and the kernel's answer is right.
#[inline(always)]
pub fn own(ctx: &SockAddrContext, family: Family) -> i32 {
    let sock = SockAddr(ctx);
    if let Some(names) = sock.names()
        && names.kind == names_kind::CAPTURED
        && !names.own.is_none()
        && sock.address(family).is_loopback()
    {
        sock.set_address(family, &names.own);
    }
    ALLOW
}
