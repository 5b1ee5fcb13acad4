//! Each refusal that needs no host resource, by its sentence.

use clap::Parser;

use super::*;
use crate::supervisor::cli::{Cli, Command};

fn run(options: &str) -> Result<MachineConfig, String> {
    let arguments = ["bulkhead", "run"].into_iter().chain(options.split_whitespace());
    match Cli::try_parse_from(arguments).unwrap().command {
        Command::Run(args) => resolve(*args).map_err(|error| error.to_string()),
        other => panic!("{other:?}"),
    }
}

fn refusal(options: &str) -> String {
    run(&format!("--kernel k {options}")).expect_err(options)
}

#[test]
fn a_kernel_is_all_that_must_be_said() {
    let config = run("--kernel k").unwrap();
    assert_eq!((config.cpus, config.memory), (1, 512 << 20));
    assert_eq!(config.cmdline, "console=ttyS0");
    assert_eq!(config.serial, StreamTarget::Stdio);
    assert!(config.name.starts_with("vm-"));
    assert!(run("").unwrap_err().contains("--kernel FILE"));
}

#[test]
fn impossible_memory_is_refused() {
    assert!(refusal("--memory 0").contains("memory: 0 is too little"));
    assert!(refusal("--memory 1K").contains("memory: 1024 bytes is not a multiple of a page"));
    assert!(refusal("--memory 512").contains("write 512M"));
    assert!(refusal("--memory 4097K").contains("multiple of a page"));
    assert!(refusal("--memory 4096").contains("write 4096M"));
}

#[test]
fn impossible_cpu_counts_are_refused() {
    assert!(refusal("--cpus 0").contains("at least 1 CPU"));
    assert!(refusal("--cpus 60000").contains("60000 is too many"));
    assert_eq!(run("--kernel k --cpus 1024").unwrap().cpus, 1024);
}

#[test]
fn names_with_other_characters_are_refused() {
    for name in ["a/b", "-a", ".a", "ä", "a\u{7}", &"x".repeat(65)] {
        let error = check_name("name", name.to_owned()).unwrap_err().to_string();
        assert!(error.contains("a-z A-Z 0-9"), "{error}");
        assert!(!error.contains('\u{7}'), "control characters are escaped");
    }
    assert!(check_name("name", "web-1.example_org".to_owned()).is_ok());
    assert!(check_name("name", String::new()).is_err());
}

#[test]
fn two_devices_with_one_id_are_refused() {
    let error = refusal("--disk path=a,id=x --disk path=b,id=x");
    assert!(error.contains("disk 'b'") && error.contains("'x'"), "{error}");
    assert!(refusal("--disk path=a,id=rng").contains("'rng' already belongs"));
    assert!(refusal("--disk path=a,id=disk1 --disk path=b").contains("'disk1' already belongs"));
    let config = run("--kernel k --disk path=a --disk path=b").unwrap();
    assert_eq!(config.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["disk0", "disk1"]);
}

#[test]
fn a_socket_path_that_does_not_fit_is_refused() {
    let error = refusal(&format!("--serial unix=/{}", "s".repeat(107)));
    assert!(
        error.contains("serial") && error.contains("108 bytes") && error.contains("at most 107"),
        "{error}"
    );
    assert!(run(&format!("--kernel k --serial unix=/{}", "s".repeat(106))).is_ok());
}

#[test]
fn more_devices_than_slots_are_refused() {
    let disks = "--disk path=a ".repeat(29);
    assert!(run(&format!("--kernel k {disks} --rng")).is_ok());
    assert!(refusal(&format!("{disks} --rng --console")).contains("31 virtio devices"));
}

#[test]
fn one_terminal_serves_one_port() {
    assert!(refusal("--serial stdio --console=stdio").contains("cannot both be stdio"));
    assert!(refusal("--console=stdio").contains("cannot both be stdio"));
    assert!(run("--kernel k --serial off --console=stdio").is_ok());
}

#[test]
fn the_console_is_added_to_the_command_line_when_none_is_named() {
    assert_eq!(run("--kernel k --cmdline quiet").unwrap().cmdline, "console=ttyS0 quiet");
    assert_eq!(run("--kernel k --cmdline console=tty0").unwrap().cmdline, "console=tty0");
    let config = run("--kernel k --serial off --console").unwrap();
    assert_eq!(config.cmdline_added, Some("console=hvc0"));
    assert_eq!(run("--kernel k --serial off").unwrap().cmdline, "");
}

#[test]
fn the_command_line_wins_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, "kernel='k'\nmemory='1G'\ncpus=2\nrng=true\n[[disk]]\npath='a'\n").unwrap();
    let file = file.display();
    let config = run(&format!("--config {file} --memory 2G --rng=off --disk path=/b")).unwrap();
    assert_eq!((config.cpus, config.memory, config.rng), (2, 2 << 30, false));
    assert_eq!(config.kernel, Some(folder.path().join("k")));
    assert_eq!(config.disks.len(), 1);
    assert_eq!(config.disks.first().unwrap().path, PathBuf::from("/b"));
}

