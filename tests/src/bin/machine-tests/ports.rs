//! Named ports of a stock guest, whose process is replaced while somebody is connected.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, bulkhead, exit};

pub fn cases() -> Vec<Case> {
    vec![Case::new("stock", "an agent answers on its named port before and after a restart", 60, agent)]
}

fn agent(context: &Context) -> Outcome {
    let path = context.folder.join("a");
    let [agent, other] = [
        format!("name=agent,unix={}", path.display()),
        format!("name=other,console=on,file={}", context.folder.join("other").display()),
    ];
    let machine = Machine::stock(context, Kernel::Elf, "ports")?;
    let options = ["--console", "--port", &agent, "--port", &other];
    let mut running = machine.arguments(&options).start()?;
    running.wait_for("guest: ports are there", 1)?;
    let failed = |error: std::io::Error| format!("port: {error}");
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(failed)?;
    let mut answers = BufReader::new(stream.try_clone().map_err(failed)?);
    for round in 0..3 {
        stream.write_all(format!("{round}\n").as_bytes()).map_err(failed)?;
        let mut answer = String::new();
        answers.read_line(&mut answer).map_err(failed)?;
        ensure!(answer == format!("echo {round}\n"), "the answer to {round} is {answer:?}");
        if round < 2 {
            let restart = bulkhead(context).args(["device", "restart", &running.name, "ports"]).status();
            ensure!(restart.is_ok_and(|status| status.success()), "the device cannot be restarted");
        }
    }
    drop((stream, answers));
    running.wait_for("guest: port hung up", 1)?;
    running.wait_for("guest: console is hvc0", 1)?;
    running.wait_for("guest: port other is hvc1", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    let other = std::fs::read_to_string(context.folder.join("other")).map_err(failed)?;
    ensure!(other.contains("to the other"), "the console's file has {other:?}");
    ensure!(!path.exists(), "the socket is still there");
    Ok(())
}
