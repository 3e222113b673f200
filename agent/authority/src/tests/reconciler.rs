//! The keeper alone, with a store and a place of the bundle that have their days.

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
/// Far above what a busy machine needs.
const DEADLINE: Duration = Duration::from_secs(30);

fn reconciler(api: &Api) -> Reconciler {
    let config = config(HOUR);
    Reconciler {
        store: store(&config, Some(&api.client)),
        bundle: bundle(&config, Some(&api.client)),
        trust_domain: config.trust_domain,
        names: config.names,
        lifetimes: config.lifetimes,
        look_max: HOUR,
        live: Arc::default(),
        trouble: Arc::default(),
        known: None,
        published: None,
    }
}

#[tokio::test]
async fn an_api_that_hangs_is_trouble_and_waited_for_no_longer_than_a_look() {
    for hanging in ["/secrets/", "/configmaps/"] {
        let api = Api::start().await;
        let mut reconciler = reconciler(&api);
        reconciler.look(SystemTime::now()).await.expect("a root is made and published");

        api.content().hanging = Some(hanging);
        reconciler.look_max = Duration::from_millis(100);
        let looked = timeout(DEADLINE, reconciler.look(SystemTime::now())).await.expect("a look that ends");
        assert!(matches!(looked, Err(ReconcileError::Late(_))), "{hanging}: {looked:?}");
        let trouble = reconciler.trouble.clone();
        let _running = AbortOnDropHandle::new(tokio::spawn(reconciler.run()));
        until("it is shown", || trouble.load().is_some()).await;
    }
}

#[tokio::test]
async fn somebody_faster_is_no_trouble_unless_it_never_ends() {
    for path in ["/secrets", "/configmaps"] {
        let api = Api::start().await;
        let mut reconciler = reconciler(&api);
        api.content().conflicts = Some((path, 2));
        reconciler.look(SystemTime::now()).await.expect("tried again");
        let live = reconciler.live.load_full().expect("a root is in use");
        assert_eq!(published(&api), live.bundle);

        let mut changed = api.object(CONFIG_MAP);
        changed["data"]["root-cert.pem"] = json!("nonsense");
        api.put(CONFIG_MAP, changed);
        api.content().conflicts = Some(("/configmaps", u32::MAX));
        let looked = reconciler.look(SystemTime::now()).await;
        assert!(matches!(looked, Err(ReconcileError::Conflicts)), "{looked:?}");
    }
}

#[tokio::test]
async fn a_request_to_rotate_that_cannot_be_read_is_trouble_while_signing_goes_on() {
    let (api, files) = (Api::start().await, Scratch::new());
    let mut reconciler = Reconciler { store: Store::Directory(files.path().into()), ..reconciler(&api) };
    let request = files.path().join("rotate-root");
    std::fs::create_dir(&request).expect("made");
    let error = reconciler.look(SystemTime::now()).await.expect_err("a folder is no request").to_string();
    assert!(error.contains("rotate-root"), "{error}");
    let live = reconciler.live.load_full().expect("it signs");
    assert_eq!((published(&api), live.roots), (live.bundle.clone(), 1));

    std::fs::remove_dir(&request).expect("removed");
    reconciler.look(SystemTime::now()).await.expect("no request");
    assert_eq!(reconciler.live.load_full().expect("it signs").roots, 1);
    std::fs::write(&request, "now\n").expect("written");
    reconciler.look(SystemTime::now()).await.expect("a request");
    assert_eq!(reconciler.live.load_full().expect("it signs").roots, 2, "the next root is trusted");
}
