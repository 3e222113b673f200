//! The pod that a container runtime names in `CNI_ARGS`.

use crate::request::Failure;

/// Longest name of an object, in bytes, as the API server limits it.
const NAME_MAX: usize = 253;

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Runtimes of old versions do not name it.
    pub(crate) uid: Option<String>,
}

/// Returns the pod of `arguments`, such as `IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web`, or `None` for a container
/// that is not of a pod.
///
/// # Errors
/// [`Failure`] for text that names no pod exactly: an unknown pod is not a pod that may pass.
pub(crate) fn of_arguments(arguments: &str) -> Result<Option<Pod>, Failure> {
    let of = |name: &str| {
        let mut values =
            arguments.split(';').filter_map(|pair| pair.split_once('=')).filter(|(key, _)| *key == name);
        match (values.next(), values.next()) {
            (Some((_, value)), None) if is_name(value) => Ok(Some(value.to_owned())),
            (Some((_, "")) | None, None) => Ok(None),
            (Some((_, value)), _) => Err(Failure::environment(format!(
                "invalid {name}={value:?} in CNI_ARGS: expected one name of letters, digits, '-' and '.'"
            ))),
            (None, Some(_)) => Ok(None),
        }
    };
    match (of("K8S_POD_NAMESPACE")?, of("K8S_POD_NAME")?, of("K8S_POD_UID")?) {
        (Some(namespace), Some(name), uid) => Ok(Some(Pod { namespace, name, uid })),
        (None, None, None) => Ok(None),
        _ => Err(Failure::environment(
            "CNI_ARGS names a part of a pod: expected K8S_POD_NAMESPACE and K8S_POD_NAME".to_owned(),
        )),
    }
}

/// Returns true for text that is the same in a URL.
fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(is_plain)
}
