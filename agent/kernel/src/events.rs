//! Brings the programs' own log lines into the agent's log.
//!
//! The programs write at a bounded rate and count everything; a line that is lost costs nothing but itself.

use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

use super::Kernel;

/// Forwards lines until the runtime ends.
pub async fn forward(kernel: &Kernel) {
    let Some(log) = kernel.programs().take_log() else { return };
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger owns its descriptor for as long as it lives"
    )]
    let readable = AsyncFd::with_interest(log, Interest::READABLE);
    let Ok(mut log): Result<AsyncFd<EbpfLogger<_>>, _> = readable else {
        return tracing::warn!("no log lines from the kernel side: its ring buffer cannot be polled");
    };
    loop {
        let Ok(mut ready) = log.readable_mut().await else { return };
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
