//! Harness of the privileged tests: two nodes with pods, with or without Tacit, and peers that connect to each other.
//!
//! | module | content |
//! |---|---|
//! | `mesh` | [`Mesh`]: a topology, its pods, its agents (or none, in a control run) |
//! | `peer` | [`Server`], [`Client`]: `tacit-peer` in a pod, and its events |
//! | `observe` | metrics, status and log of an agent |
//! | `crl` | revocation lists of the mesh's root |
//! | `api` | an API server of Kubernetes |
//! | `cni` | CNI folders of a node, and calls of the agent's plugin |
//! | `redirect` | rules of a pod that translate addresses |
//! | `program` | paths of the programs under test |
//!
//! Tests that need root are `#[ignore = "needs root"]` and run with `--include-ignored`. The tests of one file share a
//! mesh if they do not change it, and each uses a fresh port ([`fresh_port`]). Resources are removed when the test
//! process exits, even after a crash (see `tacit_topology`).
//!
//! Every test that a marker is not visible has a control run without Tacit, in which the marker must be visible.
//! [`with_and_without_tacit`] makes both tests from one function.

#![forbid(unsafe_code)]

pub mod api;
pub mod cni;
pub mod crl;
mod mesh;
pub mod observe;
mod peer;
mod program;
pub mod raw;
pub mod redirect;

pub use mesh::{Mesh, Plan};
pub use peer::{Client, Events, Server};
pub use program::{agent_program, peer_program, scaled};

use std::sync::atomic::{AtomicU16, Ordering};

/// Policy that sets STRICT for the whole mesh.
pub const STRICT_MESH: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                               metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// Returns a port that no other test of this process uses, above Tacit's ports and below the kernel's ephemeral range.
#[must_use]
pub fn fresh_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Makes two tests of each function `fn(&Mesh) -> anyhow::Result<()>`, in the modules `without_tacit` and `with_tacit`.
///
/// `plan` is a function that returns the [`Plan`] of both meshes.
#[macro_export]
macro_rules! with_and_without_tacit {
    ($plan:ident: $($name:ident),+ $(,)?) => {
        mod without_tacit {
            static MESH: ::std::sync::OnceLock<::std::result::Result<$crate::Mesh, String>> =
                ::std::sync::OnceLock::new();
            $(
                #[test]
                #[ignore = "needs root"]
                fn $name() -> ::anyhow::Result<()> {
                    super::$name($crate::Mesh::shared(&MESH, || super::$plan().without_agents())?)
                }
            )+
        }
        mod with_tacit {
            static MESH: ::std::sync::OnceLock<::std::result::Result<$crate::Mesh, String>> =
                ::std::sync::OnceLock::new();
            $(
                #[test]
                #[ignore = "needs root"]
                fn $name() -> ::anyhow::Result<()> {
                    super::$name($crate::Mesh::shared(&MESH, || super::$plan().with_agents())?)
                }
            )+
        }
    };
}
