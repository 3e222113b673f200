//! A simulated SPIRE agent, and the CA behind it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use h2::Reason;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tacit_grpc::{
    Status,
    server::{Call, Connection, Replies},
};
use tacit_testing::Scratch;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Mutex as AsyncMutex, mpsc},
};
use tokio_util::task::AbortOnDropHandle;

use super::super::api::{
    self, BundlesResponse, Empty, Svid, SvidWithKey, SvidsRequest, SvidsResponse, WorkloadResponse,
    WorkloadSvid,
};
use crate::template::leaf_params;

/// The next event of a stream.
#[derive(Debug, Clone)]
pub(super) enum Step<M> {
    /// A message.
    Send(M),
    /// The end, with a status.
    End(Status),
    /// RST_STREAM.
    Reset,
    /// The first half of a message, and the end of the connection.
    Half,
    /// The end of the connection.
    Close,
}

/// The steps of one method. The current stream waits for the next one.
struct Script<M> {
    sender: mpsc::UnboundedSender<Step<M>>,
    receiver: Arc<AsyncMutex<mpsc::UnboundedReceiver<Step<M>>>>,
    /// Sent to each new stream first, as SPIRE does, with the number of messages so far.
    latest: Arc<Mutex<(usize, Option<M>)>>,
}

impl<M: Message + Default + Clone + 'static> Script<M> {
    fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { sender, receiver: Arc::new(AsyncMutex::new(receiver)), latest: Arc::default() }
    }

    fn push(&self, step: Step<M>) {
        self.sender.send(step).expect("the script lives");
    }

    async fn play(&self, mut replies: Replies<M>, connection: &AbortConnection) {
        let (sent, latest) = self.latest.lock().expect("whole").clone();
        if let Some(message) = latest
            && replies.send(&message).await.is_err()
        {
            return;
        }
        // A stream that was replaced gives up the lock with the first message for which it has no reader.
        let mut steps = self.receiver.lock().await;
        let (count, latest) = self.latest.lock().expect("whole").clone();
        if let Some(message) = latest.filter(|_| count != sent)
            && replies.send(&message).await.is_err()
        {
            return;
        }
        while let Some(step) = steps.recv().await {
            match step {
                Step::Send(message) => {
                    {
                        let mut latest = self.latest.lock().expect("whole");
                        *latest = (latest.0 + 1, Some(message.clone()));
                    }
                    if replies.send(&message).await.is_err() {
                        // This stream was replaced: the next one sends it first.
                        return;
                    }
                }
                Step::End(status) => {
                    let _ = replies.finish(&status).await;
                    return;
                }
                Step::Reset => return replies.reset(Reason::INTERNAL_ERROR),
                Step::Half => {
                    let _ = replies.send_raw(&[0, 0, 0, 0, 9, 1, 2]).await;
                    tokio::task::yield_now().await;
                    return connection.close();
                }
                Step::Close => return connection.close(),
            }
        }
    }
}

/// Ends a connection.
struct AbortConnection(tokio_util::sync::CancellationToken);

impl AbortConnection {
    fn close(&self) {
        self.0.cancel();
    }
}

struct Scripts {
    svids: Script<SvidsResponse>,
    bundles: Script<BundlesResponse>,
    own: Script<WorkloadResponse>,
    selectors: Mutex<Vec<Vec<String>>>,
    opened: AtomicUsize,
}

/// A SPIRE agent at a socket of its own.
pub(super) struct Spire {
    socket: PathBuf,
    scripts: Arc<Scripts>,
    _scratch: Scratch,
    _task: AbortOnDropHandle<()>,
}

impl Spire {
    pub(super) fn start() -> Self {
        let scratch = Scratch::new();
        let socket = scratch.path().join("admin.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        let scripts = Arc::new(Scripts {
            svids: Script::new(),
            bundles: Script::new(),
            own: Script::new(),
            selectors: Mutex::default(),
            opened: AtomicUsize::new(0),
        });
        let task = tokio::spawn(serve(listener, scripts.clone()));
        Self { socket, scripts, _scratch: scratch, _task: AbortOnDropHandle::new(task) }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn svids(&self, step: Step<SvidsResponse>) {
        self.scripts.svids.push(step);
    }

    pub(super) fn bundles(&self, step: Step<BundlesResponse>) {
        self.scripts.bundles.push(step);
    }

    pub(super) fn own(&self, step: Step<WorkloadResponse>) {
        self.scripts.own.push(step);
    }

    /// Returns the selectors of all streams of SVIDs so far.
    pub(super) fn selectors(&self) -> Vec<Vec<String>> {
        self.scripts.selectors.lock().expect("whole").clone()
    }

    /// Returns the number of streams of SVIDs so far.
    pub(super) fn opened(&self) -> usize {
        self.scripts.opened.load(SeqCst)
    }
}

async fn serve(listener: UnixListener, scripts: Arc<Scripts>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(connection(stream, scripts.clone()));
    }
}

