//! Layers that a host may lack: Landlock, cgroups, users. What cannot be tried here is named.

use std::fs::{self, File};
use std::os::fd::AsFd;

use bulkhead_ipc::jail::cgroup::{CgroupError, Controller, GroupLimits, MachineGroup, Parent};
use bulkhead_ipc::jail::uids::{UidBlock, UidError};
use bulkhead_ipc::jail::{Exit, Identity, Layer, Limits, landlock_version};

use crate::inside::{Answer, Ask};
use crate::{Case, DEADLINE, Jailed, Place};

pub const CASES: &[Case] = &[
    ("cannot use a folder that was handed in, nor TCP, with seccomp out of the way", landlock),
    ("reaches nothing but the directory that it shares", shared_directory),
    ("has users of its own, and groups where root starts it", users),
    ("is born in its cgroup, which goes with the machine", born_in_cgroup),
    ("cannot outgrow its cgroup in threads", forks),
    ("cannot outgrow its cgroup in memory", memory),
    ("says that its cgroup is gone", no_cgroup),
];

fn ask(jailed: &Jailed, ask: &Ask) -> Answer {
    jailed.channel.send(ask, &[]).unwrap();
    jailed.channel.recv(Some(DEADLINE)).unwrap().0
}

fn landlock() {
    let Ok(version) = landlock_version() else {
        println!("    not tried: this kernel has no Landlock");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "text").unwrap();
    for name in [folder.path().to_owned(), folder.path().join("file")] {
        let mode = if name.is_dir() { 0o777 } else { 0o666 };
        fs::set_permissions(&name, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    let jailed = Jailed::start("serve");
    let descriptor = File::open(folder.path()).unwrap();
    jailed.channel.send(&Ask::LandlockedCalls, &[descriptor.as_fd()]).unwrap();
    let (answer, _) = jailed.channel.recv(Some(DEADLINE)).unwrap();
    let Answer::Errors(errors) = answer else { panic!("{answer:?}") };
    // The fourth version brought TCP; before it the empty namespace stands alone.
    let tcp = if version >= 4 { libc::EACCES } else { 0 };
    assert_eq!(errors, [libc::EACCES, libc::EACCES, libc::EACCES, tcp]);
}

fn shared_directory() {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("shared");
    fs::create_dir_all(folder.join("inner")).unwrap();
    fs::write(folder.join("file"), "text").unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path().join("secret"), folder.join("link")).unwrap();
    for (path, mode) in [
        (outside.path().to_owned(), 0o777),
        (folder.clone(), 0o777),
        (folder.join("file"), 0o666),
        (outside.path().join("secret"), 0o666),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let withheld = if landlock_version().is_ok() { libc::EACCES } else { 0 };
    let root = nix::unistd::geteuid().is_root();
    for (read_only, all_owners) in [(false, false), (true, false), (false, true)] {
        let directory = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&folder).unwrap();
        let place = Place { shared: Some((directory.into(), read_only, all_owners)), ..Place::default() };
        let jailed = Jailed::start_at("serve", Limits { file_size: None, ..Limits::default() }, &place);
        let other = File::open(outside.path()).unwrap();
        jailed.channel.send(&Ask::SharedCalls, &[other.as_fd()]).unwrap();
        let (answer, _) = jailed.channel.recv(Some(DEADLINE)).unwrap();
        let Answer::Errors(errors) = answer else { panic!("{answer:?}") };
        let write = if read_only { libc::EROFS } else { 0 };
        let expected = [
            ("a file in it to read", 0),
            ("a file in it to write", write),
            ("the same file by its descriptor's name", 0),
            ("what lies beside it", libc::ENOENT),
            ("what a link in it leads to", libc::ENOENT),
            ("whether what lies above it is another directory", 0),
            ("whether what lies above the descriptors is another directory", 0),
            ("a file of another directory", withheld),
        ];
        for ((what, expected), found) in expected.into_iter().zip(&errors) {
            assert_eq!(*found, expected, "{what}, read-only {read_only}, all owners {all_owners}");
        }
        assert_ne!(errors[expected.len()], 0, "a device was made");
        // Somebody on the host moves a directory that is held out of the shared one: nothing lies above it then.
        for (name, file) in [(folder.join("inner"), 0), (outside.path().join("moved"), libc::ENOENT)] {
            if file != 0 {
                fs::rename(folder.join("inner"), &name).unwrap();
            }
            let (answer, _) = {
                jailed.channel.send(&Ask::BesideInner, &[]).unwrap();
                jailed.channel.recv(Some(DEADLINE)).unwrap()
            };
            let Answer::Errors(errors) = answer else { panic!("{answer:?}") };
            assert_eq!(errors, [file, libc::ENOENT, libc::ENOENT], "beside {}", name.display());
        }
        fs::rename(outside.path().join("moved"), folder.join("inner")).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", jailed.process.pid())).unwrap();
        // CHOWN, DAC_OVERRIDE, FOWNER, SETGID, SETUID: in the process's own user namespace.
        let kept = if all_owners && root { "CapEff:\t00000000000000cb" } else { "CapEff:\t0000000000000000" };
        assert!(status.contains(kept), "{status}");
    }
}

fn users() {
    let block = match UidBlock::claim(None, 2) {
        Ok(block) => block,
        Err(UidError::NoSubordinates(_) | UidError::NoHelper | UidError::NoRuntimeFolder) => {
            println!("    not tried: this user has no subordinate users, or no newuidmap");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut seen = Vec::new();
    for number in 0..2 {
        let uid = block.uid(number).unwrap();
        let place = Place {
            identity: Identity { uid, gid: uid },
            subordinate: block.is_subordinate().then_some(uid),
            ..Place::default()
        };
        let jailed = Jailed::start_at("serve", Limits::default(), &place);
        let pid = jailed.process.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n")), "{status}");
        if !block.is_subordinate() {
            assert!(status.contains(&format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}\n")), "{status}");
        }
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        let numbers: Vec<u32> = map.split_whitespace().map(|word| word.parse().unwrap()).collect();
        assert_eq!(numbers, [uid, uid, 1]);
        seen.push((uid, jailed));
    }
    assert_ne!(seen[0].0, seen[1].0);
    // Whoever started it can end it, whatever user it is.
    for (_, mut jailed) in seen {
        jailed.process.kill().unwrap();
        assert_eq!(jailed.process.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    }
}

/// A machine's group with these controllers, or the reason why there is none.
fn group(machine: &str, wanted: &[Controller]) -> Option<MachineGroup> {
    let parent = match Parent::find(wanted) {
        Ok(parent) if parent.controllers == wanted => parent,
        Ok(parent) => {
            println!("    not tried: {} has only {:?}", parent.folder().display(), parent.controllers);
            return None;
        }
        Err(
            error @ (CgroupError::NotMounted
            | CgroupError::NoControllers { .. }
            | CgroupError::NotDelegated { .. }),
        ) => {
            println!("    not tried: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let group = MachineGroup::create(&parent, machine).unwrap();
    assert_eq!(group.controllers(), wanted);
    Some(group)
}

fn start_in(group: &MachineGroup, limits: &GroupLimits) -> Jailed {
    let leaf = group.leaf("device", limits).unwrap();
    let place = Place { cgroup: Some(leaf), ..Place::default() };
    // More than the group allows, so that the group is what is tried.
    let limits = Limits { threads: 4096, data: None, ..Limits::default() };
    Jailed::start_at("serve", limits, &place)
}

/// Needs no controllers, so it is tried wherever groups can be made at all.
fn born_in_cgroup() {
    let Some(group) = any_group("born") else { return };
    let jailed = start_in(&group, &GroupLimits::default());
    let text = fs::read_to_string(format!("/proc/{}/cgroup", jailed.process.pid())).unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
    assert!(path.ends_with("/bulkhead-born/device"), "{text}");
    let folder = group.folder().to_owned();
    assert!(fs::read_to_string(folder.join("device/cgroup.procs")).unwrap().trim() != "");
    drop(jailed);
    drop(group);
    assert!(!folder.exists());
}

fn any_group(machine: &str) -> Option<MachineGroup> {
    match Parent::any() {
        Ok(parent) => Some(MachineGroup::create(&parent, machine).unwrap()),
        Err(error) => {
            println!("    not tried: {error}");
            None
        }
    }
}

fn forks() {
    let Some(group) = group("forks", &[Controller::Pids]) else { return };
    let jailed = start_in(&group, &GroupLimits { pids: Some(7), ..GroupLimits::default() });
    let answer = ask(&jailed, &Ask::Forks);
    assert!(matches!(answer, Answer::Returned(6)), "{answer:?}");
}

fn memory() {
    const LIMIT: usize = 16 << 20;
    let Some(group) = group("memory", &[Controller::Memory]) else { return };
    let limits = GroupLimits { memory: Some(LIMIT as u64), ..GroupLimits::default() };
    let mut jailed = start_in(&group, &limits);
    assert!(matches!(ask(&jailed, &Ask::Memory(LIMIT / 4)), Answer::Returned(0)));
    assert_eq!(group.killed_for_memory("device"), 0);
    jailed.channel.send(&Ask::Memory(LIMIT * 3), &[]).unwrap();
    assert_eq!(jailed.process.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    assert_eq!(group.killed_for_memory("device"), 1);
}

fn no_cgroup() {
    let Some(group) = any_group("gone") else { return };
    let leaf = group.leaf("device", &GroupLimits::default()).unwrap();
    drop(group);
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let place = Place { cgroup: Some(leaf), ..Place::default() };
    let Err(error) = Jailed::try_start_at("serve", program, Limits::default(), &place) else {
        panic!("started")
    };
    assert_eq!(error.missing_layer(), Some(Layer::Cgroup), "{error}");
}
