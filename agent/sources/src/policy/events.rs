//! Events about invalid policies, shown by `kubectl describe`. Delivery is best effort, because log and status have the same
//! information.
//!
//! Every agent reads every policy. The name of an Event therefore contains the policy's UID and resource version. The first
//! agent creates the Event, and the others get a conflict.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, Client, Error, api::PostParams};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::store::InvalidPolicy;
use crate::kubernetes::random;

/// Capacity of the queue of Events.
pub(super) const WAITING_MAX: usize = 64;
/// Minimum interval between two Events of an agent.
const PAUSE: Duration = Duration::from_secs(1);
/// Maximum random delay of an Event, so that the agents of a cluster do not send at the same time.
const SPREAD_MS: u64 = 2000;
const TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum message size in bytes, as in `events.k8s.io/v1`.
const MESSAGE_MAX_BYTES: usize = 1024;
/// Maximum size of an object's name in bytes.
const NAME_MAX_BYTES: usize = 253;
const CONFLICT: u16 = 409;

/// Sends an Event for each invalid policy.
pub(super) async fn report(client: Client, mut refused: mpsc::Receiver<InvalidPolicy>) {
    while let Some(refused) = refused.recv().await {
        sleep(Duration::from_millis(random() % SPREAD_MS)).await;
        let api: Api<Event> = Api::namespaced(client.clone(), &refused.namespace);
        let event = event(&refused, Timestamp::now());
        let problem = match timeout(TIMEOUT, api.create(&PostParams::default(), &event)).await {
            Ok(Ok(_)) => None,
            Ok(Err(Error::Api(status))) if status.code == CONFLICT => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {TIMEOUT:?}")),
        };
        if let Some(problem) = problem {
            tracing::warn!(
                policy = refused.name(),
                problem,
                "cannot create the Event for an invalid policy; see the log for the reason"
            );
        }
        sleep(PAUSE).await;
    }
}

fn event(refused: &InvalidPolicy, now: Timestamp) -> Event {
    let InvalidPolicy { kind, namespace, name, uid, version, message } = refused;
    let now = Some(Time(now));
    Event {
        metadata: ObjectMeta {
            name: Some(event_name(name, uid, version)),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("security.istio.io/v1".to_owned()),
            kind: Some(kind.name().to_owned()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            uid: Some(uid.clone()),
            resource_version: Some(version.clone()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some("InvalidPolicy".to_owned()),
        message: Some(cut(message, MESSAGE_MAX_BYTES).to_owned()),
        source: Some(EventSource { component: Some("tacit".to_owned()), host: None }),
        count: Some(1),
        first_timestamp: now.clone(),
        last_timestamp: now,
        ..Event::default()
    }
}

/// Returns the name, which is equal on every node. A long policy name is truncated to a valid object name.
fn event_name(policy: &str, uid: &str, version: &str) -> String {
    let end = format!(".{uid}.{version}");
    let begin = cut(policy, NAME_MAX_BYTES.saturating_sub(end.len()));
    begin.trim_end_matches(['-', '.']).to_owned() + &end
}

/// Truncates a text to `max_bytes`, at a character boundary.
fn cut(text: &str, max_bytes: usize) -> &str {
    let end = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= max_bytes).last();
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacit_core::policy::PolicyKind;

    fn refused(name: &str, message: &str) -> InvalidPolicy {
        InvalidPolicy {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b".to_owned(),
            version: "4711".to_owned(),
            message: message.to_owned(),
        }
    }

    #[test]
    fn the_name_of_an_event_is_the_same_on_every_node_and_never_too_long() {
        let end = ".0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b.4711";
        let name =
            |policy: &str| event(&refused(policy, ""), Timestamp::now()).metadata.name.expect("a name");
        assert_eq!(name("deny"), format!("deny{end}"));
        assert_eq!(name(&"a".repeat(253)).len(), NAME_MAX_BYTES);
        let long = name(&("a".repeat(210) + &"-.b".repeat(14)));
        assert!(tacit_core::yaml::is_object_name(&long) && !long.contains("-.0b4c"), "{long}");
    }

    #[test]
    fn an_event_refers_to_the_policy_and_stays_within_the_limits() {
        let event = event(&refused("deny", &"ü".repeat(1000)), Timestamp::UNIX_EPOCH);
        let object = event.involved_object;
        assert_eq!(
            (object.kind.as_deref(), object.name.as_deref()),
            (Some("AuthorizationPolicy"), Some("deny"))
        );
        assert_eq!(object.namespace, event.metadata.namespace, "the API server wants them alike");
        assert_eq!(
            (event.type_.as_deref(), event.reason.as_deref()),
            (Some("Warning"), Some("InvalidPolicy"))
        );
        assert_eq!(event.message.map(|message| message.len()), Some(MESSAGE_MAX_BYTES));
    }
}
