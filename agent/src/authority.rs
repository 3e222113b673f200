//! `tacit authority`: runs the certificate authority, its metrics and its readiness until a signal.

use tacit_authority::{Authority, AuthorityError, bind, config::Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::telemetry::admin;

/// Runs the authority with `config` until SIGTERM or SIGINT. To be called on a tokio runtime.
///
/// # Errors
/// [`AuthorityError`] when it cannot start. Once it runs, a store or an API that fails is tried again.
pub async fn run(config: Config) -> Result<(), AuthorityError> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let metrics = bind("metrics", config.metrics).await?;
    let authority = Authority::open(config).await?;
    let (status, stopped) = (authority.status(), stop.clone());
    let serving = tokio::spawn(async move {
        let admin = admin::serve_authority(metrics, status, stopped.cancelled());
        tokio::join!(authority.serve(stopped.clone()), admin)
    });
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending: requests under way are answered");
    stop.cancel();
    // A panic was printed, and the authority ends anyway.
    let _ = serving.await;
    Ok(())
}
