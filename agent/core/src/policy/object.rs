//! Policy objects of `security.istio.io`, whatever source they come from: what all kinds have in common, and what becomes
//! of one that cannot be read.
//!
//! A source hands over the text of one object (YAML, of which JSON is a part). The object it gets back goes into
//! [`Policies::of`]; one that does not parse goes in as well, and denies what it selects:
//!
//! | readable is | an AuthorizationPolicy denies, a PeerAuthentication is STRICT for |
//! |---|---|
//! | namespace and selector | what it selects |
//! | namespace | all workloads of the namespace; of the mesh when it is the root namespace |
//! | neither | all workloads of the mesh; all flows, whatever the kind |
//!
//! A file of several documents is read by [`Policies::parse`], which refuses the file as a whole instead.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use super::{
    Policies, PolicyUsage,
    authorization::{self, Attachment, AuthorizationPolicy},
    metadata::ObjectMeta,
    peer_authentication::{self, PeerAuthentication},
};
use crate::yaml::{self, Entry, Fields, Mistake, Mistakes, Value};

const FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
const VERSIONS: [(&str, ()); 2] = [("security.istio.io/v1", ()), ("security.istio.io/v1beta1", ())];

/// One policy object. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PolicyObject {
    parsed: Arc<ParsedPolicy>,
    /// Size of its text. 0 for a document of a file, because the file as a whole is bounded.
    bytes: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ParsedPolicy {
    PeerAuthentication(PeerAuthentication),
    Authorization(ScopedAuthorization),
}

/// An AuthorizationPolicy and what it selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScopedAuthorization {
    /// `None`: not readable, so every namespace.
    pub(super) namespace: Option<Arc<str>>,
    /// Labels a workload must have; none selects all.
    pub(super) labels: BTreeMap<String, String>,
    pub(super) attachment: Attachment,
    pub(super) policy: Arc<AuthorizationPolicy>,
    pub(super) notes: Vec<String>,
}

/// Facts of an object that its source knows before reading the text, for example from its key in the Kubernetes API.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// Name of the object, or of the file, for messages.
    pub name: &'a str,
    /// Namespace; `None` where only the text says it.
    pub namespace: Option<&'a str>,
    /// PolicyKind; `None` where only the text says it. With it `apiVersion` and `kind` may be missing, as in the items of the
    /// API server's lists.
    pub kind: Option<PolicyKind>,
}

/// Two objects are equal if the same holds by them.
impl PartialEq for PolicyObject {
    fn eq(&self, other: &Self) -> bool {
        self.parsed == other.parsed
    }
}

impl Eq for PolicyObject {}

impl PolicyObject {
    /// Reads one object.
    ///
    /// It counts whether it parsed or not: see the table at the head of this file. The mistakes are for the
    /// operator.
    #[must_use]
    pub fn read(text: &str, origin: Origin<'_>) -> (Self, Option<Mistakes>) {
        let read = yaml::decode(text, Path::new(origin.name), |document| {
            object(document, origin.kind, &mut HashMap::new())
        });
        let (object, mistakes) = match read {
            Ok(object) => (object, None),
            Err(mistakes) => (Self::unreadable(text, origin, &mistakes), Some(mistakes)),
        };
        (Self { bytes: text.len(), ..object }, mistakes)
    }

    fn new(parsed: ParsedPolicy) -> Self {
        Self { parsed: Arc::new(parsed), bytes: 0 }
    }

    pub(super) fn parsed(&self) -> &ParsedPolicy {
        &self.parsed
    }

