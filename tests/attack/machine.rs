//! Machines whose every process but the supervisor is this program, and one real machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

/// Seconds after which a machine that does not end is killed.
const DEADLINE: &str = "40";
/// What nobody of the machine is to read or write.
const SECRET: &[u8] = b"secret";

/// A folder with `bulkhead` and its hostile companions.
pub struct Bench {
    folder: TempDir,
    /// Where a relay finds its back end, which never says a word.
    _back_end: UnixListener,
}

/// How a machine ended.
pub struct Run {
    pub code: i32,
    /// What the supervisor wrote to standard error.
    pub messages: String,
}

impl Run {
    pub fn expect_exit(&self, code: i32) -> Result<(), String> {
        if self.code == code { Ok(()) } else { Err(format!("exit code {}\n{}", self.code, self.messages)) }
    }
}

/// A program of ours, built with the same profile: beside this program, or one folder up from a test's program.
pub fn real_program(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let mut folders = this.ancestors().skip(1).take(2);
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|program| program.exists()));
    found.unwrap_or_else(|| {
        panic!("no program {name} beside {}: build it first (cargo build)", this.display())
    })
}

/// A directory to share, what lies beside it for everybody to read and write, and ways that seem to lead there.
fn share(folder: &Path) {
    let shared = folder.join("shared");
    let secret = folder.join("secret");
    fs::create_dir_all(shared.join("inner")).unwrap();
    fs::write(&secret, SECRET).unwrap();
    fs::write(shared.join("file"), "text").unwrap();
    fs::copy("/bin/true", shared.join("program")).unwrap();
    for (name, target) in [
        ("absolute", secret.as_path()),
        ("relative", Path::new("../secret")),
        ("inner/deeper", Path::new("../../secret")),
        ("proc", Path::new("/proc/self/root/etc/passwd")),
        ("folder", folder),
    ] {
        symlink(target, shared.join(name)).unwrap();
    }
    for (path, mode) in [(&shared, 0o777), (&shared.join("file"), 0o666), (&secret, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    // Of root only: /dev/null.
    let mode = Mode::from_bits_retain(0o666);
    let _made = mknod(&shared.join("device"), SFlag::S_IFCHR, mode, makedev(1, 3));
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("bulkhead-attack-").tempdir().unwrap();
        let this = std::env::current_exe().unwrap();
        for (from, to) in
            [(&real_program("bulkhead"), "bulkhead"), (&this, "bulkhead-vmm"), (&this, "bulkhead-device")]
        {
            let to = folder.path().join(to);
            fs::copy(from, &to).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(folder.path().join("firmware"), crate::sizes::halting_firmware()).unwrap();
        fs::File::create(folder.path().join("variables")).unwrap().set_len(1 << 16).unwrap();
        fs::File::create(folder.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
        fs::File::create(folder.path().join("memory")).unwrap().set_len(2 << 20).unwrap();
        share(folder.path());
        let back_end = UnixListener::bind(folder.path().join("back-end")).unwrap();
        // A device that ends is given up at once: each process ends once.
        fs::write(folder.path().join("machine.toml"), "restart = { max = 0, window = 10, backoff = 0 }\n")
            .unwrap();
        Self { folder, _back_end: back_end }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a machine with every kind of device to its end. Its name says what they do; the last part is this process.
    pub fn run(&self, what: &str) -> Run {
        let mut command = Command::new("timeout");
        command.args(["-sKILL", DEADLINE]).arg(self.folder().join("bulkhead"));
        let mut command = self.machine(command, what);
        let output = command
            .args(["--vhost-user", "type=rng,socket=back-end,id=relay,restart=0/10"])
            .output()
            .unwrap();
        Run {
            code: output.status.code().unwrap_or(-1),
            messages: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What lies beside the shared directory is as it was made.
    pub fn beside_is_untouched(&self) -> Result<(), String> {
        let secret = fs::read(self.folder().join("secret")).map_err(|error| format!("secret: {error}"))?;
        let mode = fs::metadata(self.folder().join("secret"))
            .map_err(|error| error.to_string())?
            .permissions()
            .mode();
        let program = fs::metadata(self.folder().join("bulkhead")).map_err(|error| error.to_string())?;
        if secret != SECRET || mode & 0o7777 != 0o666 || program.permissions().mode() & 0o7777 != 0o755 {
            return Err(format!("what lies beside the shared directory has changed: {secret:?}, {mode:o}"));
        }
        Ok(())
    }

    /// The same machine with the real programs.
    pub fn real_machine(&self) -> Command {
        self.machine(Command::new(real_program("bulkhead")), "real")
    }

    fn machine(&self, mut command: Command, name: &str) -> Command {
        command.arg("run");
        command.args(
            "--config machine.toml --firmware firmware --firmware-vars variables --memory 16M --cpus 1 --hang-deadline 60"
                .split(' '),
        );
        let cid = std::process::id().wrapping_add(0x1000_0000);
        command.arg("--vsock").arg(format!("cid={cid},path=vsock"));
        let devices = "--disk path=disk,id=disk0 --rng --console --keyboard --balloon --watchdog --pmem path=memory --net socket=wire,id=net \
                       --port name=attack,unix=port --fs tag=shared,path=shared";
        command.args(devices.split(' '));
        command.arg("--name").arg(format!("{name}-{}", std::process::id()));
        command.current_dir(self.folder()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}
