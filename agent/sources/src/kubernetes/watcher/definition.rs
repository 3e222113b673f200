//! Checks that the definition of a custom resource still exists.
//!
//! While a definition is being deleted, the API server deletes all objects of the resource. These deletions look like
//! deletions by the owners. The watcher therefore reads the definition after each deletion and before it accepts the deletion.
//! Only the first of many deletions is checked alone. All events within [`CHECK_INTERVAL`] of it wait, in order, for one common check.

use std::{fmt::Display, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _};
use kube::{
    Client,
    core::{PartialObjectMeta, Request, params::GetParams},
};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Definition, NOT_FOUND, PAGE_TIMEOUT, Resource, WatchEnd, WatchUpdate, code};

/// API path of custom resource definitions.
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// Minimum interval between two checks of a watch, and the maximum delay of a deletion.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum number of events that wait for a check.
const WAITING_MAX: usize = 512;

/// Returns an error if deleted objects may have been deleted together with their definition.
pub(super) async fn check_definition<K: Resource>(client: &Client) -> Result<(), String> {
    let Definition::Custom(name) = K::DEFINITION else { return Ok(()) };
    let request = Request::new(DEFINITIONS).get_metadata(name, &GetParams::default());
    let unknown = |problem: &dyn Display| {
        format!("cannot check whether the definition {name} is being deleted: {problem}")
    };
    let request = request.map_err(|error| unknown(&error))?;
    match timeout(PAGE_TIMEOUT, client.request::<PartialObjectMeta>(request)).await {
        Ok(Ok(found)) if found.metadata.deletion_timestamp.is_none() => Ok(()),
        Ok(Ok(_)) => Err(format!("the definition {name} is being deleted, and all objects with it")),
        Ok(Err(error)) if code(&error) == Some(NOT_FOUND) => {
            Err(format!("the definition {name} was deleted, and all objects with it; apply it again"))
        }
        Ok(Err(error)) => Err(unknown(&error)),
        Err(_) => Err(unknown(&format_args!("no answer within {PAGE_TIMEOUT:?}"))),
    }
}

/// The definition checks of one watch.
pub(super) struct DefinitionChecks {
    /// Time of the next check.
    next: Instant,
}

impl DefinitionChecks {
    pub(super) fn new() -> Self {
        Self { next: Instant::now() }
    }

    /// Checks the definition after a deletion at the start of `batch`, and appends the `events` that arrive before the check.
    /// Returns the end of the watch if it ended meanwhile. The end comes after the appended events.
    pub(super) async fn check<K: Resource>(
        &mut self,
        client: &Client,
        batch: &mut Vec<WatchUpdate<K>>,
        mut events: Pin<&mut impl Stream<Item = Result<WatchUpdate<K>, WatchEnd>>>,
    ) -> Result<Option<WatchEnd>, String> {
        let mut end = None;
        while end.is_none() && batch.len() < WAITING_MAX {
            match timeout_at(self.next, events.next()).await {
                Ok(Some(Ok(event))) => batch.push(event),
                Ok(Some(Err(other))) => end = Some(other),
                Ok(None) => end = Some(WatchEnd::Closed),
                Err(_) => break,
            }
        }
        self.next = Instant::now() + CHECK_INTERVAL;
        check_definition::<K>(client).await?;
        Ok(end)
    }
}