    /// The namespace of the object. `None` if it cannot be read: the object concerns all namespaces.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        match self.parsed() {
            ParsedPolicy::PeerAuthentication(policy) => Some(&policy.namespace),
            ParsedPolicy::Authorization(policy) => policy.namespace.as_deref(),
        }
    }

    /// The part of its namespace's share that the object uses.
    #[must_use]
    pub fn usage(&self) -> PolicyUsage {
        let lookups = match self.parsed() {
            ParsedPolicy::PeerAuthentication(_) => 1,
            ParsedPolicy::Authorization(policy) if policy.attachment == Attachment::Elsewhere => 0,
            ParsedPolicy::Authorization(policy) => policy.policy.lookups() as u64,
        };
        PolicyUsage { objects: 1, bytes: self.bytes as u64, lookups }
    }

    /// Notes for the author: rules that never match, or match more than they say.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        match self.parsed() {
            ParsedPolicy::PeerAuthentication(_) => &[],
            ParsedPolicy::Authorization(policy) => &policy.notes,
        }
    }

    fn unreadable(text: &str, origin: Origin<'_>, mistakes: &Mistakes) -> Self {
        let namespace = origin.namespace.map(str::to_owned).or_else(|| namespace_of(text));
        let labels = namespace.as_ref().and_then(|_| labels_of(text)).unwrap_or_default();
        let kind = origin.kind.or_else(|| part_of(text, |document| supported(&member(document, "kind")?)));
        Self::new(match (namespace, kind) {
            (Some(namespace), Some(PolicyKind::PeerAuthentication)) => {
                ParsedPolicy::PeerAuthentication(PeerAuthentication::strict(&namespace, labels))
            }
            (namespace, _) => {
                let why = mistakes.list.first().map(Mistake::text).unwrap_or_default();
                let id = match &namespace {
                    Some(namespace) => format!("{namespace}/{}", origin.name),
                    None => origin.name.to_owned(),
                };
                ParsedPolicy::Authorization(ScopedAuthorization {
                    namespace: namespace.map(Arc::from),
                    labels,
                    attachment: Attachment::Workloads,
                    policy: Arc::new(AuthorizationPolicy::unreadable(id, why)),
                    notes: Vec::new(),
                })
            }
        })
    }
}

/// A file of any number of documents; one that is wrong refuses all.
pub(super) fn parse(text: &str, file: &Path, root_namespace: &str) -> Result<Policies, Mistakes> {
    yaml::decode_documents(text, file, |documents| {
        let mut lines = HashMap::new();
        // Not collected to an `Option`: that would stop at the first mistake. Empty documents are what a
        // closing `---` leaves.
        let filled = documents.iter().filter(|document| !document.is_null());
        let objects: Vec<_> = filled.map(|document| object(document, None, &mut lines)).collect();
        let objects: Option<Vec<_>> = objects.into_iter().collect();
        Some(Policies::of(&objects?, root_namespace))
    })
}

/// ParsedPolicy of `security.istio.io` that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// PeerAuthentication: the modes of workloads.
    PeerAuthentication,
    /// AuthorizationPolicy: the clients that may connect to workloads.
    AuthorizationPolicy,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::PeerAuthentication, Self::AuthorizationPolicy];

    /// As `kind` of an object has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }
}

/// ObjectLines of the objects seen so far, by kind, namespace and name.
type ObjectLines<'a> = HashMap<(PolicyKind, &'a str, &'a str), usize>;

fn object<'a>(
    document: &Value<'a>,
    expected: Option<PolicyKind>,
    lines: &mut ObjectLines<'a>,
) -> Option<PolicyObject> {
    // The kind goes first: the fields of another kind would only be a list of unknown ones.
    let written = match document.peek("kind").filter(|kind| !kind.is_null()) {
        Some(kind) => Some(is_expected(supported(&kind)?, expected, &kind)?),
        None => None,
    };
    let mut fields = document.fields(&FIELDS)?;
    let version = version(&mut fields, expected);
    let metadata = fields.required("metadata", "{name: default, namespace: <namespace>}");
    let header = metadata.and_then(|value| ObjectMeta::read(&value));
    let spec = fields.optional("spec");
    let selector = spec.as_ref().and_then(|spec| spec.peek("selector")).filter(|value| !value.is_null());
    let labels = selector.map_or(Some(BTreeMap::new()), |selector| selector_labels(&selector));
    let kind = written.or(expected)?;
    let spec = Spec::read(kind, header.as_ref(), spec.as_ref(), labels.as_ref());
    let (header, ()) = (header?, version?);
    unique(kind, &header, document, lines);
    Some(PolicyObject::new(spec?.of(&header, labels?)))
}

/// `apiVersion`, and that `kind` is there.
fn version(fields: &mut Fields<'_>, expected: Option<PolicyKind>) -> Option<()> {
    let (version, kind) = (fields.optional("apiVersion"), fields.optional("kind"));
    if expected.is_none() {
        version.is_none().then(|| fields.required("apiVersion", "security.istio.io/v1"));
        kind.is_none().then(|| fields.required("kind", "PeerAuthentication or AuthorizationPolicy"));
    }
    version.map_or(Some(()), |value| value.choice(&VERSIONS))
}

/// The content of `spec`, by kind.
enum Spec {
    Modes(peer_authentication::PeerAuthenticationSpec),
    Authorization(authorization::parse::AuthorizationSpec),
}

