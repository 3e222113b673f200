//! What one side does on a connection, step by step.
//!
//! | step | does | tells |
//! |---|---|---|
//! | `send:TEXT` | sends the text and a line feed | |
//! | `line` | reads up to a line feed | `line` {text} |
//! | `read-end` | reads until the other side ends or the connection breaks | `end` {bytes, text, end} |
//! | `echo` | sends back what comes, until the other side ends | |
//! | `shut` | ends its sending direction | |
//! | `reset` | closes with RST | |
//! | `bulk:BYTES:MINE:THEIRS` | sends and checks that many bytes at the same time, see `bulk` | `bulk` {received, as_sent} |
//! | `say:TEXT` | | `said` {text} |
//! | `pause` | waits for a line on stdin | |

use crate::{
    bulk,
    event::{Teller, kind},
};
use anyhow::{Context, Result, bail};
use serde_json::json;
use socket2::SockRef;
use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

/// Longest line and longest text that is told, in bytes.
const TEXT_MAX: usize = 4096;

/// One step.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Send(String),
    Line,
    ReadEnd,
    Echo,
    Shut,
    Reset,
    Bulk { bytes: usize, mine: u64, theirs: u64 },
    Say(String),
    Pause,
}

impl Step {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        Ok(match name {
            "send" => Self::Send(rest.to_owned()),
            "line" => Self::Line,
            "read-end" => Self::ReadEnd,
            "echo" => Self::Echo,
            "shut" => Self::Shut,
            "reset" => Self::Reset,
            "bulk" => {
                let numbers: Result<Vec<u64>, _> = rest.split(':').map(str::parse).collect();
                match numbers.with_context(|| format!("step {text}"))?.as_slice() {
                    [bytes, mine, theirs] => {
                        Self::Bulk { bytes: usize::try_from(*bytes)?, mine: *mine, theirs: *theirs }
                    }
                    _ => bail!("step {text} is not bulk:BYTES:MINE:THEIRS"),
                }
            }
            "say" => Self::Say(rest.to_owned()),
            "pause" => Self::Pause,
            _ => bail!("no step {text}"),
        })
    }

    pub(crate) fn run(&self, mut stream: &TcpStream, teller: &Teller) -> io::Result<()> {
        match self {
            Self::Send(text) => stream.write_all(format!("{text}\n").as_bytes())?,
            Self::Line => teller.tell("line", json!({ "text": line(stream)? })),
            Self::ReadEnd => read_end(stream, teller),
            Self::Echo => {
                let mut back = stream;
                io::copy(&mut stream, &mut back)?;
            }
            Self::Shut => stream.shutdown(Shutdown::Write)?,
            Self::Reset => {
                // Closing a socket that lingers for no time sends RST instead of FIN.
                SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
            }
            Self::Bulk { bytes, mine, theirs } => bulk::exchange(stream, *bytes, *mine, *theirs, teller)?,
            Self::Say(text) => teller.tell("said", json!({ "text": text })),
            Self::Pause => {
                io::stdin().read_line(&mut String::new())?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Send(_) => "send",
            Self::Line => "line",
            Self::ReadEnd => "read-end",
            Self::Echo => "echo",
            Self::Shut => "shut",
            Self::Reset => "reset",
            Self::Bulk { .. } => "bulk",
            Self::Say(_) => "say",
            Self::Pause => "pause",
        })
    }
}

/// Reads byte by byte, so that what follows the line stays in the socket.
fn line(mut stream: &TcpStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while text.len() < TEXT_MAX {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        text.extend(byte);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn read_end(mut stream: &TcpStream, teller: &Teller) {
    let mut buffer = vec![0; 64 << 10];
    let mut text = Vec::new();
    let mut bytes = 0_u64;
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "eof".to_owned(),
            Ok(read) => {
                bytes += read as u64;
                text.extend(buffer.iter().take(read.min(TEXT_MAX - text.len())));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break kind(&error),
        }
    };
    teller.tell("end", json!({ "bytes": bytes, "text": String::from_utf8_lossy(&text), "end": end }));
}
