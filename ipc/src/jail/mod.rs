//! The jail: what a process may reach, from both sides.
//!
//! The supervisor calls [`spawn`]; the new process calls [`enter`] first, [`enter_thread`] on each of its threads and
//! [`seal`] last on its main thread, then answers `Ready` with the [`Sealed`] listeners. From then on every thread runs
//! under the policy of its own kind (`seccomp-policies/*.json`).
//!
//! ```text
//! supervisor                                   jailed process
//! spawn() ── clone3, user map ───────────────▶ namespaces, empty root, limits, capabilities, execveat
//! confirm() ◀── end of file, or failed step ── (close-on-exec)
//! send Start ────────────────────────────────▶ enter(): Landlock; recv Start; set_enforcement()
//!                                              threads: enter_thread(BlkQueue); main: seal(BlkMain, &descriptors)
//! poll listeners ◀──────────── Ready + listeners
//! ```

pub mod cgroup;
mod child;
mod cradle;
mod error;
mod landlock;
mod layer;
mod policy;
mod process;
mod raw;
mod seal;
mod shared;
mod steps;
pub mod uids;
mod violation;

pub use error::JailError;
pub use landlock::landlock_version;
pub use layer::{Layer, LayerError};
pub use policy::{PolicyName, PolicySummary, policies};
pub use process::{Exit, Identity, JailSpec, JailedProcess, Limits, SharedDirectory, spawn};
pub use seal::{
    Enforcement, PANIC_EXIT_CODE, Sealed, enter, enter_setup, enter_thread, open_descriptors, seal,
    set_enforcement,
};
pub use shared::shared_directory;
pub use steps::Step;
pub use violation::{Violation, ViolationListener, syscall_name};
