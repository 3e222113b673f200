//! Connections that the agent makes from inside a pod's network namespace, and the destinations of captured connections.

use std::{io, net::SocketAddr, os::fd::AsRawFd, sync::Arc, time::Duration};

use tacit_kernel::{
    Kernel,
    held::HeldEnds,
    netns::HostNetns,
    socket::{self, AppStream},
};
use tacit_tunnel::socket::reset_if_dropped;
use tokio::net::TcpStream;

use crate::enrol::Pod;

/// Limit for an application to accept a connection. It is on this node, so a longer wait means a full backlog.
const APPLICATION_CONNECT: Duration = Duration::from_secs(5);

/// Service of the probes of a pod's applications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    /// This agent answers them.
    Yes,
    /// Probes pass to the kernel of the agent's end.
    No,
}

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

    /// Connects to an application of `pod` as `client`: the application sees the client's address. The kernel keeps at most
    /// `unread_bytes` that the application has sent, [`socket::LOOPBACK_UNREAD_BYTES`] unless given.
    ///
    /// # Errors
    /// The kernel's, a time-out, or [`socket::ClientNotStored`].
    pub(super) async fn to_application(
        &self,
        pod: &Pod,
        application: SocketAddr,
        client: SocketAddr,
        unread_bytes: Option<u32>,
    ) -> io::Result<AppStream> {
        let socket = socket::dialer(&pod.netns, &self.host, application, client)?;
        // On loopback no autotuning is needed: a window of two batches keeps both ends busy.
        let unread_bytes = unread_bytes.map_or(socket::LOOPBACK_UNREAD_BYTES, |bytes| bytes as usize);
        socket.set_recv_buffer_size(unread_bytes)?;
        // An application decides by the address of its client: without the name there is no connection.
        self.kernel.maps.set_peer_name(&socket, client, pod.slot()).map_err(io::Error::other)?;
        let here = (&pod.netns, pod.capture_port());
        let connected = socket::dialled(socket, here, &self.host, application, APPLICATION_CONNECT).await?;
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
    ) -> io::Result<AppStream> {
        socket::connected(socket::plaintext(&pod.netns, &self.host, destination)?, destination, limit).await
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
        self.kernel.maps.set_tunnel(&socket, peer).map_err(io::Error::other)?;
        socket::connected(socket, peer, limit).await
    }

    /// Connects from `pod` within `limit` to `destination`, whose mode is DISABLE. As [`Self::to_tunnel`].
    ///
    /// # Errors
    /// The kernel's, or a time-out.
    pub(super) async fn to_disabled_port(
        &self,
        pod: &Pod,
        destination: SocketAddr,
        limit: Duration,
    ) -> io::Result<AppStream> {
        let socket = socket::plaintext(&pod.netns, &self.host, destination)?;
        self.kernel.maps.set_disabled(&socket, destination).map_err(io::Error::other)?;
        socket::connected(socket, destination, limit).await
    }

    /// Has the probes of `pod` handed to this agent, or not any more. On an error they pass.
    pub(super) fn set_probes_served(&self, pod: &Pod, serving: Serving) {
        let cookie = if serving == Serving::Yes { pod.netns.cookie() } else { 0 };
        if let Err(error) = self.kernel.maps.set_probes_served(pod.slot(), cookie) {
            tracing::error!(%error, pod = %pod.workload.name, "keep-alive of the pod's applications ends at the agent");
        }
    }

    /// Returns the destination of a captured connection that the agent accepted.
    pub(super) fn destination(&self, captured: &impl AsRawFd) -> Option<SocketAddr> {
        self.kernel.maps.destination(captured)
    }

    /// Returns true if a captured connection of `pod` still waits for the answer of the agent's listener.
    pub(super) fn is_waiting(&self, pod: &Pod, ends: &HeldEnds) -> bool {
        self.kernel.maps.is_captured(pod.netns.cookie(), ends.client, ends.target)
    }

    /// Returns true if an agent listens for a held connection of `pod`.
    pub(super) fn has_listener(&self, pod: &Pod, ends: &HeldEnds) -> bool {
        // What cannot be seen is assumed: the application's kernel asks again.
        socket::has_listener((&pod.netns, pod.capture_port()), &self.host, ends.target).unwrap_or(true)
    }
}
