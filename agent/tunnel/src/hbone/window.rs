//! The window that the agent announces for each stream of a connection. Pure.

/// The window of a stream before the peer has acknowledged the first SETTINGS.
const PROTOCOL_WINDOW: u32 = 65_535;

/// The window in force may be this many times that of the share. Honest peers acknowledge within a round trip, in which the
/// connections of a pod rarely become as many times more.
const EXCESS_MAX: u32 = 8;

/// The announced window, and the one that can still be in force.
#[derive(Debug)]
pub(super) struct Window {
    announced_bytes: u32,
    /// The largest window that a stream can still have.
    in_force_max: u32,
}

impl Window {
    /// A connection whose first SETTINGS announce `window_bytes`.
    pub(super) fn new(window_bytes: u32) -> Self {
        Self { announced_bytes: window_bytes, in_force_max: window_bytes.max(PROTOCOL_WINDOW) }
    }

    /// Announces another window by `announce`, unless it is about the same already. Streams that are open get it too. `announce` returns
    /// false while the peer has not acknowledged the last change. Returns false if streams still have a much larger one.
    pub(super) fn set(&mut self, window_bytes: u32, announce: impl FnOnce(u32) -> bool) -> bool {
        let is_near = window_bytes / 2 < self.announced_bytes && self.announced_bytes / 2 < window_bytes;
        let is_in_doubt = self.in_force_max / 2 > self.announced_bytes;
        // The window before this one is in force when the peer has acknowledged the last change.
        if (!is_near || is_in_doubt) && announce(window_bytes) {
            self.in_force_max = self.announced_bytes.max(window_bytes);
            self.announced_bytes = window_bytes;
        }
        self.in_force_max / EXCESS_MAX <= window_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_about_the_same_size_is_not_announced() {
        let mut window = Window::new(256 << 10);
        for bytes in [256 << 10, 300 << 10, 129 << 10] {
            assert!(window.set(bytes, |_| panic!("announced {bytes}")));
        }
        let mut announced = None;
        assert!(window.set(64 << 10, |bytes| {
            announced = Some(bytes);
            true
        }));
        assert_eq!(announced, Some(64 << 10));
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_in_excess() {
        let mut window = Window::new(1 << 20);
        assert!(window.set(512 << 10, |_| true));
        // The first change is not acknowledged.
        assert!(window.set(128 << 10, |_| false));
        assert!(!window.set(64 << 10, |_| false));
        // It is: only then is another one announced, and the first one in force.
        assert!(window.set(64 << 10, |_| true));
        assert!(window.set(64 << 10, |_| true));
    }
}
