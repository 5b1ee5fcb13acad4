//! The threads in which vCPUs run, and the gate that holds or releases them all.
//!
//! Contains unsafe code: a signal handler writes KVM's `immediate_exit` byte of the thread that it interrupts.
//! Without it a kick that arrives between the look at the gate and KVM_RUN would be lost.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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

/// Where vCPUs stand while they must not be in the guest: all of them while the machine is paused, or as long as one thread
/// changes what the guest sees of memory.
#[derive(Default)]
pub struct Gate {
    /// Closed. A copy of what `state` says, for a look without the lock before each entry into the guest.
    closed: AtomicBool,
    state: Mutex<State>,
    /// A vCPU has left the guest, stands at the gate or has ended, or nobody excludes them any more: for those who wait for that.
    left: Condvar,
}

#[derive(Default)]
struct State {
    running: bool,
    /// Somebody has all vCPUs out of the guest.
    exclusive: bool,
    /// Threads that stand at the gate, or have ended.
    waiting: usize,
    /// Threads that have not ended.
    seats: Vec<Arc<Seat>>,
}

type Guard<'a> = MutexGuard<'a, State>;

/// One vCPU thread as the gate sees it.
pub(super) struct Seat {
    index: usize,
    /// The vCPU is plugged in.
    online: AtomicBool,
    in_guest: AtomicBool,
    /// It may pass: each waits for itself, for with a thousand of them it costs to wake all.
    opened: Condvar,
    thread: libc::pthread_t,
}

impl VcpuThreads {
    /// Makes one thread for each vCPU, of which the first `online` are plugged in, and returns when all stand at the gate. `prepare` runs first in each (its seccomp
    /// filter) and says why a vCPU must not run, `on_stop` when a vCPU cannot go on.
    ///
    /// # Errors
    /// The operating system gave no thread.
    pub fn spawn(
        vcpus: Vec<Vcpu>,
        gate: Arc<Gate>,
        online: usize,
        prepare: impl Fn() -> Result<(), String> + Clone + Send + 'static,
        on_stop: impl Fn(VcpuStop) + Clone + Send + 'static,
    ) -> Result<Self, KvmError> {
        install_kick_handler();
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let (gate, prepare, on_stop) = (gate.clone(), prepare.clone(), on_stop.clone());
            let thread = Builder::new().name(format!("vcpu{id}")).stack_size(STACK_BYTES).spawn(move || {
                arm_kick(&mut vcpu);
                let seat = gate.take_seat(id, id < online);
                on_stop(match prepare() {
                    Ok(()) => run(&mut vcpu, &gate, &seat),
                    Err(reason) => VcpuStop::Failed(reason),
                });
                gate.leave(&seat);
                IMMEDIATE_EXIT.set(ptr::null_mut());
            });
            threads.push(thread.map_err(|source| KvmError::Thread { id, source })?);
        }
        let threads = Self { gate, threads };
        threads.wait_at_gate();
        Ok(threads)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        drop(self.gate.change(self.gate.lock(), |state| state.running = true));
    }

    /// Holds all vCPUs and returns when none is in the guest any more.
    ///
    /// A vCPU that waits for a device process comes back at that wait's deadline at the latest.
    pub fn pause(&self) {
        drop(self.gate.change(self.gate.lock(), |state| state.running = false));
        self.wait_at_gate();
    }

    /// Plugs a vCPU in or out. One that is out stays at the gate whatever the guest sends it; it has left the guest soon
    /// after this returns.
    pub fn set_online(&self, index: usize, online: bool) {
        let state = self.gate.lock();
        if let Some(seat) = state.seats.iter().find(|seat| seat.index == index) {
            seat.online.store(online, Ordering::SeqCst);
            state.settle(seat);
        }
    }

    fn wait_at_gate(&self) {
        let mut state = self.gate.lock();
        while state.waiting < self.threads.len() {
            state = self.gate.sleep(state);
        }
    }
}

impl State {
    fn lets(&self, seat: &Seat) -> bool {
        self.running && !self.exclusive && seat.online.load(Ordering::SeqCst)
    }

    /// Wakes the vCPU that may pass, and gets the one that may not out of the guest.
    fn settle(&self, seat: &Seat) {
        if self.lets(seat) {
            seat.opened.notify_one();
        } else if seat.in_guest.load(Ordering::SeqCst) {
            // SAFETY: a thread gives up its seat, under the lock that `self` is guarded by, before it ends: the id is valid.
            unsafe { libc::pthread_kill(seat.thread, KICK_SIGNAL) };
        }
    }
}

