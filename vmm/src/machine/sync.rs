//! Locking that does not fail.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. A panic elsewhere ends the process, so a poisoned lock is never met; if it were, its registers are as good as any.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
