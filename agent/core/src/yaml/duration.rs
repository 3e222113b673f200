//! Durations as Kubernetes writes them: `24h`, `1h30m`, `500ms`.

use std::{fmt, ops::RangeInclusive, time::Duration};

/// Units from large to small, with their length in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// The mistake of a text that is no duration of the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DurationError {
    /// No sequence of number and unit, each unit once, large ones first.
    #[error(
        "no duration: write whole numbers with the units d, h, m, s, ms from large to small, such as 1h30m or 500ms"
    )]
    Form,
    /// A duration outside the range of the field.
    #[error("outside the range: write a duration from {} to {}", DisplayDuration(*.0.start()), DisplayDuration(*.0.end()))]
    Range(RangeInclusive<Duration>),
}

/// Parses a duration within `range`. A unit is required, for `0` too.
pub(super) fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, DurationError> {
    let total_ms = total_ms(text).ok_or(DurationError::Form)?;
    let duration = Duration::from_millis(total_ms);
    if range.contains(&duration) { Ok(duration) } else { Err(DurationError::Range(range)) }
}

/// The duration in milliseconds; `None` when the form is wrong. Saturates: what does not fit is beyond any
/// range.
fn total_ms(text: &str) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let (mut rest, mut units, mut total_ms) = (text, UNITS.iter(), 0_u64);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let (_, unit_ms) = units.find(|(name, _)| *name == unit)?;
        if number.is_empty() {
            return None;
        }
        let number = number.parse().unwrap_or(u64::MAX);
        total_ms = total_ms.saturating_add(unit_ms.saturating_mul(number));
        rest = tail;
    }
    Some(total_ms)
}

/// Displays a duration in the form that is parsed.
struct DisplayDuration(Duration);

impl fmt::Display for DisplayDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (name, unit_ms) in UNITS {
            let number = rest / u128::from(unit_ms);
            rest %= u128::from(unit_ms);
            if number > 0 {
                write!(f, "{number}{name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: RangeInclusive<Duration> = Duration::ZERO..=Duration::MAX;

    #[test]
    fn numbers_with_units_add_up() {
        for (text, ms) in [
            ("0s", 0),
            ("500ms", 500),
            ("90s", 90_000),
            ("1h30m", 5_400_000),
            ("24h", 86_400_000),
            ("30d", 2_592_000_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("007s", 7_000),
        ] {
            assert_eq!(duration(text, ALL), Ok(Duration::from_millis(ms)), "{text:?}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "", "0", "10", "s", "ms", "10 s", " 10s", "10s ", "-1s", "+1s", "1.5h", "10S", "10sec", "1w",
            "30m1h", "1s1s", "1m1m", "1s2", "1hs", "h1", "1µs", "１s", "1e3s",
        ] {
            assert_eq!(duration(text, ALL), Err(DurationError::Form), "{text:?}");
        }
    }

    #[test]
    fn the_range_includes_its_ends() {
        let range = Duration::from_secs(10)..=Duration::from_secs(30 * 86_400);
        for text in ["10s", "10000ms", "30d", "720h"] {
            assert!(duration(text, range.clone()).is_ok(), "{text:?}");
        }
        for text in ["9999ms", "30d1ms", "0s", "99999999999999999999999d"] {
            assert_eq!(duration(text, range.clone()), Err(DurationError::Range(range.clone())), "{text:?}");
        }
        let message = DurationError::Range(range).to_string();
        assert_eq!(message, "outside the range: write a duration from 10s to 30d");
    }

    #[test]
    fn what_is_written_is_parsed_to_the_same() {
        for ms in [0, 1, 999, 1_000, 61_001, 93_784_005] {
            let expected = Duration::from_millis(ms);
            assert_eq!(duration(&DisplayDuration(expected).to_string(), ALL), Ok(expected));
        }
    }
}
