//! Buffers of one batch of frames, kept by the worker thread: a flow holds one only while bytes are in it, so an idle flow
//! costs none.

use std::{
    cell::RefCell,
    mem,
    ops::{Deref, DerefMut},
};

use super::batch::BATCH_BYTES;

/// Free buffers kept by each thread; 2 MiB. A thread rarely is in the middle of more flows at once.
const KEPT: usize = 16;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`BATCH_BYTES`] that goes back to its worker when dropped. It starts with whatever was left in it.
pub(crate) struct Buffer(Box<[u8]>);

impl Buffer {
    /// A free buffer of this thread, or a new one.
    pub(crate) fn take() -> Self {
        let kept = FREE.with_borrow_mut(Vec::pop);
        Self(kept.unwrap_or_else(|| vec![0; BATCH_BYTES].into_boxed_slice()))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = mem::take(&mut self.0);
        // The list is gone when a thread ends; the buffer then just goes too.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again_and_few_are_kept() {
        let taken: Vec<_> = (0..2 * KEPT).map(|_| Buffer::take()).collect();
        assert!(taken.iter().all(|buffer| buffer.len() == BATCH_BYTES));
        drop(taken);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
        let again = Buffer::take();
        assert_eq!((again.len(), FREE.with_borrow(Vec::len)), (BATCH_BYTES, KEPT - 1));
    }
}
