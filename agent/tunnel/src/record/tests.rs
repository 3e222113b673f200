//! Tests of the record layer against plain rustls, and against a peer that violates the protocol. See also `crate::fuzz`.

use std::{io::Read, io::Write, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection, SupportedCipherSuite,
    client::UnbufferedClientConnection, pki_types::ServerName, server::UnbufferedServerConnection,
};

use super::*;
use crate::{
    testing::{credentials, identity},
    tls::{PROVIDER, client_config, handshake::Handshake, server_config},
};

/// The record layer under test, and plain rustls as the peer.
struct Pair {
    ours: Records,
    theirs: Connection,
}

/// Runs a handshake in memory: `ours` unbuffered, the peer buffered.
fn pair<C: Handshake>(mut ours: C, mut theirs: Connection) -> Pair {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        loop {
            let rustls::unbuffered::UnbufferedStatus { discard, state } = ours.process(&mut incoming);
            let again = match state.expect("a good handshake") {
                rustls::unbuffered::ConnectionState::EncodeTlsData(mut data) => {
                    let mut chunk = vec![0; 1 << 16];
                    let encoded_bytes = data.encode(&mut chunk).expect("it fits");
                    outgoing.extend_from_slice(&chunk[..encoded_bytes]);
                    true
                }
                rustls::unbuffered::ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    true
                }
                _ => false,
            };
            incoming.drain(..discard);
            if !again {
                break;
            }
        }
        feed(&mut theirs, &outgoing).expect("a good handshake");
        outgoing.clear();
        if !ours.state().is_handshaking() && !theirs.is_handshaking() {
            let (secrets, schedule) = ours.into_secrets().expect("extractable");
            return Pair { ours: Records::new(secrets, schedule).expect("keys"), theirs };
        }
        theirs.write_tls(&mut incoming).expect("memory");
        while theirs.wants_write() {
            theirs.write_tls(&mut incoming).expect("memory");
        }
    }
    panic!("the handshake does not end");
}

fn feed(connection: &mut Connection, mut bytes: &[u8]) -> Result<(), rustls::Error> {
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes).expect("memory");
        connection.process_new_packets()?;
    }
    Ok(())
}

/// Connects to a server of `suite` that sends `tickets`.
fn as_client(suite: SupportedCipherSuite, tickets: usize) -> Pair {
    let (web, db) = (credentials("web"), credentials("db"));
    let mut config = ClientConfig::clone(&client_config(&web, &identity("db")));
    let mut provider = (**PROVIDER).clone();
    provider.cipher_suites = vec![suite];
    let verifier = ServerConfig::clone(&server_config(&db));
    // The same server, of one suite.
    let mut server = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(verifier.cert_resolver.clone());
    server.alpn_protocols.clone_from(&verifier.alpn_protocols);
    server.send_tls13_tickets = tickets;
    config.enable_secret_extraction = true;
    let name = ServerName::try_from("x").expect("a name");
    let ours = UnbufferedClientConnection::new(Arc::new(config), name).expect("configured");
    pair(ours, ServerConnection::new(Arc::new(server)).expect("configured").into())
}

/// Accepts a plain client.
fn as_server() -> Pair {
    let (web, db) = (credentials("web"), credentials("db"));
    let client = client_config(&web, &identity("db"));
    let name = ServerName::try_from("x").expect("a name");
    let ours = UnbufferedServerConnection::new(server_config(&db)).expect("configured");
    pair(ours, ClientConnection::new(client, name).expect("configured").into())
}

impl Pair {
    /// Sends a record to the peer; returns the data that the peer read.
    fn send(&mut self, kind: ContentType, content: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let record = self.ours.sealed(kind, content).expect("keys");
        feed(&mut self.theirs, &record)?;
        let mut got = vec![0; content.len()];
        let read_bytes = self.theirs.reader().read(&mut got).unwrap_or(0);
        got.truncate(read_bytes);
        Ok(got)
    }

    /// Returns all pending records of the peer.
    fn pending_records(&mut self) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        while self.theirs.wants_write() {
            self.theirs.write_tls(&mut bytes).expect("memory");
        }
        let mut records = Vec::new();
        while let Some(length) = record_bytes(&bytes).expect("a record") {
            records.push(bytes.drain(..length).collect());
        }
        assert!(bytes.is_empty());
        records
    }

    /// Lets the peer write `content`; returns the received data.
    fn receive(&mut self, content: &[u8]) -> Vec<u8> {
        self.theirs.writer().write_all(content).expect("memory");
        let mut got = Vec::new();
        for mut record in self.pending_records() {
            if let Opened::Data(place) = self.ours.open(&mut record).expect("good records") {
                got.extend_from_slice(&record[place]);
            }
        }
        got
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}

