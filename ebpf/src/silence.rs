//! Reports to the kernel of an application that the peer of a connection is silent, see `tacit_abi`'s `silence`.

use tacit_abi::{Limits, Told, names_kind};

use crate::context::{SockOps, TimerOption};

/// Time between two probes of the kernel, in seconds: the connection ends by so much later.
const TICK_S: u32 = 1;

/// Handles a segment with an option that the kernel does not know.
#[inline(always)]
pub fn told(sock: &SockOps<'_>) {
    let Some(told) = sock.told() else { return };
    let is_agents = sock
        .names()
        .is_some_and(|names| names.kind == names_kind::CAPTURED || names.kind == names_kind::ACCEPTED);
    if !is_agents {
        return;
    }
    match told {
        Told::Silent(limit_ms) => begin(sock, limit_ms),
        Told::Alive => end(sock),
    }
}

/// Has the kernel end the connection when the time is over. An error, as before Linux 6.1, leaves the connection to the agent.
#[inline(always)]
fn begin(sock: &SockOps<'_>, limit_ms: u32) {
    if sock.limits().is_some() {
        return;
    }
    let Some(mut limits) = read(sock) else { return };
    limits.set_ms = limits.of_silence(limit_ms);
    if !sock.store_limits(limits) {
        return;
    }
    sock.set_timer(TimerOption::UserTimeout, limits.set_ms);
    sock.set_timer(TimerOption::KeepAlive, 1);
    sock.set_timer(TimerOption::Interval, TICK_S);
    sock.set_timer(TimerOption::Idle, TICK_S);
}

#[inline(always)]
fn read(sock: &SockOps<'_>) -> Option<Limits> {
    Some(Limits {
        keep_alive: sock.timer(TimerOption::KeepAlive)?,
        idle_s: sock.timer(TimerOption::Idle)?,
        interval_s: sock.timer(TimerOption::Interval)?,
        count: sock.timer(TimerOption::Count)?,
        user_timeout_ms: sock.timer(TimerOption::UserTimeout)?,
        set_ms: 0,
    })
}

/// Gives the socket its options back, each unless the application has set another value meanwhile.
#[inline(always)]
fn end(sock: &SockOps<'_>) {
    let Some(limits) = sock.limits() else { return };
    sock.delete_limits();
    restore(sock, TimerOption::UserTimeout, limits.set_ms, limits.user_timeout_ms);
    restore(sock, TimerOption::Interval, TICK_S, limits.interval_s);
    restore(sock, TimerOption::Idle, TICK_S, limits.idle_s);
    restore(sock, TimerOption::KeepAlive, 1, limits.keep_alive);
}

/// Sets an option to `before` if it still has the value that [`begin`] has set.
#[inline(always)]
fn restore(sock: &SockOps<'_>, option: TimerOption, set: u32, before: u32) {
    if sock.timer(option) == Some(set) {
        sock.set_timer(option, before);
    }
}
