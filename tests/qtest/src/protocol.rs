//! The lines of the qtest protocol (QEMU's `docs/devel/testing/qtest`): requests parsed, answers written.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// The most bytes that one request may move.
const LONGEST: u64 = 64 << 20;

/// What a line asks for. Sizes of port and memory accesses are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `inb`, `inw`, `inl`.
    In { port: u16, size: usize },
    /// `outb`, `outw`, `outl`: the bytes in the order of their addresses.
    Out { port: u16, data: Vec<u8> },
    /// `readb`, `readw`, `readl`, `readq`.
    Read { address: u64, size: usize },
    /// `read` and `b64read`.
    ReadBytes { address: u64, size: usize, base64: bool },
    /// All writes to memory.
    Write { address: u64, data: Vec<u8> },
    /// `clock_step` without a number: to the next timer.
    StepToNextTimer,
    /// `clock_step NS`.
    Step(u64),
    /// `clock_set NS`.
    SetClock(u64),
    /// `irq_intercept_in`, `irq_intercept_out`.
    Intercept { device: String, output: bool },
    /// `set_irq_in`.
    ForceIrq { device: String, line: u8, level: bool },
    /// `endianness`.
    Endianness,
}

/// A line that is no request. Its text follows `FAIL`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// No such command.
    #[error("Unknown command '{0}'")]
    UnknownCommand(String),
    /// A word is missing.
    #[error("{0} needs more arguments")]
    Missing(String),
    /// A word is no number, or too large a one.
    #[error("'{0}' is not a number that fits")]
    Number(String),
    /// More than this program moves at once.
    #[error("{0} bytes are more than this server moves at once")]
    TooLong(u64),
    /// Data that is neither hex nor base64 as asked.
    #[error("the data is not what {0} takes")]
    Data(String),
}

/// A number as `strtoul` with base 0 reads it: decimal, 0x and hex digits, 0 and octal digits.
pub fn number(word: &str) -> Result<u64, BadRequest> {
    let (digits, radix) = match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if word.len() > 1 && word.starts_with('0') => (word, 8),
        None => (word, 10),
    };
    let plain = digits.bytes().next().is_some_and(|first| first.is_ascii_hexdigit());
    let value = if plain { u64::from_str_radix(digits, radix).ok() } else { None };
    value.ok_or_else(|| BadRequest::Number(word.to_owned()))
}

/// The words after the command.
struct Words<'a> {
    command: &'a str,
    rest: std::str::Split<'a, char>,
}

impl<'a> Words<'a> {
    fn next(&mut self) -> Result<&'a str, BadRequest> {
        self.rest.next().ok_or_else(|| BadRequest::Missing(self.command.to_owned()))
    }

    fn number(&mut self) -> Result<u64, BadRequest> {
        number(self.next()?)
    }

    fn port(&mut self) -> Result<u16, BadRequest> {
        let word = self.next()?;
        u16::try_from(number(word)?).map_err(|_| BadRequest::Number(word.to_owned()))
    }

    fn size(&mut self) -> Result<usize, BadRequest> {
        let size = self.number()?;
        usize::try_from(size).ok().filter(|_| size <= LONGEST).ok_or(BadRequest::TooLong(size))
    }

    fn small(&mut self) -> Result<u8, BadRequest> {
        let word = self.next()?;
        u8::try_from(number(word)?).map_err(|_| BadRequest::Number(word.to_owned()))
    }

    /// The low `size` bytes of a number.
    fn value(&mut self, size: usize) -> Result<Vec<u8>, BadRequest> {
        let mut bytes = self.number()?.to_le_bytes().to_vec();
        bytes.truncate(size);
        Ok(bytes)
    }

    /// Hex digits after `0x`, cut or filled with zeros to `size` bytes.
    fn hex(&mut self, size: usize) -> Result<Vec<u8>, BadRequest> {
        let bad = || BadRequest::Data(self.command.to_owned());
        let digits = self.rest.next().and_then(|word| word.strip_prefix("0x")).ok_or_else(bad)?;
        let mut bytes = Vec::with_capacity(size);
        for pair in digits.as_bytes().chunks_exact(2).take(size) {
            let pair = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
            bytes.push(pair.ok_or_else(bad)?);
        }
        bytes.resize(size, 0);
        Ok(bytes)
    }

    fn base64(&mut self, size: usize) -> Result<Vec<u8>, BadRequest> {
        let mut bytes =
            STANDARD.decode(self.next()?).map_err(|_| BadRequest::Data(self.command.to_owned()))?;
        bytes.truncate(size);
        Ok(bytes)
    }
}

/// The size that the last letter of a command stands for.
fn width(letter: &str) -> Option<usize> {
    Some(match letter {
        "b" => 1,
        "w" => 2,
        "l" => 4,
        "q" => 8,
        _ => return None,
    })
}

