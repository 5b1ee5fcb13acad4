//! Bad input: each is refused with a sentence that names it, the documented exit code, and nothing left behind.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, bulkhead, exit, expect_gone};

/// Arguments of `bulkhead run`, the exit code, and words that the message must contain. `@` stands for the folder of
/// the case, `%` for a payload that can be booted.
struct Refusal {
    name: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    words: &'static [&'static str],
}

const fn refusal(
    name: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    words: &'static [&'static str],
) -> Refusal {
    Refusal { name, arguments, code, words }
}

const REFUSALS: &[Refusal] = &[
    refusal("no kernel named", &[], exit::USAGE, &["--kernel"]),
    refusal("missing firmware", &["--firmware", "@/none"], exit::USAGE, &["none", "no such file"]),
    refusal("empty firmware", &["--firmware", "@/empty"], exit::USAGE, &["firmware", "empty"]),
    refusal("firmware of odd size", &["--firmware", "@/odd"], exit::USAGE, &["firmware", "odd", "4 KiB"]),
    refusal("firmware is a folder", &["--firmware", "@"], exit::USAGE, &["firmware", "directory"]),
    refusal("firmware and kernel", &["--firmware", "seabios", "--kernel", "%"], exit::USAGE, &["not both"]),
    refusal(
        "boot order names no disk",
        &["--firmware", "seabios", "--disk", "path=@/disk", "--boot-order", "b"],
        exit::USAGE,
        &["no disk or network card 'b'", "disk0"],
    ),
    refusal(
        "variables of odd size",
        &["--firmware", "ovmf", "--firmware-vars", "@/odd"],
        exit::USAGE,
        &["firmware-vars", "odd", "4 KiB"],
    ),
    refusal("missing kernel", &["--kernel", "@/none"], exit::USAGE, &["none", "no such file"]),
    refusal("kernel is a folder", &["--kernel", "@"], exit::USAGE, &["directory"]),
    refusal("not a kernel", &["--kernel", "@/text"], exit::USAGE, &["text", "kernel"]),
    refusal("empty kernel", &["--kernel", "@/empty"], exit::USAGE, &["empty"]),
    refusal(
        "missing initrd",
        &["--kernel", "%", "--initrd", "@/none"],
        exit::USAGE,
        &["none", "no such file"],
    ),
    refusal(
        "initrd too large for RAM",
        &["--kernel", "%", "--initrd", "@/huge", "--memory", "64M"],
        exit::USAGE,
        &["initrd"],
    ),
    refusal(
        "two disks in one place",
        &["--kernel", "%", "--disk", "path=@/disk,addr=5", "--disk", "path=@/disk,id=b,addr=05.0"],
        exit::USAGE,
        &["addr=05.0", "both disk0 and b"],
    ),
    refusal(
        "a slot without function 0",
        &["--kernel", "%", "--disk", "path=@/disk,addr=5.1"],
        exit::USAGE,
        &["addr=05.1 of disk0", "function 0"],
    ),
    refusal("memory 0", &["--kernel", "%", "--memory", "0"], exit::USAGE, &["memory"]),
    refusal("memory 1 KiB", &["--kernel", "%", "--memory", "1K"], exit::USAGE, &["memory"]),
    refusal("memory not a number", &["--kernel", "%", "--memory", "much"], exit::USAGE, &["memory", "much"]),
    refusal("more memory than the host", &["--kernel", "%", "--memory", "100T"], exit::USAGE, &["memory"]),
    refusal("no CPUs", &["--kernel", "%", "--cpus", "0"], exit::USAGE, &["cpus"]),
    refusal("too many CPUs", &["--kernel", "%", "--cpus", "100000"], exit::USAGE, &["cpus"]),
    refusal("unknown option", &["--kernel", "%", "--memry", "64M"], exit::USAGE, &["--memry", "--memory"]),
    refusal(
        "limit group that is not there",
        &["--kernel", "%", "--limit-group", "id=slow,bps=1M", "--disk", "path=@/disk,limit-group=slwo"],
        exit::USAGE,
        &["disk0", "slwo", "did you mean 'slow'?"],
    ),
    refusal("unknown key of a disk", &["--kernel", "%", "--disk", "pth=x"], exit::USAGE, &["pth", "path"]),
    refusal("unknown key of the file", &["--config", "@/bad.toml"], exit::USAGE, &["kernle", "kernel"]),
    refusal("missing configuration file", &["--config", "@/none.toml"], exit::USAGE, &["none.toml"]),
    refusal(
        "missing disk",
        &["--kernel", "%", "--disk", "path=@/none"],
        exit::USAGE,
        &["none", "no such file"],
    ),
    refusal("disk is a folder", &["--kernel", "%", "--disk", "path=@"], exit::USAGE, &["directory"]),
    refusal(
        "disk not of whole sectors",
        &["--kernel", "%", "--disk", "path=@/odd"],
        exit::USAGE,
        &["odd", "512"],
    ),
    refusal(
        "disk twice",
        &["--kernel", "%", "--disk", "path=@/disk", "--disk", "path=@/disk"],
        exit::USAGE,
        &["already"],
    ),
    refusal(
        "missing shared directory",
        &["--kernel", "%", "--fs", "tag=a,path=@/none"],
        exit::USAGE,
        &["fs0", "none", "no such directory"],
    ),
    refusal(
        "shared directory is a file",
        &["--kernel", "%", "--fs", "tag=a,path=@/text"],
        exit::USAGE,
        &["text", "a directory is needed"],
    ),
    refusal("tag is empty", &["--kernel", "%", "--fs", "tag=,path=@"], exit::USAGE, &["tag", "empty"]),
    refusal(
        "tag is too long",
        &["--kernel", "%", "--fs", "tag=1234567890123456789012345678901234567,path=@"],
        exit::USAGE,
        &["tag", "37", "36"],
    ),
    refusal(
        "two directories with one tag",
        &["--kernel", "%", "--fs", "tag=a,path=@", "--fs", "tag=a,path=@"],
        exit::USAGE,
        &["tag 'a'", "already", "fs0"],
    ),
    refusal("no directory to write", &["--rw", "@/none", "--", "true"], exit::USAGE, &["--rw", "none"]),
    refusal("a root without a command", &["--root", "@"], exit::USAGE, &["--root", "COMMAND"]),
    refusal(
        "two devices with one id",
        &["--kernel", "%", "--disk", "path=@/disk,id=a", "--disk", "path=@/other,id=a"],
        exit::USAGE,
        &["'a'", "already"],
    ),
    refusal(
        "console and serial on one terminal",
        &["--kernel", "%", "--console=stdio"],
        exit::USAGE,
        &["stdio"],
    ),
    refusal(
        "socket path too long",
        &[
            "--kernel",
            "%",
            "--serial",
            "unix=@/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
        ],
        exit::USAGE,
        &["socket", "107"],
    ),
    refusal(
        "a layer that is none",
        &["--kernel", "%", "--require", "cgroups"],
        exit::USAGE,
        &["cgroups", "distinct-uids"],
    ),
    refusal(
        "a required layer that is missing",
        &["--kernel", "%", "--require", "landlock,cgroup", "--cgroup", "off"],
        exit::HOST,
        &["core, serial", "cgroup", "required", "doctor"],
    ),
    refusal(
        "users that are required and switched off",
        &["--kernel", "%", "--rng", "--require", "distinct-uids", "--uids", "off"],
        exit::HOST,
        &["core, rng, serial", "distinct-uids", "required"],
    ),
    refusal(
        "a limit for a process that there is not",
        &["--kernel", "%", "--limit", "disk0:memory=64M"],
        exit::USAGE,
        &["disk0", "core, serial"],
    ),
    refusal(
        "an impossible limit",
        &["--kernel", "%", "--limit", "core:memory=1K"],
        exit::USAGE,
        &["core", "4M"],
    ),
    refusal("impossible name", &["--kernel", "%", "--name", "a/b"], exit::USAGE, &["a/b"]),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<_> = REFUSALS
        .iter()
        .map(|refusal| {
            Case::new("bare", format!("refused {}", refusal.name), 20, move |context| {
                refused(context, refusal)
            })
        })
        .collect();
    cases.push(Case::new("bare", "refused truncated bzImage", 20, truncated));
    cases.push(Case::new("bare", "refused without permission on /dev/kvm", 20, no_permission));
    cases.push(Case::new("bare", "refused without /dev/kvm", 20, no_kvm));
    cases.push(Case::new("bare", "refused where /dev/kvm is something else", 20, not_kvm));
    cases.push(Case::new("bare", "refused where user namespaces are forbidden", 20, no_user_namespaces));
    cases.push(Case::new("bare", "refused commands on a machine that does not run", 20, no_machine));
    cases
}

