//! Connections that are open and silent: each had one request, to show that it goes all the way.

use crate::client::{exchange, open};
use anyhow::{Context, Result};
use serde_json::json;
use std::{
    io::{self, Read},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

/// Opens them, tells `{"open": COUNT, "seconds": ..}`, waits for the end of stdin, asks once more on each, closes them
/// all and tells `{"closed": COUNT}`.
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
        exchange(stream, &mut [b'y'; 64])
            .with_context(|| format!("connection {number} after its silence"))?;
    }
    drop(connections);
    println!("{}", json!({ "closed": count }));
    Ok(())
}
