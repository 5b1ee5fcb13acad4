//! The configuration file: TOML with the names of the command line.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use bulkhead_ipc::jail::Layer;

use super::balloon::BalloonSpec;
use super::confinement::{CgroupChoice, LimitSpec, ProcessLimits, UidChoice, word, words};
use super::cpus::CpuSpec;
use super::disk::DiskSpec;
use super::firmware::{self, BootOrder};
use super::fs::FsSpec;
use super::limit_group::LimitGroupSpec;
use super::nearest::hint;
use super::net::NetSpec;
use super::pmem::PmemSpec;
use super::port::PortSpec;
use super::restart::{RestartPolicy, RestartRule};
use super::rng::RngSpec;
use super::rom::RomSpec;
use super::size::Size;
use super::smbios::SmbiosSpec;
use super::stream::StreamTarget;
use super::table::{StreamSpec, SwitchSpec};
use super::vhost_user::VhostUserSpec;
use super::vsock::VsockSpec;
use super::watchdog::WatchdogSpec;
use super::{CONSOLE, ConsoleSpec, KEYBOARD, SERIAL, table};
use crate::supervisor::cli::{EndAction, LogFormat, LogLevel, RunArgs, Switch};

/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Why a configuration file is refused.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("cannot read the configuration file '{path}': {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is too long to be one.
    #[error("the configuration file '{0}' is larger than 1 MiB: is it the right file?")]
    TooLong(PathBuf),
    /// It is not TOML, has an unknown key or a wrong value.
    #[error("{path}:{line}: {message}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

/// The keys of the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    firmware: Option<PathBuf>,
    firmware_vars: Option<PathBuf>,
    boot_order: Option<BootOrder>,
    boot_menu: Option<bool>,
    smbios: Option<SmbiosSpec>,
    debug_port: Option<PathBuf>,
    debug_exit: Option<bool>,
    cpus: Option<CpuSpec>,
    cpu_model: Option<String>,
    memory: Option<Size>,
    thp: Option<bool>,
    disk: Vec<DiskSpec>,
    limit_group: Vec<LimitGroupSpec>,
    net: Vec<NetSpec>,
    rng: Option<RngSpec>,
    console: Option<StreamSpec>,
    #[serde(deserialize_with = "table::serial")]
    serial: Option<StreamSpec>,
    keyboard: Option<SwitchSpec>,
    vsock: Option<VsockSpec>,
    balloon: Option<BalloonSpec>,
    watchdog: Option<WatchdogSpec>,
    name: Option<String>,
    restart: Option<RestartPolicy>,
    hang_deadline: Option<u32>,
    stall_deadline: Option<u32>,
    on_reboot: Option<EndAction>,
    on_panic: Option<EndAction>,
    #[serde(deserialize_with = "words")]
    require: Vec<Layer>,
    limits: BTreeMap<String, ProcessLimits>,
    #[serde(deserialize_with = "word")]
    uids: Option<UidChoice>,
    #[serde(deserialize_with = "word")]
    cgroup: Option<CgroupChoice>,
    log_level: Option<LogLevel>,
    log_format: Option<LogFormat>,
    log_file: Option<PathBuf>,
    option_rom: Vec<RomSpec>,
    vhost_user: Vec<VhostUserSpec>,
    fs: Vec<FsSpec>,
    pmem: Vec<PmemSpec>,
    port: Vec<PortSpec>,
}

