//! The state of the delta xDS session, which outlives connections. Pure.
//!
//! ```text
//! connected ─> a request for each type: everything
//! response  ─> what was read, what is gone, and an ACK; a NACK if something cannot be read
//! broken    ─> everything stays; what the first response of the next connection does not have is gone
//! ```
//! No request names the versions of what is known. Some versions of istiod answer such a request without the resources that were created
//! while the agent was away.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    address::{self, AddressContent},
    authorization,
    messages::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE, Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource,
        Status, Struct, Value,
    },
};
use tacit_core::policy::ReducedPolicy;

/// Most addresses: what fits into a message of the largest size with 256 bytes each, where istiod sends some 290. Some 200 MiB of memory.
pub(super) const ADDRESSES_MAX: usize = 262_144;
/// Most policies: 32 times the share of one namespace.
pub(super) const AUTHORIZATIONS_MAX: usize = 65_536;
/// Most resources that a NACK names.
const NAMED_MAX: usize = 5;
/// Longest name of a resource, in bytes: that of two names of Kubernetes and a cluster.
const NAME_MAX_BYTES: usize = 1024;
/// `INVALID_ARGUMENT` of gRPC.
const INVALID_ARGUMENT: i32 = 3;

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ResourceType {
    Address,
    Authorization,
}

impl ResourceType {
    pub(super) const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    pub(super) fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.url() == url)
    }

    fn max(self) -> usize {
        match self {
            Self::Address => ADDRESSES_MAX,
            Self::Authorization => AUTHORIZATIONS_MAX,
        }
    }
}

/// The content of a resource.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Address(AddressContent),
    Authorization(ReducedPolicy),
}

/// A resource as it was read.
#[derive(Debug)]
pub(super) struct ReadResource {
    pub(super) name: Arc<str>,
    pub(super) content: Result<Content, String>,
}

/// A response as it was read.
#[derive(Debug)]
pub(super) struct ReadResponse {
    type_url: String,
    version: String,
    nonce: String,
    resources: Vec<ReadResource>,
    removed: Vec<String>,
}

/// Reads a response for an agent in `network`. A large one takes some 100 ms.
pub(super) fn read(response: DeltaDiscoveryResponse, network: &str) -> ReadResponse {
    let DeltaDiscoveryResponse { system_version_info, resources, type_url, removed_resources, nonce } =
        response;
    let of = ResourceType::of(&type_url);
    let resources = resources.into_iter().map(|Resource { name, resource, .. }| {
        let content = content(of, &name, resource, network);
        ReadResource { name: name.into(), content }
    });
    let resources = resources.collect();
    ReadResponse { type_url, version: system_version_info, nonce, resources, removed: removed_resources }
}

fn content(of: Option<ResourceType>, name: &str, any: Option<Any>, network: &str) -> Result<Content, String> {
    let any = any.ok_or("no resource")?;
    if name.len() > NAME_MAX_BYTES {
        return Err(format!("its name has {} bytes: expected at most {NAME_MAX_BYTES}", name.len()));
    }
    let of = of.filter(|of| of.url() == any.type_url);
    match of.ok_or_else(|| format!("it is a {:?}", any.type_url))? {
        ResourceType::Address => address::read(name, &any.value, network).map(Content::Address),
        ResourceType::Authorization => authorization::policy(name, &any.value).map(Content::Authorization),
    }
}

/// A known resource.
#[derive(Debug)]
struct Known {
    is_service: bool,
}

/// Resources of one type.
#[derive(Debug, Default)]
struct TypeState {
    known: BTreeMap<Arc<str>, Known>,
    /// Resources of which no version could be read. The server does not learn that the client has heard of them.
    unread: BTreeSet<Arc<str>>,
    /// True after the first response of the session.
    is_complete: bool,
    /// True until the first response of a connection. What it does not have is gone.
    is_relisting: bool,
    /// Of the latest response.
    version: String,
    nonce: String,
}

