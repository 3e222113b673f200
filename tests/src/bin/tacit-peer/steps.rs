//! Steps of one side of a connection.
//!
//! | step | action | event |
//! |---|---|---|
//! | `send:TEXT` | sends the text and a line feed | |
//! | `line` | reads up to a line feed | `line` {text} |
//! | `read-end` | reads until the other side closes or the connection breaks | `end` {bytes, text, end} |
//! | `echo` | echoes until the other side closes | |
//! | `shut` | shuts down its sending direction | |
//! | `reset` | closes with RST | |
//! | `bulk:BYTES:MINE:THEIRS` | sends and checks that many bytes concurrently, see `bulk` | `bulk` {received, intact} |
//! | `fill` | sends until the socket has accepted nothing for a while, without reading | `filled` {bytes} |
//! | `urgent:TEXT` | sends the text without a line feed; its last byte is urgent (MSG_OOB) | |
//! | `receive:HOW` | waits for the other side's end, then reads; `beside`, `inline` or `never`, see `urgent` | `received` |
//! | `urgent-bulk:BYTES` | sends that many bytes, an urgent one, and as many again | |
//! | `receive-bulk:BYTES` | reads and checks that, with SO_OOBINLINE | `bulk-received` {bytes, intact, marked} |
//! | `pause` | waits for a line on stdin | |
//! | `set:OPTION` | sets a socket option, see `option` | |
//! | `limits` | reads the options of `option` | `limits` {keep_alive, idle_s, interval_s, count, user_timeout_ms} |
//! | `wait-end` | reads until the connection ends | `ended` {ms, error} |
//! | `upload` | sends until the connection ends | `ended` {ms, error} |

use crate::{
    bulk,
    event::{Reporter, error_name},
    option::{self, SocketOption},
    urgent::{self, Receive},
};
use anyhow::{Context, Result, bail};
use serde_json::json;
use socket2::SockRef;
use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    time::{Duration, Instant},
};

/// Longest line, and longest text in an event, in bytes.
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
    Fill,
    Urgent(String),
    Receive(Receive),
    UrgentBulk(usize),
    ReceiveBulk(usize),
    Pause,
    Set(SocketOption),
    Limits,
    WaitEnd,
    Upload,
}

/// A socket that accepts nothing for so long is full.
const FULL_AFTER: Duration = Duration::from_secs(2);

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
                    _ => bail!("invalid step {text}: expected bulk:BYTES:MINE:THEIRS"),
                }
            }
            "fill" => Self::Fill,
            "urgent" => Self::Urgent(rest.to_owned()),
            "receive" => Self::Receive(Receive::parse(rest).with_context(|| format!("step {text}"))?),
            "urgent-bulk" => Self::UrgentBulk(rest.parse().with_context(|| format!("step {text}"))?),
            "receive-bulk" => Self::ReceiveBulk(rest.parse().with_context(|| format!("step {text}"))?),
            "pause" => Self::Pause,
            "set" => Self::Set(SocketOption::parse(rest)?),
            "limits" => Self::Limits,
            "wait-end" => Self::WaitEnd,
            "upload" => Self::Upload,
            _ => bail!("unknown step {text}: see the table of steps"),
        })
    }

    pub(crate) fn run(&self, mut stream: &TcpStream, reporter: &Reporter) -> io::Result<()> {
        match self {
            Self::Send(text) => stream.write_all(format!("{text}\n").as_bytes())?,
            Self::Line => reporter.emit("line", json!({ "text": line(stream)? })),
            Self::ReadEnd => read_end(stream, reporter),
            Self::Echo => {
                let mut back = stream;
                io::copy(&mut stream, &mut back)?;
            }
            Self::Shut => stream.shutdown(Shutdown::Write)?,
            Self::Reset => {
                // With SO_LINGER of 0, close() sends RST instead of FIN.
                SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
            }
            Self::Bulk { bytes, mine, theirs } => bulk::exchange(stream, *bytes, *mine, *theirs, reporter)?,
            Self::Fill => reporter.emit("filled", json!({ "bytes": fill(stream)? })),
            Self::Urgent(text) => urgent::send_text(stream, text)?,
            Self::Receive(how) => urgent::receive(stream, *how, reporter)?,
            Self::UrgentBulk(bytes) => urgent::send_bulk(stream, *bytes)?,
            Self::ReceiveBulk(bytes) => urgent::receive_bulk(stream, *bytes, reporter)?,
            Self::Pause => {
                io::stdin().read_line(&mut String::new())?;
            }
            Self::Set(option) => option.set(SockRef::from(stream))?,
            Self::Limits => reporter.emit("limits", option::limits(&SockRef::from(stream))?),
            Self::WaitEnd => {
                let mut buffer = [0; 4096];
                ended(stream, reporter, || stream.read(&mut buffer))?;
            }
            Self::Upload => {
                let chunk = vec![b'x'; 16 << 10];
                ended(stream, reporter, || stream.write(&chunk))?;
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
            Self::Fill => "fill",
            Self::Urgent(_) => "urgent",
            Self::Receive(_) => "receive",
            Self::UrgentBulk(_) => "urgent-bulk",
            Self::ReceiveBulk(_) => "receive-bulk",
            Self::Pause => "pause",
            Self::Set(_) => "set",
            Self::Limits => "limits",
            Self::WaitEnd => "wait-end",
            Self::Upload => "upload",
        })
    }
}

/// Repeats `call` until it fails or the connection ends, and reports its error.
fn ended(
    stream: &TcpStream,
    reporter: &Reporter,
    mut call: impl FnMut() -> io::Result<usize>,
) -> io::Result<()> {
    // The connection's own limits are what is looked at.
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let begun = Instant::now();
    let error = loop {
        match call() {
            Ok(0) => break "eof".to_owned(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break error_name(&error),
        }
    };
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    reporter.emit("ended", json!({ "ms": ms, "error": error }));
    Ok(())
}

/// Reads a line byte by byte, so that the bytes after it stay in the socket.
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

/// Sends until the socket is full, and returns the bytes that it has accepted.
fn fill(mut stream: &TcpStream) -> io::Result<u64> {
    let timeout = stream.write_timeout()?;
    stream.set_write_timeout(Some(FULL_AFTER))?;
    let chunk = vec![b'x'; 16 << 10];
    let mut bytes = 0;
    loop {
        match stream.write(&chunk) {
            Ok(sent) => bytes += sent as u64,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    stream.set_write_timeout(timeout)?;
    Ok(bytes)
}

fn read_end(mut stream: &TcpStream, reporter: &Reporter) {
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
            Err(error) => break error_name(&error),
        }
    };
    reporter.emit("end", json!({ "bytes": bytes, "text": String::from_utf8_lossy(&text), "end": end }));
}
