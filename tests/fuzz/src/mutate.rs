//! Changes inputs a little, the same way in every run.

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).unwrap_or(1);
        usize::try_from(self.next() % limit).unwrap_or(0)
    }
}

/// Values at which code changes its mind.
const TELLING: [u64; 10] = [0, 1, 0x7F, 0x80, 0xFF, 0xFFF, 0xFFFF, 1 << 31, u64::MAX >> 1, u64::MAX];
/// An input never becomes longer.
const LONGEST: usize = 16 << 10;

/// One of the seeds with one to eight changes.
pub fn input(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let pick = |random: &mut Random| seeds.get(random.below(seeds.len())).cloned().unwrap_or_default();
    let mut bytes = pick(random);
    for _ in 0..=random.below(8) {
        let at = random.below(bytes.len());
        match random.below(7) {
            0 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            1 | 2 => {
                let value = TELLING.get(random.below(TELLING.len())).copied().unwrap_or(0);
                let value = value.wrapping_add(random.next() & 1).to_le_bytes();
                let width = 1 << random.below(4);
                for (to, from) in bytes.iter_mut().skip(at).take(width).zip(value) {
                    *to = from;
                }
            }
            3 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.next().to_le_bytes()[0];
                }
            }
            4 => bytes.truncate(at),
            5 => {
                let end = at.saturating_add(random.below(32)).min(bytes.len());
                let part: Vec<u8> = bytes.get(at..end).unwrap_or_default().to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let other = pick(random);
                let from = random.below(other.len());
                bytes.splice(at.., other.get(from..).unwrap_or_default().iter().copied());
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}
