//! Whether the definition of a custom kind is still there.
//!
//! The API server deletes all objects of a kind whose definition is being deleted, which looks as if each had been deleted
//! by its owner. So before an object of such a kind counts as gone the definition is looked at, after the object went: an
//! earlier answer says nothing. Of many that go at a time only the first is looked at alone. What happens from then on
//! within [`BETWEEN`] waits, in its order, for one look together.

use std::{fmt::Display, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _};
use kube::{
    Client,
    core::{PartialObjectMeta, Request, params::GetParams},
};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Definition, End, Followed, NOT_FOUND, PAGE_TIMEOUT, Told, code};

/// Where the API has the definitions of custom kinds.
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// Shortest time between two looks of one watch: policies that go wait so much longer at most.
const BETWEEN: Duration = Duration::from_millis(200);
/// Most events that wait for a look.
const WAITING_MAX: usize = 512;

/// Whether an object that is gone was deleted by its owner: an error when it may have gone with its definition.
pub(super) async fn defined<K: Followed>(client: &Client) -> Result<(), String> {
    let Definition::Custom(name) = K::DEFINITION else { return Ok(()) };
    let request = Request::new(DEFINITIONS).get_metadata(name, &GetParams::default());
    let unknown = |problem: &dyn Display| {
        format!("cannot tell whether the definition {name} is being deleted: {problem}")
    };
    let request = request.map_err(|error| unknown(&error))?;
    match timeout(PAGE_TIMEOUT, client.request::<PartialObjectMeta>(request)).await {
        Ok(Ok(found)) if found.metadata.deletion_timestamp.is_none() => Ok(()),
        Ok(Ok(_)) => Err(format!("the definition {name} is being deleted, and all objects with it")),
        Ok(Err(error)) if code(&error) == Some(NOT_FOUND) => {
            Err(format!("the definition {name} was deleted, and all objects with it: apply it again"))
        }
        Ok(Err(error)) => Err(unknown(&error)),
        Err(_) => Err(unknown(&format_args!("no answer within {PAGE_TIMEOUT:?}"))),
    }
}

/// The looks of one watch.
pub(super) struct Looks {
    /// No look before it.
    next: Instant,
}

impl Looks {
    pub(super) fn new() -> Self {
        Self { next: Instant::now() }
    }

    /// Looks after the first of `together` has gone, and adds what `events` have for the time before the look. An end of the
    /// watch that comes in it is answered; it comes after what was added.
    pub(super) async fn look<K: Followed>(
        &mut self,
        client: &Client,
        together: &mut Vec<Told<K>>,
        mut events: Pin<&mut impl Stream<Item = Result<Told<K>, End>>>,
    ) -> Result<Option<End>, String> {
        let mut end = None;
        while end.is_none() && together.len() < WAITING_MAX {
            match timeout_at(self.next, events.next()).await {
                Ok(Some(Ok(event))) => together.push(event),
                Ok(Some(Err(other))) => end = Some(other),
                Ok(None) => end = Some(End::Closed),
                Err(_) => break,
            }
        }
        self.next = Instant::now() + BETWEEN;
        defined::<K>(client).await?;
        Ok(end)
    }
}
