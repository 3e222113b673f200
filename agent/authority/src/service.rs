//! Handles one request, from its headers to a certificate or a refusal.
//!
//! Checks run in order of cost: rate of the address, token, rate of the node, request content, pods, signing. The body is read
//! after the first three. Certificates and refusals are counted and logged with node, identity and serial number. Rate refusals
//! are logged once a second, with the number of suppressed ones.

use std::{
    fmt::Display,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{HeaderMap, body::Body, header::AUTHORIZATION};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_grpc::frame::unframe;
use tacit_identity::istio::api::{CertificateRequest, CertificateResponse};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{
    config::{Lifetimes, Rate},
    counters::Counters,
    refusal::RequestRefusal,
    request,
    signer::Issued,
};
use crate::{
    authn::{Authenticator, Caller},
    rate_limit::RateLimits,
    reconciler::Live,
};

/// Factor of the rate of an address over the rate of a node. Several agents share an address if the path to the authority is
/// masqueraded.
pub(super) const NODES_AT_ONE_ADDRESS: u32 = 16;

/// Timeout of a request. Agents give up after 10 s.
const REQUEST_MAX: Duration = Duration::from_secs(10);

/// Minimum interval of log lines about exceeded rates.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// The request handler.
pub(super) struct Service {
    live: Arc<ArcSwapOption<Live>>,
    authn: Arc<Authenticator>,
    trust_domain: TrustDomain,
    lifetimes: Lifetimes,
    by_address: Mutex<RateLimits<IpAddr>>,
    by_node: Mutex<RateLimits<String>>,
    counters: Arc<Counters>,
    /// Time of the last logged rate refusal, and the number of suppressed ones since.
    unlogged: Mutex<(Option<Instant>, u64)>,
}

/// The known fields of a request, for the log.
#[derive(Default)]
struct RequestContext {
    node: Option<String>,
    identity: Option<SpiffeId>,
}

impl Service {
    pub(super) fn new(
        live: Arc<ArcSwapOption<Live>>,
        authn: Arc<Authenticator>,
        trust_domain: TrustDomain,
        lifetimes: Lifetimes,
        rate: Rate,
        counters: Arc<Counters>,
    ) -> Self {
        let times = |number: u32| number.saturating_mul(NODES_AT_ONE_ADDRESS);
        let address_rate = Rate { per_second: times(rate.per_second), burst: times(rate.burst) };
        Self {
            live,
            authn,
            trust_domain,
            lifetimes,
            by_address: Mutex::new(RateLimits::new(address_rate)),
            by_node: Mutex::new(RateLimits::new(rate)),
            counters,
            unlogged: Mutex::default(),
        }
    }

    /// Answers the request in `body` from `peer` within `REQUEST_MAX`. The caller must bound the length of `body`.
    pub(super) async fn answer(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
        body: impl Body<Data = Bytes, Error: Display>,
    ) -> Result<CertificateResponse, RequestRefusal> {
        let mut asked = RequestContext::default();
        let late = |_| Err(RequestRefusal::NotReady(format!("the request took more than {REQUEST_MAX:?}")));
        let decided = timeout(REQUEST_MAX, self.decide(peer, headers, body, &mut asked)).await;
        let outcome = decided.unwrap_or_else(late);
        let node = asked.node.as_deref().unwrap_or("unknown");
        let identity = asked.identity.as_ref().map_or_else(|| "unknown".to_owned(), ToString::to_string);
        match outcome {
            Ok((issued, bundle)) => {
                self.counters.issued();
                let expires = time::OffsetDateTime::from(issued.not_after);
                info!(%peer, node, identity, serial = issued.serial, %expires, "certificate issued");
                Ok(CertificateResponse { cert_chain: issued.chain.into_iter().chain([bundle]).collect() })
            }
            Err(refusal) => {
                self.counters.refused(refusal.reason());
                if let Some(more) = self.to_log(&refusal) {
                    let reason = refusal.reason();
                    warn!(%peer, node, identity, reason, more, %refusal, "certificate refused");
                }
                Err(refusal)
            }
        }
    }

    /// Counts a connection of `peer` that was closed because of the limit.
    pub(super) fn count_rejected_connection(&self, peer: IpAddr) {
        self.counters.refused("connections");
        debug!(%peer, "connection limit of the address reached");
    }

    /// Returns the number of suppressed lines if `refusal` must be logged. Exceeded rates must not fill the log.
    fn to_log(&self, refusal: &RequestRefusal) -> Option<u64> {
        if !matches!(refusal, RequestRefusal::Rate { .. }) {
            return Some(0);
        }
        let mut unlogged = self.unlogged.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, more) = *unlogged;
        let due = since.is_none_or(|since| since.elapsed() >= LOG_PAUSE);
        *unlogged = if due { (Some(Instant::now()), 0) } else { (since, more + 1) };
        due.then_some(more)
    }

    async fn decide(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
        body: impl Body<Data = Bytes, Error: Display>,
        asked: &mut RequestContext,
    ) -> Result<(Issued, String), RequestRefusal> {
        take(&self.by_address, peer, peer.to_string())?;
        let token = bearer(headers).ok_or(RequestRefusal::NoToken)?;
        let caller: Caller = self.authn.authenticate(token).await?;
        asked.node = Some(caller.node.clone());
        take(&self.by_node, caller.node.clone(), caller.node.clone())?;
        let body = body.collect().await.map_err(|e| RequestRefusal::Message(e.to_string()))?.to_bytes();
        let message: CertificateRequest =
            unframe(&body).map_err(|e| RequestRefusal::Message(e.to_string()))?;
        asked.identity = message.impersonated().and_then(|id| SpiffeId::parse(id).ok());
        let own = caller.identity.as_ref();
        let wanted = request::read(&message, own, &self.trust_domain, self.lifetimes.leaf)?;
        asked.identity = Some(wanted.identity.clone());
        self.authn.allow(&caller, &wanted.identity).await?;
        let live = self
            .live
            .load_full()
            .ok_or_else(|| RequestRefusal::NotReady("there is no root yet".to_owned()))?;
        if live.stale(Instant::now()) {
            return Err(RequestRefusal::NotReady("the root store could not be read for too long".to_owned()));
        }
        let now = SystemTime::now();
        if live.signer.not_after <= now {
            return Err(RequestRefusal::NotReady("the intermediate has expired".to_owned()));
        }
        let issued = live.signer.issue(&wanted.identity, &wanted.key, wanted.lifetime, now);
        Ok((issued.map_err(|e| RequestRefusal::Sign(e.to_string()))?, live.bundle.clone()))
    }
}

fn take<K: Eq + std::hash::Hash>(
    limits: &Mutex<RateLimits<K>>,
    who: K,
    node: String,
) -> Result<(), RequestRefusal> {
    let mut limits = limits.lock().unwrap_or_else(PoisonError::into_inner);
    limits.take(who, Instant::now()).map_err(|again| RequestRefusal::Rate { node, again })
}

/// Returns the bearer token, if there is exactly one authorization header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let (one, None) = (all.next()?, all.next()) else { return None };
    let (scheme, token) = one.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_taken_from_exactly_one_bearer_header() {
        for (values, expected) in [
            (&["Bearer abc"][..], Some("abc")),
            (&["bearer abc"], Some("abc")),
            (&[], None),
            (&["Bearer "], None),
            (&["Bearer"], None),
            (&["Basic abc"], None),
            (&["Bearer abc", "Bearer abc"], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, value.parse().expect("a header"));
            }
            assert_eq!(bearer(&headers), expected, "{values:?}");
        }
    }
}
