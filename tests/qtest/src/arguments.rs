//! The command line that libqtest and people who know QEMU write.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::streams::Address;

/// What to do when the guest panics, as `-action panic=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicAction {
    /// Go on.
    Run,
    /// Stop; there is nothing that runs, so only the status says so.
    Pause,
    /// End the program.
    Shutdown,
}

/// What the command line asks for.
#[derive(Debug)]
pub struct Options {
    /// Where the qtest client is.
    pub qtest: Address,
    /// Where to log the conversation.
    pub log: Option<PathBuf>,
    /// Where a QMP client is.
    pub monitor: Option<Address>,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Number of CPUs.
    pub cpus: u16,
    /// Time of day at power-on, since 1970, UTC.
    pub wall_clock: Duration,
    /// `-S`: not started yet, says the status.
    pub stopped: bool,
    /// Whether a power-off ends the program.
    pub end_at_shutdown: bool,
    /// Whether a reset counts as a power-off.
    pub end_at_reset: bool,
    /// What a panic of the guest does.
    pub on_panic: PanicAction,
    /// The firmware image.
    pub firmware: Option<PathBuf>,
    /// Files for firmware, by name.
    pub files: Vec<(String, Vec<u8>)>,
    /// Firmware is to offer its boot menu.
    pub boot_menu: bool,
    /// Options that were not understood, to be told.
    pub warnings: Vec<String>,
}

const DEFAULT_MEMORY: u64 = 128 << 20;
/// Firmware waits for ever.
const NEVER: u32 = u32::MAX;