#[test]
fn data_passes_both_ways_with_every_suite_and_length() {
    for suite in PROVIDER.cipher_suites.clone() {
        for mut pair in [as_client(suite, 0), as_server()] {
            for bytes in [1, 2, 15, 16, 17, 1000, CONTENT_MAX_BYTES - 1, CONTENT_MAX_BYTES] {
                let content = content(bytes);
                assert!(pair.send(ContentType::ApplicationData, &content).expect("good") == content);
                assert!(pair.receive(&content) == content, "{bytes}");
            }
        }
    }
}

#[test]
fn a_record_may_not_be_longer_than_tls_allows() {
    let mut pair = as_server();
    let too_long = vec![0; CONTENT_MAX_BYTES + 1];
    assert_eq!(pair.ours.sealed(ContentType::ApplicationData, &too_long), Err(RecordError::Overflow));
    assert_eq!(record_bytes(&[23, 3, 3, 0x41, 0x01]), Err(RecordError::Overflow));
    assert_eq!(record_bytes(&[23, 3, 3, 0x41, 0x00]), Ok(Some(5 + 16_640)));
    assert_eq!(record_bytes(&[23, 3, 3, 0x41]), Ok(None));
}

#[test]
fn keys_are_renewed_when_the_peer_asks_and_before_they_are_used_up() {
    let suite = PROVIDER.cipher_suites[0];
    for mut pair in [as_client(suite, 0), as_server()] {
        for round in 0..40 {
            pair.theirs.refresh_traffic_keys().expect("TLS 1.3");
            assert_eq!(pair.receive(b"after"), b"after", "round {round}");
            // rustls also requests a KeyUpdate.
            assert!(pair.ours.owes_key_update());
            let update = pair.ours.key_update(0).expect("keys").expect("owed");
            feed(&mut pair.theirs, &update).expect("a KeyUpdate");
            assert!(!pair.ours.owes_key_update());
            assert_eq!(pair.send(ContentType::ApplicationData, b"ours").expect("good"), b"ours");
        }
        assert!(pair.ours.key_update(100).expect("keys").is_none(), "far from used up");
        pair.ours.sending.limit = pair.ours.sending.sequence + 5;
        assert!(pair.ours.key_update(4).expect("keys").is_none(), "five are left");
        let update = pair.ours.key_update(5).expect("keys").expect("no room for the next KeyUpdate");
        feed(&mut pair.theirs, &update).expect("a KeyUpdate");
        assert_eq!(pair.ours.sending.sequence, 0);
        assert_eq!(pair.send(ContentType::ApplicationData, b"new").expect("good"), b"new");
        // A key at its limit seals nothing.
        pair.ours.sending.limit = pair.ours.sending.sequence;
        assert!(matches!(pair.ours.sealed(ContentType::ApplicationData, b"x"), Err(RecordError::Keys(_))));
    }
}

#[test]
fn a_flood_without_data_is_cut_off_and_data_starts_the_count_anew() {
    let mut pair = as_server();
    let updates = |pair: &mut Pair, count: u32| {
        (0..count).find_map(|_| {
            pair.theirs.refresh_traffic_keys().expect("TLS 1.3");
            pair.pending_records().iter_mut().find_map(|record| pair.ours.open(record).err())
        })
    };
    assert_eq!(updates(&mut pair, WITHOUT_DATA_MAX), None);
    assert_eq!(pair.receive(b"x"), b"x");
    assert_eq!(updates(&mut pair, WITHOUT_DATA_MAX), None);
    assert_eq!(updates(&mut pair, 1), Some(RecordError::Flood));
}

#[test]
fn tickets_are_accepted_from_a_server_only() {
    let mut pair = as_client(PROVIDER.cipher_suites[0], 4);
    assert_eq!(pair.receive(b"behind four tickets"), b"behind four tickets");

    let mut pair = as_client(PROVIDER.cipher_suites[0], 0);
    let ticket = [NEW_SESSION_TICKET, 0, 0, 1, 0];
    assert!(pair.send(ContentType::Handshake, &ticket).is_err(), "rustls agrees");
}

#[test]
fn close_notify_and_alerts_are_distinguished() {
    let mut pair = as_server();
    pair.theirs.send_close_notify();
    let mut records = pair.pending_records();
    assert_eq!(pair.ours.open(&mut records[0]), Ok(Opened::Closed));

    let mut pair = as_server();
    let close_notify = pair.ours.alert(AlertDescription::CloseNotify).expect("keys");
    feed(&mut pair.theirs, &close_notify).expect("no error");
    assert_eq!(pair.theirs.reader().read(&mut [0; 1]).expect("the end"), 0);

    let mut pair = as_server();
    let alert = pair.ours.alert(AlertDescription::CertificateRevoked).expect("keys");
    let received = feed(&mut pair.theirs, &alert);
    assert_eq!(received, Err(rustls::Error::AlertReceived(AlertDescription::CertificateRevoked)));
}

/// Returns a receiver, and the keys of a sender without protocol checks.
fn unchecked_sender() -> (Records, Keys) {
    let (ours, theirs) = fixed::pair().expect("keys");
    (ours, theirs.sending)
}

