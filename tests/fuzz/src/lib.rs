//! Fuzz targets: each takes any bytes, and whatever it does with them must neither panic nor hang.
//!
//! A target is a plain function of bytes. `fuzz_targets/` wraps each for libFuzzer (`make fuzz`), [`mutate`] drives each from fixed
//! seeds in `make test`. Input is either what the parser reads, or a script of small operations that `script` takes apart.

#![expect(clippy::expect_used, reason = "a fuzz target reports by a panic")]

mod guest;
mod kernels;
mod machine;
pub mod mutate;
mod registers;
mod script;
mod virtqueues;

pub use guest::fw_cfg;
pub use kernels::kernels;
pub use machine::{accesses, configuration};
pub use registers::{vfio_user_client, vfio_user_server};
pub use virtqueues::{vhost_user_backend, vhost_user_frontend};

/// A target: its name, what it does with bytes, and inputs to begin with.
pub struct Target {
    /// As its file in `fuzz_targets/` is called.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Inputs that reach far.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many inputs `make test` tries.
    pub inputs: u32,
}

/// All targets.
pub const TARGETS: [Target; 8] = [
    Target { name: "accesses", run: accesses, seeds: machine::access_seeds, inputs: 400 },
    Target { name: "configuration", run: configuration, seeds: machine::configuration_seeds, inputs: 400 },
    Target { name: "fw_cfg", run: fw_cfg, seeds: guest::seeds, inputs: 400 },
    Target { name: "kernels", run: kernels, seeds: kernels::seeds, inputs: 2000 },
    Target { name: "vfio_user_client", run: vfio_user_client, seeds: registers::client_seeds, inputs: 1500 },
    Target { name: "vfio_user_server", run: vfio_user_server, seeds: registers::server_seeds, inputs: 3000 },
    Target {
        name: "vhost_user_backend",
        run: vhost_user_backend,
        seeds: virtqueues::backend_seeds,
        inputs: 2000,
    },
    Target {
        name: "vhost_user_frontend",
        run: vhost_user_frontend,
        seeds: virtqueues::frontend_seeds,
        inputs: 1500,
    },
];
