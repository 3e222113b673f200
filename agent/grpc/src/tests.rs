//! Calls between a channel and a server, over a pipe in memory.

use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response};
use prost::Message;
use tokio::{
    io::{DuplexStream, duplex},
    sync::oneshot,
    time::timeout,
};

use crate::{
    CallError, Channel, Code, KeepAlive, MessageError, Settings, Status,
    frame::frame,
    server::{Call, Connection},
};

const MAX_BYTES: usize = 256 * 1024;
const PATH: &str = "/test.Echo/Call";
/// Longer than any test takes, however slow the machine is.
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

fn text(text: &str) -> Text {
    Text { text: text.to_owned() }
}

fn settings() -> Settings {
    Settings {
        origin: "http://localhost".to_owned(),
        message_max_bytes: MAX_BYTES,
        keep_alive: KeepAlive::Off,
    }
}

/// Opens a channel to a server that handles each call with `handle`.
async fn channel<F, R>(settings: Settings, handle: F) -> Channel
where
    F: Fn(Call) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let (client, server) = duplex(64 * 1024);
    tokio::spawn(async move {
        let mut connection = Connection::open(server, MAX_BYTES).await.expect("HTTP/2");
        while let Some(call) = connection.next().await {
            tokio::spawn(handle(call));
        }
    });
    Channel::open(client, settings).await.expect("HTTP/2")
}

/// Opens a channel to a server that answers each call with `answer`, which need not be gRPC.
async fn raw<F>(answer: F) -> Channel
where
    F: Fn(SendResponse<Bytes>) + Send + 'static,
{
    let (client, server) = duplex(64 * 1024);
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(server).await.expect("HTTP/2");
        while let Some(Ok((_request, response))) = connection.accept().await {
            answer(response);
        }
    });
    Channel::open(client, settings()).await.expect("HTTP/2")
}

async fn asked(channel: &Channel) -> Result<Text, CallError> {
    let (metadata, message) = (HeaderMap::new(), text("x"));
    let asked = channel.unary::<Text, Text>(PATH, &metadata, &message);
    timeout(LONG, asked).await.expect("an end").outcome
}

/// Starts an answer with HTTP status 200 and the content type of gRPC.
fn opened(mut response: SendResponse<Bytes>) -> SendStream<Bytes> {
    let head = Response::builder().header("content-type", "application/grpc+proto").body(());
    response.send_response(head.expect("valid"), false).expect("open")
}

#[tokio::test]
async fn a_unary_call_carries_metadata_and_both_messages() {
    let channel = channel(settings(), |call| async move {
        assert_eq!(call.path, PATH);
        assert_eq!(call.headers.get("te").map(HeaderValue::as_bytes), Some(&b"trailers"[..]));
        let token = call.headers.get("authorization").expect("sent").to_str().expect("text").to_owned();
        let (mut requests, mut replies) = call.start::<Text, Text>();
        let request = requests.message().await.expect("whole").expect("one");
        assert_eq!(requests.message().await.expect("the end"), None);
        replies.send(&text(&format!("{token} {}", request.text.len()))).await.expect("sent");
        replies.finish(&Status::OK).await.expect("sent");
    })
    .await;
    let mut metadata = HeaderMap::new();
    metadata.insert("authorization", HeaderValue::from_static("Bearer a"));
    // Longer than the flow control window and the pipe.
    let long = text(&"y".repeat(200_000));
    let answer = channel.unary::<Text, Text>(PATH, &metadata, &long).await;
    assert_eq!(answer.outcome.expect("answered"), text("Bearer a 200000"));
    assert_eq!(answer.headers.get("content-type").expect("sent"), "application/grpc");
}

#[tokio::test]
async fn a_status_is_read_from_headers_and_from_trailers() {
    let status = Status::new(Code::PermissionDenied, "no: \u{e9} 100 %");
    let sent = status.clone();
    // Without an answer the server puts the status into the headers.
    let headers_only = channel(settings(), move |call| {
        let status = sent.clone();
        async move { call.start::<Text, Text>().1.finish(&status).await.expect("sent") }
    })
    .await;
    let refused = asked(&headers_only).await.expect_err("refused");
    assert_eq!(refused.status(), Some(&status));
    assert_eq!(refused.to_string(), "the server refused, PERMISSION_DENIED: no: \u{e9} 100 %");

    let sent = status.clone();
    let trailers = raw(move |response| opened(response).send_trailers(sent.trailers()).expect("open")).await;
    assert_eq!(asked(&trailers).await.expect_err("refused").status(), Some(&status));
}

