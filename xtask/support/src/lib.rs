//! Builds and starts things of this repository, for `cargo xtask` and for the suites that it starts.
//!
//! | module | what it holds |
//! |---|---|
//! | `workspace` | folders, cargo, built programs |
//! | `platform` | this machine's platform, or arm64 from another machine |
//! | `ebpf` | the kernel side, built and linted |
//! | `setup` | compilers, linker and programs, installed when absent |
//! | `debian` | packages of Debian's archive, fetched and not installed |
//! | `command`, `privilege` | other programs, started as the caller or as root |
//! | `progress` | steps of a command, notes, colours |
//! | `test_programs` | the workspace's tests, built once and found |
//! | `report` | results of tests, counted |
//!
//! It depends on nothing but `anyhow`: `cargo xtask` is the first thing that is compiled in a new clone.
#![forbid(unsafe_code)]

pub mod command;
pub mod debian;
pub mod ebpf;
pub mod platform;
pub mod privilege;
pub mod progress;
pub mod report;
pub mod setup;
pub mod test_programs;
pub mod workspace;
