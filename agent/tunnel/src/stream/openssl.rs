//! Interoperability tests of the record layer with the programs of OpenSSL, including key updates and tickets.

use std::{future::poll_fn, io::IoSlice, process::Stdio, task::Poll, time::Duration};

use tacit_testing::Scratch;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::{
    TunnelError,
    batch::FRAMES_MAX,
    receive_buffer::Received,
    stream::{self, Established},
    testing::{ISSUER, credentials, identity},
};

const SOON: Duration = Duration::from_secs(20);

/// A program of OpenSSL. It sends each line of its input in a record, and its commands are single letters. It does not verify
/// certificates, because these tests cover records only.
struct Program {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    _child: Child,
    _files: Scratch,
}

impl Program {
    fn start(account: &str, arguments: &[&str]) -> Self {
        let files = Scratch::new();
        let names = ["key.pem", "certificate.pem"].map(|name| files.path().join(name));
        for (name, text) in names.iter().zip(ISSUER.pem(&identity(account))) {
            std::fs::write(name, text).expect("written");
        }
        let mut child = Command::new("openssl")
            .args(arguments)
            .args(["-tls1_3", "-alpn", "tacit/1"])
            .arg("-key")
            .arg(&names[0])
            .arg("-cert")
            .arg(&names[1])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("openssl is installed (`cargo xtask setup`)");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { input, output, _child: child, _files: files }
    }

    async fn send_line(&mut self, line: &[u8]) {
        self.input.write_all(line).await.expect("it runs");
        self.input.flush().await.expect("it runs");
    }

    /// Waits for a line that ends with `text`.
    async fn prints(&mut self, text: &str) {
        let found = async {
            while let Some(line) = self.output.next_line().await.unwrap_or(None) {
                if line.ends_with(text) {
                    return true;
                }
            }
            false
        };
        assert!(timeout(SOON, found).await.expect("in time"), "it ended before it printed {text:?}");
    }
}

/// The payload of the next DATA frames.
async fn received(established: &mut Established) -> Result<Vec<u8>, TunnelError> {
    let Established { stream, receive_buffer, .. } = established;
    let next = poll_fn(|cx| {
        loop {
            match receive_buffer.next(|record| stream.open(record))? {
                Some(Received::Data) => {
                    let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
                    let used = receive_buffer.payloads(&mut slices);
                    let payload: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
                    receive_buffer.consume(payload.len());
                    return Poll::Ready(Ok(payload));
                }
                Some(Received::Control(control)) => panic!("{control:?}"),
                None => std::task::ready!(stream.poll_fill(cx, receive_buffer))?,
            }
        }
    });
    timeout(SOON, next).await.expect("in time")
}

/// Sends a frame that also is a line, after any owed KeyUpdate.
async fn send(established: &mut Established, line: &str) {
    let frame = [&[4, 0, 0, line.len() as u8], line.as_bytes()].concat();
    let stream = &mut established.stream;
    // An owed KeyUpdate goes first.
    poll_fn(|cx| stream.poll_flush(cx)).await.expect("sent");
    stream.queue(&frame).expect("keys");
    poll_fn(|cx| stream.poll_flush(cx)).await.expect("sent");
}

/// Waits until the peer has requested a KeyUpdate. The KeyUpdate is sent before the next data.
async fn asked_for_keys(established: &mut Established) {
    let Established { stream, receive_buffer, .. } = established;
    let asked = poll_fn(|cx| {
        loop {
            match receive_buffer.next(|record| stream.open(record))? {
                None if stream.unsent() => return Poll::Ready(Ok::<_, TunnelError>(())),
                None => std::task::ready!(stream.poll_fill(cx, receive_buffer))?,
                Some(received) => panic!("{received:?}"),
            }
        }
    });
    timeout(SOON, asked).await.expect("in time").expect("good");
}

/// Exchanges data and key updates in both directions, repeatedly, and returns how the program ends. A command is lost if the
/// program has not read the line before it, because the program looks for commands only at the start of a read.
async fn converse(mut established: Established, program: &mut Program) -> TunnelError {
    for round in 0..3 {
        send(&mut established, "answer\n").await;
        program.prints("answer").await;
        program.send_line(b"\x04\x00\x00\x06hello\n").await;
        assert_eq!(received(&mut established).await.expect("good"), b"hello\n", "round {round}");
        program.send_line(b"K\n").await;
        asked_for_keys(&mut established).await;
    }
    program.send_line(b"Q\n").await;
    received(&mut established).await.expect_err("it has gone")
}

#[tokio::test]
async fn openssl_talks_to_our_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let mut program = Program::start("web", &["s_client", "-connect", &address]);
    let (tcp, _) = timeout(SOON, listener.accept()).await.expect("in time").expect("accepted");
    let established = stream::accept(tcp, &credentials("db")).await.expect("a good client");
    assert_eq!(established.peer, identity("web"));
    assert!(matches!(converse(established, &mut program).await, TunnelError::Closed), "close_notify");
}

#[tokio::test]
async fn our_client_talks_to_openssl() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("bound").port()
    };
    let accept = format!("127.0.0.1:{port}");
    let mut program = Program::start("db", &["s_server", "-Verify", "2", "-accept", &accept]);
    program.prints("ACCEPT").await;
    let tcp = TcpStream::connect(&accept).await.expect("it listens");
    let established = stream::connect(tcp, &credentials("web"), &identity("db")).await;
    let established = established.map_err(|error| error.to_string()).expect("a good server");
    // s_server exits without close_notify.
    converse(established, &mut program).await;
}