#[tokio::test]
async fn an_answer_that_is_not_grpc_is_an_error_with_its_reason() {
    let end = |mut stream: SendStream<Bytes>, bytes: Bytes, trailers: Option<HeaderMap>| {
        stream.send_data(bytes, trailers.is_none()).expect("open");
        trailers.into_iter().for_each(|trailers| stream.send_trailers(trailers).expect("open"));
    };
    let one = || frame(&text("one"));
    let no_status = raw(move |response| end(opened(response), one(), None)).await;
    let error = asked(&no_status).await.expect_err("no status");
    assert!(error.to_string().contains("without a status"), "{error}");

    let bad_status =
        HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static("x"))]);
    let bad_status = raw(move |response| end(opened(response), one(), Some(bad_status.clone()))).await;
    let error = asked(&bad_status).await.expect_err("no number");
    assert!(error.to_string().contains("without a status"), "{error}");

    let none = raw(move |response| end(opened(response), Bytes::new(), Some(Status::OK.trailers()))).await;
    let error = asked(&none).await.expect_err("no message");
    assert!(error.to_string().contains("no messages"), "{error}");

    let two = raw(move |response| {
        end(opened(response), [one(), one()].concat().into(), Some(Status::OK.trailers()));
    })
    .await;
    let error = asked(&two).await.expect_err("two messages");
    assert!(error.to_string().contains("several messages"), "{error}");

    let html = raw(|mut response| {
        let head = Response::builder().header("content-type", "text/html").body(());
        response.send_response(head.expect("valid"), true).expect("open");
    })
    .await;
    let error = asked(&html).await.expect_err("a page");
    assert!(error.to_string().contains("text/html"), "{error}");

    let missing = raw(|mut response| {
        response.send_response(Response::builder().status(404).body(()).expect("valid"), true).expect("open");
    })
    .await;
    let error = asked(&missing).await.expect_err("no page");
    assert!(error.to_string().contains("404"), "{error}");
}

#[tokio::test]
async fn a_message_that_is_cut_compressed_or_too_long_ends_the_call() {
    for (bytes, expected) in [
        (Bytes::from_static(&[0, 0, 0, 0, 9, 1]), MessageError::Cut(6)),
        (Bytes::from_static(&[1, 0, 0, 0, 0]), MessageError::Compressed),
        (Bytes::from_static(&[0, 0, 4, 0, 1]), MessageError::Long { bytes: 262_145, max_bytes: MAX_BYTES }),
    ] {
        let peer = raw(move |response| {
            let mut stream = opened(response);
            stream.send_data(bytes.clone(), false).expect("open");
            stream.send_trailers(Status::OK.trailers()).expect("open");
        })
        .await;
        let error = asked(&peer).await.expect_err("refused");
        assert!(matches!(&error, CallError::Message(found) if *found == expected), "{error}");
    }
}

#[tokio::test]
async fn a_stream_yields_its_messages_and_then_its_status() {
    let channel = channel(settings(), |call| async move {
        let (mut requests, mut replies) = call.start::<Text, Text>();
        let count = requests.message().await.expect("whole").expect("one").text.len();
        for number in 0..count {
            replies.send(&text(&number.to_string())).await.expect("sent");
        }
        replies.finish(&Status::new(Code::Unavailable, "the end")).await.expect("sent");
    })
    .await;
    let stream = channel.server_stream::<Text, Text>(PATH, &HeaderMap::new(), &text("xxx")).await;
    let mut stream = stream.expect("a call");
    for number in 0..3 {
        assert_eq!(stream.message().await.expect("open"), Some(text(&number.to_string())));
    }
    let end = stream.message().await.expect_err("the end");
    assert_eq!(end.status().map(|status| status.code), Some(Code::Unavailable));
    assert!(matches!(stream.message().await, Err(CallError::Ended)));
}

#[tokio::test]
async fn both_directions_flow_before_either_ends() {
    let channel = channel(settings(), |call| async move {
        let (mut requests, mut replies) = call.start::<Text, Text>();
        while let Some(request) = requests.message().await.expect("whole") {
            replies.send(&request).await.expect("sent");
        }
        replies.finish(&Status::OK).await.expect("sent");
    })
    .await;
    let call = channel.bidirectional::<Text, Text>(PATH, &HeaderMap::new()).await;
    let (mut sender, mut receiver) = call.expect("a call");
    // The call outlives its channel.
    drop(channel);
    for number in 0..3 {
        let message = text(&number.to_string());
        sender.send(&message).await.expect("open");
        assert_eq!(receiver.message().await.expect("open"), Some(message));
    }
    sender.finish().await.expect("open");
    assert_eq!(receiver.message().await.expect("status OK"), None);
}

