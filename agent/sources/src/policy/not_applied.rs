//! Warnings about namespaces whose policies are not applied.

use std::collections::BTreeSet;

use tacit_core::policy::Policies;

/// The namespaces that were warned about.
#[derive(Debug, Default)]
pub(crate) struct NotApplied(BTreeSet<String>);

impl NotApplied {
    /// Returns a warning for each namespace of `policies` that has become one of these since the last call.
    pub(crate) fn warnings(&mut self, policies: &Policies) -> Vec<String> {
        let new = policies.not_applied().filter(|(namespace, _)| !self.0.contains(*namespace));
        let warnings = new.map(|(namespace, why)| {
            format!("policies of namespace {namespace} are not applied, and all connections to its pods are denied: {why}")
        });
        let warnings = warnings.collect();
        self.0 = policies.not_applied().map(|(namespace, _)| namespace.to_owned()).collect();
        warnings
    }
}
