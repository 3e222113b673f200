//! `authority.yaml`: the configuration of `tacit authority`, read once at start.
//!
//! Every field with unit, default and effect is in `deploy/authority.schema.json`, which a test keeps in step with this
//! file. All mistakes are reported together. Relative paths are relative to the folder of the file.

use std::{
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use tacit_core::{
    spiffe::TrustDomain,
    yaml::{self, Fields, Mistakes, Value},
};
use tacit_identity::issuer::{LEAF_LIFETIME, LEAF_LIFETIME_RANGE};
use tacit_sources::file::{self, LoadError};

const FIELDS: [&str; 11] = [
    "trustDomain",
    "listen",
    "names",
    "metrics",
    "root",
    "bundle",
    "agents",
    "staticPods",
    "leafLifetime",
    "intermediateLifetime",
    "rate",
];
const ROOT_FIELDS: [&str; 3] = ["secret", "directory", "lifetime"];
const BUNDLE_FIELDS: [&str; 4] = ["configMap", "namespace", "key", "file"];
const AGENTS_FIELDS: [&str; 4] = ["serviceAccounts", "audience", "tokens", "directory"];
const STATIC_PODS_FIELDS: [&str; 1] = ["namespaces"];
const RATE_FIELDS: [&str; 2] = ["perSecond", "burst"];

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 15012);
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15020);
const NAME: &str = "tacit-authority.tacit-system.svc";
const NAMES_MAX: usize = 16;
const SERVICE_ACCOUNTS_MAX: usize = 16;
/// Static pods are those of the control plane and of the node's own services. They have one or a few namespaces.
const STATIC_POD_NAMESPACES_MAX: usize = 16;
/// Longest name of a namespace, a DNS label (RFC 1123).
const NAMESPACE_MAX_BYTES: usize = 63;
const AUDIENCE: &str = "tacit-authority";
const BUNDLE_KEY: &str = "root-cert.pem";
const DAY: Duration = Duration::from_secs(24 * 3600);
const ROOT_LIFETIME: Duration = DAY.saturating_mul(3650);
const INTERMEDIATE_LIFETIME: Duration = DAY.saturating_mul(7);
/// The minimum also depends on the lifetimes below, see [`Config::check_lifetimes`].
const ROOT_LIFETIME_RANGE: RangeInclusive<Duration> = Duration::from_secs(250)..=DAY.saturating_mul(7300);
const INTERMEDIATE_LIFETIME_RANGE: RangeInclusive<Duration> =
    Duration::from_secs(50)..=DAY.saturating_mul(365);
/// See [`Config::check_lifetimes`].
const LEAVES_OF_AN_INTERMEDIATE: u32 = 5;
/// An agent requests a certificate for each service account of its node when it starts. A node has at most a few hundred pods.
const RATE: Rate = Rate { per_second: 10, burst: 300 };
const RATE_MAX: u32 = 10_000;

/// The configuration of an authority, with absolute paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Trust domain of every certificate.
    pub trust_domain: TrustDomain,
    /// Address of the CA API.
    pub listen: SocketAddr,
    /// DNS names of this server, 1 to 16.
    pub names: Vec<String>,
    /// Address of metrics and readiness.
    pub metrics: SocketAddr,
    /// The storage of the root.
    pub root: RootStorage,
    /// The target of the root bundle.
    pub bundle: BundleTarget,
    /// The agents that may request certificates.
    pub agents: Agents,
    /// Lifetimes of certificates.
    pub lifetimes: Lifetimes,
    /// Rate limit of a node.
    pub rate: Rate,
}

/// Lifetimes of certificates. A root lives at least five times as long as an intermediate, and an intermediate as a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// Of a root that the authority creates.
    pub root: Duration,
    /// Of an intermediate.
    pub intermediate: Duration,
    /// Maximum of a workload's certificate.
    pub leaf: Duration,
}

/// The storage of the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootStorage {
    /// A Secret.
    Secret {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A folder on disk.
    Directory(PathBuf),
}

/// The target of the root bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundleTarget {
    /// A ConfigMap.
    ConfigMap {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// Its key.
        key: String,
    },
    /// A file.
    File(PathBuf),
}

/// The agents that may request certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agents {
    /// Pods of these service accounts, authenticated by TokenReview.
    Kubernetes {
        /// Namespace and name, 1 to 16.
        service_accounts: Vec<(String, String)>,
        /// Audience of the tokens.
        audience: String,
        /// Namespaces, 0 to 16, in which every node may get the identity `default`, because pods without a service account count.
        static_pods: Vec<String>,
    },
    /// Nodes of a standalone mesh, authenticated by a file of tokens.
    Standalone {
        /// File of the tokens.
        tokens: PathBuf,
        /// File of the workloads.
        directory: PathBuf,
    },
}

