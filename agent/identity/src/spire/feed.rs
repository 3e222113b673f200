//! A stream of the SPIRE agent that is opened again whenever it ends. The latest message stays.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderValue};
use tacit_core::spiffe::TrustDomain;
use tacit_grpc::{Channel, Receiver};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::warn;

use super::{
    SpireError,
    api::{self, BundlesResponse, Empty, Selector, SvidsRequest, SvidsResponse, WorkloadResponse},
    bundles::Bundles,
    socket,
    svids::{self, Svid},
};

/// Limit for the connection, and for the first message after which its absence is reported.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Pause after a stream that ended; doubles with each further one that brought no message.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause: a SPIRE agent that comes back is noticed within about half a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The stream that is requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// SVIDs of the workload with these selectors.
    Svids(Vec<Selector>),
    /// Bundles of all trust domains.
    Bundles,
    /// SVIDs and bundles of the agent's own process.
    Own,
}

/// The latest messages of a stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Feed {
    pub(super) svids: Option<Arc<Vec<Svid>>>,
    pub(super) bundles: Option<Arc<Bundles>>,
    /// The reason why the latest message was refused or the stream has ended; `None` after a good message.
    pub(super) problem: Option<Arc<SpireError>>,
    /// Time of the latest message.
    pub(super) answered: Option<SystemTime>,
}

/// The socket, and the trust domain whose roots are required.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) trust_domain: TrustDomain,
}

enum Stream {
    Svids(Receiver<SvidsResponse>),
    Bundles(Receiver<BundlesResponse>),
    Own(Receiver<WorkloadResponse>),
}

/// Keeps `feed` current. Returns never.
pub(super) async fn follow(source: Source, asked: Asked, feed: watch::Sender<Feed>) {
    let mut failures = 0;
    loop {
        let before = feed.borrow().answered;
        let Err(problem) = run(&source, &asked, &feed).await;
        failures = if feed.borrow().answered == before { failures + 1 } else { 1 };
        feed.send_modify(|feed| feed.problem = Some(Arc::new(problem)));
        sleep(pause(failures, jitter())).await;
    }
}

/// Opens the stream and reads it until it ends.
async fn run(
    source: &Source,
    asked: &Asked,
    feed: &watch::Sender<Feed>,
) -> Result<std::convert::Infallible, SpireError> {
    let opened = timeout(ANSWER_MAX, open(source, asked)).await;
    let mut stream = opened.unwrap_or_else(|_| Err(source.silent()))?;
    let mut is_first = true;
    loop {
        let message = {
            let mut message = std::pin::pin!(stream.message());
            match timeout(ANSWER_MAX, message.as_mut()).await {
                Ok(message) => message,
                Err(_) => {
                    // A SPIRE agent may wait until there is an entry. The stream stays open.
                    if is_first {
                        feed.send_modify(|feed| feed.problem = Some(Arc::new(source.silent())));
                    }
                    message.await
                }
            }
        };
        is_first = false;
        let message = message.map_err(|e| source.call(e))?.ok_or_else(|| source.ended())?;
        let read = source.read(message);
        feed.send_modify(|feed| {
            feed.answered = Some(SystemTime::now());
            match read {
                Ok(Update { svids, bundles, problem }) => {
                    feed.svids = svids.or(feed.svids.take());
                    feed.bundles = bundles.or(feed.bundles.take());
                    feed.problem = problem.map(Arc::new);
                }
                Err(problem) => feed.problem = Some(Arc::new(problem)),
            }
        });
    }
}

async fn open(source: &Source, asked: &Asked) -> Result<Stream, SpireError> {
    let channel: Channel = socket::connect(&source.path).await?;
    let mut metadata = HeaderMap::new();
    let stream = match asked {
        Asked::Svids(selectors) => {
            let request = SvidsRequest { selectors: selectors.clone() };
            channel.server_stream(api::SUBSCRIBE_SVIDS, &metadata, &request).await.map(Stream::Svids)
        }
        Asked::Bundles => {
            channel.server_stream(api::SUBSCRIBE_BUNDLES, &metadata, &Empty {}).await.map(Stream::Bundles)
        }
        Asked::Own => {
            metadata.insert(api::WORKLOAD_HEADER, HeaderValue::from_static("true"));
            channel.server_stream(api::FETCH_SVIDS, &metadata, &Empty {}).await.map(Stream::Own)
        }
    };
    stream.map_err(|e| source.call(e))
}

