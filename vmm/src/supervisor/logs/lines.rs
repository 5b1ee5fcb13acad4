//! Lines from the pipe of a process: hostile bytes, made harmless.

/// The longest line that is kept, in bytes; the rest of it is dropped.
pub const MAX_LINE: usize = 1024;

/// Puts lines together from what the pipe delivers, without ever holding more than [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub struct LineBuffer {
    partial: Vec<u8>,
    cut: bool,
}

impl LineBuffer {
    /// Takes what was read and calls `line` for each complete line, escaped.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (content, complete) = match piece.strip_suffix(b"\n") {
                Some(content) => (content, true),
                None => (piece, false),
            };
            let room = MAX_LINE.saturating_sub(self.partial.len());
            self.cut |= content.len() > room;
            self.partial.extend_from_slice(content.get(..room).unwrap_or(content));
            if complete {
                self.flush(&mut line);
            }
        }
    }

    /// The line that the process did not end, if there is one.
    pub fn finish(&mut self, mut line: impl FnMut(&str)) {
        if !self.partial.is_empty() {
            self.flush(&mut line);
        }
    }

    fn flush(&mut self, line: &mut impl FnMut(&str)) {
        let mut text = escape(&self.partial);
        if self.cut {
            text.push('…');
        }
        self.partial = Vec::new();
        self.cut = false;
        if !text.is_empty() {
            line(&text);
        }
    }
}

/// The bytes as text that cannot move the cursor, change colours or pretend to be another line: control and
/// invisible formatting characters as escapes, what is not UTF-8 as `\xNN`.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '\t' {
                text.push(' ');
            } else if character.is_control() || is_format(character) {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Characters that change the direction or order of the text around them, or separate lines.
const fn is_format(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for piece in pieces {
            buffer.push(piece, |line| lines.push(line.to_owned()));
        }
        buffer.finish(|line| lines.push(line.to_owned()));
        lines
    }

    #[test]
    fn lines_are_put_together() {
        assert_eq!(lines(&[b"on", b"e\ntwo\n\nth", b"ree"]), ["one", "two", "three"]);
    }

    #[test]
    fn long_lines_are_cut_once() {
        let long = vec![b'a'; 5000];
        let got = lines(&[&long, &long, b"\nnext\n"]);
        assert_eq!(got.len(), 2);
        assert_eq!(got.first().unwrap().chars().count(), MAX_LINE + 1);
        assert_eq!(got.last().unwrap(), "next");
    }

    #[test]
    fn terminal_sequences_are_made_visible() {
        assert_eq!(escape(b"\x1b[2J\r\x07"), "\\u{1b}[2J\\r\\u{7}");
        assert_eq!(escape(b"caf\xc3\xa9 \xff"), "café \\xff");
        assert_eq!(escape("a\u{202e}b\u{9b}".as_bytes()), "a\\u{202e}b\\u{9b}");
    }

    proptest! {
        #[test]
        fn nothing_that_comes_out_is_a_control_character(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(!escape(&bytes).chars().any(|c| c.is_control() || is_format(c)));
        }
    }
}
