//! Kernel side of Tacit: the list of programs. Entry points only turn a decision into the kernel's verdict. The
//! decisions are pure functions in `tacit-abi`, and raw context accesses are in `context`.
#![no_std]
#![no_main]
// For the one instruction of `atomic`.
#![feature(asm_experimental_arch)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "keys and values of maps are passed by reference: by value they would be copied on a stack of 512 bytes"
)]

mod answers;
mod atomic;
mod connect;
mod context;
mod count;
mod drops;
mod established;
mod guard;
mod held;
mod log_budget;
mod lookup;
mod maps;
mod names;
mod node_flows;
mod packet;
mod pending;
mod probes;
mod recent;
mod silence;
mod steer;

use aya_ebpf::{
    bindings::sk_action,
    macros::{cgroup_skb, cgroup_sock_addr, classifier, sk_lookup, sock_ops},
    programs::{SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, TcContext},
};
use context::Family;
use packet::Direction;

/// Return value of a cgroup program that allows the system call or passes the packet.
const ALLOW: i32 = 1;
/// Return value of a cgroup program that fails the system call or drops the packet.
const DENY: i32 = 0;
/// Return value of a program on a link that passes the frame to the next program (`TC_ACT_UNSPEC`, `TCX_NEXT`).
const TC_NEXT: i32 = -1;
/// Return value of a program on a link that drops the frame.
const TC_DROP: i32 = 2;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::run(&ctx, Family::V4)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::run(&ctx, Family::V6)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    names::peer(&ctx, Family::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    names::peer(&ctx, Family::V6)
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    names::own(&ctx, Family::V4)
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    names::own(&ctx, Family::V6)
}

#[sock_ops]
pub fn established(ctx: SockOpsContext) -> u32 {
    established::run(&ctx)
}

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    if steer::run(&ctx) { sk_action::SK_PASS } else { sk_action::SK_DROP }
}

#[cgroup_skb(egress)]
pub fn guard_egress(ctx: SkBuffContext) -> i32 {
    let passes = held::passes(&ctx) && probes::passes(&ctx) && guard::socket(&ctx, Direction::Egress);
    if passes { ALLOW } else { DENY }
}

#[cgroup_skb(ingress)]
pub fn guard_ingress(ctx: SkBuffContext) -> i32 {
    if guard::socket(&ctx, Direction::Ingress) { ALLOW } else { DENY }
}

#[classifier]
pub fn guard_link(ctx: TcContext) -> i32 {
    if guard::link(&SkBuffContext::new(ctx.skb.skb)) { TC_NEXT } else { TC_DROP }
}

#[classifier]
pub fn guard_arrival(ctx: TcContext) -> i32 {
    if guard::arrival(&SkBuffContext::new(ctx.skb.skb)) { TC_NEXT } else { TC_DROP }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
