//! Bulk transfer in both directions at the same time, with a check of every byte.
//!
//! Each side sends a block of pseudo-random bytes repeatedly, and the other side knows the block. Its length is a prime,
//! so it is aligned differently in every buffer, and lost, duplicated or swapped bytes are noticed.

use crate::event::Reporter;
use serde_json::json;
use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    thread,
};

/// Length of the block, in bytes: the largest prime below 1 MiB.
const BLOCK: usize = 1_048_573;
/// Length of one read, in bytes.
const READ: usize = 128 << 10;

/// Sends `bytes` of stream `mine` and shuts down, while it reads to the end and compares with stream `theirs`.
pub(crate) fn exchange(
    stream: &TcpStream,
    bytes: usize,
    mine: u64,
    theirs: u64,
    reporter: &Reporter,
) -> io::Result<()> {
    thread::scope(|scope| {
        let sending = scope.spawn(move || send(stream, bytes, &block(mine)));
        let (received, same) = receive(stream, &block(theirs))?;
        let sent = sending.join().map_err(|_| io::Error::other("the sending thread panicked"))?;
        reporter.emit("bulk", json!({ "received": received, "intact": same }));
        sent
    })
}

fn send(mut stream: &TcpStream, bytes: usize, block: &[u8]) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let piece = block.get(..left).unwrap_or(block);
        stream.write_all(piece)?;
        left -= piece.len();
    }
    stream.shutdown(Shutdown::Write)
}

/// Returns the number of received bytes and whether they match the repeated block.
fn receive(mut stream: &TcpStream, block: &[u8]) -> io::Result<(usize, bool)> {
    let mut buffer = vec![0; READ];
    let (mut received, mut same) = (0, true);
    loop {
        // A read never crosses the end of the block, so one comparison is enough.
        let expected = block.get(received % block.len()..).unwrap_or_default();
        let room = expected.len().min(buffer.len());
        let read = stream.read(buffer.get_mut(..room).unwrap_or_default())?;
        if read == 0 {
            return Ok((received, same));
        }
        same &= buffer.get(..read) == expected.get(..read);
        received += read;
    }
}

/// Returns the block of a seed, by xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
fn block(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let mut out = Vec::with_capacity(BLOCK + 8);
    while out.len() < BLOCK {
        out.extend(next());
    }
    out.truncate(BLOCK);
    out
}