#[test]
fn firmware_takes_the_place_of_a_kernel() {
    let config =
        run("--firmware /f --disk path=a --disk path=b,id=b --boot-order b,disk0 --boot-menu").unwrap();
    assert_eq!((config.kernel, config.cmdline.as_str()), (None, ""));
    let firmware = config.firmware.unwrap();
    assert_eq!((firmware.image, firmware.menu), ("/f".into(), true));
    assert_eq!(firmware.order, ["b", "disk0"]);
    let refusal = |options: &str| run(options).expect_err(options);
    assert!(refusal("--firmware f --kernel k").contains("not both"));
    assert!(refusal("--firmware f --initrd i").contains("initrd is for a kernel"));
    assert!(refusal("--firmware f --cmdline c").contains("cmdline is for a kernel"));
    assert!(refusal("--kernel k --boot-menu").contains("boot-menu is for firmware"));
    assert!(refusal("--kernel k --firmware-vars v").contains("firmware-vars is for firmware"));
    assert!(
        refusal("--firmware f --disk path=a --net user --boot-order c")
            .contains("no disk or network card 'c'; there are: disk0, net0")
    );
    assert!(refusal("--firmware f --disk path=a --boot-order disk0,disk0").contains("named twice"));
}

#[test]
fn a_kernel_on_the_command_line_wins_over_firmware_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, "firmware='/f'\n").unwrap();
    let options = format!("--config {}", file.display());
    assert!(run(&options).unwrap().firmware.is_some());
    assert!(run(&format!("{options} --kernel k")).unwrap().firmware.is_none());
    std::fs::write(&file, "kernel='k'\n").unwrap();
    assert!(run(&format!("{options} --firmware /f")).unwrap().kernel.is_none());
}

#[test]
fn the_nearest_policy_counts() {
    let options = "--disk path=a,id=a,restart=always --disk path=b,id=b --rng --serial attach \
        --restart 3/60 --restart serial=never --restart b=1/2/3 --restart b=4/5";
    let config = run(&format!("--kernel k {options}")).unwrap();
    let policies: Vec<String> = ["a", "b", RNG, SERIAL].map(|id| config.restart_of(id).to_string()).to_vec();
    assert_eq!(policies, ["always", "4/5", "3/60", "never"]);
    assert_eq!(config.liveness, Liveness::default());
    let flash = run("--firmware /f --firmware-vars v --restart firmware-vars=never").unwrap();
    assert_eq!(flash.restart_of(FLASH), RestartPolicy::Never);
    assert!(process_names(&flash).contains(&FLASH));
    assert!(refusal("--restart firmware-vars=never").contains("no device"));
    let error = refusal("--rng --restart rgn=never");
    assert!(error.contains("no device 'rgn': did you mean 'rng'?"), "{error}");
    assert!(refusal("--restart console=never").contains("valid: serial"));
}

#[test]
fn every_kind_of_device_has_an_id_of_its_own() {
    let devices = [
        "--disk path=a",
        "--net user",
        "--vhost-user type=rng,socket=s",
        "--fs tag=t,path=p",
        "--vsock cid=3,path=v",
        "--balloon=size=0",
        "--pmem path=m",
    ];
    for (index, first) in devices.iter().enumerate() {
        let error = refusal(&format!("{first},id=core"));
        assert!(error.contains("the id 'core' already belongs"), "{error}");
        for second in devices.iter().skip(index + 1) {
            let error = refusal(&format!("{first},id=x {second},id=x"));
            assert!(error.contains("the id 'x' already belongs"), "{first} {second}: {error}");
        }
    }
}

#[test]
fn disks_cards_and_directories_can_be_those_of_other_back_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.toml");
    std::fs::write(&path, "[[net]]\nuser = true\n[[fs]]\ntag = \"t\"\npath = \"p\"\n").unwrap();
    let given =
        "--disk vhost-user=d --net vhost-user=n,mac=52:54:00:00:00:01,id=card --fs tag=home,vhost-user=f";
    let config = run(&format!("--kernel k --config {} {given}", path.display())).unwrap();
    let foreign: Vec<(&str, &str)> =
        config.vhost_user.iter().map(|device| (&*device.kind, &*device.id)).collect();
    assert_eq!(foreign, [("blk", "vhost-user0"), ("net", "card"), ("fs", "vhost-user2")]);
    assert!(config.vhost_user.iter().skip(1).all(|device| device.config.is_some()));
    // The command line's word for cards and directories replaces the file's.
    assert!(config.disks.is_empty() && config.nics.is_empty() && config.shares.is_empty());
    for spec in ["vhost-user=n,mtu=1400", "vhost-user=n,tap=t"] {
        let error = spec.parse::<NetSpec>().unwrap_err().to_string();
        assert!(error.contains("only mac, id, restart and addr"), "{error}");
    }
}

#[test]
fn every_kind_of_device_can_choose_its_place() {
    let options = "--disk path=a,addr=5 --net user,addr=5.1 --vhost-user type=rng,socket=s,addr=5.2 \
        --fs tag=t,path=p,addr=5.3 --vsock cid=3,path=v,addr=5.4 --balloon=addr=5.5 --disk vhost-user=s,addr=5.7 \
        --pmem path=m,addr=5.6 --rng=addr=6.0 --console=addr=6.1";
    let config = run(&format!("--kernel k {options}")).unwrap();
    let mut places: Vec<String> = config.places().map(|(_, address)| address.to_string()).collect();
    places.sort();
    assert_eq!(places, ["05.0", "05.1", "05.2", "05.3", "05.4", "05.5", "05.6", "05.7", "06.0", "06.1"]);
    let error = refusal("--net user,addr=5 --balloon=addr=5");
    assert!(error.contains("addr=05.0: both balloon and net0"), "{error}");
    let error = refusal("--rng=addr=7 --console=attach,addr=7");
    assert!(error.contains("addr=07.0: both rng and console"), "{error}");
    assert_eq!(run("--kernel k --console=off,addr=7.1").unwrap().places().count(), 0);
    let error = refusal("--fs tag=t,path=p,addr=6.1");
    assert!(error.contains("addr=06.1 of fs0") && error.contains("function 0"), "{error}");
}
