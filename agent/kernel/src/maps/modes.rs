//! The maps that plaintext towards a pod is judged by: addresses of pods, and modes of single ports.
//!
//! A copy of the entries of each slot is kept in memory. So a change of one pod's policy costs time for that pod's entries,
//! not for those of all pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use tacit_abi::{Address, Mode, PodCells, PortKey, Steered, limits};

use super::{super::KernelError, Maps, PlaintextHandling, address, failed, ip, lock, map_of};

/// Both maps, with the entries of each slot.
pub(super) struct ModeMaps {
    steered: HashMap<MapData, Address, Steered>,
    port_modes: HashMap<MapData, PortKey, u32>,
    slots: BTreeMap<u32, Entries>,
}

/// The entries of one slot.
#[derive(Default)]
struct Entries {
    addresses: Vec<Address>,
    ports: BTreeSet<u16>,
}

impl ModeMaps {
    /// Takes the maps, with the entries that an earlier agent left.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self::adopt(map_of(ebpf, "STEERED")?, map_of(ebpf, "PORT_MODES")?))
    }

    fn adopt(
        steered: HashMap<MapData, Address, Steered>,
        port_modes: HashMap<MapData, PortKey, u32>,
    ) -> Self {
        let mut maps = Self { steered, port_modes, slots: BTreeMap::new() };
        for (address, steered) in maps.steered.iter().filter_map(Result::ok) {
            maps.slots.entry(steered.slot).or_default().addresses.push(address);
        }
        for key in maps.port_modes.keys().filter_map(Result::ok) {
            if let Ok(port) = u16::try_from(key.port) {
                maps.slots.entry(key.slot).or_default().ports.insert(port);
            }
        }
        maps
    }

    /// Sets the modes of a pod. Ports are written before the pod's default, and those that are gone go after it. So each port has
    /// the mode from before or the new one after each of the writes, any of which may be this agent's last.
    fn set(
        &mut self,
        pod: PodCells,
        addresses: &[Address],
        (default, plaintext): (Mode, PlaintextHandling),
        ports: &BTreeMap<u16, Mode>,
    ) -> Result<(), KernelError> {
        let PodCells { slot, mark } = pod;
        let entry = Steered { slot, mode: default as u32, flags: plaintext.flags(), mark };
        writes(entry, addresses, ports).try_for_each(|write| self.make(slot, write))?;
        self.retain(slot, |known| addresses.contains(known), |port| ports.contains_key(&port));
        Ok(())
    }

    fn make(&mut self, slot: u32, write: Write) -> Result<(), KernelError> {
        match write {
            Write::Port(port, mode) => self.set_port(slot, port, mode),
            Write::Default(address, entry) => self.set_address(entry, address),
        }
    }

    fn set_port(&mut self, slot: u32, port: u16, mode: Mode) -> Result<(), KernelError> {
        // Known before it is there: a failure half way leaves nothing behind.
        self.slots.entry(slot).or_default().ports.insert(port);
        let key = PortKey { slot, port: u32::from(port) };
        self.port_modes.insert(key, mode as u32, 0).map_err(failed("PORT_MODES"))
    }

    fn set_address(&mut self, entry: Steered, address: Address) -> Result<(), KernelError> {
        let known = &mut self.slots.entry(entry.slot).or_default().addresses;
        if !known.contains(&address) {
            known.push(address);
        }
        self.steered.insert(address, entry, 0).map_err(failed("STEERED"))
    }

    /// Removes the slot's addresses and ports that are not kept. An address that is another slot's by now stays in the map.
    fn retain(
        &mut self,
        slot: u32,
        is_address_kept: impl Fn(&Address) -> bool,
        is_port_kept: impl Fn(u16) -> bool,
    ) {
        let Some(entries) = self.slots.get_mut(&slot) else { return };
        entries.addresses.retain(|address| {
            let is_kept = is_address_kept(address);
            if !is_kept && self.steered.get(address, 0).is_ok_and(|steered| steered.slot == slot) {
                let _ = self.steered.remove(address);
            }
            is_kept
        });
        entries.ports.retain(|port| {
            let is_kept = is_port_kept(*port);
            if !is_kept {
                let _ = self.port_modes.remove(&PortKey { slot, port: u32::from(*port) });
            }
            is_kept
        });
        if entries.addresses.is_empty() && entries.ports.is_empty() {
            self.slots.remove(&slot);
        }
    }
}

/// One write of a pod's modes.
#[derive(Clone, Copy)]
enum Write {
    /// The mode of a port.
    Port(u16, Mode),
    /// The mode of other ports at an address.
    Default(Address, Steered),
}

/// Returns the writes of a pod's modes, in their order.
fn writes(entry: Steered, addresses: &[Address], ports: &BTreeMap<u16, Mode>) -> impl Iterator<Item = Write> {
    let of_ports = ports.iter().map(|(port, mode)| Write::Port(*port, *mode));
    of_ports.chain(addresses.iter().map(move |address| Write::Default(*address, entry)))
}

impl Maps {
    /// Sets what plaintext meets at a pod's addresses. `ports` are those whose mode differs from the default.
    ///
    /// # Errors
    /// [`KernelError::Share`] for more ports than a pod's share; nothing is written then. [`KernelError::Map`].
    pub fn set_modes(
        &self,
        pod: PodCells,
        addresses: &[IpAddr],
        default: (Mode, PlaintextHandling),
        ports: &BTreeMap<u16, Mode>,
    ) -> Result<(), KernelError> {
        let bound = limits::PORT_MODES_PER_POD as usize;
        if ports.len() > bound {
            return Err(KernelError::Share { map: "PORT_MODES", have: ports.len(), bound });
        }
        let addresses: Vec<Address> = addresses.iter().map(|ip| address(*ip)).collect();
        lock(&self.modes).set(pod, &addresses, default, ports)
    }

