//! Connections that the agent makes from inside a pod's network namespace, and the destinations of captured connections.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tacit_kernel::{Kernel, held::HeldEnds, netns::HostNetns, socket};
use tacit_tunnel::socket::reset_if_dropped;
use tokio::net::TcpStream;

use crate::enrol::Pod;

/// How long an application may take to accept. It is on this node: more means its backlog is full.
const APPLICATION_CONNECT: Duration = Duration::from_secs(5);

/// Opens sockets in the namespaces of pods and exchanges addresses with the kernel's maps.
pub struct Dialer {
    kernel: Arc<Kernel>,
    host: Arc<HostNetns>,
}

impl Dialer {
    /// A dialer that works with the maps of `kernel`. Threads return to the namespace `host`.
    #[must_use]
    pub fn new(kernel: Arc<Kernel>, host: Arc<HostNetns>) -> Self {
        Self { kernel, host }
    }

    /// Connects to an application of `pod` as `client`: the application sees the client's address.
    ///
    /// # Errors
    /// The kernel's, or a time-out.
    pub(super) async fn to_application(
        &self,
        pod: &Pod,
        application: SocketAddr,
        client: SocketAddr,
    ) -> io::Result<TcpStream> {
        let socket = socket::dialer(&pod.netns, &self.host, application, client)?;
        // An application decides by the address of its client: without the name there is no connection.
        self.kernel.maps.set_peer_name(&socket, client).map_err(io::Error::other)?;
        let here = (&pod.netns, &*self.host);
        let connected = socket::connected_here(socket, here, application, APPLICATION_CONNECT).await?;
        reset_if_dropped(&connected);
        Ok(connected)
    }

    /// Connects from `pod` to `destination` within `limit`.
    ///
    /// # Errors
    /// The kernel's, or a time-out.
    pub(super) async fn connect(
        &self,
        pod: &Pod,
        destination: SocketAddr,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        socket::connect(&pod.netns, &self.host, destination, limit).await
    }

    /// Connects from `pod` to the tunnel port of a peer within `limit`. Of the agent's sockets only these pass the pod's link
    /// into the mesh, wherever rules of the pod's own lead them.
    ///
    /// # Errors
    /// The kernel's, or a time-out.
    pub(super) async fn to_tunnel(
        &self,
        pod: &Pod,
        peer: SocketAddr,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        let socket = socket::outgoing(&pod.netns, &self.host, peer)?;
        self.kernel.maps.set_tunnel(&socket).map_err(io::Error::other)?;
        socket::connected(socket, peer, limit).await
    }

    /// Takes out of the kernel's map the destination of a connection that `client` in `pod` made and the agent accepted at
    /// `accepted_at`.
    pub(super) fn take_destination(
        &self,
        pod: &Pod,
        client: SocketAddr,
        accepted_at: SocketAddr,
    ) -> Option<SocketAddr> {
        self.kernel.maps.destination(pod.netns.cookie(), client, accepted_at)
    }

    /// Returns true if a captured connection of `pod` still waits for the agent to accept it.
    pub(super) fn is_waiting(&self, pod: &Pod, ends: &HeldEnds) -> bool {
        self.kernel.maps.is_captured(pod.netns.cookie(), ends.client, ends.target)
    }

    /// Returns true if an agent listens for a held connection of `pod`.
    pub(super) fn has_listener(&self, pod: &Pod, ends: &HeldEnds) -> bool {
        // What cannot be seen is assumed: the application's kernel asks again.
        socket::has_listener(&pod.netns, &self.host, ends.target).unwrap_or(true)
    }
}