impl Spec {
    fn read(
        kind: PolicyKind,
        header: Option<&ObjectMeta<'_>>,
        spec: Option<&Value<'_>>,
        labels: Option<&BTreeMap<String, String>>,
    ) -> Option<Self> {
        // Without a header it is read all the same, for its mistakes.
        let unnamed = ObjectMeta { namespace: "", name: "", dry_run: false };
        Some(match kind {
            PolicyKind::PeerAuthentication => Self::Modes(peer_authentication::spec(spec, labels)?),
            PolicyKind::AuthorizationPolicy => {
                Self::Authorization(authorization::parse::spec(header.unwrap_or(&unnamed), spec)?)
            }
        })
    }

    fn of(self, header: &ObjectMeta<'_>, labels: BTreeMap<String, String>) -> ParsedPolicy {
        let namespace = header.namespace.into();
        match self {
            Self::Modes(peer_authentication::PeerAuthenticationSpec { mode, ports }) => {
                ParsedPolicy::PeerAuthentication(PeerAuthentication {
                    namespace,
                    labels,
                    mode,
                    ports,
                    unreadable: false,
                })
            }
            Self::Authorization(authorization::parse::AuthorizationSpec { policy, attachment, notes }) => {
                let (namespace, policy) = (Some(namespace), Arc::new(policy));
                ParsedPolicy::Authorization(ScopedAuthorization {
                    namespace,
                    labels,
                    attachment,
                    policy,
                    notes,
                })
            }
        }
    }
}

/// The kind that is written, when it is the one that the source knows.
fn is_expected(written: PolicyKind, expected: Option<PolicyKind>, value: &Value<'_>) -> Option<PolicyKind> {
    if let Some(expected) = expected.filter(|expected| *expected != written) {
        value.refuse(format_args!("is not the kind of this object: write {}", expected.name()));
        return None;
    }
    Some(written)
}

fn supported(kind: &Value<'_>) -> Option<PolicyKind> {
    match kind.text()? {
        "PeerAuthentication" => return Some(PolicyKind::PeerAuthentication),
        "AuthorizationPolicy" => return Some(PolicyKind::AuthorizationPolicy),
        "RequestAuthentication" => kind.refuse(
            "RequestAuthentication is not supported, it needs HTTP: remove it, since skipping it would let through what it denies",
        ),
        "List" => kind.refuse("List is not supported: write each object as a document of its own, with `---` between"),
        other => kind.refuse(format_args!(
            "{other:?} is not supported here: remove it, the kinds are PeerAuthentication and AuthorizationPolicy of security.istio.io/v1"
        )),
    }
    None
}

fn unique<'a>(kind: PolicyKind, header: &ObjectMeta<'a>, document: &Value<'_>, lines: &mut ObjectLines<'a>) {
    let ObjectMeta { namespace, name, .. } = *header;
    if let Some(line) = lines.insert((kind, namespace, name), document.line()) {
        let kind = kind.name();
        document.refuse(format_args!("{kind} {namespace}/{name} is already in line {line}: remove one"));
    }
}

/// The labels a workload must have; none when the policy holds for the whole namespace.
fn selector_labels(selector: &Value<'_>) -> Option<BTreeMap<String, String>> {
    let Some(labels) = selector.fields(&["matchLabels"])?.optional("matchLabels") else {
        return Some(BTreeMap::new());
    };
    let labels: Vec<_> = labels.entries()?.into_iter().map(selector_label).collect();
    labels.into_iter().collect()
}

fn selector_label(Entry { name, value, .. }: Entry<'_>) -> Option<(String, String)> {
    let text = value.text_or_empty()?;
    if name.is_empty() {
        value.refuse("the label has no name: write one");
        return None;
    }
    if name.contains('*') || text.contains('*') {
        value.refuse("`*` is not supported in a selector: write the label and its value out");
        return None;
    }
    Some((name.to_owned(), text.to_owned()))
}

/// Decodes one valid part of an object that is invalid elsewhere. Returns `None` if the part itself is invalid.
fn part_of<T>(text: &str, part: impl FnOnce(&Value<'_>) -> Option<T>) -> Option<T> {
    yaml::decode(text, Path::new(""), part).ok()
}

/// A member of a mapping; one that is written twice is a mistake.
fn member<'a>(value: &Value<'a>, name: &str) -> Option<Value<'a>> {
    value.entries()?.into_iter().find(|entry| entry.name == name).map(|entry| entry.value)
}

fn namespace_of(text: &str) -> Option<String> {
    part_of(text, |document| member(&member(document, "metadata")?, "namespace")?.name().map(str::to_owned))
}

fn labels_of(text: &str) -> Option<BTreeMap<String, String>> {
    part_of(text, |document| selector_labels(&member(&member(document, "spec")?, "selector")?))
}

#[cfg(test)]
mod tests;