impl Options {
    /// Parses the words after the program's name. Unknown options become warnings; only what would make another machine
    /// than the one asked for is an error.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        let mut options = Self {
            qtest: Address::Stdio,
            log: None,
            monitor: None,
            memory: DEFAULT_MEMORY,
            cpus: 1,
            wall_clock: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            stopped: false,
            end_at_shutdown: true,
            end_at_reset: false,
            on_panic: PanicAction::Shutdown,
            firmware: None,
            files: Vec::new(),
            boot_menu: false,
            warnings: Vec::new(),
        };
        let mut parser = Parser { qtest: None, chardevs: Vec::new(), monitor: None, reboot_timeout: NEVER };
        let mut rest = words.iter().map(String::as_str).peekable();
        while let Some(word) = rest.next() {
            let Some(name) = word.strip_prefix('-') else {
                options.warnings.push(format!("'{word}' ignored"));
                continue;
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            if options.flag(name) {
                continue;
            }
            let value = rest.next_if(|next| !next.starts_with('-') || next.len() == 1);
            options.option(&mut parser, name, value)?;
        }
        options.files.push(("etc/boot-fail-wait".to_owned(), parser.reboot_timeout.to_le_bytes().to_vec()));
        options.qtest = parser.qtest.ok_or("say -qtest unix:PATH or -qtest stdio")?;
        options.monitor = match parser.monitor {
            Some(Monitor::At(address)) => Some(address),
            Some(Monitor::Chardev(id)) => {
                let found = parser.chardevs.into_iter().find(|(other, _)| *other == id);
                Some(found.ok_or(format!("-mon: there is no chardev '{id}'"))?.1)
            }
            None => None,
        };
        Ok(options)
    }

    /// Options without a value.
    fn flag(&mut self, name: &str) -> bool {
        match name {
            "S" => self.stopped = true,
            "no-shutdown" => self.end_at_shutdown = false,
            "no-reboot" => self.end_at_reset = true,
            "nodefaults" | "nographic" | "no-user-config" | "no-hpet" => {}
            _ => return false,
        }
        true
    }

    fn option(&mut self, parser: &mut Parser, name: &str, value: Option<&str>) -> Result<(), String> {
        let given = || value.ok_or(format!("-{name} needs a value"));
        match name {
            "qtest" => parser.qtest = Some(Address::parse(given()?)?),
            "qtest-log" => self.log = Some(given()?).filter(|path| *path != "none").map(PathBuf::from),
            "chardev" => match chardev(given()?) {
                Some(chardev) => parser.chardevs.push(chardev),
                None => self.warnings.push(format!("-chardev {} ignored", given()?)),
            },
            "mon" => parser.monitor = property(given()?, "chardev").map(|id| Monitor::Chardev(id.to_owned())),
            "qmp" => parser.monitor = Some(Monitor::At(Address::parse(given()?)?)),
            "machine" | "M" => self.machine(given()?)?,
            "m" => self.memory = memory(given()?)?,
            "smp" => self.cpus = cpus(given()?)?,
            "rtc" => self.rtc(given()?)?,
            "action" => self.action(given()?),
            "bios" | "pflash" => self.firmware = Some(given()?.into()),
            "drive" if property(given()?, "if") == Some("pflash") => {
                let file = property(given()?, "file").ok_or("-drive if=pflash needs a file=")?;
                self.firmware = Some(file.into());
            }
            "boot" => self.boot(parser, given()?)?,
            "accel" | "display" | "audio" | "audiodev" | "cpu" | "vga" | "net" | "nic" => {}
            "device" if property(given()?, "driver").or(given()?.split(',').next()) == Some("pvpanic") => {}
            _ => self.warnings.push(format!("-{name} {} ignored", value.unwrap_or_default())),
        }
        Ok(())
    }

    fn machine(&mut self, value: &str) -> Result<(), String> {
        let kind = property(value, "type").or(value.split(',').next()).unwrap_or_default();
        if kind == "pc" || kind.starts_with("pc-i440fx") || kind.contains('=') {
            return Ok(());
        }
        Err(format!("unsupported machine type '{kind}': this is an i440FX PC, called pc"))
    }

    fn rtc(&mut self, value: &str) -> Result<(), String> {
        match property(value, "base") {
            None | Some("utc" | "localtime") => {}
            Some(date) => self.wall_clock = date_time(date).ok_or(format!("-rtc: '{date}' is no date"))?,
        }
        Ok(())
    }

    /// What QEMU tells its firmware in the files of the same meaning.
    fn boot(&mut self, parser: &mut Parser, value: &str) -> Result<(), String> {
        let number = |key, most| {
            property(value, key)
                .map(|text| text.parse::<i64>().ok().filter(|number| (-1..=most).contains(number)))
                .map(|number| number.ok_or(format!("-boot: {key} is a number up to {most}")))
                .transpose()
        };
        let (timeout, splash) = (number("reboot-timeout", 0xFFFF)?, number("splash-time", 0xFFFF)?);
        if let Some(timeout) = timeout {
            parser.reboot_timeout = u32::try_from(timeout).unwrap_or(NEVER);
        }
        if let Some(splash) = splash {
            let wait = u16::try_from(splash).unwrap_or(u16::MAX);
            self.files.push(("etc/boot-menu-wait".to_owned(), wait.to_le_bytes().to_vec()));
        }
        let menu = property(value, "menu");
        self.boot_menu |= menu == Some("on");
        if timeout.is_none() && splash.is_none() && menu.is_none() {
            self.warnings.push(format!("-boot {value} ignored"));
        }
        Ok(())
    }

    fn action(&mut self, value: &str) {
        match property(value, "panic") {
            Some("none") => self.on_panic = PanicAction::Run,
            Some("pause") => self.on_panic = PanicAction::Pause,
            Some(_) => self.on_panic = PanicAction::Shutdown,
            None => {}
        }
        self.end_at_shutdown &= property(value, "shutdown") != Some("pause");
        self.end_at_reset |= property(value, "reboot") == Some("shutdown");
    }
}

enum Monitor {
    At(Address),
    Chardev(String),
}

/// What has to be put together after the last word.
struct Parser {
    qtest: Option<Address>,
    chardevs: Vec<(String, Address)>,
    monitor: Option<Monitor>,
    /// For how long firmware waits when nothing boots, in milliseconds.
    reboot_timeout: u32,
}

/// The value of `key=` in a list of properties.
pub fn property<'a>(list: &'a str, key: &str) -> Option<&'a str> {
    list.split(',').find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

fn chardev(value: &str) -> Option<(String, Address)> {
    let path = PathBuf::from(property(value, "path").filter(|_| value.starts_with("socket"))?);
    let server =
        matches!(property(value, "server"), Some("on")) || value.split(',').any(|word| word == "server");
    let address = if server { Address::Listen(path) } else { Address::Connect(path) };
    Some((property(value, "id")?.to_owned(), address))
}

