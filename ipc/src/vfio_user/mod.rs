//! The register protocol, a strict subset of vfio-user.
