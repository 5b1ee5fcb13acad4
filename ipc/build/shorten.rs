//! Shortens BPF programs: loading one costs time for each instruction, on the way to every thread's start.
//!
//! seccompiler writes five instructions for a plain rule, two of which only jump on and one of which nothing reaches.
//! Jumps to jumps go to where those lead, then what nothing reaches is left out. Meaning and order stay; that they do is
//! tried on each program with all its constants, and the build fails otherwise.

use seccompiler::sock_filter;

/// `BPF_LD | BPF_W | BPF_ABS`, `BPF_ALU | BPF_AND | BPF_K`, `BPF_JMP | BPF_JA`, `BPF_RET | BPF_K` (linux/bpf_common.h).
pub const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
pub const RETURN: u16 = 0x06;
/// `BPF_JMP | … | BPF_K` with equal, greater, greater or equal, any bit set.
pub const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
pub const GREATER_EQUAL: u16 = 0x35;
const ANY_BIT: u16 = 0x45;

/// Where an instruction leads.
enum Next {
    End,
    One(usize),
    Two(usize, usize),
}

/// The shorter program, or what about it is not understood.
pub fn shorten(program: &[sock_filter]) -> Result<Vec<sock_filter>, String> {
    let mut reached = vec![false; program.len()];
    let mut open = vec![0];
    while let Some(place) = open.pop() {
        let seen = reached.get_mut(place).ok_or("a jump leaves the program")?;
        if std::mem::replace(seen, true) {
            continue;
        }
        match next(program, place)? {
            Next::End => {}
            Next::One(one) => open.push(one),
            Next::Two(one, two) => open.extend([one, two]),
        }
    }
    // The new number of each instruction that stays.
    let numbers: Vec<usize> = reached
        .iter()
        .scan(0, |count, reached| {
            let number = *count;
            *count += usize::from(*reached);
            Some(number)
        })
        .collect();
    let mut short = Vec::new();
    for (place, instruction) in program.iter().enumerate().filter(|(place, _)| reached[*place]) {
        let distance = |to: usize| numbers[to] - numbers[place] - 1;
        let near = |to| u8::try_from(distance(to)).map_err(|_| "a conditional jump became too long");
        let (mut jt, mut jf, mut k) = (0, 0, instruction.k);
        match next(program, place)? {
            Next::Two(yes, no) => (jt, jf) = (near(yes)?, near(no)?),
            Next::One(to) if instruction.code == JUMP => {
                k = u32::try_from(distance(to)).map_err(|_| "a jump became too long")?;
            }
            Next::One(_) | Next::End => {}
        }
        short.push(sock_filter { code: instruction.code, jt, jf, k });
    }
    compare(program, &short)?;
    Ok(short)
}

fn next(program: &[sock_filter], place: usize) -> Result<Next, String> {
    let instruction = program.get(place).ok_or("a jump leaves the program")?;
    let through = |offset: usize| {
        let mut to = place + 1 + offset;
        while let Some(jump) = program.get(to).filter(|it| it.code == JUMP) {
            to += 1 + jump.k as usize;
        }
        to
    };
    match instruction.code {
        RETURN => Ok(Next::End),
        // Falls through to whatever comes next, even to a jump.
        LOAD | AND => Ok(Next::One(place + 1)),
        JUMP => Ok(Next::One(through(instruction.k as usize))),
        EQUAL | GREATER | GREATER_EQUAL | ANY_BIT => {
            Ok(Next::Two(through(instruction.jt.into()), through(instruction.jf.into())))
        }
        other => Err(format!("instruction {other:#x} is not known")),
    }
}

/// `struct seccomp_data` as words: number, architecture, instruction pointer, six arguments.
type Data = [u32; 16];

fn run(program: &[sock_filter], data: &Data) -> Result<u32, String> {
    let (mut place, mut accumulator) = (0, 0);
    loop {
        let it = program.get(place).ok_or("a program has no end")?;
        let jump = |yes: bool| usize::from(if yes { it.jt } else { it.jf });
        place += 1 + match it.code {
            RETURN => return Ok(it.k),
            LOAD => {
                accumulator = *data.get(it.k as usize / 4).ok_or("a load beyond seccomp_data")?;
                0
            }
            AND => {
                accumulator &= it.k;
                0
            }
            JUMP => it.k as usize,
            EQUAL => jump(accumulator == it.k),
            GREATER => jump(accumulator > it.k),
            GREATER_EQUAL => jump(accumulator >= it.k),
            ANY_BIT => jump(accumulator & it.k != 0),
            other => return Err(format!("instruction {other:#x} is not known")),
        };
    }
}

/// Runs both with every system call number, and with arguments made of the constants that the program compares with.
pub fn compare(long: &[sock_filter], short: &[sock_filter]) -> Result<(), String> {
    const X86_64: u32 = 0xC000_003E;
    let mut constants = vec![0, 1, u32::MAX, X86_64];
    constants.extend(long.iter().flat_map(|it| [it.k, it.k.wrapping_add(1), it.k.wrapping_sub(1), !it.k]));
    constants.sort_unstable();
    constants.dedup();
    // A generator of fixed numbers (Knuth's MMIX), so that a build is what it was.
    let mut random = 1_u64;
    let mut pick = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        constants[(random >> 33) as usize % constants.len()]
    };
    for number in (0..0x400).chain(constants.iter().copied()) {
        for round in 0..64 {
            let mut data = Data::default().map(|_| pick());
            (data[0], data[1]) = (number, if round == 0 { pick() } else { X86_64 });
            // Small arguments are frequent: their upper halves are 0.
            if round % 2 == 0 {
                data[4..].chunks_exact_mut(2).for_each(|argument| argument[1] = 0);
            }
            if run(long, &data)? != run(short, &data)? {
                return Err(format!("shortened, it answers otherwise to {data:x?}"));
            }
        }
    }
    Ok(())
}