/// The rate limit of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Average requests per second, 1 to 10,000.
    pub per_second: u32,
    /// Burst of requests, 1 to 10,000.
    pub burst: u32,
}

impl Config {
    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// [`LoadError`] if the file cannot be read, or with all mistakes in it.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        file::load(path, |text| Self::parse(text, &file))
    }

    /// Parses the text of `file`; relative paths are relative to the folder of `file`.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text.
    pub fn parse(text: &str, file: &Path) -> Result<Self, Mistakes> {
        let folder = file.parent().unwrap_or(Path::new("."));
        yaml::decode(text, file, |root| {
            let config = Self::decode(&mut root.fields(&FIELDS)?, folder)?;
            config.check_lifetimes(root)?;
            Some(config)
        })
    }

    /// Decodes all fields before the first `?`, so that all mistakes are recorded.
    fn decode(f: &mut Fields<'_>, folder: &Path) -> Option<Self> {
        let trust_domain = f.required("trustDomain", "the SPIFFE trust domain, such as cluster.local");
        let trust_domain = trust_domain.and_then(|value| value.parse(TrustDomain::parse));
        let listen = f.or("listen", LISTEN, Value::listen_address);
        let names =
            f.or("names", vec![NAME.to_owned()], |v| texts(v, NAMES_MAX, |v| v.name().map(Into::into)));
        let metrics = f.or("metrics", METRICS, Value::listen_address);
        let root = f.required("root", "{secret: {namespace: tacit-system, name: tacit-root}}");
        let root = root.and_then(|value| self::root(&value, folder));
        let namespace = match &root {
            Some((RootStorage::Secret { namespace, .. }, _)) => Some(namespace.as_str()),
            _ => None,
        };
        let bundle = f.required("bundle", "{configMap: tacit-roots}");
        let bundle = bundle.and_then(|value| self::bundle(&value, namespace, folder));
        let agents = f.required("agents", "{serviceAccounts: [tacit-system/tacit-agent]}");
        let static_pods = f.optional("staticPods");
        let agents = agents.and_then(|value| self::agents(&value, static_pods.as_ref(), folder));
        let leaf = f.or("leafLifetime", LEAF_LIFETIME, |v| v.duration(LEAF_LIFETIME_RANGE));
        let intermediate =
            f.or("intermediateLifetime", INTERMEDIATE_LIFETIME, |v| v.duration(INTERMEDIATE_LIFETIME_RANGE));
        let rate = f.or("rate", RATE, rate);
        let (root, lifetime) = root?;
        Some(Self {
            trust_domain: trust_domain?,
            listen: listen?,
            names: names?,
            metrics: metrics?,
            root,
            bundle: bundle?,
            agents: agents?,
            lifetimes: Lifetimes { root: lifetime, intermediate: intermediate?, leaf: leaf? },
            rate: rate?,
        })
    }

    /// Checks the ratios of the lifetimes. A certificate never outlives its signer and is never shortened. A signer is replaced
    /// at half of its life, so that half must cover the full life of its certificates and the duration of a rotation.
    ///
    /// After an operator has replaced the root (`rotation`), an intermediate still signs for one leaf life, plus a quarter for
    /// replicas that have not read the change. The last leaf then lives for one leaf life. The half must therefore cover two and
    /// a quarter leaf lives. The factor five leaves a margin for late reconciliations. With less, peers would see certificates of
    /// the new root before they trust it.
    fn check_lifetimes(&self, root: &Value<'_>) -> Option<()> {
        let Lifetimes { root: root_life, intermediate, leaf } = self.lifetimes;
        if intermediate < leaf * LEAVES_OF_AN_INTERMEDIATE {
            root.refuse(format_args!(
                "intermediateLifetime {intermediate:?} is less than five times leafLifetime {leaf:?}: peers would see a new root before they trust it; increase intermediateLifetime, or reduce leafLifetime"
            ));
            return None;
        }
        if root_life < intermediate * 5 {
            root.refuse(format_args!(
                "root.lifetime {root_life:?} is less than five times intermediateLifetime {intermediate:?}; increase root.lifetime"
            ));
            return None;
        }
        Some(())
    }
}

fn root(value: &Value<'_>, folder: &Path) -> Option<(RootStorage, Duration)> {
    let mut fields = value.fields(&ROOT_FIELDS)?;
    let lifetime = fields.or("lifetime", ROOT_LIFETIME, |v| v.duration(ROOT_LIFETIME_RANGE));
    let place = match (fields.optional("secret"), fields.optional("directory")) {
        (Some(secret), None) => secret_storage(&secret)?,
        (None, Some(directory)) => RootStorage::Directory(folder.join(directory.text()?)),
        _ => return exactly_one(value, "secret or directory"),
    };
    Some((place, lifetime?))
}

