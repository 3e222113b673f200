//! The decisions of Tacit's node agent. Data and the time go in, a value comes out.
//!
//! | module | content |
//! |---|---|
//! | `spiffe` | SPIFFE ids and trust domains |
//! | `directory` | workloads and services by address; choice of an endpoint |
//! | `balance` | flows of each endpoint, and clients that stay with one |
//! | `policy` | modes, authorization, the verdict on an inbound flow |
//! | `route` | the route of a captured connection |
//! | `refusal` | the reasons why connections are refused |
//! | `shares` | bounds in total and for each holder of every shared resource; who may use how much |
//! | `renewal` | when to renew a certificate |
//! | `wire` | the wire format `tacit/1`: frames, OPEN, the states of a flow |
//! | `pool` | idle sessions of a pair |
//! | `cow_map` | a map whose copies share what did not change |
//! | `yaml` | YAML to typed values, with all mistakes of a file |
//! | `error_chain` | an error and its causes in one line |
//!
//! Nothing here reads a clock, a file or a socket, and nothing logs. `cargo xtask tidy` checks the manifest and the sources.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod balance;
mod cow_map;
pub mod directory;
pub mod error_chain;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod policy;
pub mod pool;
pub mod refusal;
pub mod renewal;
pub mod route;
pub mod shares;
pub mod spiffe;
pub mod wire;
pub mod yaml;
