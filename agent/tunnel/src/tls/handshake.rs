//! The TLS handshake over a socket. rustls runs unbuffered and receives one record at a time, so it never decrypts bytes behind
//! the handshake. The record layer gets those bytes unchanged.

use std::{io, mem};

use rustls::{
    CommonState, ExtractedSecrets,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus},
};
use tokio::{io::Interest, net::TcpStream};

use super::{
    TunnelError,
    verify::{PeerCertificateError, VerifiedPeer, with_verdict},
};
use crate::record::{Schedule, record_bytes};

/// Bytes per read, more than a flight of either side.
const READ_BYTES: usize = 8 << 10;
/// Maximum bytes of a handshake that are buffered. The limit of rustls is lower.
const KEPT_MAX_BYTES: usize = 128 << 10;

/// One side of a handshake.
pub(crate) trait Handshake: Sized {
    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn state(&self) -> &CommonState;

    /// Returns the secrets after the handshake.
    fn into_secrets(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error>;
}

impl Handshake for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_secrets(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Client(Box::new(schedule))))
    }
}

impl Handshake for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_secrets(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Server(Box::new(schedule))))
    }
}

/// The action that rustls requires next.
enum Step {
    Again,
    Send,
    Receive,
    Done,
    Failed(TunnelError),
}

/// Runs `connection`'s handshake over `tcp` to its end. Returns the bytes that the peer sent behind it, and the verified peer.
pub(crate) async fn run<C: Handshake>(
    tcp: &TcpStream,
    connection: &mut C,
) -> Result<(Vec<u8>, VerifiedPeer), TunnelError> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    // Bytes of `incoming` that rustls has seen, whole records only.
    let mut shown = 0;
    let mut verified = None;
    loop {
        let ((step, discard), verdict) =
            with_verdict(|| process(connection, &mut incoming[..shown], &mut outgoing));
        let step = match verdict {
            Some(Err(refusal)) => Step::Failed(refusal.into()),
            Some(Ok(peer)) => {
                verified = Some(peer);
                step
            }
            None => step,
        };
        incoming.drain(..discard);
        shown -= discard;
        match step {
            Step::Again => {}
            Step::Send => send(tcp, &mut outgoing).await?,
            Step::Receive => {
                while !show_more(&incoming, &mut shown) {
                    receive(tcp, &mut incoming).await?;
                }
            }
            Step::Done => {
                let peer = verified.ok_or(PeerCertificateError::NoClientCertificate)?;
                return Ok((incoming.split_off(shown), peer));
            }
            Step::Failed(error) => {
                // The next output is the alert, if there is one. rustls must not process the same input again.
                // Send the alert only if the socket accepts it at once.
                let _ = process(connection, &mut incoming[..shown], &mut outgoing);
                let _ = tcp.try_write(&outgoing);
                return Err(error);
            }
        }
    }
}

fn process<C: Handshake>(connection: &mut C, shown: &mut [u8], outgoing: &mut Vec<u8>) -> (Step, usize) {
    let UnbufferedStatus { discard, state } = connection.process(shown);
    let step = match state {
        Ok(ConnectionState::EncodeTlsData(data)) => match encode(data, outgoing) {
            Ok(()) => Step::Again,
            Err(error) => Step::Failed(TunnelError::Tls(rustls::Error::General(error.to_string()))),
        },
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Step::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Step::Receive,
        Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
        Ok(_) => Step::Failed(TunnelError::Closed),
        Err(error) => Step::Failed(error.into()),
    };
    // rustls may be ready to write before it has processed the peer's last message.
    let step =
        if matches!(step, Step::Done) && connection.state().is_handshaking() { Step::Receive } else { step };
    (step, discard)
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), EncodeError> {
    let at = outgoing.len();
    let encoded = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            outgoing.resize(at + required_size, 0);
            data.encode(&mut outgoing[at..])
        }
        other => other,
    };
    outgoing.truncate(at + *encoded.as_ref().unwrap_or(&0));
    encoded.map(|_| ())
}

async fn send(tcp: &TcpStream, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let bytes = mem::take(outgoing);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let sent = tcp.async_io(Interest::WRITABLE, || tcp.try_write(rest)).await?;
        rest = &rest[sent..];
    }
    Ok(())
}

async fn receive(tcp: &TcpStream, incoming: &mut Vec<u8>) -> io::Result<()> {
    if incoming.len() > KEPT_MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the TLS handshake exceeds 128 KiB"));
    }
    incoming.reserve(READ_BYTES);
    loop {
        tcp.readable().await?;
        match tcp.try_read_buf(incoming) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Passes one more record to rustls, or all bytes if they cannot be TLS, so that rustls reports the error. Returns false if
/// no complete record is available.
fn show_more(incoming: &[u8], shown: &mut usize) -> bool {
    let rest = &incoming[*shown..];
    let might_be_tls =
        rest.first().is_none_or(|kind| (20..=23).contains(kind)) && rest.get(1).is_none_or(|v| *v == 3);
    let more = match record_bytes(rest) {
        Ok(Some(record)) if might_be_tls && record <= rest.len() => record,
        Ok(_) if might_be_tls => return false,
        _ => rest.len(),
    };
    *shown += more;
    more > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_shown_one_by_one_and_garbage_at_once() {
        let two = [22, 3, 1, 0, 2, 7, 7, 23, 3, 3, 0, 1, 9];
        let mut shown = 0;
        for cut in 0..7 {
            assert!(!show_more(&two[..cut], &mut shown));
        }
        assert!(show_more(&two, &mut shown));
        assert_eq!(shown, 7);
        assert!(!show_more(&two[..12], &mut shown));
        assert!(show_more(&two, &mut shown));
        assert_eq!(shown, two.len());
        assert!(!show_more(&two, &mut shown));

        for garbage in [b"GET / HTTP/1.1".as_slice(), &[22, 3, 3, 0xff, 0xff, 0], &[22, 4]] {
            let mut shown = 0;
            assert!(show_more(garbage, &mut shown));
            assert_eq!(shown, garbage.len());
        }
    }
}