async fn connection(stream: UnixStream, scripts: Arc<Scripts>) {
    let Ok(mut connection) = Connection::open(stream, api::MESSAGE_MAX_BYTES).await else { return };
    let closed = tokio_util::sync::CancellationToken::new();
    loop {
        tokio::select! {
            call = connection.next() => {
                let Some(call) = call else { break };
                let (scripts, closed) = (scripts.clone(), AbortConnection(closed.clone()));
                tokio::spawn(async move { answer(call, &scripts, &closed).await });
            }
            () = closed.cancelled() => break,
        }
    }
}

async fn answer(call: Call, scripts: &Scripts, connection: &AbortConnection) {
    match call.path.as_str() {
        api::SUBSCRIBE_SVIDS => {
            let (mut requests, replies) = call.start::<SvidsRequest, SvidsResponse>();
            let request = requests.message().await.expect("whole").expect("one");
            let selectors = request.selectors.iter().map(ToString::to_string).collect();
            scripts.selectors.lock().expect("whole").push(selectors);
            scripts.opened.fetch_add(1, SeqCst);
            scripts.svids.play(replies, connection).await;
        }
        api::SUBSCRIBE_BUNDLES => {
            let (_requests, replies) = call.start::<Empty, BundlesResponse>();
            scripts.bundles.play(replies, connection).await;
        }
        path => {
            assert_eq!(path, api::FETCH_SVIDS);
            assert_eq!(call.headers.get(api::WORKLOAD_HEADER).expect("sent"), "true");
            let (_requests, replies) = call.start::<Empty, WorkloadResponse>();
            scripts.opened.fetch_add(1, SeqCst);
            scripts.own.play(replies, connection).await;
        }
    }
}

/// A CA of a trust domain.
pub(super) struct Ca {
    domain: String,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    pub(super) fn new(domain: &str) -> Self {
        Self::until(domain, SystemTime::now() + Duration::from_secs(3600))
    }

    /// A CA whose root has expired.
    pub(super) fn expired(domain: &str) -> Self {
        Self::until(domain, SystemTime::now() - Duration::from_secs(60))
    }

    fn until(domain: &str, not_after: SystemTime) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = SystemTime::UNIX_EPOCH.into();
        params.not_after = not_after.into();
        let uri = format!("spiffe://{domain}").try_into().expect("ascii");
        params.subject_alt_names = vec![SanType::URI(uri)];
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("signed");
        Self { domain: domain.to_owned(), issuer }
    }

    fn root(&self) -> Vec<u8> {
        self.issuer.der().to_vec()
    }

    fn id(&self) -> String {
        format!("spiffe://{}", self.domain)
    }

    pub(super) fn bundles(&self) -> BundlesResponse {
        BundlesResponse { bundles: BTreeMap::from([(self.id(), self.root())]) }
    }

    /// One bundle with the roots of both.
    pub(super) fn bundles_with(&self, next: &Self) -> BundlesResponse {
        let both = [self.root(), next.root()].concat();
        BundlesResponse { bundles: BTreeMap::from([(self.id(), both)]) }
    }

    /// A bundle for each.
    pub(super) fn bundles_and_those_of(&self, other: &Self) -> BundlesResponse {
        let bundles = [self, other].map(|ca| (ca.id(), ca.root()));
        BundlesResponse { bundles: BTreeMap::from(bundles) }
    }

    pub(super) fn svids(&self, ids: &[&str]) -> SvidsResponse {
        self.svids_for(ids, Duration::from_secs(3600))
    }

    /// SVIDs that expire after `lifetime`.
    pub(super) fn svids_for(&self, ids: &[&str], lifetime: Duration) -> SvidsResponse {
        let svid = |id: &&str| self.svid(id, SystemTime::now(), lifetime);
        SvidsResponse { svids: ids.iter().map(svid).collect() }
    }

    pub(super) fn expired_svids(&self, id: &str) -> SvidsResponse {
        let long_ago = SystemTime::now() - Duration::from_secs(7200);
        SvidsResponse { svids: vec![self.svid(id, long_ago, Duration::from_secs(3600))] }
    }

    fn svid(&self, id: &str, now: SystemTime, lifetime: Duration) -> SvidWithKey {
        let (chain, key) = self.leaf(id, now, lifetime);
        SvidWithKey { svid: Some(Svid { chain: vec![chain] }), key }
    }

    /// The answer of the Workload API.
    pub(super) fn own(&self, ids: &[&str]) -> WorkloadResponse {
        let svid = |id: &&str| {
            let (chain, key) = self.leaf(id, SystemTime::now(), Duration::from_secs(3600));
            WorkloadSvid { id: (*id).to_owned(), chain, key, bundle: self.root() }
        };
        WorkloadResponse { svids: ids.iter().map(svid).collect(), federated: BTreeMap::new() }
    }

    fn leaf(&self, id: &str, now: SystemTime, lifetime: Duration) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().expect("a key");
        let params = leaf_params(&[id.to_owned()], now, lifetime).expect("valid");
        let leaf = params.signed_by(&key, &self.issuer).expect("signed");
        (leaf.der().to_vec(), key.serialize_der())
    }
}
