//! Clients that send bytes by hand, and the choice of the wire format.

use tokio_rustls::client::TlsStream;

use super::*;

/// One frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("short");
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// The same frame of another stream.
fn with_stream(mut frame: Vec<u8>, stream: u32) -> Vec<u8> {
    frame[5..9].copy_from_slice(&stream.to_be_bytes());
    frame
}

/// The fields of a CONNECT: literals with the names 2 and 1 of HPACK's static table.
fn fields() -> Vec<u8> {
    [b"\x02\x07CONNECT\x01\x0c".as_slice(), b"10.77.2.3:80"].concat()
}

/// The preface, SETTINGS, and a CONNECT.
fn beginning() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[]), frame(1, 4, 1, &fields())].concat()
}

#[tokio::test]
async fn close_notify_inside_a_flow_is_no_clean_end_and_wrong_frames_end_the_connection() {
    let window_too_large = [0x7f, 0xff, 0xff, 0xff];
    for (bytes, closes, reason) in [
        (vec![], true, None),
        (frame(8, 0, 0, &window_too_large), false, Some("protocol")),
        (frame(9, 4, 1, b"out of order"), false, Some("protocol")),
        (frame(0, 0, 7, b"a stream that is not open"), false, Some("protocol")),
        (frame(4, 0, 0, b"short"), false, Some("protocol")),
    ] {
        let (client, accepted) = tls(&[ALPN_HBONE], &beginning()).await;
        let (mut client, server) = (client.expect("accepted"), begun(accepted).await.expect("HTTP/2"));
        let (mut requests, _commands) = serve(server);
        let request = soon(requests.recv()).await.expect("a connection").expect("in order");
        let stream = request.accept("").expect("open");
        let (mut app, agent) = app_connection().await;
        let end = tokio::spawn(relayed(agent, stream));
        client.write_all(&bytes).await.expect("open");
        if closes {
            client.shutdown().await.expect("open");
        }
        let ended = soon(requests.recv()).await;
        assert_eq!(ended.map(|ended| ended.err().expect("no request").reason().label()), reason);
        assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::TunnelLost(_)));
        assert!(is_reset(&mut app).await);
    }
}

/// What is on its way when the agent resets a stream is no fault of the peer, however often it happens.
#[tokio::test]
async fn a_connection_outlives_many_streams_that_the_agent_resets() {
    let (client, accepted) = tls(&[ALPN_HBONE], &beginning()).await;
    let (client, server) = (client.expect("accepted"), begun(accepted).await.expect("HTTP/2"));
    let (mut answers, mut client) = tokio::io::split(client);
    let discarding = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await });
    let (mut requests, _commands) = serve(server);
    for number in 0..1200_u32 {
        let request = soon(requests.recv()).await.expect("a connection").expect("in order");
        drop(request.accept("").expect("open"));
        // The server's task sends the reset before it reads on.
        let late = with_stream(frame(0, 0, 0, b"late"), 1 + 2 * number);
        let next = with_stream(frame(1, 4, 0, &fields()), 3 + 2 * number);
        client.write_all(&[late, next].concat()).await.expect("open");
        client.flush().await.expect("open");
    }
    assert!(!discarding.is_finished());
    drop(soon(requests.recv()).await.expect("a connection").expect("in order"));
}

/// A server that did not refuse would hold the larger window of each stream.
#[tokio::test]
async fn requests_are_refused_while_a_much_smaller_window_is_not_acknowledged() {
    let (client, accepted) = tls(&[ALPN_HBONE], &beginning()).await;
    let (_client, mut server) = (client.expect("accepted"), begun(accepted).await.expect("HTTP/2"));
    assert!(server.set_window(WINDOW));
    assert!(server.set_window(WINDOW / 8));
    assert!(!server.set_window(WINDOW / 16));
    drop(soon(server.next()).await.expect("in order").expect("a request"));
    assert!(!server.set_window(WINDOW / 16));
    assert!(server.set_window(WINDOW / 8));
}

#[tokio::test]
async fn a_reset_of_the_application_is_noticed_while_the_stream_has_no_room() {
    let no_window = frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    let (preface, headers) = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(1, 4, 1, &fields()));
    let (client, accepted) = tls(&[ALPN_HBONE], &[preface, no_window, headers].concat()).await;
    let (_client, server) = (client.expect("accepted"), begun(accepted).await.expect("HTTP/2"));
    let (mut requests, _commands) = serve(server);
    let request = soon(requests.recv()).await.expect("a connection").expect("in order");
    let stream = request.accept("").expect("open");
    let (mut app, agent) = app_connection().await;
    app.write_all(b"more than there is room for").await.expect("open");
    let end = tokio::spawn(relayed(agent, stream));
    app.set_zero_linger().expect("open");
    drop(app);
    assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Reset(App::Destination)));
}

#[tokio::test]
async fn the_wire_format_is_chosen_by_alpn() {
    for (offered, expected) in [
        (vec![&b"h2"[..]], Some("h2")),
        (vec![&b"tacit/1.1"[..], b"tacit/1", b"h2"], Some("tacit/1.1")),
        (vec![&b"h2"[..], b"tacit/1"], Some("tacit/1")),
        (vec![&b"http/1.1"[..]], None),
        (vec![], None),
    ] {
        let (client, accepted) = tls(&offered, &beginning()).await;
        match (accepted, expected) {
            (Ok(Incoming::Tacit(session)), Some(expected)) => assert_eq!(session.tls().alpn, expected),
            (Ok(Incoming::Hbone(accepted)), Some(expected)) => assert_eq!(accepted.0.tls.alpn, expected),
            (Err(error), None) => assert_eq!(error.reason().label(), "alpn", "{error}"),
            (accepted, _) => panic!("{:?} for {offered:?}", accepted.map(|_| "accepted")),
        }
        drop(client);
    }
}

/// A client's connection, and the server's. The client begins with these bytes, without which a server of HTTP/2 waits.
async fn tls(
    alpn: &[&[u8]],
    first: &[u8],
) -> (std::io::Result<TlsStream<TcpStream>>, Result<Incoming, TunnelError>) {
    let (near, far) = connection().await;
    let (web, db) = (credentials("web"), credentials("db"));
    let mut config = ClientConfig::clone(&client_config(&web, &identity("db")));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = ServerName::try_from("10.77.2.3").expect("an address");
    let connect = async {
        let mut tls = TlsConnector::from(Arc::new(config)).connect(name, near).await?;
        tls.write_all(first).await?;
        tls.flush().await?;
        Ok(tls)
    };
    tokio::join!(connect, Incoming::accept(far, &db))
}
