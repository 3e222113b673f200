//! The maps that plaintext towards a pod is judged by: addresses of pods, and modes of single ports.
//!
//! A copy of the entries of each slot is kept in memory. So a change of one pod's policy costs time for that pod's entries,
//! not for those of all pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::maps::{HashMap, MapData};
use tacit_abi::{Address, Mode, PodCells, PortKey, Steered, limits};

use super::{
    super::{KernelError, programs::Programs},
    Maps, PlaintextHandling, address, failed, ip, lock, unlocked,
};

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
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        let mut maps = Self {
            steered: unlocked(programs, "STEERED")?,
            port_modes: unlocked(programs, "PORT_MODES")?,
            slots: BTreeMap::new(),
        };
        for (address, steered) in maps.steered.iter().filter_map(Result::ok) {
            maps.slots.entry(steered.slot).or_default().addresses.push(address);
        }
        for key in maps.port_modes.keys().filter_map(Result::ok) {
            if let Ok(port) = u16::try_from(key.port) {
                maps.slots.entry(key.slot).or_default().ports.insert(port);
            }
        }
        Ok(maps)
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

impl Maps {
    /// Sets what plaintext meets at a pod's addresses. `ports` are those whose mode differs from the default.
    ///
    /// # Errors
    /// [`KernelError::Share`] for more ports than a pod's share; nothing is written then. [`KernelError::Map`]. Ports are
    /// written before the pod's default, so that no port is open meanwhile that should not be.
    pub fn set_modes(
        &self,
        pod: PodCells,
        addresses: &[IpAddr],
        (default, plaintext): (Mode, PlaintextHandling),
        ports: &BTreeMap<u16, Mode>,
    ) -> Result<(), KernelError> {
        let bound = limits::PORT_MODES_PER_POD as usize;
        if ports.len() > bound {
            return Err(KernelError::Share { map: "PORT_MODES", have: ports.len(), bound });
        }
        let PodCells { slot, mark } = pod;
        let mut maps = lock(&self.modes);
        for (port, mode) in ports {
            maps.set_port(slot, *port, *mode)?;
        }
        let entry = Steered { slot, mode: default as u32, flags: plaintext.flags(), mark };
        for ip in addresses {
            maps.set_address(entry, address(*ip))?;
        }
        let wanted: Vec<Address> = addresses.iter().map(|ip| address(*ip)).collect();
        maps.retain(slot, |known| wanted.contains(known), |port| ports.contains_key(&port));
        Ok(())
    }

    /// Forgets the modes of a slot and of those addresses that are still its own.
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
