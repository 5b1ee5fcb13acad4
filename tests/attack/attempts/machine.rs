//! What belongs to other processes of the machine: their descriptors, and KVM.
//!
//! Contains unsafe code: a message header made of zeroes.

use super::*;

const NOT_KVM: &[(i32, &str)] = &[
    (libc::ENOTTY, "holds no KVM descriptor"),
    (libc::EINVAL, "holds no KVM descriptor"),
    (libc::ENOTCONN, "holds no KVM descriptor"),
    (libc::EBADF, "holds no KVM descriptor"),
    (libc::EFAULT, "holds no KVM descriptor"),
];
const CORE_OWNS_IT: Option<&str> = Some("the core only: KVM is its own");

fn ioctl(held: &Held, request: u64, argument: u64) -> Result {
    any(&held.descriptors, |number| {
        call(libc::SYS_ioctl, [fd(*number), request, argument, 0, 0, 0]).map(drop)
    })
}

fn create_vm(held: &Held) -> Result {
    ioctl(held, 0xAE01, 0)
}

fn create_vcpu(held: &Held) -> Result {
    ioctl(held, 0xAE41, 7)
}

/// KVM_SET_MSRS: none.
fn model_specific(held: &Held) -> Result {
    let none = [0_u64; 2];
    ioctl(held, 0x4008_AE89, address(&none))
}

fn registers(held: &Held) -> Result {
    let registers = [0_u64; 18];
    ioctl(held, 0x4090_AE82, address(&registers))
}

/// KVM_CREATE_DEVICE, VFIO (4): pass-through.
fn device(held: &Held) -> Result {
    let device = [4_u32, 0, 0];
    ioctl(held, 0xC00C_AEE0, address(&device))
}

/// KVM_MEMORY_ENCRYPT_OP: the door to the firmware of the host's CPU.
fn encryption(held: &Held) -> Result {
    let operation = [0_u64; 4];
    ioctl(held, 0xC008_AEBA, address(&operation))
}

fn type_into_terminal(held: &Held) -> Result {
    ioctl(held, 0x5412, address(c"x"))
}

/// FIONBIO: would let a device make the core wait on an eventfd that both hold.
fn blocking(held: &Held) -> Result {
    let off = 0_i32;
    ioctl(held, 0x5421, address(&off))
}

fn through_proc(_: &Held) -> Result {
    any([c"/proc/1/fd/5", c"/proc/2/fd/5", c"/proc/self/fd/5", c"/dev/fd/5"], |path| {
        call(libc::SYS_open, [path.as_ptr() as u64, 2, 0, 0, 0, 0]).map(drop)
    })
}

fn from_pidfd(held: &Held) -> Result {
    any(&held.descriptors, |number| call(libc::SYS_pidfd_getfd, [fd(*number), 5, 0, 0, 0, 0]).map(drop))
}

/// Looks on each socket for descriptors that somebody sent; the messages stay where they are.
fn received(held: &Held) -> Result {
    any(&held.descriptors, |number| {
        let mut byte = 0_u8;
        let mut control = [0_u64; 32];
        let mut buffer = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: plain data, for which zero means "nothing".
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut buffer;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = 256;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        call(libc::SYS_recvmsg, [fd(*number), &raw mut message as u64, fd(flags), 0, 0, 0])?;
        // The descriptors of its own start message were taken before.
        if message.msg_controllen > 0 { Ok(()) } else { Err(libc::EAGAIN) }
    })
}

/// Binds a name, so that others could be made to connect and hand over something.
fn lure(_: &Held) -> Result {
    let socket = call(libc::SYS_socket, [1, 1, 0, 0, 0, 0])?.cast_unsigned();
    let name = [1_u8, 0, 0, b'l', b'u', b'r', b'e'];
    call(libc::SYS_bind, [socket, address(&name), 7, 0, 0, 0]).map(drop)
}

pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        goal: "open others' descriptors through /proc",
        calls: &["open"],
        run: through_proc,
        walls: &[(libc::ENOENT, EMPTY_ROOT), (libc::EACCES, LANDLOCK)],
        gap: None,
    },
    Attempt {
        goal: "take others' descriptors with pidfd_getfd",
        calls: &["pidfd_getfd"],
        run: from_pidfd,
        walls: &[(libc::EBADF, NOTHING_HELD), (libc::ESRCH, PID_NAMESPACE)],
        gap: None,
    },
    Attempt {
        goal: "find descriptors on its sockets that were not meant for it (SCM_RIGHTS)",
        calls: &["recvmsg"],
        run: received,
        walls: &[
            (libc::EAGAIN, "nobody sends any"),
            (libc::ENOTSOCK, "nobody sends any"),
            (libc::ENOTCONN, "nobody sends any"),
        ],
        gap: None,
    },
    Attempt {
        goal: "bind a name at which others would connect",
        calls: &["socket"],
        run: lure,
        walls: &[],
        gap: Some("the name exists in its own network namespace, where nobody is"),
    },
    Attempt {
        goal: "KVM_CREATE_VM on every descriptor",
        calls: &["ioctl"],
        run: create_vm,
        walls: NOT_KVM,
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "KVM_CREATE_VCPU on every descriptor",
        calls: &["ioctl"],
        run: create_vcpu,
        walls: NOT_KVM,
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "KVM_SET_MSRS on every descriptor",
        calls: &["ioctl"],
        run: model_specific,
        walls: NOT_KVM,
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "KVM_SET_REGS on every descriptor",
        calls: &["ioctl"],
        run: registers,
        walls: NOT_KVM,
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "KVM_CREATE_DEVICE for pass-through",
        calls: &["ioctl"],
        run: device,
        walls: &[
            (libc::ENOTTY, "holds no KVM descriptor"),
            (libc::EINVAL, "holds no KVM descriptor"),
            (libc::EBADF, "holds no KVM descriptor"),
            (libc::ENODEV, HOST),
        ],
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "KVM_MEMORY_ENCRYPT_OP",
        calls: &["ioctl"],
        run: encryption,
        walls: NOT_KVM,
        gap: CORE_OWNS_IT,
    },
    Attempt {
        goal: "type into the user's terminal (TIOCSTI)",
        calls: &["ioctl"],
        run: type_into_terminal,
        walls: &[
            (libc::ENOTTY, "holds no terminal"),
            (libc::EINVAL, "holds no terminal"),
            (libc::EPERM, "not its session"),
            (libc::EIO, HOST),
        ],
        gap: None,
    },
    Attempt {
        goal: "make shared descriptors blocking (FIONBIO)",
        calls: &["ioctl"],
        run: blocking,
        walls: &[],
        gap: Some("whoever holds a descriptor may change its flags"),
    },
];
