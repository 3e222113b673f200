//! TCP ports of the data path, reserved in every enrolled pod unless noted otherwise.

/// Captured outbound connections, on the pod's loopback.
pub const CAPTURE: u16 = 15001;
/// First of the ports of `::1` that captured IPv6 connections are spread over, see `Address::capture_port_v6`.
/// Nothing listens on these ports, and they are not reserved. The steering program redirects captured connections to
/// the listener on [`CAPTURE`] and passes all others.
pub const CAPTURE_V6_FIRST: u16 = 15040;
/// Number of ports of `::1` that captured connections are spread over; a power of two.
pub const CAPTURE_V6_COUNT: u16 = 16;
/// Steered inbound plaintext.
pub const PLAINTEXT: u16 = 15006;
/// The tunnel.
pub const TUNNEL: u16 = 15008;

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

/// Returns true for the agent's ports and their spares.
#[inline(always)]
#[must_use]
pub const fn is_reserved(port: u16) -> bool {
    is_own_or_spare(port, CAPTURE) || is_own_or_spare(port, PLAINTEXT) || is_own_or_spare(port, TUNNEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listeners_ports_and_their_spares_are_reserved() {
        let reserved = (0..=u16::MAX).filter(|port| is_reserved(*port));
        assert!(reserved.eq([15001, 15002, 15006, 15007, 15008, 15009]));
    }
}
