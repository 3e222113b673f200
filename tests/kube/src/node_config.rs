//! Configuration files of the daemons of a node.

use std::path::Path;

use serde_json::{Value, json};

use super::{cluster::PAUSE, dns, node::SOCKET};

/// Returns the list of CNI plugins for pods of a range.
pub(super) fn bridge(pods: &str) -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
         "ipam": {"type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
}

/// Returns containerd's configuration; its state is in `folder`.
pub(super) fn containerd(folder: &Path, runc: &Path) -> String {
    format!(
        "version = 3\nroot = {root:?}\nstate = \"/run/containerd\"\noom_score = 0\n\
         disabled_plugins = [\"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = {SOCKET:?}\n\
         [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {PAUSE:?}\n\
         [plugins.\"io.containerd.cri.v1.runtime\"]\nrestrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc.options]\nBinaryName = {runc:?}\n",
        root = folder.join("containerd"),
    )
}

/// Returns the configuration of a node's kubelet.
pub(super) fn kubelet(pki: &Path, name: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "x509": {"clientCAFile": pki.join("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.join(format!("{name}.crt")),
        "tlsPrivateKeyFile": pki.join(format!("{name}.key")),
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        // No systemd is in the node. Limits of the node's own cgroups need controllers, which it may lack.
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "protectKernelDefaults": true,
        "resolvConf": "",
        "clusterDNS": [dns::ADDRESS],
        "clusterDomain": "cluster.local",
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "2s",
        // ConfigMaps reach their pods within this and their cache's time.
        "syncFrequency": "5s",
        "configMapAndSecretChangeDetectionStrategy": "Watch",
    })
}
