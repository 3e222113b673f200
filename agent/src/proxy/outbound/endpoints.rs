//! The endpoints of a service for one captured connection, in the order in which they are tried.
//!
//! The application keeps the service's address as its peer: the kernel remembers the requested address. No byte of the
//! application is sent before an endpoint has accepted, so a try of another endpoint repeats nothing. After a refusal by
//! policy no other endpoint is tried, because the outcome would then depend on chance.

use std::{net::SocketAddr, time::Instant};

use tacit_core::{
    balance::{Balancer, EndpointRequest, PickedEndpoint},
    directory::NoEndpoint,
    refusal::{Fault, Refusal},
};

/// Endpoints that are tried for one connection.
const TRIES: usize = 3;

/// The endpoints that are left to try.
pub(super) struct Endpoints<'a> {
    balancer: &'a Balancer,
    request: EndpointRequest<'a>,
    tried: Vec<SocketAddr>,
    last: Option<Refusal>,
}

/// An endpoint to try.
pub(super) struct Candidate {
    picked: PickedEndpoint,
    rest: Rest,
}

/// The candidates left after this one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// There is another.
    More,
    /// The candidate is the last.
    Nothing,
}

impl Candidate {
    /// Returns the endpoint's address.
    pub(super) fn address(&self) -> SocketAddr {
        self.picked.endpoint()
    }

    /// Returns whether another endpoint may be tried after this one.
    pub(super) fn rest(&self) -> Rest {
        self.rest
    }
}

impl<'a> Endpoints<'a> {
    /// Returns the endpoints for a connection.
    pub(super) fn new(balancer: &'a Balancer, request: EndpointRequest<'a>) -> Self {
        Self { balancer, request, tried: Vec::with_capacity(TRIES), last: None }
    }

    /// Chooses the next endpoint, which counts as loaded until the candidate is dropped.
    ///
    /// # Errors
    /// The refusal of the connection, if no endpoint is left.
    pub(super) fn choose(&mut self) -> Result<Candidate, Refusal> {
        let picked = self.balancer.pick(&self.request, &self.tried, Instant::now()).map_err(|none| {
            let service = self.request.service;
            let last = self.last.take().filter(|_| none == NoEndpoint::AllTried);
            last.unwrap_or_else(|| {
                Refusal::new(none.reason(), format!("{}/{}: {none}", service.namespace, service.name))
            })
        })?;
        self.tried.push(picked.endpoint());
        let is_last = self.tried.len() == TRIES || !self.balancer.has_more(&self.request, &self.tried);
        Ok(Candidate { picked, rest: if is_last { Rest::Nothing } else { Rest::More } })
    }

    /// Remembers the endpoint that the client is connected to, and returns its load.
    pub(super) fn connected(&self, candidate: Candidate) -> PickedEndpoint {
        self.balancer.record_affinity(&self.request, candidate.address(), Instant::now());
        candidate.picked
    }

    /// Records a refused candidate.
    ///
    /// # Errors
    /// The refusal of the connection, if no other endpoint may be tried.
    pub(super) fn refused(&mut self, candidate: &Candidate, refusal: Refusal) -> Result<(), Refusal> {
        let endpoint = candidate.address();
        if refusal.reason.is_silence() {
            self.balancer.avoid(self.request.client, endpoint, Instant::now());
        }
        if refusal.reason.fault() == Fault::Destination && candidate.rest == Rest::More {
            let (service, reason) = (&self.request.service.name, refusal.reason.label());
            tracing::debug!(%service, %endpoint, reason, "next endpoint");
            self.last = Some(refusal);
            return Ok(());
        }
        Err(Refusal { detail: format!("{endpoint}: {}", refusal.detail), ..refusal })
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tacit_core::{
        directory::{
            Affinity, Endpoint, EndpointCondition, Endpoints as Ready, InternalTrafficPolicy, Service,
            ServicePort,
        },
        refusal::RefusalReason,
    };

    use super::*;

    #[test]
    fn an_endpoint_that_does_not_answer_is_followed_by_another_up_to_the_limit() {
        for (count, tries) in [(1, 1), (2, 2), (5, TRIES)] {
            let (balancer, service) = (Balancer::default(), service(count));
            let mut endpoints = Endpoints::new(&balancer, request(&service));
            let mut tried = Vec::new();
            let refusal = loop {
                let candidate = endpoints.choose().expect("one is left");
                assert!(!tried.contains(&candidate.address()), "tried twice");
                tried.push(candidate.address());
                let unreachable = Refusal::new(RefusalReason::PeerUnreachable, "down");
                if let Err(refusal) = endpoints.refused(&candidate, unreachable) {
                    break refusal;
                }
            };
            assert_eq!(tried.len(), tries, "of {count}");
            let detail = format!("{}: down", tried[tries - 1]);
            assert_eq!(refusal, Refusal::new(RefusalReason::PeerUnreachable, detail));
        }
    }

    #[test]
    fn an_endpoint_that_does_not_answer_is_not_tried_by_the_next_connection() {
        let (balancer, service) = (Balancer::default(), service(2));
        for reason in [RefusalReason::PeerUnreachable, RefusalReason::ConnectionRefused] {
            let mut first = Endpoints::new(&balancer, request(&service));
            let candidate = first.choose().expect("two are left");
            first.refused(&candidate, Refusal::new(reason, "down")).expect("another is left");
            let others = (0..50).map(|_| Endpoints::new(&balancer, request(&service)).choose().expect("one"));
            let is_avoided =
                others.collect::<Vec<_>>().iter().all(|other| other.address() != candidate.address());
            assert_eq!(is_avoided, reason == RefusalReason::PeerUnreachable, "{reason:?}");
            balancer.avoid(request(&service).client, candidate.address(), Instant::now());
        }
    }

    #[test]
    fn no_other_endpoint_is_tried_after_a_refusal_by_policy() {
        let (balancer, service) = (Balancer::default(), service(3));
        let mut endpoints = Endpoints::new(&balancer, request(&service));
        let candidate = endpoints.choose().expect("three are left");
        let denied = Refusal::new(RefusalReason::Policy, "denied");
        let refusal = endpoints.refused(&candidate, denied).expect_err("refused");
        assert_eq!(refusal.reason, RefusalReason::Policy);
    }

    #[test]
    fn a_service_without_a_ready_endpoint_is_refused() {
        let (balancer, service) = (Balancer::default(), service(0));
        let refusal = Endpoints::new(&balancer, request(&service)).choose().err().expect("refused");
        assert_eq!(refusal.reason, RefusalReason::NoEndpoint);
        assert_eq!(refusal.detail, "shop/web: no endpoint of the service is ready");
    }

    fn service(endpoints: u8) -> Service {
        let endpoint = |i: u8| Endpoint { address: SocketAddr::from(([10, 0, 0, i], 80)), node: "b".into() };
        let ipv4 = Ready::new((1..=endpoints).map(|i| (endpoint(i), EndpointCondition::Ready)));
        Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![IpAddr::from([10, 96, 0, 1])],
            external_ips: Vec::new(),
            ingress_ips: Vec::new(),
            udp_ports: Vec::new(),
            ports: vec![ServicePort { port: 80, node_port: None, ipv4, ipv6: Ready::default() }],
            traffic: InternalTrafficPolicy::Cluster,
            affinity: Affinity::None,
        }
    }

    fn request(service: &Service) -> EndpointRequest<'_> {
        let address = SocketAddr::from(([10, 96, 0, 1], 80));
        EndpointRequest { service, address, client: IpAddr::from([10, 77, 1, 2]), node: "a" }
    }
}