/// The state of a type, for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeStatus {
    /// `Address` or `Authorization`.
    pub name: &'static str,
    /// Number of known resources.
    pub resources: usize,
    /// Services among them.
    pub services: usize,
    /// Version of the latest response, as the server calls it.
    pub version: String,
    /// Nonce of the latest response.
    pub nonce: String,
}

/// The consequence of a response.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) of: Option<ResourceType>,
    /// Resources in order. Of those that could not be read there is the reason.
    pub(super) resources: Vec<ReadResource>,
    /// Names of resources that are gone.
    pub(super) gone: Vec<Arc<str>>,
    /// True if the type is complete for the first time.
    pub(super) is_first: bool,
    /// The ACK or NACK.
    pub(super) answer: DeltaDiscoveryRequest,
    /// The text of the NACK.
    pub(super) rejected: Option<String>,
}

/// The session.
#[derive(Debug)]
pub(super) struct Session {
    node: Node,
    types: BTreeMap<ResourceType, TypeState>,
}

impl Session {
    pub(super) fn new(node: Node, types: &[ResourceType]) -> Self {
        Self { node, types: types.iter().map(|of| (*of, TypeState::default())).collect() }
    }

    /// Returns the first requests of a connection.
    pub(super) fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let node = &self.node;
        let requests = self.types.iter_mut().map(|(of, state)| {
            state.is_relisting = true;
            DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: of.url().to_owned(),
                ..DeltaDiscoveryRequest::default()
            }
        });
        requests.collect()
    }

    /// Takes in a response.
    pub(super) fn accept(&mut self, response: ReadResponse) -> Accepted {
        let ReadResponse { type_url, version, nonce, mut resources, removed } = response;
        let mut problems: Vec<String> = Vec::new();
        let answer = |problems: &[String]| DeltaDiscoveryRequest {
            type_url: type_url.clone(),
            response_nonce: nonce.clone(),
            error_detail: rejection(problems).map(|message| Status { code: INVALID_ARGUMENT, message }),
            ..DeltaDiscoveryRequest::default()
        };
        let of = ResourceType::of(&type_url);
        let Some((of, state)) = of.and_then(|of| Some((of, self.types.get_mut(&of)?))) else {
            problems.push(format!("the type {type_url:?} was not asked for"));
            let (answer, rejected) = (answer(&problems), rejection(&problems));
            return Accepted {
                of: None,
                resources: Vec::new(),
                gone: Vec::new(),
                is_first: false,
                answer,
                rejected,
            };
        };
        let mut gone: BTreeSet<Arc<str>> = removed.into_iter().map(Arc::from).collect();
        if std::mem::take(&mut state.is_relisting) {
            gone.extend(state.known.keys().cloned());
            gone.extend(state.unread.iter().cloned());
        }
        // What is gone makes room first.
        for ReadResource { name, .. } in &resources {
            gone.remove(name);
        }
        gone.retain(|name| {
            let was_unread = state.unread.remove(name);
            state.known.remove(name).is_some() || was_unread || of == ResourceType::Authorization
        });
        for ReadResource { name, content } in &mut resources {
            let is_new = !state.known.contains_key(name);
            if is_new && content.is_ok() && state.known.len() >= of.max() {
                *content = Err(format!("there are more than {} of its type", of.max()));
            }
            match content {
                Ok(content) => {
                    state.unread.remove(name);
                    let is_service = matches!(content, Content::Address(AddressContent::Service(_)));
                    state.known.insert(Arc::clone(name), Known { is_service });
                }
                Err(problem) => {
                    problems.push(format!("{name}: {problem}"));
                    if is_new && state.unread.len() < of.max() {
                        state.unread.insert(Arc::clone(name));
                    }
                }
            }
        }
        (state.version, state.nonce) = (version, nonce.clone());
        let is_first = !std::mem::replace(&mut state.is_complete, true);
        let (answer, rejected) = (answer(&problems), rejection(&problems));
        Accepted { of: Some(of), resources, gone: gone.into_iter().collect(), is_first, answer, rejected }
    }

    /// Returns the state of each type.
    pub(super) fn status(&self) -> Vec<TypeStatus> {
        let status = self.types.iter().map(|(of, state)| TypeStatus {
            name: of.url().rsplit('.').next().unwrap_or_default(),
            resources: state.known.len(),
            services: state.known.values().filter(|known| known.is_service).count(),
            version: state.version.clone(),
            nonce: state.nonce.clone(),
        });
        status.collect()
    }
}