fn secret_storage(value: &Value<'_>) -> Option<RootStorage> {
    let mut fields = value.fields(&["namespace", "name"])?;
    let namespace = fields.required("namespace", "the namespace of the Secret");
    let name = fields.required("name", "the name of the Secret, such as tacit-root");
    let (namespace, name) =
        (namespace.and_then(|v| v.name().map(Into::into)), name.and_then(|v| v.name().map(Into::into)));
    Some(RootStorage::Secret { namespace: namespace?, name: name? })
}

fn bundle(value: &Value<'_>, default_namespace: Option<&str>, folder: &Path) -> Option<BundleTarget> {
    let mut fields = value.fields(&BUNDLE_FIELDS)?;
    let key = fields.or("key", BUNDLE_KEY.to_owned(), |v| v.text().map(Into::into))?;
    let namespace = fields.optional("namespace");
    match (fields.optional("configMap"), fields.optional("file")) {
        (Some(name), None) => {
            let namespace = match namespace {
                Some(value) => value.name().map(Into::into),
                None => default_namespace.map(Into::into),
            };
            if namespace.is_none() {
                value.refuse("missing namespace: write bundle.namespace, because root.secret has none");
            }
            Some(BundleTarget::ConfigMap { namespace: namespace?, name: name.name()?.into(), key })
        }
        (None, Some(file)) => Some(BundleTarget::File(folder.join(file.text()?))),
        _ => exactly_one(value, "configMap or file"),
    }
}

/// Decodes `agents`, with the pods that count for them.
fn agents(value: &Value<'_>, static_pods: Option<&Value<'_>>, folder: &Path) -> Option<Agents> {
    let namespaces = static_pods.map_or(Some(Vec::new()), self::static_pods);
    let mut fields = value.fields(&AGENTS_FIELDS)?;
    let audience = fields.or("audience", AUDIENCE.to_owned(), |v| v.text().map(Into::into))?;
    let accounts = fields.optional("serviceAccounts");
    match (accounts, fields.optional("tokens"), fields.optional("directory")) {
        (Some(accounts), None, None) => {
            let service_accounts = texts(&accounts, SERVICE_ACCOUNTS_MAX, |v| v.parse(service_account))?;
            Some(Agents::Kubernetes { service_accounts, audience, static_pods: namespaces? })
        }
        (None, Some(_), Some(_)) if static_pods.is_some() => {
            static_pods?.refuse(
                "expected with agents.serviceAccounts only: remove it, agents.directory lists all pods",
            );
            None
        }
        (None, Some(tokens), Some(directory)) => Some(Agents::Standalone {
            tokens: folder.join(tokens.text()?),
            directory: folder.join(directory.text()?),
        }),
        _ => exactly_one(value, "serviceAccounts, or tokens together with directory"),
    }
}

fn static_pods(value: &Value<'_>) -> Option<Vec<String>> {
    let mut fields = value.fields(&STATIC_PODS_FIELDS)?;
    let namespaces = fields.required("namespaces", "the namespaces of static pods, such as [kube-system]")?;
    texts(&namespaces, STATIC_POD_NAMESPACES_MAX, |v| v.parse(namespace))
}

fn namespace(text: &str) -> Result<String, String> {
    let is_label = yaml::is_object_name(text) && !text.contains('.') && text.len() <= NAMESPACE_MAX_BYTES;
    is_label.then(|| text.to_owned()).ok_or_else(|| {
        format!(
            "invalid namespace: expected 1 to {NAMESPACE_MAX_BYTES} characters of a-z, 0-9 and '-'; write each namespace, patterns are not supported"
        )
    })
}

fn exactly_one<T>(value: &Value<'_>, choices: &str) -> Option<T> {
    value.refuse(format_args!("expected exactly one of {choices}"));
    None
}

/// Decodes a list of 1 to `max` items and records the mistakes of each.
fn texts<T>(value: &Value<'_>, max: usize, item: impl Fn(&Value<'_>) -> Option<T>) -> Option<Vec<T>> {
    let items = value.items()?;
    if items.is_empty() || items.len() > max {
        value.refuse(format_args!("{} items: expected 1 to {max}", items.len()));
        return None;
    }
    let decoded: Vec<_> = items.iter().map(item).collect();
    decoded.into_iter().collect()
}

fn service_account(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("invalid service account: expected namespace/name"),
    }
}

fn rate(value: &Value<'_>) -> Option<Rate> {
    let mut fields = value.fields(&RATE_FIELDS)?;
    let number = |text: &str| {
        let number = text.parse().ok().filter(|number| (1..=RATE_MAX).contains(number));
        number.ok_or_else(|| format!("invalid number of requests: expected 1 to {RATE_MAX}"))
    };
    let per_second = fields.or("perSecond", RATE.per_second, |v| v.parse(number));
    let burst = fields.or("burst", RATE.burst, |v| v.parse(number));
    Some(Rate { per_second: per_second?, burst: burst? })
}

#[cfg(test)]
mod tests;
