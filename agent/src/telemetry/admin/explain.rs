//! `tacit policy explain`: the question as it crosses the operator's socket, and its answer.

use std::{path::Path, sync::Arc};

use hyper::{StatusCode, Uri};
use tacit_core::policy::explain::{ExplainError, Explanation, WorkloadRef, port};

use super::{Answer, FetchError, answer as respond, failure, plain, socket::fetch_json};

pub(super) const PATH: &str = "/policy/explain";

/// Explains a connection by what the agent knows now. Called for every question; must not block.
pub type ExplainSource =
    Arc<dyn Fn(&WorkloadRef, &WorkloadRef, u16) -> Result<Explanation, ExplainError> + Send + Sync>;

pub(super) fn answer(
    query: &str,
    explain: &dyn Fn(&WorkloadRef, &WorkloadRef, u16) -> Result<Explanation, ExplainError>,
) -> Answer {
    let field = |name: &str| {
        let fields = query.split('&').filter_map(|field| field.split_once('='));
        fields.filter(|(key, _)| *key == name).map(|(_, value)| value).next().unwrap_or_default()
    };
    let explained = || {
        explain(&WorkloadRef::parse(field("from"))?, &WorkloadRef::parse(field("to"))?, port(field("port"))?)
    };
    match explained().map(|explanation| serde_json::to_string(&explanation)) {
        Ok(Ok(json)) => respond(StatusCode::OK, "application/json", json),
        Ok(Err(json_error)) => failure(&json_error),
        Err(problem) => plain(StatusCode::BAD_REQUEST, format!("{problem}\n")),
    }
}

/// Asks the agent behind `socket` what policy says about a connection: `from` and `to` are `namespace/name` of a
/// workload or an IP address.
///
/// # Errors
/// [`FetchError`]; [`FetchError::Question`] when the question makes no sense to the agent.
pub async fn fetch_explanation(
    socket: &Path,
    from: &str,
    to: &str,
    at: &str,
) -> Result<Explanation, FetchError> {
    let wrong = |problem: ExplainError| FetchError::Question(problem.to_string());
    // Checked here, so that what is put into the query needs no escaping.
    let (from, to) = (WorkloadRef::parse(from).map_err(wrong)?, WorkloadRef::parse(to).map_err(wrong)?);
    let query = format!("{PATH}?from={from}&to={to}&port={}", port(at).map_err(wrong)?);
    let uri: Uri = query.parse().map_err(|_| {
        FetchError::Question(format!(
            "{from} or {to} has characters that no name has: write <namespace>/<name>"
        ))
    })?;
    fetch_json(socket, uri).await
}
