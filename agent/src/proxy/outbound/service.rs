//! A captured connection to a service: an endpoint is chosen for it, and another when the first does not answer.
//!
//! The application keeps the service's address as its peer: the kernel remembers what was asked for. No byte of it was
//! sent before an endpoint has accepted, so trying another one repeats nothing. What an endpoint refuses by policy is
//! not tried elsewhere: the answer would depend on chance.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tacit_core::{
    balance::{EndpointRequest, PickedEndpoint},
    directory::{NoEndpoint, Service},
    refusal::{Fault, Refusal},
};
use tokio::net::TcpStream;

use super::{Addresses, Attempt, PEER_CONNECT, Pod, Proxy, Way};

/// Endpoints that are tried for one connection.
const TRIES: usize = 3;
/// How long an endpoint may take to answer while there may be another: the first SYN and its repetition after a second
/// are lost by then.
const TRY_CONNECT: Duration = Duration::from_secs(2);

/// Makes a way to an endpoint of `service`, which counts as loaded until the answer's second part is dropped.
pub(super) async fn reach(
    path: &Proxy,
    pod: &Pod,
    service: &Arc<Service>,
    asked: Addresses,
    app: &TcpStream,
) -> Result<(Way, Option<PickedEndpoint>), Refusal> {
    let request = EndpointRequest {
        service,
        address: asked.destination,
        client: asked.source.ip(),
        node: &pod.workload.node,
    };
    let mut tried = Vec::with_capacity(TRIES);
    let mut last: Option<Refusal> = None;
    loop {
        let held = match path.balancer.pick(&request, &tried, Instant::now()) {
            Ok(held) => held,
            Err(none) => {
                return Err(last.filter(|_| none == NoEndpoint::AllTried).unwrap_or_else(|| {
                    Refusal::new(none.reason(), format!("{}/{}: {none}", service.namespace, service.name))
                }));
            }
        };
        let addresses = Addresses { source: asked.source, destination: held.endpoint() };
        tried.push(addresses.destination);
        let is_last = tried.len() == TRIES || !path.balancer.has_more(&request, &tried);
        let attempt = if is_last {
            Attempt { limit: PEER_CONNECT, optimistic: Some(app) }
        } else {
            Attempt { limit: TRY_CONNECT, optimistic: None }
        };
        let directory = super::discover(path, addresses.destination).await;
        let route = super::find_route(path, pod, &directory, addresses.destination);
        match super::reach(path, pod, route, addresses, attempt).await {
            Ok(way) => {
                path.balancer.record_affinity(&request, held.endpoint(), Instant::now());
                return Ok((way, Some(held)));
            }
            Err(refusal) if refusal.reason.fault() == Fault::Destination && !is_last => {
                tracing::debug!(service = %service.name, endpoint = %addresses.destination, reason = refusal.reason.label(), "next endpoint");
                last = Some(refusal);
            }
            Err(refusal) => {
                return Err(Refusal {
                    detail: format!("{}: {}", addresses.destination, refusal.detail),
                    ..refusal
                });
            }
        }
    }
}
