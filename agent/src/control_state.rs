//! The control state that flows read: directory, policies, ranges of the mesh, credentials. Each is an immutable snapshot that
//! a control task replaces. No flow waits for a control task, except for the bounded discovery of an unknown address.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tacit_core::{
    directory::Directory,
    policy::Policies,
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_identity::{
    credentials::Credentials, manager::Identities, peer_trust::DomainRoots, revocation::RevocationLists,
};
use tacit_sources::reload::Watched;
use tokio::time::timeout;

use crate::{mesh::Mesh, telemetry::Party};

/// Handles to the control state; a clone shares it.
#[derive(Clone)]
pub struct Snapshots {
    /// Workloads and services with their addresses.
    pub directory: Arc<Watched<Directory>>,
    /// Modes and authorization policies.
    pub policies: Arc<Watched<Policies>>,
    /// Ranges of the mesh, those of services included.
    pub mesh: Arc<Mesh>,
    /// Certificates of the node's workloads.
    pub identities: Arc<Identities>,
    /// Revocation lists, if they are configured.
    pub revocation: Option<Arc<Watched<RevocationLists>>>,
    /// Federated trust domains.
    pub federation: Arc<[FederatedRoots]>,
}

/// The roots of a federated trust domain.
pub struct FederatedRoots {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// Its roots.
    pub roots: Watched<DomainRoots>,
}

impl Snapshots {
    /// Returns the directory. Waits up to `limit` for an address of the mesh that the directory does not have.
    pub(crate) async fn discover(&self, address: IpAddr, limit: Duration) -> Arc<Directory> {
        let directory = self.directory.current();
        if directory.knows(address) || !self.is_mesh(address) {
            return directory;
        }
        let mut changes = self.directory.subscribe();
        // Still unknown, or the source ended: the caller decides with the directory as it is.
        let _ = timeout(limit, changes.wait_for(|known| known.knows(address))).await;
        self.directory.current()
    }

    /// Returns true if `address` is in a range of the mesh.
    pub(crate) fn is_mesh(&self, address: IpAddr) -> bool {
        self.mesh.contains(address)
    }

    /// Returns the valid certificate of `identity`, if the node has one.
    pub(crate) fn credentials(&self, identity: &SpiffeId) -> Option<Arc<Credentials>> {
        self.identities.current(identity)
    }

    /// Describes one end of a flow, with the workload that the directory has at `address`.
    pub(crate) fn party(&self, address: SocketAddr, identity: Option<SpiffeId>) -> Party {
        Party { address, workload: self.directory.current().at(address.ip()).cloned(), identity }
    }
}
