//! The agent that reads the probes of pods' connections, see `tacit_abi`'s `probes`.

use tacit_abi::ProbeShare;

use super::{KernelError, Maps, failed, lock};

impl Maps {
    /// Has the probes of the pod with this slot handed to this agent, which serves the pod in the network namespace with this cookie;
    /// 0 for a pod that it serves no more.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_probes_served(&self, slot: u32, netns_cookie: u64) -> Result<(), KernelError> {
        let share = ProbeShare { served: netns_cookie, ..ProbeShare::default() };
        lock(&self.probe_shares).set(slot, share, 0).map_err(failed("PROBE_SHARES"))
    }
}