fn prepare(context: &Context) -> std::io::Result<()> {
    let folder = &context.folder;
    fs::write(folder.join("text"), "not a kernel, however long this text is\n".repeat(1000))?;
    fs::write(folder.join("empty"), "")?;
    fs::write(folder.join("bad.toml"), "kernle = \"x\"\n")?;
    fs::write(folder.join("odd"), [0; 1000])?;
    for (name, bytes) in [("huge", 1 << 30), ("disk", 1 << 20), ("other", 1 << 20)] {
        File::create(folder.join(name))?.set_len(bytes)?;
    }
    Ok(())
}

fn refused(context: &Context, refusal: &Refusal) -> Outcome {
    prepare(context).map_err(|error| error.to_string())?;
    let payload = context.places.payloads.join("first_byte.elf");
    ensure!(payload.exists(), "{} is missing: run `make guest`", payload.display());
    let mut command = bulkhead(context);
    command.arg("run");
    for argument in refusal.arguments {
        let argument = argument.replace('@', &context.folder.to_string_lossy());
        command.arg(argument.replace('%', &payload.to_string_lossy()));
    }
    expect_refusal(context, Machine::from_command(context, command), refusal.code, refusal.words)
}

/// Starts it, expects that it ends by itself with this code and a short message with all of these words.
fn expect_refusal(context: &Context, machine: Machine<'_>, code: i32, words: &[&str]) -> Outcome {
    let mut running = machine.start()?;
    let processes = running.processes();
    running.expect_exit(code)?;
    let messages = running.messages().join("\n");
    context.log(&messages);
    for word in words {
        ensure!(
            messages.to_lowercase().contains(&word.to_lowercase()),
            "the message does not contain '{word}': {messages}"
        );
    }
    ensure!(!messages.contains("panicked"), "a panic is no refusal: {messages}");
    expect_gone(&processes, Duration::from_secs(1))
}