fn sealed(keys: &mut Keys, kind: ContentType, content: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEADER_BYTES + content.len() + TAIL_BYTES];
    record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
    keys.seal(kind, &mut record).expect("keys");
    record
}

/// Opens `contents` in order; returns the last result, or the first error.
fn opened(contents: &[(ContentType, &[u8])]) -> Result<Opened, RecordError> {
    let (mut ours, mut keys) = unchecked_sender();
    let mut last = Ok(Opened::Nothing);
    for (kind, content) in contents {
        last = ours.open(&mut sealed(&mut keys, *kind, content));
        if last.is_err() {
            break;
        }
    }
    last
}

#[test]
fn protocol_violations_end_the_connection_with_the_alert_of_the_rfc() {
    use AlertDescription as Alert;
    use ContentType::{Alert as A, ApplicationData as D, ChangeCipherSpec as C, Handshake as H};
    type Contents = &'static [(ContentType, &'static [u8])];
    let cases: [(Contents, Alert); 12] = [
        (&[(A, &[1])], Alert::DecodeError),
        (&[(A, &[1, 0, 0])], Alert::DecodeError),
        (&[(C, &[1])], Alert::UnexpectedMessage),
        (&[(H, &[])], Alert::UnexpectedMessage),
        (&[(H, &[KEY_UPDATE, 0, 0, 1, 2])], Alert::DecodeError),
        (&[(H, &[KEY_UPDATE, 0, 0, 0])], Alert::DecodeError),
        (&[(H, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE])], Alert::UnexpectedMessage),
        (&[(H, &[1, 0, 0, 0])], Alert::UnexpectedMessage),
        (&[(H, &[NEW_SESSION_TICKET, 0, 0, 0])], Alert::UnexpectedMessage),
        (&[(H, &[NEW_SESSION_TICKET, 1, 0, 1])], Alert::DecodeError),
        (&[(H, &[KEY_UPDATE, 0]), (D, b"x")], Alert::UnexpectedMessage),
        (&[(A, &[1, 0]), (D, b"x")], Alert::UnexpectedMessage),
    ];
    for (contents, expected) in cases {
        let alert = opened(contents).expect_err("refused").alert();
        assert_eq!(alert, Some(expected), "{contents:?}");
    }
    assert_eq!(opened(&[(A, &[1, 90])]), Ok(Opened::Nothing), "user_canceled waits for close_notify");
    assert_eq!(opened(&[(A, &[2, 0])]), Ok(Opened::Closed), "the level means nothing");
    assert_eq!(opened(&[(D, &[])]), Ok(Opened::Nothing));
    // A KeyUpdate in two pieces.
    assert_eq!(opened(&[(H, &[KEY_UPDATE, 0]), (H, &[0, 1, 0])]), Ok(Opened::Nothing));
}

#[test]
fn padding_is_removed_and_records_of_only_padding_are_refused() {
    let (mut ours, mut keys) = unchecked_sender();
    // The type precedes the zeros. The record is sealed with content type 0, which is padding too.
    let padded = [b"text".as_slice(), &[23, 0, 0, 0]].concat();
    let mut record = sealed(&mut keys, ContentType::from(0), &padded);
    assert_eq!(ours.open(&mut record), Ok(Opened::Data(5..9)));
    let opened = ours.open(&mut sealed(&mut keys, ContentType::from(0), &[0; 40]));
    assert_eq!(opened.expect_err("refused").alert(), Some(AlertDescription::UnexpectedMessage));
}

#[test]
fn a_record_that_was_changed_repeated_left_out_or_sent_as_plaintext_is_refused() {
    for at in 0..30 {
        let (mut ours, mut keys) = unchecked_sender();
        let mut record = sealed(&mut keys, ContentType::ApplicationData, b"content");
        record[at % 29] ^= 1 << (at % 8);
        assert!(ours.open(&mut record).is_err(), "byte {at}");
    }
    let (mut ours, mut keys) = unchecked_sender();
    let record = sealed(&mut keys, ContentType::ApplicationData, b"once");
    assert!(ours.open(&mut record.clone()).is_ok());
    assert_eq!(ours.open(&mut record.clone()), Err(RecordError::Decrypt), "repeated");
    let (mut ours, mut keys) = unchecked_sender();
    let _left_out = sealed(&mut keys, ContentType::ApplicationData, b"one");
    let mut record = sealed(&mut keys, ContentType::ApplicationData, b"two");
    assert_eq!(ours.open(&mut record), Err(RecordError::Decrypt));
    let (mut ours, _) = unchecked_sender();
    let clear = ours.open(&mut [22, 3, 3, 0, 5, KEY_UPDATE, 0, 0, 1, 0]);
    assert_eq!(clear.expect_err("refused").alert(), Some(AlertDescription::UnexpectedMessage));
}