impl Request {
    /// Parses a line without its end.
    pub fn parse(line: &str) -> Result<Self, BadRequest> {
        let mut rest = line.trim_end_matches('\r').split(' ');
        let command = rest.next().unwrap_or_default();
        let mut words = Words { command, rest };
        let sized = |prefix: &str| command.strip_prefix(prefix).and_then(width);
        if let Some(size) = sized("in").filter(|size| *size < 8) {
            return Ok(Self::In { port: words.port()?, size });
        }
        if let Some(size) = sized("out").filter(|size| *size < 8) {
            return Ok(Self::Out { port: words.port()?, data: words.value(size)? });
        }
        if let Some(size) = sized("read") {
            return Ok(Self::Read { address: words.number()?, size });
        }
        if let Some(size) = sized("write") {
            return Ok(Self::Write { address: words.number()?, data: words.value(size)? });
        }
        Ok(match command {
            "read" | "b64read" => {
                let (address, size) = (words.number()?, words.size()?);
                Self::ReadBytes { address, size, base64: command == "b64read" }
            }
            "write" | "b64write" | "memset" => {
                let (address, size) = (words.number()?, words.size()?);
                let data = match command {
                    "write" => words.hex(size)?,
                    "b64write" => words.base64(size)?,
                    _ => vec![words.small()?; size],
                };
                Self::Write { address, data }
            }
            "clock_step" => match words.rest.next() {
                Some(word) => Self::Step(number(word)?),
                None => Self::StepToNextTimer,
            },
            "clock_set" => Self::SetClock(words.number()?),
            "irq_intercept_in" | "irq_intercept_out" => {
                Self::Intercept { device: words.next()?.to_owned(), output: command.ends_with("out") }
            }
            "set_irq_in" => {
                let device = words.next()?.to_owned();
                words.next()?;
                Self::ForceIrq { device, line: words.small()?, level: words.number()? != 0 }
            }
            "endianness" => Self::Endianness,
            _ => return Err(BadRequest::UnknownCommand(command.to_owned())),
        })
    }
}

/// An answer that carries bytes.
pub fn data_line(bytes: &[u8], base64: bool) -> String {
    use std::fmt::Write as _;
    if base64 {
        return format!("OK {}\n", STANDARD.encode(bytes));
    }
    let mut line = String::with_capacity(bytes.len().saturating_mul(2).saturating_add(6));
    line.push_str("OK 0x");
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(line, "{byte:02x}");
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_read_in_the_bases_of_c() {
        assert_eq!(number("0x1F"), Ok(31));
        assert_eq!(number("017"), Ok(15));
        assert_eq!(number("0"), Ok(0));
        assert_eq!(number("18446744073709551615"), Ok(u64::MAX));
        for bad in ["", "0x", "-1", "+1", "0x+1", "18446744073709551616", "08", "1 "] {
            assert_eq!(number(bad), Err(BadRequest::Number(bad.into())));
        }
    }

    #[test]
    fn the_letter_gives_the_width() {
        assert_eq!(Request::parse("inw 0x60"), Ok(Request::In { port: 0x60, size: 2 }));
        assert_eq!(Request::parse("outb 0x70 0x10F"), Ok(Request::Out { port: 0x70, data: vec![0x0F] }));
        assert_eq!(Request::parse("readq 8"), Ok(Request::Read { address: 8, size: 8 }));
        assert_eq!(Request::parse("inq 8"), Err(BadRequest::UnknownCommand("inq".into())));
        assert_eq!(Request::parse("inb 0x10000"), Err(BadRequest::Number("0x10000".into())));
    }

    #[test]
    fn data_is_cut_or_filled_to_its_size() {
        let write = |data: &[u8]| Ok(Request::Write { address: 4096, data: data.to_vec() });
        assert_eq!(Request::parse("write 0x1000 4 0x0102"), write(&[1, 2, 0, 0]));
        assert_eq!(Request::parse("write 0x1000 1 0x0102"), write(&[1]));
        assert_eq!(Request::parse("memset 0x1000 2 0x55"), write(&[0x55, 0x55]));
        assert_eq!(Request::parse("b64write 0x1000 3 AQID"), write(&[1, 2, 3]));
        assert_eq!(Request::parse("write 0x1000 1 0xg1"), Err(BadRequest::Data("write".into())));
        assert_eq!(Request::parse("read 0 0x8000000"), Err(BadRequest::TooLong(0x800_0000)));
        assert_eq!(data_line(&[1, 0xAB], false), "OK 0x01ab\n");
        assert_eq!(data_line(&[1, 2, 3], true), "OK AQID\n");
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "(in|out|read|write|b64write|clock_|set_irq_in|memset)?[bwlq]?( [ -~]{0,9}){0,5}|.*") {
            let _ = Request::parse(&line);
        }
    }
}
