//! Tests of the reconciler with a store and a bundle target that fail on demand.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::json;
use tacit_testing::Scratch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{
    api::Api,
    bench::{CONFIG_MAP, config, published, until},
};
use crate::{
    bundle,
    reconciler::{ReconcileError, Reconciler},
    store,
    store::Store,
};

const HOUR: Duration = Duration::from_secs(3600);
/// Longer than a busy machine needs.
const DEADLINE: Duration = Duration::from_secs(30);

fn reconciler(api: &Api) -> Reconciler {
    let config = config(HOUR);
    Reconciler {
        store: store(&config, Some(&api.client)),
        bundle: bundle(&config, Some(&api.client)),
        trust_domain: config.trust_domain,
        names: config.names,
        lifetimes: config.lifetimes,
        reconcile_max: HOUR,
        live: Arc::default(),
        last_error: Arc::default(),
        known: None,
        published: None,
    }
}

#[tokio::test]
async fn a_hanging_api_is_reported_after_the_timeout() {
    for hanging in ["/secrets/", "/configmaps/"] {
        let api = Api::start().await;
        let mut reconciler = reconciler(&api);
        reconciler.reconcile(SystemTime::now()).await.expect("a root is made and published");

        api.content().hanging = Some(hanging);
        reconciler.reconcile_max = Duration::from_millis(100);
        let result = timeout(DEADLINE, reconciler.reconcile(SystemTime::now())).await.expect("ends in time");
        assert!(matches!(result, Err(ReconcileError::Timeout(_))), "{hanging}: {result:?}");
        let last_error = reconciler.last_error.clone();
        let _running = AbortOnDropHandle::new(tokio::spawn(reconciler.run()));
        until("it is shown", || last_error.load().is_some()).await;
    }
}

#[tokio::test]
async fn write_conflicts_are_retried_up_to_a_limit() {
    for path in ["/secrets", "/configmaps"] {
        let api = Api::start().await;
        let mut reconciler = reconciler(&api);
        api.content().conflicts = Some((path, 2));
        reconciler.reconcile(SystemTime::now()).await.expect("tried again");
        let live = reconciler.live.load_full().expect("a root is in use");
        assert_eq!(published(&api), live.bundle);

        let mut changed = api.object(CONFIG_MAP);
        changed["data"]["root-cert.pem"] = json!("invalid");
        api.put(CONFIG_MAP, changed);
        api.content().conflicts = Some(("/configmaps", u32::MAX));
        let result = reconciler.reconcile(SystemTime::now()).await;
        assert!(matches!(result, Err(ReconcileError::Conflicts)), "{result:?}");
    }
}

#[tokio::test]
async fn an_invalid_rotation_request_is_reported_while_signing_continues() {
    let (api, files) = (Api::start().await, Scratch::new());
    let mut reconciler = Reconciler { store: Store::Directory(files.path().into()), ..reconciler(&api) };
    let request = files.path().join("rotate-root");
    std::fs::create_dir(&request).expect("made");
    let error =
        reconciler.reconcile(SystemTime::now()).await.expect_err("a folder is no request").to_string();
    assert!(error.contains("rotate-root"), "{error}");
    let live = reconciler.live.load_full().expect("it signs");
    assert_eq!((published(&api), live.roots), (live.bundle.clone(), 1));

    std::fs::remove_dir(&request).expect("removed");
    reconciler.reconcile(SystemTime::now()).await.expect("no request");
    assert_eq!(reconciler.live.load_full().expect("it signs").roots, 1);
    std::fs::write(&request, "now\n").expect("written");
    reconciler.reconcile(SystemTime::now()).await.expect("a request");
    assert_eq!(reconciler.live.load_full().expect("it signs").roots, 2, "the next root is trusted");
}
