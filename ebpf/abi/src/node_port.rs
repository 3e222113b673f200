//! Node ports: a service's port at the addresses of all nodes.

/// The first node port, by the default of kube-apiserver's `--service-node-port-range`.
pub const FIRST: u16 = 30_000;
/// The last node port.
pub const LAST: u16 = 32_767;

/// Returns true for ports that a service can have at the addresses of nodes.
#[inline(always)]
#[must_use]
pub const fn contains(port: u16) -> bool {
    port >= FIRST && port <= LAST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_range_is_that_of_kubernetes() {
        assert!([30_000, 31_999, 32_767].into_iter().all(contains));
        assert!(![0, 443, 10_250, 29_999, 32_768, u16::MAX].into_iter().any(contains));
    }
}