fn rejection(problems: &[String]) -> Option<String> {
    let mut named = problems.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>();
    match problems.len() {
        0 => return None,
        count if count > NAMED_MAX => named.push(format!("and {} more", count - NAMED_MAX)),
        _ => {}
    }
    Some(named.join("; "))
}

/// Returns the node of a proxy that has pods, as istiod expects it.
pub(super) fn node(id: String, cluster: &str, metadata: &[(&str, &str)]) -> Node {
    let value = |text: &str| Value { string_value: Some(text.to_owned()) };
    let fields = metadata.iter().map(|(name, text)| ((*name).to_owned(), value(text)));
    Node { id, cluster: cluster.to_owned(), metadata: Some(Struct { fields: fields.collect() }) }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::istiod::messages::{Address, AddressKind, Authorization, Workload};

    fn resource(of: ResourceType, name: &str, version: &str, value: Vec<u8>) -> Resource {
        let any = Any { type_url: of.url().to_owned(), value };
        Resource {
            name: name.to_owned(),
            version: version.to_owned(),
            resource: Some(any),
            ..Resource::default()
        }
    }

    fn workload(uid: &str, version: &str) -> Resource {
        let workload = Workload { uid: uid.to_owned(), ..Workload::default() };
        let kind = Some(AddressKind::Workload(Box::new(workload)));
        resource(ResourceType::Address, uid, version, Address { kind }.encode_to_vec())
    }

    fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> ReadResponse {
        let message = DeltaDiscoveryResponse {
            system_version_info: "v".to_owned(),
            resources,
            type_url: ADDRESS_TYPE.to_owned(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            nonce: nonce.to_owned(),
        };
        read(message, "")
    }

    fn session() -> Session {
        Session::new(node("id".to_owned(), "c", &[]), &ResourceType::ALL)
    }

    fn known(session: &Session) -> Vec<String> {
        session.types[&ResourceType::Address].known.keys().map(ToString::to_string).collect()
    }

    fn gone(accepted: &Accepted) -> Vec<String> {
        accepted.gone.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_first_response_of_each_connection_is_the_whole_list() {
        let mut session = session();
        let mut requests = session.connect();
        let asked: Vec<&str> = requests.iter().map(|request| request.type_url.as_str()).collect();
        assert_eq!(asked, [ADDRESS_TYPE, AUTHORIZATION_TYPE]);
        let first = session.accept(response("1", vec![workload("a", "1"), workload("b", "2")], &[]));
        assert!(first.is_first && first.rejected.is_none() && first.gone.is_empty());
        assert_eq!((first.answer.response_nonce.as_str(), &first.answer.error_detail), ("1", &None));
        let second = session.accept(response("2", vec![workload("c", "3")], &["b", "never seen"]));
        assert!(!second.is_first);
        assert_eq!(
            (gone(&second), known(&session)),
            (vec!["b".to_owned()], vec!["a".to_owned(), "c".to_owned()])
        );
        // The server does not name what is gone, and sends what was created meanwhile.
        requests.extend(session.connect());
        let all = session.accept(response("3", vec![workload("c", "3"), workload("d", "1")], &[]));
        assert_eq!((all.is_first, gone(&all)), (false, vec!["a".to_owned()]));
        assert_eq!(known(&session), ["c", "d"]);
        let change = session.accept(response("4", vec![workload("e", "1")], &[]));
        assert_eq!((gone(&change).len(), known(&session).len()), (0, 3));
        requests.extend(session.connect());
        let none = session.accept(response("5", vec![], &[]));
        assert_eq!((gone(&none).len(), known(&session).len()), (3, 0));
        assert!(
            requests.len() == 6
                && requests.iter().all(|request| {
                    request.resource_names_subscribe.is_empty()
                        && request.initial_resource_versions.is_empty()
                        && request.response_nonce.is_empty()
                })
        );
    }

    #[test]
    fn a_resource_that_cannot_be_read_is_named_and_the_others_count() {
        let mut session = session();
        let broken = |name: &str| resource(ResourceType::Address, name, "9", vec![0xff]);
        session.accept(response("1", vec![workload("a", "1"), workload("b", "1")], &[]));
        let second = session.accept(response("2", vec![broken("a"), workload("b", "2")], &[]));
        let detail = second.answer.error_detail.expect("rejected");
        assert!(detail.message.starts_with("a: no istio.workload.Address"), "{}", detail.message);
        assert_eq!((detail.code, second.answer.response_nonce.as_str()), (INVALID_ARGUMENT, "2"));
        assert_eq!(known(&session), ["a", "b"], "the last one that was read");
        let many = session.accept(response("3", (0..9).map(|i| broken(&format!("x{i}"))).collect(), &[]));
        assert!(many.rejected.expect("rejected").ends_with("; and 4 more"));
    }

    #[test]
    fn a_resource_that_was_never_read_ends_with_the_next_connection_that_does_not_have_it() {
        let mut session = session();
        let broken = |name: &str| resource(ResourceType::Address, name, "9", vec![0xff]);
        let names =
            |accepted: &Accepted| accepted.gone.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        session.connect();
        session.accept(response("1", vec![broken("x"), broken("y"), broken("z"), workload("a", "1")], &[]));
        assert!(names(&session.accept(response("2", vec![], &[]))).is_empty(), "a change, and not all of it");
        assert_eq!(names(&session.accept(response("3", vec![], &["z"]))), ["z"]);
        assert!(known(&session).len() == 1 && session.connect().len() == 2);
        let relisted = session.accept(response("4", vec![broken("y"), workload("a", "1")], &[]));
        assert_eq!(names(&relisted), ["x"], "the others are there");
        session.connect();
        assert_eq!(names(&session.accept(response("5", vec![workload("y", "1")], &[]))), ["a"]);
    }

    #[test]
    fn a_type_that_was_not_asked_for_changes_nothing() {
        let mut session = Session::new(node("id".to_owned(), "c", &[]), &[ResourceType::Address]);
        for type_url in ["type.googleapis.com/envoy.config.cluster.v3.Cluster", AUTHORIZATION_TYPE] {
            let message = DeltaDiscoveryResponse {
                type_url: type_url.to_owned(),
                nonce: "7".to_owned(),
                ..Default::default()
            };
            let accepted = session.accept(read(message, ""));
            assert_eq!((accepted.of, accepted.is_first), (None, false));
            assert!(accepted.answer.error_detail.expect("rejected").message.contains("was not asked for"));
            assert_eq!(
                (accepted.answer.type_url.as_str(), accepted.answer.response_nonce.as_str()),
                (type_url, "7")
            );
        }
        let policy = Authorization { name: "p".to_owned(), namespace: "n".to_owned(), ..Default::default() };
        let other = resource(ResourceType::Authorization, "n/p", "1", policy.encode_to_vec());
        let accepted = session.accept(response("8", vec![other], &[]));
        assert!(
            accepted.rejected.expect("rejected").starts_with("n/p: it is a "),
            "another type in the response"
        );
    }

    #[test]
    fn a_resource_is_removed_and_added_again() {
        let mut session = session();
        for (removed, added) in
            [(vec![], vec!["a"]), (vec!["a"], vec![]), (vec![], vec!["a"]), (vec!["a"], vec!["a"])]
        {
            let resources = added.iter().map(|name| workload(name, "1")).collect();
            let accepted = session.accept(response("n", resources, &removed));
            assert_eq!(accepted.gone.is_empty(), removed.is_empty() || !added.is_empty());
            assert_eq!(known(&session).contains(&"a".to_owned()), !added.is_empty());
        }
        // Twice in one response.
        session.accept(response("n", vec![workload("a", "1"), workload("a", "2")], &[]));
        assert_eq!(known(&session), ["a"]);
    }
}
