//! SPIRE agents of two nodes with one CA. They issue an SVID for whatever namespace and service account is asked for.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    SerialNumber,
};
use tacit_grpc::server::{Call, Connection};
use tacit_identity::spire::api::{
    self, BundlesResponse, Empty, Svid, SvidWithKey, SvidsRequest, SvidsResponse,
};
use tacit_topology::MeshFiles;
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::Runtime,
    sync::watch,
    task::JoinHandle,
};

/// First byte of the serial numbers of SVIDs, in hexadecimal.
pub(crate) const SERIAL_START: &str = "51";

/// The SPIRE agents. Dropping it ends them.
pub(crate) struct Spire {
    runtime: Runtime,
    ca: Arc<Mutex<Ca>>,
    changes: Changes<watch::Sender<()>>,
    listening: HashMap<PathBuf, JoinHandle<()>>,
}

/// Told after each change of the bundle, and of the SVIDs.
#[derive(Clone)]
struct Changes<T> {
    bundle: T,
    svids: T,
}

struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Roots of the bundle, in DER.
    roots: Vec<Vec<u8>>,
    /// Service accounts that get the SVID of another one.
    confused: HashMap<String, String>,
    issued: u32,
}

impl Spire {
    pub(crate) fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let issuer = root()?;
        let roots = vec![issuer.der().to_vec()];
        let ca = Ca { issuer, roots, confused: HashMap::new(), issued: 0 };
        let changes = Changes { bundle: watch::Sender::new(()), svids: watch::Sender::new(()) };
        Ok(Self { runtime, ca: Arc::new(Mutex::new(ca)), changes, listening: HashMap::new() })
    }

    /// Starts the SPIRE agent at `socket`.
    pub(crate) fn listen(&mut self, socket: &Path) -> Result<()> {
        let _ = std::fs::remove_file(socket);
        let _inside = self.runtime.enter();
        let listener = UnixListener::bind(socket).with_context(|| format!("bind {}", socket.display()))?;
        let Changes { bundle, svids } = &self.changes;
        let changes = Changes { bundle: bundle.subscribe(), svids: svids.subscribe() };
        let served = serve(listener, self.ca.clone(), changes);
        self.listening.insert(socket.to_owned(), self.runtime.spawn(served));
        Ok(())
    }

    /// Ends the SPIRE agent at `socket`, with its connections.
    pub(crate) fn stop(&mut self, socket: &Path) -> Result<()> {
        let task = self.listening.remove(socket).context("not started")?;
        task.abort();
        let _ = self.runtime.block_on(task);
        Ok(())
    }

    /// Makes a new root, trusted beside the old ones. SVIDs are still of the old one.
    pub(crate) fn publish_new_root(&self) -> Result<CertifiedIssuer<'static, KeyPair>> {
        let new = root()?;
        self.change(|ca| ca.roots.push(new.der().to_vec()), &self.changes.bundle);
        Ok(new)
    }

    /// Issues all SVIDs anew, by `issuer`.
    pub(crate) fn issue_by(&self, issuer: CertifiedIssuer<'static, KeyPair>) {
        self.change(|ca| ca.issuer = issuer, &self.changes.svids);
    }

    /// Takes the roots other than that of the current issuer out of the bundle.
    pub(crate) fn remove_old_roots(&self) {
        self.change(|ca| ca.roots = vec![ca.issuer.der().to_vec()], &self.changes.bundle);
    }

    /// Gives service account `account` the SVID of `other`.
    pub(crate) fn confuse(&self, account: &str, other: &str) {
        let change = |ca: &mut Ca| drop(ca.confused.insert(account.to_owned(), other.to_owned()));
        self.change(change, &self.changes.svids);
    }

    fn change(&self, change: impl FnOnce(&mut Ca), told: &watch::Sender<()>) {
        change(&mut self.ca.lock().expect("no panic"));
        told.send_replace(());
    }
}

fn root() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let uri = format!("spiffe://{}", MeshFiles::TRUST_DOMAIN).try_into()?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

impl Ca {
    fn bundles(&self) -> BundlesResponse {
        let id = format!("spiffe://{}", MeshFiles::TRUST_DOMAIN);
        BundlesResponse { bundles: BTreeMap::from([(id, self.roots.concat())]) }
    }

    fn svids(&mut self, request: &SvidsRequest) -> Result<SvidsResponse> {
        let value = |kind: &str| {
            let selectors = request.selectors.iter().filter(|selector| selector.r#type == "k8s");
            selectors.filter_map(|selector| selector.value.strip_prefix(kind)?.strip_prefix(':')).next()
        };
        let (namespace, account) = (value("ns").context("no namespace")?, value("sa").context("no account")?);
        let account = self.confused.get(account).map_or(account, String::as_str);
        let id = format!("spiffe://{}/ns/{namespace}/sa/{account}", MeshFiles::TRUST_DOMAIN);
        self.issued += 1;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let serial = [&[0x51], self.issued.to_be_bytes().as_slice()].concat();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + Duration::from_secs(3600)).into();
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        let svid = Svid { chain: vec![leaf.der().to_vec()] };
        Ok(SvidsResponse { svids: vec![SvidWithKey { svid: Some(svid), key: key.serialize_der() }] })
    }
}

async fn serve(listener: UnixListener, ca: Arc<Mutex<Ca>>, changes: Changes<watch::Receiver<()>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                connections.spawn(connection(stream, ca.clone(), changes.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: UnixStream, ca: Arc<Mutex<Ca>>, changes: Changes<watch::Receiver<()>>) {
    let Ok(mut connection) = Connection::open(stream, api::MESSAGE_MAX_BYTES).await else { return };
    let mut calls = tokio::task::JoinSet::new();
    while let Some(call) = connection.next().await {
        calls.spawn(answer(call, ca.clone(), changes.clone()));
    }
}

/// Sends an answer now and after each change, until the client is gone.
async fn answer(call: Call, ca: Arc<Mutex<Ca>>, mut changes: Changes<watch::Receiver<()>>) {
    if call.path == api::SUBSCRIBE_BUNDLES {
        let (_requests, mut replies) = call.start::<Empty, BundlesResponse>();
        loop {
            let bundles = ca.lock().expect("no panic").bundles();
            if replies.send(&bundles).await.is_err() || changes.bundle.changed().await.is_err() {
                return;
            }
        }
    }
    assert_eq!(call.path, api::SUBSCRIBE_SVIDS, "the method");
    let (mut requests, mut replies) = call.start::<SvidsRequest, SvidsResponse>();
    let request = requests.message().await.expect("whole").expect("one");
    loop {
        let svids = ca.lock().expect("no panic").svids(&request).expect("an SVID");
        if replies.send(&svids).await.is_err() || changes.svids.changed().await.is_err() {
            return;
        }
    }
}
