//! A client of the pod `peer`, whose connections enter its ztunnel by SOCKS5 (RFC 1928).

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result, bail, ensure};
use tacit_topology::{HANG, Pod};

/// The port of a ztunnel.
const PORT: u16 = 15080;

/// Connects from `pod` through its ztunnel to `to`. SOCKS5 is answered before the destination is reached.
pub(crate) fn connect(pod: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let proxy = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let mut tcp = pod.netns().enter(|| TcpStream::connect_timeout(&proxy, HANG))?.context("SOCKS5")?;
    tcp.set_read_timeout(Some(HANG))?;
    tcp.set_nodelay(true)?;
    tcp.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    tcp.read_exact(&mut method)?;
    ensure!(method == [5, 0], "SOCKS5 answered {method:?}");
    let mut request = vec![5, 1, 0];
    match to.ip() {
        IpAddr::V4(address) => {
            request.push(1);
            request.extend(address.octets());
        }
        IpAddr::V6(address) => {
            request.push(4);
            request.extend(address.octets());
        }
    }
    request.extend(to.port().to_be_bytes());
    tcp.write_all(&request)?;
    let mut head = [0; 4];
    tcp.read_exact(&mut head)?;
    ensure!(head[1] == 0, "SOCKS5 refused: {head:?}");
    let mut bound = vec![0; if head[3] == 4 { 18 } else { 6 }];
    tcp.read_exact(&mut bound)?;
    Ok(tcp)
}

/// Sends a line, and checks that it comes back, and the end too.
pub(crate) fn echo(mut tcp: TcpStream, text: &str) -> Result<()> {
    exchange(&mut tcp, text)?;
    tcp.shutdown(Shutdown::Write)?;
    let mut rest = Vec::new();
    tcp.read_to_end(&mut rest)?;
    ensure!(rest.is_empty(), "{rest:?} behind the echo");
    Ok(())
}

/// Sends a line, and checks that it comes back.
pub(crate) fn exchange(tcp: &mut TcpStream, text: &str) -> Result<()> {
    let line = format!("{text}\n");
    tcp.write_all(line.as_bytes())?;
    let mut got = vec![0; line.len()];
    tcp.read_exact(&mut got).context("no echo")?;
    ensure!(got == line.as_bytes(), "{:?} came back", String::from_utf8_lossy(&got));
    Ok(())
}

/// Checks that the connection ends without a byte.
pub(crate) fn is_refused(mut tcp: TcpStream) -> Result<()> {
    // It may be reset before.
    let _ = tcp.write_all(b"secret\n");
    let mut rest = Vec::new();
    match tcp.read_to_end(&mut rest) {
        Ok(_) if rest.is_empty() => Ok(()),
        Err(error)
            if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
                && rest.is_empty() =>
        {
            Ok(())
        }
        other => bail!("{other:?}, {:?} came", String::from_utf8_lossy(&rest)),
    }
}
