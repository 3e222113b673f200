//! Properties of frames, parsers and decisions, checked with random inputs.
//!
//! A failure prints the smallest input that was found: make it a test of its own beside the code. `PROPTEST_CASES=10000`
//! looks longer. Nothing is written to the source tree.

use proptest::test_runner::Config;

mod damage;
mod directory;
mod policy;
mod texts;
mod wire;

fn config() -> Config {
    Config { failure_persistence: None, ..Config::default() }
}
