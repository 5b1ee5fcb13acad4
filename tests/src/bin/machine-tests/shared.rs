//! Shared directories, and commands that need no configuration.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, bulkhead};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::guest_command::in_guest;

/// An ordinary user.
const USER: u32 = 65534;

/// What the guest does: `@` stands for the project, `%` for the folder of the programs, `$` for what shows the result, `&/` for the
/// name of the host.
const SCRIPT: &str = r#"
cd @
exec 3<Makefile 4>>kept
echo one >&4
touch started
while [ ! -e go ]; do sleep 0.1; done
echo two >&4
read -r line <&3 && echo "$line" >first
make -s && $ >out || exit 1
touch /etc/bulkhead-was-here || exit 2
%/guest-fs @ exercise 1 60 20 || exit 3
bash -c 'exec 5<>/dev/tcp/&/8000 && cat <&5' >fetched || exit 4
exit 7
"#;

/// Every virtio device of the guest has a driver, and those that hold something give it.
const DEVICES: &str = r#"
count=0
for device in /sys/bus/virtio/devices/*; do
    [ -e "$device/driver" ] || { echo "$device ($(cat "$device/modalias")) has no driver"; exit 1; }
    count=$((count + 1))
done
# Entropy, vsock, balloon, persistent memory, disk, console, root and case folder.
[ $count = 8 ] || { echo "$count devices"; exit 1; }
[ "$(head -c 16 /dev/hwrng | wc -c)" = 16 ] || exit 1
[ "$(head -c 4 /dev/pmem0)" = pmem ] && [ "$(head -c 4 /dev/vda)" = disk ] || exit 1
[ -c /dev/vsock ] || exit 1
"#;

pub fn cases() -> Vec<Case> {
    let plain = ("hello: hello.txt\n\tsed s/h/H/ hello.txt >hello\n", "cat hello", "Hello\n");
    let compiled = ("hello: hello.c\n\tcc -o hello hello.c\n", "./hello", "hello\n");
    vec![
        Case::new(
            "stock",
            "an ordinary user's command runs in a guest that sees the host's files and network, and its devices are killed",
            150,
            move |context| command(context, plain),
        ),
        Case::new("stock", "bulkhead run builds a C project", 200, move |context| command(context, compiled))
            .not_in_lab("the compiler alone takes a minute there"),
        Case::new(
            "stock",
            "bulkhead run loads the drivers of the virtio devices that are asked for",
            90,
            drivers,
        ),
    ]
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn own(path: &Path) -> Outcome {
    std::os::unix::fs::chown(path, Some(USER), Some(USER)).map_err(text)
}

/// A makefile, what shows its result, and what that is.
type Project = (&'static str, &'static str, &'static str);

/// Answers each question for a name's IPv4 address (RFC 1035, 4.1) with the one by which the guest reaches the host.
fn answer_names(socket: &UdpSocket) {
    /// A pointer to the name of the question, type A, class IN, a minute, four bytes.
    const ANSWER: [u8; 16] = [0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0, 2, 2];
    let mut packet = [0; 512];
    while let Ok((count, from)) = socket.recv_from(&mut packet) {
        let question = packet.get(12..count).unwrap_or_default();
        let Some(end) = question.iter().position(|byte| *byte == 0) else { continue };
        let Some((question, kind)) = question.get(..end + 5).zip(question.get(end + 2)) else { continue };
        let answers = u8::from(*kind == 1);
        // A response, recursion available, one question, and nothing but it and the answer.
        let mut reply = vec![packet[0], packet[1], 0x81, 0x80, 0, 1, 0, answers, 0, 0, 0, 0];
        reply.extend_from_slice(question);
        reply.extend(ANSWER.into_iter().take(16 * usize::from(answers)));
        let _asked_again = socket.send_to(&reply, from);
    }
}

/// A network in which the name server of this machine knows one name, and port 8000 says a sentence. What the guest calls it.
fn host() -> Outcome<&'static str> {
    super::network::separate()?;
    let web = TcpListener::bind("0.0.0.0:8000").map_err(text)?;
    thread::spawn(move || {
        for mut stream in web.incoming().flatten() {
            let _gone = stream.write_all(b"from the host\n");
        }
    });
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server =
        resolver.lines().find_map(|line| line.strip_prefix("nameserver ")?.trim().parse::<IpAddr>().ok());
    let Some(server @ IpAddr::V4(_)) = server else { return Ok("10.0.2.2") };
    super::network::run("ip", &format!("addr add {server}/32 dev lo"))?;
    let socket = UdpSocket::bind((server, 53)).map_err(text)?;
    thread::spawn(move || answer_names(&socket));
    Ok("host.bulkhead.test")
}

fn command(context: &Context, (makefile, show, shown): Project) -> Outcome {
    let project = context.folder.join("project");
    fs::create_dir(&project).map_err(text)?;
    own(&project)?;
    for (name, content) in [
        ("Makefile", makefile),
        ("hello.txt", "hello\n"),
        ("hello.c", "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n"),
    ] {
        fs::write(project.join(name), content).map_err(text)?;
        own(&project.join(name))?;
    }
    let programs = context.folder.clone();
    fs::copy(context.places.programs.join("guest-fs"), programs.join("guest-fs")).map_err(text)?;
    let host = host()?;
    let place = project.to_string_lossy();
    let script = SCRIPT
        .replace('@', &place)
        .replace('%', &programs.to_string_lossy())
        .replace("&/", &format!("{host}/"))
        .replace("$ >", &format!("{show} >"));
    let mut command = bulkhead(context);
    command.args(["run", "--memory", "768M", "--rw", &place, "--", "sh", "-c", &script]);
    let mut running = Machine::from_command(context, command).as_user(USER)?.start()?;
    while !project.join("started").exists() {
        ensure!(!context.left().is_zero(), "the command has not begun");
        ensure!(!running.processes().is_empty(), "bulkhead has ended: {:?}", running.messages());
        thread::sleep(Duration::from_millis(50));
    }
    // Whatever the guest has open and knows by name, it has and knows afterwards.
    let shares: Vec<_> =
        running.processes().into_iter().filter(|process| process.title().contains("/fs")).collect();
    ensure!(shares.len() == 2, "{} processes share directories", shares.len());
    for process in &shares {
        let pid = i32::try_from(process.pid).map_err(text)?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(text)?;
    }
    fs::write(project.join("go"), "").map_err(text)?;
    own(&project.join("go"))?;
    running.expect_exit(7)?;
    let first = makefile.split_inclusive('\n').next().unwrap_or_default();
    for (name, expected) in
        [("kept", "one\ntwo\n"), ("first", first), ("out", shown), ("fetched", "from the host\n")]
    {
        let found = fs::read_to_string(project.join(name)).map_err(|error| format!("{name}: {error}"))?;
        ensure!(found == expected, "{name} holds {found:?}");
    }
    ensure!(!Path::new("/etc/bulkhead-was-here").exists(), "the guest has changed the host's root");
    Ok(())
}

fn drivers(context: &Context) -> Outcome {
    let file = |name: &str| -> Outcome<String> {
        let path = context.folder.join(name);
        fs::write(&path, name).map_err(text)?;
        let file = fs::File::options().write(true).open(&path).map_err(text)?;
        file.set_len(2 << 20).map_err(text)?;
        Ok(path.display().to_string())
    };
    let arguments = [
        "--net=none".to_owned(),
        "--rng".to_owned(),
        "--balloon".to_owned(),
        format!("--vsock=cid=5,path={}", context.folder.join("vsock").display()),
        format!("--pmem=path={},readonly=on", file("pmem")?),
        format!("--disk=path={}", file("disk")?),
    ];
    in_guest(context, &arguments, DEVICES)
}