/// A message of any of the streams.
enum Answer {
    Svids(SvidsResponse),
    Bundles(BundlesResponse),
    Own(WorkloadResponse),
}

impl Stream {
    async fn message(&mut self) -> Result<Option<Answer>, tacit_grpc::CallError> {
        Ok(match self {
            Self::Svids(stream) => stream.message().await?.map(Answer::Svids),
            Self::Bundles(stream) => stream.message().await?.map(Answer::Bundles),
            Self::Own(stream) => stream.message().await?.map(Answer::Own),
        })
    }
}

/// The good parts of a message, and the reason why the rest is refused.
#[derive(Default)]
struct Update {
    svids: Option<Arc<Vec<Svid>>>,
    bundles: Option<Arc<Bundles>>,
    problem: Option<SpireError>,
}

impl Source {
    /// Reads a message.
    fn read(&self, answer: Answer) -> Result<Update, SpireError> {
        match answer {
            Answer::Svids(answer) => {
                Ok(Update { svids: Some(Arc::new(svids::delegated(answer))), ..Update::default() })
            }
            Answer::Bundles(answer) => {
                let bundles = answer.bundles.iter().map(|(name, der)| (name.as_str(), der.as_slice()));
                Ok(Update { bundles: Some(self.bundles(bundles)?), ..Update::default() })
            }
            Answer::Own(answer) => {
                let own = answer.svids.iter().find(|svid| self.is_own(&svid.id));
                let own = own.map(|svid| (self.trust_domain.as_str(), svid.bundle.as_slice()));
                let federated = answer.federated.iter().map(|(name, der)| (name.as_str(), der.as_slice()));
                // Without an SVID there is no bundle either, and the missing entry is what has to be reported.
                let bundles = match answer.svids.is_empty() {
                    true => None,
                    false => Some(self.bundles(own.into_iter().chain(federated))?),
                };
                // A root may be gone from the bundle: it counts whatever came with it.
                let (svids, problem) = match svids::own(answer) {
                    Ok(svids) => (Some(Arc::new(svids)), None),
                    Err(error) => (None, Some(SpireError::Svids(error.to_string()))),
                };
                Ok(Update { svids, bundles, problem })
            }
        }
    }

    fn is_own(&self, id: &str) -> bool {
        let rest = id.strip_prefix("spiffe://").and_then(|id| id.strip_prefix(self.trust_domain.as_str()));
        rest.is_some_and(|rest| rest.starts_with('/'))
    }

    fn bundles<'a>(
        &self,
        bundles: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<Arc<Bundles>, SpireError> {
        let domain = &self.trust_domain;
        let failed = |problem| SpireError::Bundle { trust_domain: domain.clone(), problem };
        let bundles = Bundles::read(bundles, domain, SystemTime::now()).map_err(failed)?;
        if let Some(problem) = bundles.left_out.first() {
            let more = bundles.left_out.len() - 1;
            warn!(%problem, more, "bundles of SPIRE for other trust domains are left out");
        }
        Ok(Arc::new(bundles))
    }

    fn call(&self, source: tacit_grpc::CallError) -> SpireError {
        SpireError::Call { path: self.path.clone(), source }
    }

    fn silent(&self) -> SpireError {
        SpireError::Silent { path: self.path.clone(), limit: ANSWER_MAX }
    }

    fn ended(&self) -> SpireError {
        SpireError::Call { path: self.path.clone(), source: tacit_grpc::CallError::Ended }
    }
}

/// Returns the pause after this many streams in a row, the latest included, that brought no message after their first end.
fn pause(failures: u32, jitter: u8) -> Duration {
    let full = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_PAUSE);
    full * 3 / 4 + full * u32::from(jitter) / 510
}

fn jitter() -> u8 {
    crate::manager::jitter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_have_jitter() {
        for (failures, jitter, millis) in [
            (0, 0, 750),
            (1, 0, 750),
            (1, 255, 1250),
            (2, 0, 1500),
            (3, 0, 3000),
            (6, 0, 22_500),
            (u32::MAX, 255, 37_500),
        ] {
            assert_eq!(pause(failures, jitter), Duration::from_millis(millis), "{failures} {jitter}");
        }
    }
}