#[tokio::test]
async fn a_sender_waits_for_a_peer_that_does_not_read() {
    let (read, reading) = oneshot::channel::<()>();
    let reading = std::sync::Mutex::new(Some(reading));
    let channel = channel(settings(), move |call| {
        let reading = reading.lock().expect("whole").take().expect("one call");
        async move {
            let (mut requests, replies) = call.start::<Text, Text>();
            reading.await.expect("told");
            let mut bytes = 0;
            while let Some(request) = requests.message().await.expect("whole") {
                bytes += request.text.len();
            }
            replies.finish(&Status::new(Code::Aborted, bytes.to_string())).await.expect("sent");
        }
    })
    .await;
    let call = channel.bidirectional::<Text, Text>(PATH, &HeaderMap::new()).await;
    let (mut sender, mut receiver) = call.expect("a call");
    let message = text(&"z".repeat(100_000));
    // The window of the peer has 65,535 bytes, so no message fits. A send that was given up is completed later.
    let waiting = timeout(Duration::from_millis(50), sender.send(&message)).await;
    assert!(waiting.is_err(), "the peer has not read");
    read.send(()).expect("waits");
    sender.send(&message).await.expect("read");
    sender.finish().await.expect("read");
    let end = receiver.message().await.expect_err("a status");
    assert_eq!(end.status(), Some(&Status::new(Code::Aborted, "200000")));
}

#[tokio::test]
async fn a_reset_and_a_closed_connection_are_told_apart() {
    let channel = channel(settings(), |call| async move {
        let (_requests, mut replies) = call.start::<Text, Text>();
        replies.send(&text("first")).await.expect("sent");
        replies.reset(Reason::CANCEL);
    })
    .await;
    let stream = channel.server_stream::<Text, Text>(PATH, &HeaderMap::new(), &text("x")).await;
    let mut stream = stream.expect("a call");
    // The reset may overtake the message.
    let end = match stream.message().await {
        Ok(first) => {
            assert_eq!(first, Some(text("first")));
            stream.message().await
        }
        end => end,
    };
    assert!(matches!(end, Err(CallError::Reset(Reason::CANCEL))), "{end:?}");

    let (client, server) = duplex(64 * 1024);
    tokio::spawn(async move {
        let mut connection = Connection::open(server, MAX_BYTES).await.expect("HTTP/2");
        let _call = connection.next().await.expect("a call");
    });
    let channel = Channel::open(client, settings()).await.expect("HTTP/2");
    let end = asked(&channel).await;
    assert!(matches!(end, Err(CallError::Connection(_))), "{end:?}");
}

/// Accepts one call and never reads again.
async fn fall_silent(server: DuplexStream) {
    let mut connection = Connection::open(server, MAX_BYTES).await.expect("HTTP/2");
    let _call = connection.next().await.expect("a call");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_server_that_answers_no_ping_is_noticed() {
    let (client, server) = duplex(64 * 1024);
    tokio::spawn(fall_silent(server));
    let limit = Duration::from_millis(50);
    let keep_alive = KeepAlive::Every { interval: limit, timeout: limit };
    let channel = Channel::open(client, Settings { keep_alive, ..settings() }).await.expect("HTTP/2");
    let end = asked(&channel).await;
    assert!(matches!(end, Err(CallError::Silent(silent)) if silent == limit), "{end:?}");
    // Calls after it fail as well.
    let end = asked(&channel).await;
    assert!(matches!(end, Err(CallError::Silent(_))), "{end:?}");
}

#[tokio::test]
async fn a_server_that_answers_pings_keeps_its_connection() {
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = std::sync::Mutex::new(Some(stopped));
    let keep_alive = KeepAlive::Every { interval: Duration::from_millis(1), timeout: LONG };
    let channel = channel(Settings { keep_alive, ..settings() }, move |call| {
        let stopped = stopped.lock().expect("whole").take().expect("one call");
        async move {
            let (_requests, mut replies) = call.start::<Text, Text>();
            stopped.await.expect("told");
            replies.send(&text("late")).await.expect("sent");
            replies.finish(&Status::OK).await.expect("sent");
        }
    })
    .await;
    let mut asking = std::pin::pin!(asked(&channel));
    // Some PINGs pass.
    assert!(timeout(Duration::from_millis(100), asking.as_mut()).await.is_err(), "not answered yet");
    stop.send(()).expect("waits");
    assert_eq!(asking.await.expect("answered"), text("late"));
}
