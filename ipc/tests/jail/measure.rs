//! What a jail costs: `cargo test --release -p bulkhead-ipc --test jail -- --measure`.

use std::fs::File;
use std::time::{Duration, Instant};

use bulkhead_ipc::jail::Limits;

use crate::inside::Answer;
use crate::{DEADLINE, Jailed};

const ROUNDS: usize = 40;
/// The core and four devices.
const PROCESSES: usize = 5;

/// Prints medians: one `spawn` call, all processes started, all confirmed, all have spoken from inside.
pub fn main() {
    let mut columns: [Vec<Duration>; 4] = Default::default();
    for _ in 0..ROUNDS {
        let program = File::open(std::env::current_exe().unwrap()).unwrap();
        let start = Instant::now();
        let mut jailed: Vec<Jailed> = Vec::new();
        for _ in 0..PROCESSES {
            let before = Instant::now();
            jailed.push(Jailed::try_start("look", program.try_clone().unwrap(), Limits::default()).unwrap());
            columns[0].push(before.elapsed());
        }
        columns[1].push(start.elapsed());
        for jailed in &mut jailed {
            jailed.process.confirm(DEADLINE).unwrap();
        }
        columns[2].push(start.elapsed());
        for jailed in &jailed {
            jailed.channel.recv::<Answer>(Some(DEADLINE)).unwrap();
        }
        columns[3].push(start.elapsed());
        drop(jailed);
        std::thread::sleep(Duration::from_millis(20));
    }
    for (name, mut column) in
        ["spawn", "all spawned", "all confirmed", "all answered"].into_iter().zip(columns)
    {
        column.sort();
        println!(
            "{name:<14} median {:>9.3?}  p90 {:>9.3?}",
            column[column.len() / 2],
            column[column.len() * 9 / 10]
        );
    }
}
