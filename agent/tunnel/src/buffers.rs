//! Batch buffers, cached by worker threads. A flow holds a buffer only while it has bytes in transit, so an idle flow holds
//! none. The small size fits a core's cache and suits short exchanges. The large size saves system calls on bulk transfers.

use std::{
    cell::RefCell,
    mem,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use super::batch;

/// Interval at which a thread frees unused memory. Flow timers that are longer than this interval are never the first to
/// expire, so setting them costs no system call.
pub const TRIM: Duration = Duration::from_secs(5);
/// Maximum number of free buffers of each size per thread (4 MiB and 1 MiB). A thread rarely has more flows in transit.
const KEPT: usize = 8;
const KEPT_SMALL: usize = 16;
/// Maximum number of large buffers in use by all threads (128 MiB). Beyond it, flows use small buffers.
const LARGE_MAX: usize = 256;

static LARGE_USED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static FREE: RefCell<Free> = const { RefCell::new(Free { large: Vec::new(), small: Vec::new() }) };
}

struct Free {
    large: Vec<Box<[u8]>>,
    small: Vec<Box<[u8]>>,
}

/// The amount of data that a flow moves at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Size {
    /// One full record, in a small buffer. A read into one slice costs less than a read into several.
    #[default]
    Single,
    /// Four full records.
    Small,
    /// [`batch::FRAMES_MAX`] full records.
    Large,
}

impl Size {
    /// Returns the bytes of a batch of this size.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::Single => batch::bytes(1),
            Self::Small => batch::bytes(4),
            Self::Large => batch::bytes(batch::FRAMES_MAX),
        }
    }

    /// Returns the size of the next read, after a read of `read_bytes` into `room_bytes`.
    pub(crate) fn after(self, read_bytes: usize, room_bytes: usize) -> Self {
        match self {
            Self::Single | Self::Small if read_bytes == room_bytes => Self::Large,
            // A burst has ended.
            Self::Large if read_bytes < Self::Small.bytes() / 2 => Self::Small,
            Self::Small if read_bytes < Self::Single.bytes() / 2 => Self::Single,
            same => same,
        }
    }
}

/// A buffer that returns to its thread's cache when dropped. Its initial content is undefined.
pub(crate) struct Buffer(Box<[u8]>);

impl Buffer {
    /// Takes a free buffer of this thread, or allocates one.
    pub(crate) fn take(size: Size) -> Self {
        let size = match size {
            Size::Large if LARGE_USED.load(Relaxed) < LARGE_MAX => {
                LARGE_USED.fetch_add(1, Relaxed);
                Size::Large
            }
            _ => Size::Small,
        };
        let kept = FREE.with_borrow_mut(|free| match size {
            Size::Large => free.large.pop(),
            _ => free.small.pop(),
        });
        Self(kept.unwrap_or_else(|| vec![0; size.bytes()].into_boxed_slice()))
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
        let is_large = buffer.len() == Size::Large.bytes();
        if is_large {
            LARGE_USED.fetch_sub(1, Relaxed);
        }
        // The cache is gone when the thread exits. The buffer is then freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let (list, kept) = if is_large { (&mut free.large, KEPT) } else { (&mut free.small, KEPT_SMALL) };
            if list.len() < kept {
                list.push(buffer);
            }
        });
    }
}

/// Frees this thread's cached buffers, except one of each size.
pub fn trim() {
    FREE.with_borrow_mut(|free| {
        free.large.truncate(1);
        free.small.truncate(1);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again_and_few_are_kept() {
        let taken: Vec<_> = (0..2 * KEPT).map(|_| Buffer::take(Size::Large)).collect();
        assert!(taken.iter().all(|buffer| buffer.len() == Size::Large.bytes()));
        drop(taken);
        let kept = || FREE.with_borrow(|free| (free.large.len(), free.small.len()));
        assert_eq!(kept(), (KEPT, 0));
        let again = (Buffer::take(Size::Large), Buffer::take(Size::Small));
        assert_eq!((again.1.len(), kept()), (Size::Small.bytes(), (KEPT - 1, 0)));
        drop(again);
        trim();
        assert_eq!(kept(), (1, 1));
    }

    #[test]
    fn the_size_follows_what_comes() {
        let (single, small) = (Size::Single.bytes(), Size::Small.bytes());
        assert_eq!(Size::Single.after(single, single), Size::Large);
        assert_eq!(Size::Single.after(single - 1, single), Size::Single);
        assert_eq!(Size::Small.after(small, small), Size::Large);
        assert_eq!(Size::Small.after(small - 1, small), Size::Small);
        assert_eq!(Size::Small.after(64, small), Size::Single);
        assert_eq!(Size::Large.after(small, Size::Large.bytes()), Size::Large);
        assert_eq!(Size::Large.after(64, Size::Large.bytes()), Size::Small);
    }
}
