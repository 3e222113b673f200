//! Sockets, credentials and sessions for tests of the tunnel and the relay.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use socket2::Socket;
use tacit_core::{
    spiffe::SpiffeId,
    wire::{
        flow_state::Role,
        open::{Open, OptimisticMode},
    },
};
use tacit_identity::credentials::Credentials;
use tacit_kernel::socket::{AppStream, Polled as _};
use tokio::net::{TcpListener, TcpStream};

mod issuer;

pub(crate) use issuer::TestIssuer;

use super::{Session, TunnelError, random_trace_id, stream};

/// The issuer of the mesh under test.
pub(crate) static ISSUER: LazyLock<TestIssuer> = LazyLock::new(TestIssuer::new);

/// Returns the identity of `account` in the tests' trust domain.
pub(crate) fn identity(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).expect("a service account")
}

/// Returns valid credentials of `account`.
pub(crate) fn credentials(account: &str) -> Arc<Credentials> {
    Arc::new(ISSUER.any(&identity(account), SystemTime::now(), Duration::from_secs(600)))
}

/// Returns two ends of one connection; the first is the client.
pub(crate) async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.expect("connected"), accepted.expect("accepted").0)
}

/// Returns an application's end of a connection, and its agent's.
pub(crate) async fn app_connection() -> (TcpStream, AppStream) {
    let (app, ours) = connection().await;
    (app, app_stream(ours))
}

/// Returns the agent's end of a connection with an application.
pub(crate) fn app_stream(tcp: TcpStream) -> AppStream {
    let socket = Socket::from(tcp.into_std().expect("registered"));
    // As the sockets of `tacit_kernel`.
    socket.set_out_of_band_inline(true).expect("open");
    AppStream::of(socket).expect("descriptors")
}

/// Both ends of a connection that speaks `tacit/1`.
impl Session {
    /// As [`Outgoing::connect`](crate::Outgoing::connect).
    pub(crate) async fn connect(
        tcp: TcpStream,
        own: &Arc<Credentials>,
        expected: &SpiffeId,
    ) -> Result<Box<Self>, TunnelError> {
        Ok(Self::new(stream::connect(tcp, own, expected).await?, Role::Client))
    }

    /// As [`Incoming::accept`](crate::Incoming::accept).
    pub(crate) async fn accept(tcp: TcpStream, own: &Arc<Credentials>) -> Result<Box<Self>, TunnelError> {
        Ok(Self::new(stream::accept(tcp, own).await?, Role::Server))
    }
}

/// Returns a session of `web` with `db`, client and server.
pub(crate) async fn sessions() -> (Box<Session>, Box<Session>) {
    let (client, server) = connection().await;
    let (web, db) = (credentials("web"), credentials("db"));
    let expected = identity("db");
    let (client, server) =
        tokio::join!(Session::connect(client, &web, &expected), Session::accept(server, &db));
    (client.expect("connected"), server.expect("accepted"))
}

/// Returns the OPEN request of the tests.
pub(crate) fn open() -> Open {
    Open {
        destination: "10.77.2.3:80".parse().expect("an address"),
        client: "10.77.1.2:40000".parse().expect("an address"),
        trace: random_trace_id(),
        optimistic_data: OptimisticMode::Off,
    }
}

/// Opens a flow over `client` and `server`.
pub(crate) async fn open_flow(client: &mut Session, server: &mut Session) {
    let asked = open();
    let serve = async {
        let got = server.next(Duration::from_secs(5)).await.expect("no error").expect("not closed");
        server.accept_flow(&got).expect("in turn");
        std::future::poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
        got
    };
    let (opened, got) = tokio::join!(client.open(&asked, None), serve);
    opened.expect("accepted");
    assert_eq!(got, asked);
}
