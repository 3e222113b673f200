//! Harness of the privileged tests: two nodes with pods, with or without Tacit, and peers that talk between them.
//!
//! | module | what it holds |
//! |---|---|
//! | `mesh` | [`Mesh`]: a topology, its pods, its agents (or none: the control run) |
//! | `peer` | [`Server`], [`Client`]: `tacit-peer` inside a pod, and what it told |
//! | `observe` | metrics, status and log of an agent |
//! | `program` | where the programs under test are |
//!
//! Tests that need root are `#[ignore = "needs root"]` and run with `--include-ignored`. Those of one file share a mesh
//! where they change nothing in it; each takes a fresh port ([`fresh_port`]). What they made is removed when the test
//! process ends, however it ends (see `tacit_topology`).
//!
//! Every promise about what must not be seen is tested twice: with Tacit, and in a control run without, in which the
//! same thing must be seen. [`with_and_without_tacit`] makes both tests from one function.

#![forbid(unsafe_code)]

mod mesh;
pub mod observe;
mod peer;
mod program;

pub use mesh::{Mesh, Plan};
pub use peer::{Client, Events, Server};
pub use program::{agent_program, peer_program, scaled};

use std::sync::atomic::{AtomicU16, Ordering};

/// A port no other test of this process uses. Below the kernel's ephemeral range, above Tacit's own ports.
#[must_use]
pub fn fresh_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Makes two tests of each function `fn(&Mesh) -> anyhow::Result<()>`: in `without_tacit` and in `with_tacit`.
///
/// `plan` is a function that gives the [`Plan`] of the mesh both need.
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
