//! What management software asks of a back end program: `--print-capabilities`, and the name it is started by.
//!
//! The manifests in `dist/vhost-user/` name a program without arguments, so each type has a link to `bulkhead-device` that is
//! called `vhost-user-TYPE` (`VhostUserBackend` in docs/interop/vhost-user.json of QEMU).

use std::path::Path;

use super::{ServiceType, find};

/// What the name of a link to this program begins with.
const LINK: &str = "vhost-user-";

/// The answer to `--print-capabilities` (`VHostUserBackendCapabilities`), one line of JSON.
#[must_use]
pub fn capabilities(service: &ServiceType) -> String {
    let features: Vec<String> = service.features.iter().map(|feature| format!("\"{feature}\"")).collect();
    format!("{{\"type\": \"{}\", \"features\": [{}]}}", service.backend_type, features.join(", "))
}

/// The type that the program's own name says.
#[must_use]
pub fn type_of_link(title: &str) -> Option<&'static ServiceType> {
    find(Path::new(title).file_name()?.to_str()?.strip_prefix(LINK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_names_its_type() {
        let name = |title| type_of_link(title).map(|service| service.name);
        assert_eq!(name("/usr/libexec/bulkhead/vhost-user-blk"), Some("blk"));
        for title in ["bulkhead-device", "vhost-user-", "vhost-user-toaster", "bulkhead-device[service/blk]"]
        {
            assert_eq!(name(title), None, "{title}");
        }
    }

    #[test]
    fn a_disk_has_the_options_of_the_conventions() {
        assert_eq!(
            capabilities(&crate::blk::SERVICE),
            r#"{"type": "block", "features": ["read-only", "blk-file"]}"#
        );
        assert_eq!(capabilities(&crate::rng::SERVICE), r#"{"type": "rng", "features": []}"#);
    }
}
