//! Events on stdout: `{"event": .., "connection": .., ..}`, one object a line.

use serde_json::{Value, json};
use std::io::{self, Write};

/// Prints the events of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reporter {
    connection: u64,
}

impl Reporter {
    pub(crate) fn new(connection: u64) -> Self {
        Self { connection }
    }

    pub(crate) fn emit(&self, event: &str, mut fields: Value) {
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("event".to_owned(), json!(event));
            fields.insert("connection".to_owned(), json!(self.connection));
        }
        // The write fails if the test has exited, which needs no events.
        let _ = writeln!(io::stdout().lock(), "{fields}");
    }
}

/// Returns the name of an error. A socket with a timeout reports WouldBlock, which is named `TimedOut`.
pub(crate) fn error_name(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock => "TimedOut".to_owned(),
        kind => format!("{kind:?}"),
    }
}