/// Reads a file as if its content had been given as options. Relative paths in it start at its folder.
pub fn read(path: &Path) -> Result<RunArgs, FileError> {
    let read = |source| FileError::Read { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(read)?;
    if metadata.is_dir() {
        return Err(read(io::ErrorKind::IsADirectory.into()));
    }
    if metadata.len() > MAX_BYTES {
        return Err(FileError::TooLong(path.to_owned()));
    }
    parse(path, &fs::read_to_string(path).map_err(read)?)
}

fn parse(path: &Path, text: &str) -> Result<RunArgs, FileError> {
    let file: File = toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
        let line = before.matches('\n').count() + 1;
        FileError::Content { path: path.to_owned(), line, message: explain(error.message()) }
    })?;
    let base = path.parent().unwrap_or(Path::new(""));
    let at = |relative: PathBuf| base.join(relative);
    let target = |target| match target {
        StreamTarget::File(path) => StreamTarget::File(at(path)),
        StreamTarget::Unix(path) => StreamTarget::Unix(at(path)),
        other => other,
    };
    let of = |device: Option<&str>, policy: Option<RestartPolicy>| {
        policy.map(|policy| RestartRule { device: device.map(str::to_owned), policy })
    };
    let rules = [
        of(None, file.restart),
        of(Some(CONSOLE), file.console.as_ref().and_then(|console| console.restart)),
        of(Some(SERIAL), file.serial.as_ref().and_then(|serial| serial.restart)),
        of(Some(KEYBOARD), file.keyboard.as_ref().and_then(|keyboard| keyboard.restart)),
    ];
    Ok(RunArgs {
        kernel: file.kernel.map(at),
        initrd: file.initrd.map(at),
        cmdline: file.cmdline,
        // A bare name is one that Bulkhead knows, or a file here: `./seabios` is the file.
        firmware: file.firmware.map(|path| if firmware::is_known(&path) { path } else { at(path) }),
        firmware_vars: file.firmware_vars.map(at),
        boot_order: file.boot_order,
        boot_menu: file.boot_menu.map(Switch::from),
        smbios: file.smbios,
        debug_port: file.debug_port.map(at),
        debug_exit: file.debug_exit.map(Switch::from),
        cpus: file.cpus,
        cpu_model: file.cpu_model.map(|model| model_at(base, model)),
        memory: file.memory,
        thp: file.thp.map(Switch::from),
        disks: file
            .disk
            .into_iter()
            .map(|disk| DiskSpec { path: at(disk.path), options: disk.options.below(base), ..disk })
            .collect(),
        limit_groups: file.limit_group,
        nets: file.net.into_iter().map(|net| net_at(base, net)).collect(),
        rng: file.rng,
        console: file
            .console
            .map(|console| ConsoleSpec { target: target(console.target), addr: console.addr }),
        serial: file.serial.map(|serial| target(serial.target)),
        keyboard: file.keyboard.map(|keyboard| Switch::from(keyboard.on)),
        vsock: file.vsock.map(|vsock| vsock.below(base)),
        balloon: file.balloon,
        watchdog: file.watchdog,
        config: None,
        name: file.name,
        restart: rules.into_iter().flatten().collect(),
        hang_deadline: file.hang_deadline,
        stall_deadline: file.stall_deadline,
        on_reboot: file.on_reboot,
        on_panic: file.on_panic,
        require: file.require,
        limits: file.limits.into_iter().map(|(process, limits)| LimitSpec { process, limits }).collect(),
        uids: file.uids,
        cgroup: file.cgroup,
        log_level: file.log_level,
        log_format: file.log_format,
        log_file: file.log_file.map(at),
        roms: file.option_rom.into_iter().map(|rom| rom.at(base)).collect(),
        vhost_user: {
            let at = |spec: VhostUserSpec| VhostUserSpec { socket: at(spec.socket), ..spec };
            file.vhost_user.into_iter().map(at).collect()
        },
        pmems: file.pmem.into_iter().map(|pmem| PmemSpec { path: at(pmem.path), ..pmem }).collect(),
        fs: file.fs.into_iter().map(|fs| FsSpec { path: at(fs.path), ..fs }).collect(),
        ports: file.port.into_iter().map(|port| port.below(base)).collect(),
        ..RunArgs::default()
    })
}

fn net_at(base: &Path, net: NetSpec) -> NetSpec {
    let at = |socket: PathBuf| base.join(socket);
    NetSpec { socket: net.socket.map(at), vhost_user: net.vhost_user.map(at), rom: net.rom.at(base), ..net }
}

/// A model that is a file beside the configuration file is that file.
fn model_at(base: &Path, model: String) -> String {
    let path = base.join(&model);
    if path.is_file() { path.to_string_lossy().into_owned() } else { model }
}

