//! `bulkhead sendkey`: names of keys, as QEMU's monitor knows them (`qapi/ui.json`, QKeyCode), and their scan codes.

use bulkhead_ipc::channel::message::Key;

use super::api::client::{ClientError, Connection};
use super::api::{Request, Response};
use super::cli::SendkeyArgs;
use super::config::nearest::hint;

/// Strokes in one order, at the most: what the keyboard keeps for a guest that is slow to read.
const MOST: usize = 100;

/// Names and codes in scan code set 2.
#[rustfmt::skip]
const KEYS: [(&str, u16); 106] = [
    ("a", 0x1C), ("b", 0x32), ("c", 0x21), ("d", 0x23), ("e", 0x24),
    ("f", 0x2B), ("g", 0x34), ("h", 0x33), ("i", 0x43), ("j", 0x3B),
    ("k", 0x42), ("l", 0x4B), ("m", 0x3A), ("n", 0x31), ("o", 0x44),
    ("p", 0x4D), ("q", 0x15), ("r", 0x2D), ("s", 0x1B), ("t", 0x2C),
    ("u", 0x3C), ("v", 0x2A), ("w", 0x1D), ("x", 0x22), ("y", 0x35),
    ("z", 0x1A), ("0", 0x45), ("1", 0x16), ("2", 0x1E), ("3", 0x26),
    ("4", 0x25), ("5", 0x2E), ("6", 0x36), ("7", 0x3D), ("8", 0x3E),
    ("9", 0x46), ("f1", 0x05), ("f2", 0x06), ("f3", 0x04), ("f4", 0x0C),
    ("f5", 0x03), ("f6", 0x0B), ("f7", 0x83), ("f8", 0x0A), ("f9", 0x01),
    ("f10", 0x09), ("f11", 0x78), ("f12", 0x07), ("ret", 0x5A), ("esc", 0x76),
    ("spc", 0x29), ("tab", 0x0D), ("backspace", 0x66), ("minus", 0x4E), ("equal", 0x55),
    ("bracket_left", 0x54), ("bracket_right", 0x5B), ("backslash", 0x5D), ("semicolon", 0x4C), ("apostrophe", 0x52),
    ("grave_accent", 0x0E), ("comma", 0x41), ("dot", 0x49), ("slash", 0x4A), ("less", 0x61),
    ("shift", 0x12), ("shift_r", 0x59), ("ctrl", 0x14), ("ctrl_r", 0xE014), ("alt", 0x11),
    ("alt_r", 0xE011), ("meta_l", 0xE01F), ("meta_r", 0xE027), ("menu", 0xE02F), ("caps_lock", 0x58),
    ("num_lock", 0x77), ("scroll_lock", 0x7E), ("up", 0xE075), ("down", 0xE072), ("left", 0xE06B),
    ("right", 0xE074), ("home", 0xE06C), ("end", 0xE069), ("pgup", 0xE07D), ("pgdn", 0xE07A),
    ("insert", 0xE070), ("delete", 0xE071), ("print", 0xE07C), ("pause", 0xE114), ("kp_0", 0x70),
    ("kp_1", 0x69), ("kp_2", 0x72), ("kp_3", 0x7A), ("kp_4", 0x6B), ("kp_5", 0x73),
    ("kp_6", 0x74), ("kp_7", 0x6C), ("kp_8", 0x75), ("kp_9", 0x7D), ("kp_add", 0x79),
    ("kp_subtract", 0x7B), ("kp_multiply", 0x7C), ("kp_divide", 0xE04A), ("kp_decimal", 0x71), ("kp_enter", 0xE05A),
    ("power", 0xE037),
];

/// `bulkhead sendkey`: has a machine that runs strike keys.
pub fn send(args: &SendkeyArgs) -> Result<String, ClientError> {
    let request = Request::Sendkey { keys: args.keys.clone() };
    match Connection::to_name(&args.name)?.ask(&request, None)? {
        Response::Done => Ok(String::new()),
        other => Err(ClientError::Answer(format!("{other:?}"))),
    }
}

/// The strokes of words such as `ctrl-alt-delete`, one word after the other: its keys go down, and up in the opposite order.
///
/// # Errors
/// There is no such key, or there are too many strokes.
pub fn strokes(words: &[String]) -> Result<Vec<Key>, String> {
    let mut strokes = Vec::new();
    for word in words {
        let codes = word.split('-').map(code).collect::<Result<Vec<u16>, String>>()?;
        strokes.extend(codes.iter().map(|&code| Key { code, pressed: true }));
        strokes.extend(codes.iter().rev().map(|&code| Key { code, pressed: false }));
        if strokes.len() > 2 * MOST {
            return Err(format!("more than {MOST} keys at once: strike some of them later"));
        }
    }
    Ok(strokes)
}

fn code(name: &str) -> Result<u16, String> {
    let found = KEYS.iter().find(|(known, _)| *known == name).map(|(_, code)| *code);
    found.ok_or_else(|| {
        let names: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
        let name = name.escape_debug().to_string();
        format!("there is no key '{name}': {}", hint(&name, &names))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Vec<Key>, String> {
        strokes(&text.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn keys_of_a_word_are_held_together() {
        let keys = words("ctrl-alt-delete a").unwrap();
        let codes: Vec<(u16, bool)> = keys.iter().map(|key| (key.code, key.pressed)).collect();
        let down = [(0x14, true), (0x11, true), (0xE071, true)];
        let up = [(0xE071, false), (0x11, false), (0x14, false)];
        assert_eq!(codes, [&down[..], &up, &[(0x1C, true), (0x1C, false)]].concat());
    }

    #[test]
    fn unknown_keys_and_too_many_are_refused() {
        let error = words("ctrl-alt-delte").unwrap_err();
        assert!(error.contains("no key 'delte'") && error.contains("'delete'"), "{error}");
        assert!(words("a--b").is_err() && words("").is_err());
        assert!(words(&vec!["a"; MOST].join(" ")).is_ok());
        assert!(words(&vec!["a"; MOST + 1].join(" ")).unwrap_err().contains("more than"));
    }

    #[test]
    fn names_and_codes_are_unique() {
        let mut codes: Vec<u16> = KEYS.iter().map(|(_, code)| *code).collect();
        codes.sort_unstable();
        codes.dedup();
        let mut names: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!((codes.len(), names.len()), (KEYS.len(), KEYS.len()));
    }
}
