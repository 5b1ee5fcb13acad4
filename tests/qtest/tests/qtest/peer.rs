//! A program that speaks qtest and QMP, started with the command line that libqtest uses.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsFd;
use tempfile::TempDir;

/// No step of a test waits longer for a program.
const LIMIT: Duration = Duration::from_secs(20);

/// The server under test.
pub const OURS: &str = env!("CARGO_BIN_EXE_bulkhead-qtest-x86_64");
/// What it is compared with.
pub const QEMU: &str = "qemu-system-x86_64";

/// A line-based connection.
pub struct Lines {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Lines {
    fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self { input: BufReader::new(socket.try_clone().unwrap()), output: socket }
    }

    pub fn send(&mut self, text: &str) {
        self.output.write_all(text.as_bytes()).unwrap();
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.input.read_line(&mut line).expect("an answer in time");
        assert!(line.ends_with('\n'), "the connection ended");
        line.trim_end().to_owned()
    }
}

/// A running program.
pub struct Peer {
    child: Child,
    qtest: Lines,
    pub qmp: Lines,
    /// Reports of interrupt lines so far.
    pub irqs: Vec<String>,
    events: VecDeque<String>,
    _folder: TempDir,
}

impl Peer {
    /// Starts `program`, waits until it has connected, and shakes hands on QMP.
    pub fn start(program: &str, arguments: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (qtest, qmp) = (folder.path().join("qtest"), folder.path().join("qmp"));
        let (qtest_socket, qmp_socket) =
            (UnixListener::bind(&qtest).unwrap(), UnixListener::bind(&qmp).unwrap());
        let mut command = Command::new(program);
        command.args(["-qtest", &format!("unix:{}", qtest.display()), "-qtest-log", "/dev/null"]);
        command.args(["-chardev", &format!("socket,path={},id=char0", qmp.display())]);
        command.args(["-mon", "chardev=char0,mode=control", "-display", "none"]);
        command.args(arguments.split_whitespace()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{program}: {error}; tools/install-packages unit installs what the tests need")
        });
        let qtest = Lines::new(accept(&qtest_socket, &mut child));
        let mut qmp = Lines::new(accept(&qmp_socket, &mut child));
        assert!(qmp.line().contains("\"QMP\""));
        qmp.send("{\"execute\":\"qmp_capabilities\"}");
        assert!(qmp.line().contains("\"return\""));
        Self { child, qtest, qmp, irqs: Vec::new(), events: VecDeque::new(), _folder: folder }
    }

    /// Sends a line and returns its answer; reports of interrupt lines go to `irqs`.
    pub fn ask(&mut self, line: &str) -> String {
        self.qtest.send(&format!("{line}\n"));
        loop {
            let answer = self.qtest.line();
            match answer.strip_prefix("IRQ ") {
                Some(report) => self.irqs.push(report.to_owned()),
                None => return answer,
            }
        }
    }

    /// Sends a line that has to succeed and returns what follows OK.
    pub fn ok(&mut self, line: &str) -> String {
        let answer = self.ask(line);
        answer.strip_prefix("OK").unwrap_or_else(|| panic!("{line}: {answer}")).trim_start().to_owned()
    }

    /// A number that a read returned.
    pub fn number(&mut self, line: &str) -> u64 {
        let answer = self.ok(line);
        let digits = answer.strip_prefix("0x").unwrap_or_else(|| panic!("{line}: {answer}"));
        u64::from_str_radix(digits, 16).unwrap()
    }

    /// Executes a QMP command without arguments; events that come before its reply are kept.
    pub fn execute(&mut self, command: &str) -> String {
        self.qmp.send(&format!("{{\"execute\":\"{command}\"}}"));
        loop {
            let line = self.qmp.line();
            if !line.contains("\"event\"") {
                return line;
            }
            self.events.push_back(line);
        }
    }

    /// Waits for a QMP event; others before it are dropped.
    pub fn event(&mut self, name: &str) -> String {
        loop {
            let line = self.events.pop_front().unwrap_or_else(|| self.qmp.line());
            if line.contains(&format!("\"{name}\"")) {
                return line;
            }
        }
    }

    /// Ends the program as libqtest does and returns how it ended.
    pub fn terminate(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("the program does not end");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the program to connect.
fn accept(listener: &UnixListener, child: &mut Child) -> UnixStream {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let limit = u16::try_from(LIMIT.as_millis()).unwrap();
    if poll(&mut fds, limit).unwrap() == 0 {
        panic!("nobody connected; the program: {:?}", child.try_wait());
    }
    listener.accept().unwrap().0
}
