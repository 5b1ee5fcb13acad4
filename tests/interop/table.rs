//! `docs/interop.md`.

use std::fmt::Write;

use std::time::Duration;

use crate::Outcome;

/// A case that was run.
pub struct Row {
    pub ours: String,
    pub peer: String,
    pub version: Option<String>,
    pub what: String,
    pub result: Outcome,
    /// How long it took.
    pub time: Duration,
}

/// Begins the lines by which a run in the lab hands its rows over.
const ROW: &str = "row\t";

impl Row {
    /// For whoever watches.
    pub fn say(&self) {
        let Self { ours, peer, what, time, .. } = self;
        let version = self.version.as_deref().unwrap_or("-");
        let (word, text) = match &self.result {
            Ok(text) => ("ok", text),
            Err(text) => ("FAILED", text),
        };
        println!("{ours} / {peer} {version}: {what} ... {word} ({:.1} s): {text}", time.as_secs_f32());
    }

    /// Out of the lab, as one line.
    pub fn hand_over(&self) {
        let (word, text) = match &self.result {
            Ok(text) => ("ok", text),
            Err(text) => ("failed", text),
        };
        let (version, time) = (self.version.as_deref().unwrap_or(""), self.time.as_millis().to_string());
        let fields = [&self.ours, &self.peer, version, &self.what, word, &time, text];
        let fields = fields.map(|field| field.replace(['\t', '\n'], " "));
        println!("{ROW}{}", fields.join("\t"));
    }

    /// What [`Row::hand_over`] printed.
    pub fn take_over(line: &str) -> Option<Self> {
        let fields: Vec<String> = line.split_once(ROW)?.1.split('\t').map(str::to_owned).collect();
        let [ours, peer, version, what, word, time, text] = <[String; 7]>::try_from(fields).ok()?;
        let result = if word == "ok" { Ok(text) } else { Err(text) };
        let time = Duration::from_millis(time.parse().ok()?);
        Some(Self { ours, peer, version: Some(version).filter(|text| !text.is_empty()), what, result, time })
    }
}

const HEAD: &str = "# Interoperation

Made by `make interop`: our devices as vhost-user back ends under another monitor, and back ends of others under our core. Real programs
on both sides; a stock Debian kernel is the guest where a guest is meant, in QEMU's software emulation.

| ours | peer | version | what | result |
| --- | --- | --- | --- | --- |
";

const TAIL: &str = "
Known limits of the peers:

- QEMU 7.2 has no front end for a console device.
- `vhost-user-net-pci` of QEMU 7.2 needs `vectors=0`.
- QEMU's emulator loses pages that its processor writes while a guest migrates, and the guest's kernel then finds its lists torn. It does so
  with a disk of QEMU's own in place of ours, too. A try in which the kernel dies says nothing and is made again.
- passt of Debian 12 knows no vhost-user; the one here comes from the next Debian, as the newer QEMU and virtiofsd do (`tools/make-peers`).
- vhost-device-vsock does not pass on that the guest has ended one direction of a stream, so its streams end as a whole.
- A back end without INFLIGHT_SHMFD (qemu-storage-daemon) that dies can lose a request that it had finished out of order: after a
  reconnect the core takes up from the used ring, as QEMU does.
- vhost-user does not say of what type a back end is. The relay tells types apart by features and configuration space, so a back end that has
  neither (entropy, for one) passes for any type that needs neither.
";

/// Writes the table into the repository.
pub fn write(rows: &[Row]) {
    let mut text = HEAD.to_owned();
    for Row { ours, peer, version, what, result, .. } in rows {
        let version = version.as_deref().unwrap_or("-");
        let result = match result {
            Ok(text) => text.clone(),
            Err(text) => format!("**{}**", text.lines().next().unwrap_or("failed")),
        };
        let result = result.replace('|', "\\|");
        let _infallible = writeln!(text, "| {ours} | {peer} | {version} | {what} | {result} |");
    }
    text.push_str(TAIL);
    let path = crate::root().join("docs/interop.md");
    std::fs::write(path, text).unwrap();
}
