//! Idle connections. Each one sends a request after it is opened, to show that it works end to end.

use crate::client::{exchange, open};
use anyhow::{Context, Result};
use serde_json::json;
use std::{
    io::{self, Read},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

/// Opens the connections, prints `{"open": COUNT, "seconds": ..}` and waits for the end of stdin. Then it sends one more
/// request on each, closes all and prints `{"closed": COUNT}`.
pub(crate) fn run(to: SocketAddr, count: usize) -> Result<()> {
    let begin = Instant::now();
    let connections: Vec<TcpStream> = (0..count)
        .map(|number| {
            let stream = open(to).and_then(|stream| exchange(&stream, &mut [b'x'; 64]).map(|()| stream));
            stream.with_context(|| format!("connection {number} of {count}"))
        })
        .collect::<Result<_>>()?;
    println!("{}", json!({ "open": count, "seconds": begin.elapsed().as_secs_f64() }));
    io::stdin().read_to_end(&mut Vec::new())?;
    for (number, stream) in connections.iter().enumerate() {
        exchange(stream, &mut [b'y'; 64]).with_context(|| format!("connection {number} after being idle"))?;
    }
    drop(connections);
    println!("{}", json!({ "closed": count }));
    Ok(())
}
