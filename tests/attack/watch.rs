//! Stands in for the supervisor inside the hostile process: hears of each forbidden call and refuses it instead of killing,
//! so that one process can try everything. The filter is the real one, and what it reports comes from the kernel.
//!
//! Contains unsafe code: the seccomp notification requests.

use std::mem;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bulkhead_ipc::jail::syscall_name;

use crate::hostile::STOPPED;

/// Names of the calls that were stopped since the last look.
#[derive(Debug, Clone, Default)]
pub struct Watch(Arc<Mutex<Vec<&'static str>>>);

impl Watch {
    /// Starts a thread that serves one listener; it has no policy of its own.
    pub fn serve(&self, listeners: std::sync::mpsc::Receiver<Vec<RawFd>>) {
        let stopped = Arc::clone(&self.0);
        thread::spawn(move || {
            let Ok(listeners) = listeners.recv() else { return };
            let mut polled: Vec<libc::pollfd> = listeners
                .iter()
                .map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 })
                .collect();
            loop {
                // SAFETY: the table is live and its length is passed with it.
                unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
                for entry in polled.iter_mut() {
                    if entry.revents & libc::POLLIN != 0 {
                        answer(entry.fd, &stopped);
                    } else if entry.revents != 0 {
                        // Its threads have ended.
                        entry.fd = -1;
                    }
                }
            }
        });
    }

    /// What was stopped since the last look.
    pub fn take(&self) -> Vec<&'static str> {
        mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn answer(listener: RawFd, stopped: &Mutex<Vec<&'static str>>) {
    // SAFETY: plain data, which the kernel demands to be zero.
    let mut notification: libc::seccomp_notif = unsafe { mem::zeroed() };
    // SAFETY: the request carries the structure's size, so the kernel writes no more than that.
    if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification) } != 0 {
        return;
    }
    let native = notification.data.arch == 0xC000_003E;
    let name = if native { syscall_name(notification.data.nr) } else { "unknown" };
    stopped.lock().unwrap_or_else(PoisonError::into_inner).push(name);
    let answer = libc::seccomp_notif_resp { id: notification.id, val: 0, error: -STOPPED, flags: 0 };
    // SAFETY: the request carries the structure's size, and the kernel only reads it.
    unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
}
