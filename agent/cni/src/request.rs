//! The configuration of the plugin as the runtime passes it, and its errors.

use std::{path::PathBuf, time::Duration};

use serde_json::{Value, json};

use crate::pod::Pod;

/// Versions of the specification. In all of them a runtime passes `prevResult`, if the plugin is in a list.
const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Time to wait for the agent, if the configuration has none.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// The agent's socket.
    pub(crate) socket: PathBuf,
    /// Time to wait for the agent.
    pub(crate) timeout: Duration,
    /// Namespaces whose pods do not wait.
    exempt_namespaces: Vec<String>,
    /// The result of the plugins before this one, which is the result of this one.
    pub(crate) result: String,
}

/// An error of the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    code: u32,
    message: String,
}

impl Request {
    /// Parses the text on stdin.
    ///
    /// # Errors
    /// [`Failure`] names the field.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let wrong =
            |what: &str| Failure::configuration(format!("invalid configuration of tacit-cni: {what}"));
        let root: Value = serde_json::from_str(text).map_err(|error| wrong(&format!("no JSON: {error}")))?;
        let socket = root["socket"].as_str().filter(|path| path.starts_with('/'));
        let socket =
            socket.ok_or_else(|| wrong("expected the absolute path of the agent's socket as `socket`"))?;
        let timeout = match &root["timeoutSeconds"] {
            Value::Null => TIMEOUT,
            value => Duration::from_secs(
                value
                    .as_u64()
                    .ok_or_else(|| wrong("expected a whole number of seconds as `timeoutSeconds`"))?,
            ),
        };
        let exempt_namespaces = match &root["exemptNamespaces"] {
            Value::Null => Vec::new(),
            value => serde_json::from_value(value.clone())
                .map_err(|_| wrong("expected a list of names as `exemptNamespaces`"))?,
        };
        let result = match &root["prevResult"] {
            Value::Null => {
                return Err(wrong("no `prevResult`: chain it behind the plugin that makes the interface"));
            }
            result => result.to_string(),
        };
        Ok(Self { socket: socket.into(), timeout, exempt_namespaces, result })
    }

    /// Returns true for a pod that does not wait.
    pub(crate) fn is_exempt(&self, pod: &Pod) -> bool {
        self.exempt_namespaces.contains(&pod.namespace)
    }
}

/// Returns the answer to `VERSION`.
pub(crate) fn versions() -> String {
    json!({ "cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS }).to_string()
}

impl Failure {
    pub(crate) fn environment(message: String) -> Self {
        Self { code: 4, message }
    }

    pub(crate) fn configuration(message: String) -> Self {
        Self { code: 7, message }
    }

    /// The runtime may try again.
    pub(crate) fn try_again(message: String) -> Self {
        Self { code: 11, message }
    }

    /// Returns the error as the specification has it, in the version of the configuration `text`.
    pub(crate) fn json(&self, text: &str) -> String {
        let version = serde_json::from_str::<Value>(text).ok();
        let version = version.and_then(|root| root["cniVersion"].as_str().map(str::to_owned));
        let version = version.unwrap_or_else(|| VERSIONS[VERSIONS.len() - 1].to_owned());
        json!({ "cniVersion": version, "code": self.code, "msg": self.message }).to_string()
    }
}
