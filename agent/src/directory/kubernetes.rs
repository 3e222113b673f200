//! The directory of a cluster, from the API of Kubernetes.

use std::{fmt, path::PathBuf};

/// How the API is reached and what enrols a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// What enrols a pod.
    pub enrol_label: EnrolLabel,
    /// A kubeconfig file; `None` is the credentials of the pod that the agent runs in.
    pub kubeconfig: Option<PathBuf>,
}

/// The label that enrols a pod, on itself or on its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolLabel {
    /// Its name.
    pub name: String,
    /// The value that enrols.
    pub value: String,
}

impl Default for EnrolLabel {
    fn default() -> Self {
        Self { name: "tacit.io/enrol".to_owned(), value: "true".to_owned() }
    }
}

impl fmt::Display for EnrolLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}
