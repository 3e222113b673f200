//! The cluster's DNS server: CoreDNS as a daemon of the first node, and a Service that leads to it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// Address of the Service, which pods are given.
pub(super) const ADDRESS: &str = "10.96.0.10";
/// Address at which the server reports that it has read the cluster's services.
pub(super) const READY: &str = "http://127.0.0.1:8181/ready";

/// Writes the configuration of a server that listens on `address`; returns the daemon's arguments.
pub(super) fn configure(file: &Path, address: &str, kubeconfig: &Path) -> Result<Vec<String>> {
    let text = format!(
        ". {{\n    bind {address}\n    errors\n    ready 127.0.0.1:8181\n    kubernetes cluster.local {{\n        \
         kubeconfig {}\n    }}\n}}\n",
        kubeconfig.display()
    );
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(["-conf", &file.display().to_string()].map(str::to_owned).to_vec())
}

/// Returns the Service, and its endpoint, which no controller finds: the server is no pod.
pub(super) fn service(address: &str) -> [Value; 2] {
    let name = json!({"name": "kube-dns", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}});
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": 53});
    let ports = json!([port("UDP"), port("TCP")]);
    [
        json!({"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": {"clusterIP": ADDRESS, "ports": ports}}),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": name,
            "addressType": "IPv4", "ports": ports, "endpoints": [{"addresses": [address]}],
        }),
    ]
}