/// serde's "unknown field `x`, expected one of `a`, `b`" with the nearest key in place of the list.
fn explain(message: &str) -> String {
    for (prefix, what) in [("unknown field ", "key"), ("unknown variant ", "value")] {
        if let Some(rest) = message.strip_prefix(prefix) {
            let quoted: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
            if let Some((word, valid)) = quoted.split_first() {
                return format!("unknown {what} '{word}': {}", hint(word, valid));
            }
        }
    }
    message.trim_end().replace('`', "'").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        parse(Path::new("/etc/vm.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let text = r#"
            kernel = "vmlinuz"
            initrd = "/boot/initrd"
            cmdline = "root=/dev/vda"
            cpus = 2
            memory = "1G"
            rng = { restart = "always" }
            console = { target = "attach", restart = "never", addr = "5" }
            serial = "file=out.log"
            keyboard = true
            watchdog = { action = "poweroff", addr = "9" }
            name = "web"
            firmware = "ovmf"
            firmware-vars = "vars"
            boot-order = ["root"]
            boot-menu = true
            smbios = { serial = "1" }
            debug-port = "fw.log"
            debug-exit = false
            restart = { max = 3 }
            hang-deadline = 7
            stall-deadline = 0
            on-reboot = "exit"
            on-panic = "restart"
            require = ["landlock", "cgroup"]
            uids = "200000:1000"
            cgroup = "off"
            limits.root = { memory = "64M", cpu = 50, read-iops = 100 }
            log-level = "debug"
            log-format = "json"
            log-file = "log"
            [[disk]]
            path = "root.img"
            readonly = true
            id = "root"
            restart = "never"
        "#;
        let run = parse(Path::new("/etc/vm.toml"), text).unwrap();
        assert_eq!(run.kernel, Some("/etc/vmlinuz".into()));
        assert_eq!(run.initrd, Some("/boot/initrd".into()));
        assert_eq!(run.firmware, Some("ovmf".into()));
        assert_eq!(run.firmware_vars, Some("/etc/vars".into()));
        assert_eq!(run.boot_order, Some(BootOrder(vec!["root".into()])));
        assert_eq!((run.boot_menu, run.debug_exit), (Some(Switch::On), Some(Switch::Off)));
        assert_eq!(run.smbios.unwrap().serial, "1");
        assert_eq!(run.debug_port, Some("/etc/fw.log".into()));
        assert_eq!(run.memory, Some(Size(1 << 30)));
        assert_eq!(run.serial, Some(StreamTarget::File("/etc/out.log".into())));
        assert_eq!(run.disks.first().unwrap().path, PathBuf::from("/etc/root.img"));
        assert!(run.disks.first().unwrap().readonly);
        assert_eq!(run.disks.first().unwrap().restart, Some(RestartPolicy::Never));
        assert_eq!((run.rng.map(|rng| rng.on), run.keyboard), (Some(true), Some(Switch::On)));
        assert_eq!(run.watchdog, "action=poweroff,addr=9".parse().ok());
        assert_eq!(run.console, "attach,addr=05.0".parse().ok());
        let rules: Vec<String> =
            run.restart.iter().map(|rule| format!("{:?}={}", rule.device, rule.policy)).collect();
        assert_eq!(rules, ["None=3/10", "Some(\"console\")=never"]);
        assert_eq!(run.rng.and_then(|rng| rng.restart), Some(RestartPolicy::always()));
        assert_eq!((run.hang_deadline, run.stall_deadline), (Some(7), Some(0)));
        assert_eq!(run.require, [Layer::Landlock, Layer::Cgroup]);
        assert_eq!(run.cgroup, Some(CgroupChoice::Off));
        assert_eq!(run.uids, "200000:1000".parse().ok());
        assert_eq!(run.limits, ["root:memory=64M,cpu=50,read-iops=100".parse().unwrap()]);
    }

    #[test]
    fn reads_tables_of_devices() {
        let text = r#"
            [[net]]
            user = true
            hostfwd = ["tcp:8080:80"]
            ip-filter = ["10.0.0.1"]
            [[net]]
            socket = "wire"
            rx-rate = "1M"
            rom = false
            [[vhost-user]]
            type = "fs"
            socket = "fs.sock"
            config-size = 44
            [[port]]
            name = "agent"
            target = "unix=agent.sock"
            [[fs]]
            tag = "data"
            path = "shared"
            cache = "never"
            owner = "1000:1000"
        "#;
        let run = parse(Path::new("/etc/vm.toml"), text).unwrap();
        assert!(run.nets.first().is_some_and(|net| net.user && net.hostfwd == ["tcp:8080:80"]));
        assert_eq!(run.nets.last().unwrap().socket, Some("/etc/wire".into()));
        assert_eq!(run.nets.last().unwrap().rom, super::super::rom::RomChoice::Off);
        let foreign = run.vhost_user.first().unwrap();
        assert_eq!((foreign.socket.as_path(), foreign.config_size), (Path::new("/etc/fs.sock"), Some(44)));
        assert_eq!(run.ports, ["name=agent,unix=/etc/agent.sock".parse().unwrap()]);
        let fs = run.fs.first().unwrap();
        assert_eq!((fs.tag.as_str(), &fs.path), ("data", &PathBuf::from("/etc/shared")));
        assert_eq!((fs.cache, fs.owner), (super::super::fs::Cache::Never, "1000:1000".parse().ok()));
    }

    #[test]
    fn an_unknown_key_names_line_and_nearest_key() {
        assert_eq!(
            refusal("cpus = 1\nkernal = \"x\"\n"),
            "/etc/vm.toml:2: unknown key 'kernal': did you mean 'kernel'?"
        );
        let error = refusal("[[disk]]\npath = \"x\"\nreedonly = true\n");
        assert_eq!(error, "/etc/vm.toml:3: unknown key 'reedonly': did you mean 'readonly'?");
    }

    #[test]
    fn a_wrong_value_names_line_and_value() {
        assert_eq!(
            refusal("on-panic = \"reboot\"\n"),
            "/etc/vm.toml:1: unknown value 'reboot': valid: restart, exit"
        );
        assert!(
            refusal("\nmemory = 512\n").starts_with("/etc/vm.toml:2: "),
            "{}",
            refusal("\nmemory = 512\n")
        );
        assert!(refusal("memory = 512").contains("such as \"512M\""));
        assert!(refusal("serial = \"tcp\"").contains("'tcp' is not a target"));
        assert!(refusal("[[disk]]\nid = \"x\"").contains("path"));
        assert!(refusal("kernel = ").starts_with("/etc/vm.toml:1: "));
        assert!(refusal("require = [\"cgroups\"]").contains("'cgroups' is no layer of the jail"));
        assert!(refusal("[limits.core]\nmemroy = \"1M\"").contains("did you mean 'memory'?"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nonexistent/vm.toml")).unwrap_err().to_string();
        assert!(error.contains("'/nonexistent/vm.toml'"), "{error}");
        assert!(read(Path::new("/")).unwrap_err().to_string().contains("directory"));
    }
}
