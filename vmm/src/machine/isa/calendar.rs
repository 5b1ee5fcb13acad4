//! The Gregorian calendar, for the clock's registers.

/// A moment, broken down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1–12
    pub(super) month: u8,
    /// 1–31
    pub(super) day: u8,
    /// 1 is Sunday.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Days in 400 years.
const ERA: i64 = 146_097;

impl DateTime {
    /// From seconds since 1970-01-01 00:00:00 UTC, within some thousand years of it.
    pub(super) fn from_unix(seconds: i64) -> Self {
        // Years count from March here, so that the leap day is a year's last.
        let seconds = seconds.clamp(-1 << 40, 1 << 40);
        let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let since = days + EPOCH;
        let (era, day_of_era) = (since.div_euclid(ERA), since.rem_euclid(ERA));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let byte = |value: i64| u8::try_from(value).unwrap_or(0);
        Self {
            year: 400 * era + year_of_era + i64::from(month <= 2),
            month: byte(month),
            day: byte(day_of_year - (153 * march_month + 2) / 5 + 1),
            // 1970-01-01 was a Thursday.
            weekday: byte((days + 4).rem_euclid(7) + 1),
            hour: byte(second_of_day / 3_600),
            minute: byte(second_of_day / 60 % 60),
            second: byte(second_of_day % 60),
        }
    }

    /// Seconds since 1970-01-01 00:00:00 UTC of a date (month, day) and time (hour, minute, second). Any values will do: what
    /// is too large runs over into the next unit.
    pub(super) fn to_unix(year: i64, (month, day): (u8, u8), (hour, minute, second): (u8, u8, u8)) -> i64 {
        let months = year.clamp(0, 99_999) * 12 + i64::from(month) - 3;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
        let days = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        let days = days + (153 * month + 2) / 5 + i64::from(day) - 1 - EPOCH;
        ((days * 24 + i64::from(hour)) * 60 + i64::from(minute)) * 60 + i64::from(second)
    }

    pub(super) fn year_of_century(self) -> u8 {
        u8::try_from(self.year.rem_euclid(100)).unwrap_or(0)
    }

    pub(super) fn century(self) -> u8 {
        u8::try_from(self.year.div_euclid(100).rem_euclid(100)).unwrap_or(0)
    }
}

/// Two decimal digits in one byte.
pub(super) const fn to_bcd(value: u8) -> u8 {
    let value = value % 100;
    ((value / 10) << 4) | (value % 10)
}

/// Back. Digits above nine count on: 0x1F is 25.
pub(super) const fn from_bcd(value: u8) -> u8 {
    (value >> 4) * 10 + (value & 0x0F)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_moments() {
        let parts = |seconds| {
            let time = DateTime::from_unix(seconds);
            (time.year, time.month, time.day, time.weekday, time.hour, time.minute, time.second)
        };
        assert_eq!(parts(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(parts(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(parts(4_107_542_399), (2100, 2, 28, 1, 23, 59, 59));
        assert_eq!(parts(-1), (1969, 12, 31, 4, 23, 59, 59));
    }

    proptest! {
        #[test]
        fn broken_down_and_back(seconds in -2_000_000_000_i64..200_000_000_000) {
            let time = DateTime::from_unix(seconds);
            let back = DateTime::to_unix(
                time.year, (time.month, time.day), (time.hour, time.minute, time.second));
            prop_assert_eq!(back, seconds);
        }

        #[test]
        fn any_bytes_make_some_moment(year: i64, month: u8, day: u8, hour: u8, minute: u8, second: u8) {
            DateTime::from_unix(DateTime::to_unix(year, (month, day), (hour, minute, second)));
        }

        #[test]
        fn bcd_and_back(value in 0_u8..100) {
            prop_assert_eq!(from_bcd(to_bcd(value)), value);
        }
    }
}
