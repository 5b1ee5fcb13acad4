//! What a command stands for: `bulkhead run` with every option, as a shell takes it.

use std::ffi::OsString;
use std::fmt::Write as _;

use super::super::cli::RunArgs;

/// Options of the user that are told as what became of them, and whether their value may be the next word.
const RETOLD: [(&str, bool); 9] = [
    ("--kernel", true),
    ("--cmdline", true),
    ("--net", true),
    ("--root", true),
    ("--rw", true),
    ("--save-initrd", true),
    ("--debug-exit", false),
    ("--dry-run", false),
    ("--verbose", false),
];

/// The options in the words of a command line, without what is told otherwise.
pub(super) struct Given(Vec<String>);

impl Given {
    /// Those between `run` and `--`.
    pub(super) fn new(line: impl Iterator<Item = OsString>) -> Self {
        let words = line.map(|word| word.to_string_lossy().into_owned());
        let mut words = words.skip_while(|word| word != "run").skip(1).take_while(|word| word != "--");
        let mut kept = Vec::new();
        while let Some(word) = words.next() {
            match RETOLD.into_iter().find(|(option, _)| is(&word, option)) {
                Some((option, true)) if word == option => drop(words.next()),
                Some(_) => {}
                None => kept.push(word),
            }
        }
        Self(kept)
    }

    fn count(&self, option: &str) -> usize {
        self.0.iter().filter(|word| is(word, option)).count()
    }
}

/// Whether the word is this option, with its value or without.
fn is(word: &str, option: &str) -> bool {
    word.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The command that a run stands for. `args` are filled in; `contents` says what is in the initial RAM file system.
pub(super) fn words(args: &RunArgs, given: &Given, contents: &str) -> String {
    let initrd = args.save_initrd.as_ref().map_or("INITRAMFS".into(), |path| path.to_string_lossy());
    let kernel = args.kernel.as_ref().map_or("".into(), |path| path.to_string_lossy());
    let mut text = format!("bulkhead run --kernel {} --initrd {}", quoted(&kernel), quoted(&initrd));
    let mut option = |option: &str, value: &str| {
        let _infallible = write!(text, " \\\n    {option} {}", quoted(value));
    };
    option("--cmdline", args.cmdline.as_deref().unwrap_or(""));
    let memory = args.memory.map_or(0, |size| size.0 >> 20);
    let cpus = args.cpus.and_then(|cpus| cpus.resolve().ok()).map_or(1, |(count, _)| count);
    for (name, value) in [
        ("--memory", format!("{memory}M")),
        ("--cpus", cpus.to_string()),
        ("--serial", "off".to_owned()),
        ("--on-reboot", "exit".to_owned()),
        ("--on-panic", "exit".to_owned()),
        ("--log-level", "warn".to_owned()),
    ] {
        if given.count(name) == 0 {
            option(name, &value);
        }
    }
    for net in &args.nets {
        option("--net", &net.to_string());
    }
    // Those that the user has named come first, and are told in the user's words.
    for fs in args.fs.iter().skip(given.count("--fs")) {
        let on = |on: bool, key: &'static str| if on { key } else { "" };
        let flags = [on(fs.readonly, ",readonly=on"), on(fs.submounts, ",submounts=on")].concat();
        option("--fs", &format!("tag={},path={}{flags},others={}", fs.tag, fs.path.display(), fs.others));
    }
    text.push_str(" \\\n    --console=stdio --debug-exit");
    for word in &given.0 {
        text.push_str(if word.starts_with("--") { " \\\n    " } else { " " });
        text.push_str(&quoted(word));
    }
    let _infallible = write!(text, "\n# the initial RAM file system, made for this run: {contents}\n");
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tests::args;
    use super::super::{fill, share};
    use super::*;

    fn told(line: &[&str]) -> String {
        let mut args = args(line);
        args.kernel = Some("/boot/vmlinuz".into());
        share(&mut args, Path::new("/")).unwrap();
        fill(&mut args);
        let given = Given::new(["bulkhead", "run"].iter().chain(line).map(OsString::from));
        words(&args, &given, "nothing")
    }

    #[test]
    fn the_words_can_be_given_to_a_shell() {
        assert_eq!(quoted("a=b/c,d"), "a=b/c,d");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
        let words = told(&["--save-initrd", "/i d", "--", "true"]);
        assert!(words.starts_with("bulkhead run --kernel /boot/vmlinuz --initrd '/i d' "), "{words}");
        assert!(words.contains("--fs tag=root,path=/,readonly=on,submounts=on,others=0"), "{words}");
    }

    #[test]
    fn options_of_the_user_are_told_once_and_as_they_were_given() {
        let own = [
            "--disk",
            "path=a b.img,id=d",
            "--limit-group=id=g,iops=5",
            "--fs",
            "tag=t,path=/srv,cache=never",
        ];
        let more = ["--memory", "3G", "--on-reboot=restart", "--dry-run", "--rw=/tmp", "--", "ls", "--net"];
        let words = told(&[own.as_slice(), &more].concat());
        for part in
            ["--disk 'path=a b.img,id=d'", "--limit-group=id=g,iops=5", "--fs tag=t,path=/srv,cache=never"]
        {
            assert_eq!(words.matches(part).count(), 1, "{part} in {words}");
        }
        assert!(words.contains("--memory 3G") && words.contains("--on-reboot=restart"), "{words}");
        let once = ["--memory", "--on-reboot", "--on-panic", "--serial", "tag=t,"];
        assert!(once.iter().all(|option| words.matches(option).count() == 1), "{words}");
        assert!(["--dry-run", "--rw", "--net", "3072M"].iter().all(|word| !words.contains(word)), "{words}");
        assert!(words.contains("--fs tag=mount0,path=/tmp,"), "{words}");
    }
}
