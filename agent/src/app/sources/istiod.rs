//! The connection to istiod, as the configuration and the agent's pod describe it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use hyper::HeaderMap;
use tacit_identity::istio::IstioIssuer;
use tacit_sources::istiod::{AgentPod, Dial, Dialled, Options};
use tokio::net::TcpStream;

use crate::{
    app::{AppError, start::published_roots},
    config::{
        Config,
        istiod::{IstiodAccess, IstiodConfig},
    },
};

/// The namespace of the agent's account, in every pod with a ServiceAccount.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// Returns what a connection to istiod needs.
pub(super) async fn options(istiod: &IstiodConfig, config: &Config) -> Result<Options, AppError> {
    Ok(Options {
        dial: dial(istiod).await?,
        address: istiod.access.address().to_owned(),
        place: istiod.place.clone(),
        agent: agent_pod(config),
        local: istiod.local.clone(),
    })
}

async fn dial(istiod: &IstiodConfig) -> Result<Dial, AppError> {
    Ok(match &istiod.access {
        IstiodAccess::Plaintext { address } => {
            tracing::warn!(
                address,
                "istiod is reached as plaintext: anybody on the way can change directory and policies"
            );
            let address = address.clone();
            Arc::new(move || {
                let address = address.clone();
                Box::pin(async move {
                    let connected = TcpStream::connect(&address).await;
                    let io = connected.map_err(|error| {
                        format!(
                            "cannot connect to {address}: {error}; is istiod running, and its address right?"
                        )
                    })?;
                    Ok(Dialled { io: Box::new(io), metadata: HeaderMap::new() })
                })
            })
        }
        IstiodAccess::Tls(tls, roots) => {
            let mut issuer = IstioIssuer::new(tls.clone());
            if let Some(at) = roots {
                let published = published_roots(istiod.local.kubeconfig.as_deref(), at).await;
                issuer = issuer.with_published_roots(published.map_err(AppError::RootConfigMap)?);
            }
            let issuer = Arc::new(issuer);
            Arc::new(move || {
                let issuer = Arc::clone(&issuer);
                Box::pin(async move {
                    let (io, metadata) = issuer.dial().await.map_err(|error| error.to_string())?;
                    Ok(Dialled { io: Box::new(io), metadata })
                })
            })
        }
    })
}

/// Returns the agent's pod. istiod compares the namespace with that of the token. Name and address are for its logs.
fn agent_pod(config: &Config) -> AgentPod {
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let mounted = || fs::read_to_string(NAMESPACE_FILE).ok().map(|text| text.trim().to_owned());
    let address = variable("POD_IP").and_then(|text| text.parse().ok());
    AgentPod {
        name: variable("POD_NAME").unwrap_or_else(|| format!("tacit-{}", config.node)),
        namespace: variable("POD_NAMESPACE")
            .or_else(mounted)
            .unwrap_or_else(|| config.root_namespace.to_string()),
        address: address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}
