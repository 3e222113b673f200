//! Held connections: connect an upstream first, and only then let the application's `connect()` return.
//!
//! ```text
//! SYN held ─ destination ─ upstream as for every captured connection
//!     accepted     ─ deliver the SYN ─ the listener's connection ─ relay
//!     refused      ─ reset, ICMP error, or no answer: `connect()` ends as without Tacit
//!     not wanted   ─ the upstream is reset
//! ```

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tacit_abi::tcp_port;
use tacit_core::{
    refusal::{ConnectEnd, Refusal, RefusalReason},
    shares::connections::Connection,
};
use tacit_kernel::{
    held::{Held, HeldConnect},
    socket::{AppStream, Polled as _},
};
use tacit_tunnel::relay;
use tokio::time::timeout;

use super::{Carried, carry, reach, source};
use crate::{
    proxy::{
        Addresses, Proxy,
        accept::{accept_delivered, bound_unread},
        openings::{Hold, OPENINGS_MAX, PodOpenings, ToOpen},
    },
    telemetry::Reporter,
};

/// Limit for the application's connection, while an upstream waits for it. The kernel's last SYN has been answered by then: at the default
/// of six repetitions they are at most 64 s apart.
const DELIVERED_MAX: Duration = Duration::from_secs(70);

/// Handles a record of the kernel side. Starts a task for a connection to open, on a worker.
pub fn handle_record(proxy: &Arc<Proxy>, held: Held) {
    match held {
        Held::Connect(held) => {
            if let Some((openings, held)) = proxy.openings.of(held) {
                start(proxy, &openings, held);
            }
        }
        Held::Probe { slot, netns_cookie, probe } => {
            if let Some(openings) = proxy.openings.get(slot, netns_cookie) {
                proxy.watches.probed(&openings, probe);
            }
        }
        Held::Ended { slot, netns_cookie, ends } => proxy.openings.cancel((slot, netns_cookie), &ends),
    }
}

/// Starts to open a held connection, unless that has begun before.
pub fn start(proxy: &Arc<Proxy>, openings: &Arc<PodOpenings>, held: HeldConnect) {
    let HeldConnect { destination, syn, is_repeated, .. } = held;
    let ends = syn.ends();
    if proxy.drain.stop.is_cancelled() && !openings.has(&ends) {
        // Another agent gets the next repetition. Without one nobody would answer.
        if proxy.drain.alone.is_cancelled() {
            openings.refuse_unknown(&syn);
        }
        return;
    }
    let client = ends.client.ip();
    let is_client = client.is_loopback() || openings.pod.workload.addresses.contains(&client);
    if !is_client || !ends.target.ip().is_loopback() {
        // Rules of the pod have changed it.
        return;
    }
    if !openings.is_own_target(&ends) {
        if !tcp_port::is_capture(ends.target.port()) || !proxy.dialer.is_waiting(&openings.pod, &ends) {
            return;
        }
        // The agent that this one has taken over from ends what it has begun. Its SYNs come here.
        match (proxy.dialer.has_listener(&openings.pod, &ends), is_repeated) {
            (false, _) => openings.refuse_unknown(&syn),
            (true, false) => openings.pass_foreign(&syn),
            (true, true) => {}
        }
        return;
    }
    if !openings.has(&ends) && !proxy.dialer.is_waiting(&openings.pod, &ends) {
        // Either its application has closed it, and the answer meets no socket, or the kernel side could not store its destination,
        // and has counted that. A repeated SYN can also be read after its connection was accepted.
        if !is_repeated {
            openings.refuse_unknown(&syn);
        }
        return;
    }
    let to_open = match openings.hold(syn) {
        Hold::New(to_open) => to_open,
        Hold::Known => return,
        Hold::Full => {
            let detail = format!("{OPENINGS_MAX} connections of the pod wait for their destinations");
            let refusal = Refusal::new(RefusalReason::OpeningLimit, detail);
            return proxy.report(Reporter::Source, Addresses { source: ends.client, destination }, refusal);
        }
    };
    // Held connections count as the accepted ones do, from here to their end.
    let permit = match proxy.shares.connection(Connection { pod: openings.pod.cgroup, source: None }) {
        Ok(permit) => permit,
        Err(refusal) => {
            openings.refuse(&ends, to_open.id, refusal.connect_end);
            return proxy.report(Reporter::Source, Addresses { source: ends.client, destination }, refusal);
        }
    };
    let home = openings.pod.home(proxy.workers.count());
    let (on, openings) = (proxy.clone(), openings.clone());
    proxy.spawn_flow(home, async move {
        relay::connection_started();
        // Boxed, so that a flow does not keep room for what is needed only until both ends are connected.
        let carried =
            Box::pin(open(on, openings, (destination, is_repeated), to_open, permit.unread_bytes())).await;
        if let Some(carried) = carried {
            carried.await;
        }
        drop(permit);
    });
}

/// Connects an upstream to the destination of a SYN, which may be a repeated one, then has the kernel connect the application. Returns the relay between both. The application's
/// connection keeps at most `unread_bytes`, times what loopback adds.
async fn open(
    proxy: Arc<Proxy>,
    openings: Arc<PodOpenings>,
    (destination, is_repeated): (SocketAddr, bool),
    to_open: ToOpen,
    unread_bytes: Option<u32>,
) -> Option<Carried> {
    let ToOpen { ends, id, mut accepted } = to_open;
    let pod = &openings.pod;
    let Some(source) = source(pod, ends.client, destination) else {
        let refusal = Refusal::new(RefusalReason::NoDestination, "the source address is not the pod's");
        openings.refuse(&ends, id, refusal.connect_end);
        proxy.report(Reporter::Source, Addresses { source: ends.client, destination }, refusal);
        return None;
    };
    let addresses = Addresses { source, destination };
    let (reached, early) = {
        let reaching = reach(&proxy, pod, addresses, None);
        tokio::pin!(reaching);
        // A SYN can reach the listener without this agent: while the heartbeat was stale, or through another agent.
        let mut early = None;
        loop {
            tokio::select! {
                biased;
                reached = &mut reaching => break (reached, early),
                connection = &mut accepted, if early.is_none() => match connection {
                    Ok(connection) => early = Some(connection),
                    Err(_) => return None,
                },
            }
        }
    };
    let (upstream, endpoint) = match reached {
        Ok(reached) => reached,
        Err(refusal) => {
            // A connection that was accepted early is reset when it is dropped, as its listener is set up.
            openings.refuse(&ends, id, refusal.connect_end);
            // A connection that is not answered is opened again with each repetition of its SYN.
            if !(is_repeated && refusal.connect_end == ConnectEnd::Unanswered) {
                proxy.report(Reporter::Source, addresses, refusal);
            }
            return None;
        }
    };
    let connection = match early {
        Some(connection) => connection,
        None if openings.deliver(&ends, id) => {
            accept_delivered(&proxy, &openings);
            relay::connection_proceeds();
            let delivered = timeout(DELIVERED_MAX, accepted).await;
            openings.forget(&ends, id);
            // Its application has closed it, or does not answer the listener.
            delivered.ok()?.ok()?
        }
        None => return None,
    };
    bound_unread(&connection, unread_bytes);
    match AppStream::of(connection.into()) {
        Ok(app) => Some(carry(proxy, pod.clone(), (app, Some(ends)), upstream, endpoint.map(Box::new))),
        Err(error) => {
            tracing::error!(%error, "a connection cannot be polled, and is dropped");
            None
        }
    }
}
