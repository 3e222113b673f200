//! The victim's server: accepts connections and datagrams, and prints which markers its application got.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, UdpSocket},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tacit_topology::HANG;

use super::sockets::{QUERY, dccp_socket, set};

const BACKLOG: i32 = 128;

/// Serves TCP and UDP on the comma-separated `ports`, and the first also by MPTCP, SCTP and DCCP where the kernel has them, at
/// the next three ports. Prints `ready`, then `got ..` for what each connection brought.
///
/// # Errors
/// Fails if a port is not available.
pub(super) fn run(ports: &str) -> Result<()> {
    let ports: Vec<u16> = ports
        .split(',')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("ports {ports:?}"))?;
    let first = *ports.first().context("no port")?;
    let mut threads = Vec::new();
    for port in &ports {
        let listener = listen(libc::IPPROTO_TCP, *port).with_context(|| format!("listen on {port}"))?;
        set(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, &BACKLOG)?;
        threads.push(std::thread::spawn(move || accept(&listener)));
        let socket = datagrams(*port).with_context(|| format!("UDP port {port}"))?;
        threads.push(std::thread::spawn(move || receive(&socket)));
    }
    for (protocol, port) in [(libc::IPPROTO_MPTCP, first + 1), (libc::IPPROTO_SCTP, first + 2)] {
        if let Ok(listener) = listen(protocol, port) {
            threads.push(std::thread::spawn(move || accept(&listener)));
        }
    }
    if let Ok(listener) = dccp_socket(Domain::IPV6).and_then(|socket| begin(socket, first + 3)) {
        threads.push(std::thread::spawn(move || accept(&listener)));
    }
    println!("ready");
    io::stdout().flush()?;
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn listen(protocol: i32, port: u16) -> io::Result<Socket> {
    begin(Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::from(protocol)))?, port)
}

fn begin(socket: Socket, port: u16) -> io::Result<Socket> {
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn datagrams(port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())?;
    Ok(socket.into())
}

fn receive(socket: &UdpSocket) {
    let mut bytes = vec![0; usize::from(u16::MAX)];
    loop {
        // Errors are of earlier answers.
        let Ok((length, from)) = socket.recv_from(&mut bytes) else { continue };
        let datagram = bytes.get(..length).unwrap_or_default();
        if let Some(answer) = datagram.strip_prefix(QUERY) {
            let _ = socket.send_to(answer, from);
        }
        println!("got {}", String::from_utf8_lossy(datagram));
        let _ = io::stdout().flush();
    }
}

fn accept(listener: &Socket) {
    while let Ok((mut connection, _)) = listener.accept() {
        std::thread::spawn(move || {
            let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
            let _ = connection.set_read_timeout(Some(HANG));
            // Each part counts at once: what has come before an error, or before an end that is not to come.
            while let Ok(length @ 1..) = connection.read(&mut part) {
                bytes.extend_from_slice(part.get(..length).unwrap_or_default());
                if let Some(answer) = bytes.strip_prefix(QUERY) {
                    let _ = connection.write_all(answer);
                }
                println!("got {}", String::from_utf8_lossy(&bytes));
                let _ = io::stdout().flush();
            }
        });
    }
}
