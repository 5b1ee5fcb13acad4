//! Disk contents that can be computed again: what a sector holds follows from a seed, its number and how often it
//! was written. Used by `guest-io` inside the guest, and by whoever checks the image afterwards.

/// Bytes in a sector, the smallest unit of I/O.
pub const SECTOR: usize = 512;

/// One step of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A stream of pseudo-random numbers; good enough to choose offsets, and the same each time.
pub struct Stream(u64);

impl Stream {
    /// The stream that belongs to `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_number().checked_rem(end).unwrap_or(0)
    }
}

/// Fills `data`, which begins with sector number `sector`, with what each sector holds after its `generation`th write.
pub fn fill(seed: u64, sector: u64, generations: &[u32], data: &mut [u8]) {
    for ((number, generation), bytes) in (sector..).zip(generations).zip(data.chunks_exact_mut(SECTOR)) {
        let mut stream = Stream::new(seed ^ mix(number) ^ mix(u64::from(*generation) << 40));
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&stream.next_number().to_le_bytes());
        }
    }
}

/// A 64-bit digest of a whole disk: finds accidents, not attackers.
#[derive(Default)]
pub struct Digest(u64);

impl Digest {
    /// Takes in the next bytes, a multiple of 8 (what is left over is ignored).
    pub fn update(&mut self, data: &[u8]) {
        for word in data.as_chunks::<8>().0 {
            self.0 = (self.0 ^ u64::from_le_bytes(*word)).rotate_left(23).wrapping_mul(0x9FB2_1C65_1E98_DF25);
        }
    }

    /// The digest so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        mix(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_differ_by_number_generation_and_seed() {
        let content = |seed, sector, generation| {
            let mut data = [0; SECTOR];
            fill(seed, sector, &[generation], &mut data);
            data
        };
        assert_eq!(content(1, 2, 3), content(1, 2, 3));
        assert_ne!(content(1, 2, 3), content(1, 3, 3));
        assert_ne!(content(1, 2, 3), content(1, 2, 4));
        assert_ne!(content(1, 2, 3), content(2, 2, 3));
    }

    #[test]
    fn several_sectors_are_filled_as_each_alone() {
        let mut together = [0; 2 * SECTOR];
        fill(7, 10, &[1, 5], &mut together);
        let mut alone = [0; SECTOR];
        fill(7, 11, &[5], &mut alone);
        assert_eq!(together[SECTOR..], alone);
    }

    #[test]
    fn digest_sees_one_bit_and_the_order() {
        let digest = |data: &[u8]| {
            let mut digest = Digest::default();
            digest.update(data);
            digest.value()
        };
        let mut data = [0_u8; 64];
        let before = digest(&data);
        data[13] ^= 0x10;
        let first = digest(&data);
        data.swap(13, 21);
        assert_ne!(before, first);
        assert_ne!(first, digest(&data));
    }
}
