//! The threads in which vCPUs run, and the gate that holds or releases them all.
//!
//! Contains unsafe code: a signal handler writes KVM's `immediate_exit` byte of the thread that it interrupts.
//! Without it a kick that arrives between the look at the gate and KVM_RUN would be lost.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::KvmError;
use super::vcpu::{Step, Vcpu, VcpuStop};

/// What a vCPU thread needs of stack: its deepest path is a device access with its logging.
const STACK_BYTES: usize = 256 * 1024;

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// All vCPU threads of a machine. They start held.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    running: bool,
    /// Of each vCPU, whether it is plugged in.
    online: Vec<bool>,
    /// Threads that stand at the gate, or have ended.
    waiting: usize,
}

impl VcpuThreads {
    /// Makes one thread for each vCPU, of which the first `online` are plugged in, and returns when all stand at the gate. `prepare` runs first in each (its seccomp
    /// filter) and says why a vCPU must not run, `on_stop` when a vCPU cannot go on.
    ///
    /// # Errors
    /// The operating system gave no thread.
    pub fn spawn(
        vcpus: Vec<Vcpu>,
        online: usize,
        prepare: impl Fn() -> Result<(), String> + Clone + Send + 'static,
        on_stop: impl Fn(VcpuStop) + Clone + Send + 'static,
    ) -> Result<Self, KvmError> {
        install_kick_handler();
        let gate = Arc::new(Gate::default());
        gate.lock().online = (0..vcpus.len()).map(|index| index < online).collect();
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let (gate, prepare, on_stop) = (gate.clone(), prepare.clone(), on_stop.clone());
            let thread = Builder::new().name(format!("vcpu{id}")).stack_size(STACK_BYTES).spawn(move || {
                arm_kick(&mut vcpu);
                on_stop(match prepare() {
                    Ok(()) => run(&mut vcpu, id, &gate),
                    Err(reason) => VcpuStop::Failed(reason),
                });
                IMMEDIATE_EXIT.set(ptr::null_mut());
                gate.leave();
            });
            threads.push(thread.map_err(|source| KvmError::Thread { id, source })?);
        }
        let threads = Self { gate, threads };
        threads.wait_at_gate();
        Ok(threads)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.gate.lock().running = true;
        self.gate.changed.notify_all();
    }

    /// Holds all vCPUs and returns when none is in the guest any more.
    ///
    /// A vCPU that waits for a device process comes back at that wait's deadline at the latest.
    pub fn pause(&self) {
        self.gate.lock().running = false;
        for thread in &self.threads {
            kick(thread);
        }
        self.wait_at_gate();
    }

    /// Plugs a vCPU in or out. One that is out stays at the gate whatever the guest sends it; it has left the guest soon
    /// after this returns.
    pub fn set_online(&self, index: usize, online: bool) {
        if let Some(place) = self.gate.lock().online.get_mut(index) {
            *place = online;
        }
        self.gate.changed.notify_all();
        self.threads.get(index).into_iter().for_each(kick);
    }

    fn wait_at_gate(&self) {
        let mut state = self.gate.lock();
        while state.waiting < self.threads.len() {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl State {
    /// Whether a vCPU may run.
    fn lets(&self, index: usize) -> bool {
        self.running && self.online.get(index).is_some_and(|online| *online)
    }
}

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, index: usize) {
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while !state.lets(index) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
    }

    fn leave(&self) {
        self.lock().waiting += 1;
        self.changed.notify_all();
    }
}

/// Runs until the vCPU cannot go on. The gate is looked at after a kick alone, so that the guest's exits take no lock.
fn run(vcpu: &mut Vcpu, index: usize, gate: &Gate) -> VcpuStop {
    gate.wait(index);
    loop {
        match vcpu.step() {
            Step::Continue => {}
            Step::Interrupted => {
                vcpu.clear_immediate_exit();
                let may_run = gate.lock().lets(index);
                if !may_run {
                    gate.wait(index);
                }
            }
            Step::Stop(stop) => return stop,
        }
    }
}

/// The first real-time signal is free for programs (signal(7)); glibc keeps the two below for itself.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_kick_handler() {
    extern "C" fn on_kick(_: libc::c_int) {
        let byte = IMMEDIATE_EXIT.get();
        if !byte.is_null() {
            // SAFETY: `arm_kick` set the pointer for this very thread to a byte in the vCPU's shared page, which
            // the thread's `Vcpu` keeps mapped until after the pointer is cleared at the thread's end. A volatile byte write is what the
            // kernel's interface asks for and is async-signal-safe; thread-local storage without a destructor is too.
            unsafe { byte.write_volatile(1) };
        }
    }
    // SAFETY: a zeroed sigaction is a valid value (no flags, empty mask); the handler is async-signal-safe
    // (above). No SA_RESTART, so that KVM_RUN returns EINTR.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
        libc::sigaction(kick_signal(), &raw const action, ptr::null_mut());
    }
}

fn arm_kick(vcpu: &mut Vcpu) {
    let run = vcpu.run_page();
    // SAFETY: `run` points to the vCPU's mapped page; only the field's address is taken.
    IMMEDIATE_EXIT.set(unsafe { &raw mut (*run).immediate_exit });
}

fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle is not joined while `VcpuThreads` holds it, so the thread id is valid even when the
    // thread has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}
