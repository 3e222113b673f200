//! Destinations to which strict pods may send plaintext, such as the cluster's DNS: `10.96.0.10:53/udp`.

use std::net::SocketAddr;

use tacit_kernel::PlaintextDestination;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The mistake of a text that is no destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ClearError {
    /// Not of the form.
    #[error(
        "no destination: write address, port and protocol, as in 10.96.0.10:53/udp or \"[fd00::a]:53/udp\""
    )]
    Form,
    /// A protocol without ports, or none at all.
    #[error("{0:?} is no protocol that can be allowed: write udp or tcp")]
    Protocol(String),
    /// Every port, which would be no exception but the rule.
    #[error("port 0: write the one port that is meant")]
    Port,
    /// An address that means no single destination.
    #[error("{0} is no single destination: write the address of one")]
    Address(std::net::IpAddr),
}

/// Parses a destination.
pub(super) fn clear_destination(text: &str) -> Result<PlaintextDestination, ClearError> {
    let (address, protocol) = text.rsplit_once('/').ok_or(ClearError::Form)?;
    let address: SocketAddr = address.parse().map_err(|_| ClearError::Form)?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let protocol = match protocol {
        "tcp" => TCP,
        "udp" => UDP,
        other => return Err(ClearError::Protocol(other.to_owned())),
    };
    if address.port() == 0 {
        return Err(ClearError::Port);
    }
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        return Err(ClearError::Address(address.ip()));
    }
    Ok(PlaintextDestination { address, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_have_address_port_and_protocol() {
        let parsed = clear_destination("10.96.0.10:53/udp").expect("valid");
        assert_eq!((parsed.address.to_string().as_str(), parsed.protocol), ("10.96.0.10:53", UDP));
        let parsed = clear_destination("[fd00::a]:53/tcp").expect("valid");
        assert_eq!((parsed.address.to_string().as_str(), parsed.protocol), ("[fd00::a]:53", TCP));
        let mapped = clear_destination("[::ffff:10.0.0.1]:53/udp").expect("valid");
        assert_eq!(mapped.address.to_string(), "10.0.0.1:53");
    }

    #[test]
    fn what_would_allow_more_than_it_says_is_refused() {
        for text in
            ["", "10.0.0.1", "10.0.0.1:53", "10.0.0.1/udp", "10.0.0.0/24:53/udp", "dns:53/udp", ":53/udp"]
        {
            assert_eq!(clear_destination(text), Err(ClearError::Form), "{text}");
        }
        assert_eq!(clear_destination("10.0.0.1:53/icmp"), Err(ClearError::Protocol("icmp".to_owned())));
        assert_eq!(clear_destination("10.0.0.1:0/udp"), Err(ClearError::Port));
        assert!(matches!(clear_destination("0.0.0.0:53/udp"), Err(ClearError::Address(_))));
        assert!(matches!(clear_destination("[ff02::1]:53/udp"), Err(ClearError::Address(_))));
    }
}