    /// Forgets the modes of a slot and of those addresses that are still its own. Also before another pod gets the slot: an agent
    /// that was killed may have written some of the modes of a pod that never got its entry.
    pub fn remove_modes(&self, slot: u32) {
        lock(&self.modes).retain(slot, |_| false, |_| false);
    }

    /// Returns the addresses at which plaintext meets the modes of a slot.
    #[must_use]
    pub fn steered_addresses(&self, slot: u32) -> Vec<IpAddr> {
        let maps = lock(&self.modes);
        maps.slots.get(&slot).map_or_else(Vec::new, |entries| entries.addresses.iter().map(ip).collect())
    }

    /// Returns the number of ports of a slot that have a mode of their own in the kernel.
    #[must_use]
    pub fn count_port_modes(&self, slot: u32) -> usize {
        lock(&self.modes).slots.get(&slot).map_or(0, |entries| entries.ports.len())
    }
}

#[cfg(test)]
mod tests {
    use aya::EbpfLoader;

    use super::*;
    use crate::programs::OBJECT;

    const SLOT: u32 = 3;

    fn maps() -> ModeMaps {
        let mut ebpf = EbpfLoader::new().load(OBJECT).expect("maps");
        ModeMaps::take(&mut ebpf).expect("the maps")
    }

    /// The agent is killed, and another one finds the maps.
    fn killed(maps: ModeMaps) -> ModeMaps {
        ModeMaps::adopt(maps.steered, maps.port_modes)
    }

    /// Returns the mode that the steering program finds for a port. `None` for an address that no pod has.
    fn mode(maps: &ModeMaps, at: Address, port: u16) -> Option<Mode> {
        let steered = maps.steered.get(&at, 0).ok()?;
        let own = maps.port_modes.get(&PortKey { slot: steered.slot, port: port.into() }, 0);
        Some(Mode::from_raw(own.unwrap_or(steered.mode)))
    }

    fn ip(last: u8) -> Address {
        address(IpAddr::from([10, 77, 1, last]))
    }

    /// Modes of single ports that a killed agent had written used to count for the next pod in the slot until its own were written.
    #[test]
    #[ignore = "needs root"]
    fn modes_that_a_killed_agent_wrote_count_for_no_later_pod_of_the_slot() {
        for is_addressed in [false, true] {
            let mut maps = maps();
            maps.set_port(SLOT, 80, Mode::Disable).expect("written");
            if is_addressed {
                let entry = Steered { slot: SLOT, mode: Mode::Permissive as u32, ..Steered::default() };
                maps.set_address(entry, ip(2)).expect("written");
            }
            let mut maps = killed(maps);
            maps.retain(SLOT, |_| false, |_| false);
            assert_eq!((mode(&maps, ip(2), 80), maps.slots.len()), (None, 0));
            // Killed again before the next pod's ports are complete.
            let strict = Steered { slot: SLOT, mode: Mode::Strict as u32, ..Steered::default() };
            maps.set_address(strict, ip(3)).expect("written");
            assert_eq!(mode(&killed(maps), ip(3), 80), Some(Mode::Strict), "{is_addressed}");
        }
    }

    /// An agent that is killed within a change leaves each port in its old or its new mode, and its successor completes the change.
    #[test]
    #[ignore = "needs root"]
    fn a_killed_agent_leaves_each_port_in_the_mode_from_before_or_the_new_one() {
        use Mode::{Disable, Permissive, Strict};
        let policies = [
            (Permissive, BTreeMap::from([(443, Strict)])),
            (Strict, BTreeMap::from([(80, Permissive), (443, Strict)])),
            (Strict, BTreeMap::from([(80, Disable), (8080, Permissive)])),
            (Permissive, BTreeMap::new()),
        ];
        let pod = PodCells::new(SLOT, 70);
        let addresses = [ip(2), ip(3)];
        let handling = PlaintextHandling::Direct;
        let mut maps = maps();
        for (before, after) in
            policies.iter().flat_map(|before| policies.iter().map(move |after| (before, after)))
        {
            let expected = |policy: &(Mode, BTreeMap<u16, Mode>), port: u16| {
                Some(policy.1.get(&port).copied().unwrap_or(policy.0))
            };
            for count in 0..=after.1.len() + addresses.len() {
                maps.set(pod, &addresses, (before.0, handling), &before.1).expect("written");
                let entry = Steered { slot: SLOT, mode: after.0 as u32, flags: 0, mark: pod.mark };
                for write in writes(entry, &addresses, &after.1).take(count) {
                    maps.make(SLOT, write).expect("written");
                }
                maps = killed(maps);
                for (at, port) in
                    addresses.iter().flat_map(|at| [80, 443, 8080, 9000].map(|port| (*at, port)))
                {
                    let found = mode(&maps, at, port);
                    let either = [expected(before, port), expected(after, port)];
                    assert!(
                        either.contains(&found),
                        "{port}: {found:?} after {count} of {before:?} to {after:?}"
                    );
                }
                maps.set(pod, &addresses, (after.0, handling), &after.1).expect("written");
                for (at, port) in
                    addresses.iter().flat_map(|at| [80, 443, 8080, 9000].map(|port| (*at, port)))
                {
                    assert_eq!(mode(&maps, at, port), expected(after, port), "{port} after {before:?}");
                }
            }
        }
    }
}
