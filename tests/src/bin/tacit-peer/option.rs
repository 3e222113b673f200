//! Socket options that decide when a connection to a dead peer ends.
//!
//! | option | sets |
//! |---|---|
//! | `keep-alive:IDLE:INTERVAL:COUNT` | SO_KEEPALIVE, TCP_KEEPIDLE and TCP_KEEPINTVL in seconds, TCP_KEEPCNT |
//! | `user-timeout:MS` | TCP_USER_TIMEOUT |

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use socket2::{SockRef, TcpKeepalive};
use std::{io, time::Duration};

/// One option.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SocketOption {
    KeepAlive { idle_s: u64, interval_s: u64, count: u32 },
    UserTimeout { ms: u64 },
}

impl SocketOption {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let numbers: Result<Vec<u64>, _> = rest.split(':').map(str::parse).collect();
        match (name, numbers.with_context(|| format!("option {text}"))?.as_slice()) {
            ("keep-alive", [idle_s, interval_s, count]) => {
                let count = u32::try_from(*count)?;
                Ok(Self::KeepAlive { idle_s: *idle_s, interval_s: *interval_s, count })
            }
            ("user-timeout", [ms]) => Ok(Self::UserTimeout { ms: *ms }),
            _ => bail!("invalid option {text}: see the table of options"),
        }
    }

    pub(crate) fn set(self, socket: SockRef<'_>) -> io::Result<()> {
        match self {
            Self::KeepAlive { idle_s, interval_s, count } => {
                let keepalive = TcpKeepalive::new()
                    .with_time(Duration::from_secs(idle_s))
                    .with_interval(Duration::from_secs(interval_s))
                    .with_retries(count);
                socket.set_tcp_keepalive(&keepalive)
            }
            Self::UserTimeout { ms } => socket.set_tcp_user_timeout(Some(Duration::from_millis(ms))),
        }
    }
}

/// Returns the values of all options.
pub(crate) fn limits(socket: &SockRef<'_>) -> io::Result<Value> {
    Ok(json!({
        "keep_alive": socket.keepalive()?,
        "idle_s": socket.tcp_keepalive_time()?.as_secs(),
        "interval_s": socket.tcp_keepalive_interval()?.as_secs(),
        "count": socket.tcp_keepalive_retries()?,
        "user_timeout_ms": socket.tcp_user_timeout()?.map(|timeout| timeout.as_millis()),
    }))
}
