//! Helpers for the tests of both relays.

use std::{future::Future, io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::watch::{Watch, Watching};

/// Limit of every wait in a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Awaits `work` with the limit.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(DEADLINE, work).await.expect("in time")
}

/// Watches a peer of which nothing is asked.
pub(crate) fn unasked(watch: &Watch) -> Watching<'_> {
    Watching { watch, silence_max: DEADLINE, tell: &|_, _| {} }
}

/// Returns true if the connection ends with RST, false if it ends with FIN.
pub(crate) async fn is_reset(tcp: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match soon(tcp.read_to_end(&mut rest)).await {
        Ok(_) => false,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
    }
}

/// Both applications write `bytes` at once, end, and check the received bytes.
pub(crate) async fn exchange(source: TcpStream, destination: TcpStream, bytes: usize) {
    let one = tokio::spawn(talk(source, 1, 2, bytes));
    let other = tokio::spawn(talk(destination, 2, 1, bytes));
    soon(one).await.expect("no panic");
    soon(other).await.expect("no panic");
}

async fn talk(tcp: TcpStream, ours: u32, theirs: u32, bytes: usize) {
    let (mut read, mut write) = tcp.into_split();
    let sent = pattern(ours, bytes);
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.expect("open");
        write.shutdown().await.expect("open");
        write
    });
    let mut received = Vec::with_capacity(bytes);
    read.read_to_end(&mut received).await.expect("a clean end");
    let _write = writing.await.expect("no panic");
    assert!(received == pattern(theirs, bytes), "{} of {bytes} bytes, or others", received.len());
}

/// Returns bytes that depend on the seed and the position.
fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}
