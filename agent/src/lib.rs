//! stub
pub mod identity;
pub mod kernel;
