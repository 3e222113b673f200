//! The maps that the agent reads for each connection: a look-up takes no lock.

use std::{
    os::fd::{AsFd as _, AsRawFd, OwnedFd},
    sync::Mutex,
};

use aya::maps::{HashMap, Map, MapData, SkStorage};
use tacit_abi::{Destination, Names, Tuple};

use super::{
    super::{KernelError, link, programs::Programs},
    failed, lock, typed,
};

/// The storage of names in sockets. Each captured connection is read once, which takes no lock.
pub(super) struct SocketNames {
    reader: OwnedFd,
    map: Mutex<SkStorage<MapData, Names>>,
}

impl SocketNames {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        const NAME: &str = "NAMES";
        let map = programs.ebpf().map(NAME);
        let data = match map {
            Some(Map::SkStorage(data)) => data,
            _ => return Err(KernelError::Map { map: NAME, problem: "no socket storage".to_owned() }),
        };
        let reader = data.fd().as_fd().try_clone_to_owned();
        let reader = reader.map_err(|e| KernelError::Map { map: NAME, problem: e.to_string() })?;
        Ok(Self { reader, map: typed(programs, NAME)? })
    }

    pub(super) fn get(&self, socket: &impl AsRawFd) -> Option<Names> {
        link::read(self.reader.as_fd(), &socket.as_raw_fd())
    }

    pub(super) fn set(&self, socket: &impl AsRawFd, names: Names) -> Result<(), KernelError> {
        lock(&self.map).insert(socket, names, 0).map_err(failed("NAMES"))
    }
}

/// The map of captured connections. A look-up takes no lock.
pub(super) struct Captured(OwnedFd);

impl Captured {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        const NAME: &str = "CAPTURED";
        let problem = |problem: String| KernelError::Map { map: NAME, problem };
        let map = programs.ebpf().map(NAME);
        let map = map.ok_or_else(|| problem("not in the object".to_owned()))?;
        HashMap::<_, Tuple, Destination>::try_from(map).map_err(failed(NAME))?;
        let Map::HashMap(data) = map else { return Err(problem("no hash map".to_owned())) };
        let reader = data.fd().as_fd().try_clone_to_owned();
        Ok(Self(reader.map_err(|error| problem(error.to_string()))?))
    }

    pub(super) fn has(&self, key: &Tuple) -> bool {
        link::read::<Tuple, Destination>(self.0.as_fd(), key).is_some()
    }
}