/// `128`, `128M`, `2G`, `size=…`.
fn memory(value: &str) -> Result<u64, String> {
    let size = property(value, "size").or(value.split(',').next()).unwrap_or_default();
    let (digits, shift) = match size.char_indices().last() {
        Some((at, 'k' | 'K')) => (&size[..at], 10),
        Some((at, 'm' | 'M')) => (&size[..at], 20),
        Some((at, 'g' | 'G')) => (&size[..at], 30),
        _ => (size, 20),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or(format!("-m: '{value}' is no size"))
}

/// `2`, `cpus=2`.
fn cpus(value: &str) -> Result<u16, String> {
    let count = property(value, "cpus").or(value.split(',').next()).unwrap_or_default();
    count.parse().map_err(|_| format!("-smp: '{value}' is no number of CPUs"))
}

/// `2006-06-17T16:01:21` or `2006-06-17`, as seconds since 1970.
fn date_time(text: &str) -> Option<Duration> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
    let date: Vec<i64> = date.split('-').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let time: Vec<i64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let ([year, month, day], [hour, minute, second]) = (date[..].try_into().ok()?, time[..].try_into().ok()?);
    let sane = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    let sane = sane && (0..24).contains(&hour) && (0..60).contains(&minute) && (0..60).contains(&second);
    // Days from 1970 in the proleptic Gregorian calendar, years beginning in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    sane.then(|| u64::try_from(seconds).ok().map(Duration::from_secs)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_line_of_libqtest_is_understood() {
        let options = parse(
            "-qtest unix:/tmp/q.sock -qtest-log /dev/null -chardev socket,path=/tmp/q.qmp,id=char0 \
             -mon chardev=char0,mode=control -display none -audio none -machine pc,accel=qtest -smp 2 -m 64 \
             -rtc base=2006-06-17T16:01:21 -accel qtest",
        )
        .unwrap();
        assert_eq!(options.qtest, Address::Connect("/tmp/q.sock".into()));
        assert_eq!(options.monitor, Some(Address::Connect("/tmp/q.qmp".into())));
        assert_eq!((options.cpus, options.memory), (2, 64 << 20));
        assert_eq!(options.wall_clock, Duration::from_secs(1_150_560_081));
        assert_eq!(options.warnings, [""; 0]);
    }

    #[test]
    fn what_is_not_known_is_a_warning_and_another_machine_an_error() {
        let options = parse("-qtest stdio -frobnicate fast -boot order=d -S").unwrap();
        assert_eq!(options.warnings, ["-frobnicate fast ignored", "-boot order=d ignored"]);
        assert!(options.stopped);
        assert!(parse("-qtest stdio -machine q35").unwrap_err().contains("unsupported machine type"));
        assert!(parse("-qtest stdio -mon chardev=nobody").unwrap_err().contains("no chardev"));
        assert!(parse("-display none").is_err());
    }

    #[test]
    fn firmware_and_what_it_is_told() {
        let options =
            parse("-qtest stdio -bios /tmp/rom -boot reboot-timeout=15,splash-time=12,menu=on").unwrap();
        assert_eq!(options.firmware, Some("/tmp/rom".into()));
        let files = [("etc/boot-menu-wait", vec![12, 0]), ("etc/boot-fail-wait", vec![15, 0, 0, 0])];
        assert_eq!(options.files, files.map(|(name, data)| (name.to_owned(), data)));
        assert!(options.boot_menu && options.warnings.is_empty());
        let options = parse("-qtest stdio -drive if=pflash,format=raw,file=/tmp/flash").unwrap();
        assert_eq!(options.firmware, Some("/tmp/flash".into()));
        assert_eq!(options.files, [("etc/boot-fail-wait".to_owned(), vec![0xFF; 4])]);
        assert!(parse("-qtest stdio -boot reboot-timeout=soon").unwrap_err().contains("reboot-timeout"));
        assert!(parse("-qtest stdio -drive if=pflash").is_err());
    }

    #[test]
    fn dates_are_checked() {
        assert_eq!(date_time("1970-01-01"), Some(Duration::ZERO));
        assert_eq!(date_time("2000-02-29T12:00:00"), Some(Duration::from_secs(951_825_600)));
        for bad in ["", "2000", "2000-13-01", "2000-01-01T24:00:00", "now"] {
            assert_eq!(date_time(bad), None, "{bad}");
        }
    }
}
