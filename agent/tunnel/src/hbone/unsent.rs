//! The bytes of a stream that HTTP/2 has not given to the connection's socket yet.
//!
//! A flow lives until they are gone: HTTP/2 keeps its stream as long, and so the pod's share has to count it as long.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

/// The pieces of one stream.
#[derive(Debug, Default)]
pub(super) struct Unsent(Arc<Pieces>);

#[derive(Debug, Default)]
struct Pieces {
    count: AtomicUsize,
    waiting: Mutex<Option<Waker>>,
}

impl Unsent {
    /// Returns `bytes` as a piece. It counts until HTTP/2 drops it.
    pub(super) fn piece(&self, bytes: &[u8]) -> Bytes {
        self.0.count.fetch_add(1, Ordering::Relaxed);
        Bytes::from_owner(Piece { bytes: bytes.into(), all: self.0.clone() })
    }

    /// Ready if there are at most `most` pieces.
    pub(super) fn poll_at_most(&self, most: usize, cx: &mut Context<'_>) -> Poll<()> {
        let is_few = || self.0.count.load(Ordering::Acquire) <= most;
        if is_few() {
            return Poll::Ready(());
        }
        *self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        // The last one may have gone before the waker was there.
        if is_few() { Poll::Ready(()) } else { Poll::Pending }
    }
}

struct Piece {
    bytes: Box<[u8]>,
    all: Arc<Pieces>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.all.count.fetch_sub(1, Ordering::AcqRel);
        let waiting = self.all.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn a_piece_counts_until_it_is_dropped() {
        let unsent = Unsent::default();
        let (first, second) = (unsent.piece(b"first"), unsent.piece(b"second"));
        assert_eq!(first, &b"first"[..]);
        poll_fn(|cx| unsent.poll_at_most(2, cx)).await;
        let waiting = tokio::spawn(poll_fn(move |cx| unsent.poll_at_most(0, cx)));
        drop(first);
        tokio::task::yield_now().await;
        let copy = second.clone();
        drop(second);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(copy);
        waiting.await.expect("woken");
    }
}