impl Gate {
    fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes who may pass, and tells all that it concerns.
    fn change<'a>(&self, mut state: Guard<'a>, change: impl FnOnce(&mut State)) -> Guard<'a> {
        change(&mut state);
        // Sequentially consistent, as in `enter_guest`: either the vCPU sees the gate closed, or its seat is seen in the guest.
        self.closed.store(!state.running || state.exclusive, Ordering::SeqCst);
        state.seats.iter().for_each(|seat| state.settle(seat));
        self.left.notify_all();
        state
    }

    fn sleep<'a>(&self, state: Guard<'a>) -> Guard<'a> {
        self.left.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something while no vCPU is in the guest; those that are elsewhere, the caller's own for instance, go on. What is done
    /// must not wait for a vCPU.
    pub fn exclude_vcpus<T>(&self, action: impl FnOnce() -> T) -> T {
        let mut state = self.lock();
        while state.exclusive {
            state = self.sleep(state);
        }
        // Without letting the lock go: of two that waited one would open the gate while the other is not done.
        let mut state = self.change(state, |state| state.exclusive = true);
        while state.seats.iter().any(|seat| seat.in_guest.load(Ordering::SeqCst)) {
            state = self.sleep(state);
        }
        drop(state);
        let result = action();
        drop(self.change(self.lock(), |state| state.exclusive = false));
        result
    }

    /// Returns when this vCPU may enter the guest, and has said so.
    pub(super) fn enter_guest(&self, seat: &Seat) {
        loop {
            seat.in_guest.store(true, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) && seat.online.load(Ordering::SeqCst) {
                return;
            }
            self.leave_guest(seat);
            self.wait(seat);
        }
    }

    /// This vCPU is out of the guest.
    pub(super) fn leave_guest(&self, seat: &Seat) {
        seat.in_guest.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            let _whoever_looks_has_looked = self.lock();
            self.left.notify_all();
        }
    }

    fn wait(&self, seat: &Seat) {
        let mut state = self.lock();
        state.waiting += 1;
        self.left.notify_all();
        while !state.lets(seat) {
            state = seat.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
    }

    fn take_seat(&self, index: usize, online: bool) -> Arc<Seat> {
        // SAFETY: takes no argument and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        let (online, in_guest, opened) = (online.into(), AtomicBool::default(), Condvar::new());
        let seat = Arc::new(Seat { index, online, in_guest, opened, thread });
        self.lock().seats.push(seat.clone());
        seat
    }

    fn leave(&self, seat: &Arc<Seat>) {
        let mut state = self.lock();
        state.seats.retain(|other| !Arc::ptr_eq(other, seat));
        state.waiting += 1;
        self.left.notify_all();
    }
}

/// Runs until the vCPU cannot go on. After a look at a flag, so that the guest's exits take no lock.
fn run(vcpu: &mut Vcpu, gate: &Gate, seat: &Seat) -> VcpuStop {
    gate.wait(seat);
    loop {
        match vcpu.step(gate, seat) {
            Step::Continue => {}
            Step::Interrupted => vcpu.clear_immediate_exit(),
            Step::Stop(stop) => return stop,
        }
    }
}

/// Not a real-time signal: those queue up, and with many vCPUs one more than RLIMIT_SIGPENDING allows would be lost.
const KICK_SIGNAL: libc::c_int = libc::SIGUSR1;

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
        libc::sigaction(KICK_SIGNAL, &raw const action, ptr::null_mut());
    }
}

fn arm_kick(vcpu: &mut Vcpu) {
    let run = vcpu.run_page();
    // SAFETY: `run` points to the vCPU's mapped page; only the field's address is taken.
    IMMEDIATE_EXIT.set(unsafe { &raw mut (*run).immediate_exit });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Threads that go in and out of a guest that is not there, as fast as they can.
    #[test]
    fn nobody_is_in_the_guest_while_memory_changes_or_the_machine_is_paused() {
        install_kick_handler();
        let gate = Gate::default();
        let (inside, stop, met) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let seat = gate.take_seat(0, true);
                    while !stop.load(Ordering::SeqCst) {
                        gate.enter_guest(&seat);
                        inside.fetch_add(1, Ordering::SeqCst);
                        std::hint::spin_loop();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        gate.leave_guest(&seat);
                    }
                    gate.leave(&seat);
                });
            }
            let empty = || {
                met.fetch_add(inside.load(Ordering::SeqCst), Ordering::SeqCst);
                // Long enough for another one that excludes them to be in the way.
                std::thread::yield_now();
                met.fetch_add(inside.load(Ordering::SeqCst), Ordering::SeqCst);
            };
            gate.exclude_vcpus(empty);
            drop(gate.change(gate.lock(), |state| state.running = true));
            // Two at once, as when two vCPUs flip PAM.
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..300).for_each(|_| gate.exclude_vcpus(empty)));
                }
            });
            let mut state = gate.change(gate.lock(), |state| state.running = false);
            while state.waiting < 3 {
                state = gate.sleep(state);
            }
            empty();
            drop(state);
            gate.exclude_vcpus(empty);
            stop.store(true, Ordering::SeqCst);
            drop(gate.change(gate.lock(), |state| state.running = true));
        });
        assert_eq!(met.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_vcpu_passes_only_while_it_is_online() {
        install_kick_handler();
        let (gate, passes, stop) = (Arc::new(Gate::default()), AtomicUsize::new(0), AtomicBool::new(false));
        let threads = VcpuThreads { gate: gate.clone(), threads: Vec::new() };
        let (passes, stop, threads, mut late) = (&passes, &stop, &threads, 0);
        std::thread::scope(|scope| {
            for index in 0..3 {
                let gate = gate.clone();
                scope.spawn(move || {
                    let seat = gate.take_seat(index, index == 0);
                    while !stop.load(Ordering::SeqCst) {
                        gate.enter_guest(&seat);
                        passes.fetch_add(usize::from(index == 2), Ordering::SeqCst);
                        gate.leave_guest(&seat);
                    }
                    gate.leave(&seat);
                });
            }
            threads.resume();
            while gate.lock().waiting < 2 {
                std::thread::yield_now();
            }
            for _ in 0..300 {
                let before = passes.load(Ordering::SeqCst);
                threads.set_online(2, true);
                while passes.load(Ordering::SeqCst) == before {
                    std::thread::yield_now();
                }
                threads.set_online(2, false);
                gate.exclude_vcpus(|| ());
                let after = passes.load(Ordering::SeqCst);
                // What opens the gate for others opens it not for this one.
                gate.exclude_vcpus(|| ());
                late += passes.load(Ordering::SeqCst) - after;
            }
            stop.store(true, Ordering::SeqCst);
            (1..3).for_each(|index| threads.set_online(index, true));
        });
        assert_eq!(late, 0);
    }
}
