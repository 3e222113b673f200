//! What happened, told on stdout: `{"event": .., "connection": .., ..}`, one object a line.

use serde_json::{Value, json};
use std::io::{self, Write};

/// Tells the events of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Teller {
    connection: u64,
}

impl Teller {
    pub(crate) fn new(connection: u64) -> Self {
        Self { connection }
    }

    pub(crate) fn tell(&self, event: &str, mut fields: Value) {
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("event".to_owned(), json!(event));
            fields.insert("connection".to_owned(), json!(self.connection));
        }
        // When nobody reads any more, nobody is interested.
        let _ = writeln!(io::stdout().lock(), "{fields}");
    }
}

/// The name of an error, `TimedOut` also for the kernel's "try again" of a socket with a timeout.
pub(crate) fn kind(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock => "TimedOut".to_owned(),
        kind => format!("{kind:?}"),
    }
}
