//! TCP ports of the data path, reserved in every enrolled pod unless noted otherwise.

/// The tunnel, as peers dial it. The steering program redirects these connections to the listener on [`TUNNEL_LISTENER`].
pub const TUNNEL: u16 = 15008;
/// Answers of the agent of a pod that is left alone. Peers ask there if the port [`TUNNEL`] has no agent.
pub const ANSWER: u16 = 15009;
/// Ports at which proxies in pods listen: captured outbound connections, captured inbound connections, HBONE. The agent has no
/// listener there, so that such a proxy can start at any time.
pub const OF_PROXIES: [u16; 3] = [15001, 15006, 15008];
/// Listener for captured outbound connections, on the pod's loopback.
pub const CAPTURE: u16 = 15056;
/// Listener for steered inbound plaintext.
pub const PLAINTEXT: u16 = 15058;
/// Listener for the tunnel.
pub const TUNNEL_LISTENER: u16 = 15060;
/// First of the ports of `::1` that captured IPv6 connections are spread over, see `Address::capture_port_v6`.
/// Nothing listens on these ports, and they are not reserved. The steering program redirects captured connections to
/// the listener on [`CAPTURE`] and passes all others.
pub const CAPTURE_V6_FIRST: u16 = 15040;
/// Number of ports of `::1` that captured connections are spread over; a power of two.
pub const CAPTURE_V6_COUNT: u16 = 16;
/// Returns the port that a successor listens on while its predecessor's listener on `port` is still open.
/// Clients never connect to it: the programs redirect connections there.
#[must_use]
pub const fn spare(port: u16) -> u16 {
    port + 1
}

#[inline(always)]
const fn is_own_or_spare(port: u16, own: u16) -> bool {
    port == own || port == spare(own)
}

/// Returns true for the port of captured connections and its spare.
#[inline(always)]
#[must_use]
pub const fn is_capture(port: u16) -> bool {
    is_own_or_spare(port, CAPTURE)
}

/// Returns true for the ports of the agent's listeners and their spares.
#[inline(always)]
#[must_use]
pub const fn is_listener(port: u16) -> bool {
    port >= CAPTURE && port <= spare(TUNNEL_LISTENER)
}

/// Returns true for the agent's ports.
#[inline(always)]
#[must_use]
pub const fn is_reserved(port: u16) -> bool {
    port == TUNNEL || port == ANSWER || is_listener(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listeners_ports_and_their_spares_are_reserved() {
        assert!(OF_PROXIES.iter().all(|port| !is_listener(*port)));
        let reserved = (0..=u16::MAX).filter(|port| is_reserved(*port));
        assert!(reserved.eq([15008, 15009, 15056, 15057, 15058, 15059, 15060, 15061]));
    }
}
