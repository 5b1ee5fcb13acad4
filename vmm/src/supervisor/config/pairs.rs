//! `KEY=VALUE[,KEY=VALUE…]`: how the command line describes a device.

use thiserror::Error;

use super::nearest::hint;

/// What such a text describes.
#[derive(Debug)]
pub struct Pairs {
    /// The thing, as in "a watchdog".
    pub what: &'static str,
    /// How it is written, for whoever wrote something else.
    pub shape: &'static str,
    /// The keys, each of which may be given once.
    pub keys: &'static [&'static str],
}

/// Why a text is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PairError {
    /// An unknown key.
    #[error("unknown key '{key}' of {what}: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The thing that it is said of.
        what: &'static str,
        /// The nearest valid key.
        hint: String,
    },
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A piece without `=`.
    #[error("'{piece}' is not KEY=VALUE; {what} is {shape}")]
    NotAPair {
        /// What was written.
        piece: String,
        /// The thing that it is said of.
        what: &'static str,
        /// How that is written.
        shape: &'static str,
    },
}

impl Pairs {
    /// The pairs of `text`, each with a key of [`Self::keys`].
    ///
    /// # Errors
    /// [`PairError`].
    pub fn read<'a>(&self, text: &'a str) -> Result<Vec<(&'a str, &'a str)>, PairError> {
        let Self { what, shape, keys } = *self;
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for piece in text.split(',') {
            let not_a_pair = || PairError::NotAPair { piece: piece.escape_debug().to_string(), what, shape };
            let (key, value) = piece.split_once('=').ok_or_else(not_a_pair)?;
            if !keys.contains(&key) {
                let hint = hint(key, keys);
                return Err(PairError::UnknownKey { key: key.escape_debug().to_string(), what, hint });
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(PairError::Twice(key.to_owned()));
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOOR: Pairs = Pairs { what: "a door", shape: "width=N[,colour=NAME]", keys: &["width", "colour"] };

    #[test]
    fn reads_pairs_in_their_order() {
        assert_eq!(DOOR.read("colour=a=b,width="), Ok(vec![("colour", "a=b"), ("width", "")]));
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (text, error) in [
            ("", "'' is not KEY=VALUE; a door is width=N[,colour=NAME]"),
            ("width", "'width' is not KEY=VALUE; a door is width=N[,colour=NAME]"),
            ("widht=1", "unknown key 'widht' of a door: did you mean 'width'?"),
            ("width=1,colour=x,width=2", "'width' is given twice"),
        ] {
            assert_eq!(DOOR.read(text).unwrap_err().to_string(), error);
        }
    }
}
