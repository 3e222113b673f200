//! Tests of the source against an API server of our own: lists, watches, broken connections, versions that are too old.