fn truncated(context: &Context) -> Outcome {
    let whole = context.places.guest.join("bzImage");
    let mut bytes = fs::read(&whole).map_err(|error| format!("{}: {error}", whole.display()))?;
    bytes.truncate(bytes.len() / 2);
    let path = context.folder.join("half");
    fs::write(&path, bytes).map_err(|error| error.to_string())?;
    let mut command = bulkhead(context);
    command.arg("run").arg("--kernel").arg(&path);
    expect_refusal(context, Machine::from_command(context, command), exit::USAGE, &["half"])
}

/// Runs `bulkhead` from a shell line that first changes what the host offers, in namespaces of its own: `$@` is the command.
fn on_poorer_host(context: &Context, unshare: &[&str], line: &str, words: &[&str]) -> Outcome {
    let mut command = Command::new("unshare");
    command.args(unshare).args([
        "sh",
        "-ec",
        &line.replace("FOLDER", &context.folder.to_string_lossy()),
        "sh",
    ]);
    command.arg(context.places.programs.join("bulkhead")).args(["run", "--serial", "off", "--kernel"]);
    command.arg(context.places.payloads.join("first_byte.elf"));
    expect_refusal(context, Machine::from_command(context, command), exit::HOST, words)
}

fn no_permission(context: &Context) -> Outcome {
    // Capabilities go, so that root too is refused by the mode of the file.
    let line = "touch FOLDER/kvm; chmod 0 FOLDER/kvm; mount --bind FOLDER/kvm /dev/kvm; \
        exec setpriv --inh-caps=-all --bounding-set=-all \"$@\"";
    on_poorer_host(context, &["--mount"], line, &["/dev/kvm", "ermission"])
}

fn no_kvm(context: &Context) -> Outcome {
    let line = "mount -t tmpfs tmpfs /dev; exec \"$@\"";
    on_poorer_host(context, &["--mount"], line, &["no /dev/kvm"])
}

fn not_kvm(context: &Context) -> Outcome {
    let line = "touch FOLDER/kvm; mount --bind FOLDER/kvm /dev/kvm; exec \"$@\"";
    on_poorer_host(context, &["--mount"], line, &["/dev/kvm"])
}

fn no_user_namespaces(context: &Context) -> Outcome {
    let line = "echo 0 >/proc/sys/user/max_user_namespaces; exec \"$@\"";
    on_poorer_host(context, &["--user", "--map-root-user"], line, &["user namespace"])
}

fn no_machine(context: &Context) -> Outcome {
    for arguments in [
        ["stop", "nobody-has-this-name"],
        ["console", "nobody-has-this-name"],
        ["ps", "nobody-has-this-name"],
    ] {
        let output = bulkhead(context).args(arguments).output().map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(exit::NO_MACHINE), "{arguments:?} ended with {}", output.status);
        ensure!(text.contains("nobody-has-this-name"), "{arguments:?} says: {text}");
    }
    Ok(())
}
