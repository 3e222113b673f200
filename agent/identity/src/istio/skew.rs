//! Clock skew between this node and the authority: pure.
//!
//! HTTP dates have whole seconds and an answer takes a while, so only what is left after both is called skew: a right
//! clock is never accused. Authorities that send no date (istiod) are measured by the certificate alone: one that is not
//! valid yet, or not any more, as it arrives shows at least how wrong the clock is; any other shows nothing.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use time::{OffsetDateTime, format_description::well_known::Rfc2822};

use crate::certificate::Validity;

/// An HTTP date has no fractions: the clock that wrote it may have been this much further.
const DATE_RESOLUTION: Duration = Duration::from_secs(1);

/// The skew of this node's clock against the authority's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skew {
    /// No further away than can be measured.
    None,
    /// It is late by at least this much.
    Behind(Duration),
    /// It is early by at least this much.
    Ahead(Duration),
}

impl Skew {
    /// Returns the absolute skew.
    #[must_use]
    pub fn distance(self) -> Duration {
        match self {
            Self::None => Duration::ZERO,
            Self::Behind(by) | Self::Ahead(by) => by,
        }
    }

    /// Returns the skew in milliseconds, above 0 if this node's clock is ahead and below 0 if it is behind.
    #[must_use]
    pub fn ahead_ms(self) -> i64 {
        let millis = i64::try_from(self.distance().as_millis()).unwrap_or(i64::MAX);
        if matches!(self, Self::Behind(_)) { -millis } else { millis }
    }
}

impl fmt::Display for Skew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("as the authority's"),
            Self::Behind(by) => write!(f, "{:.1} s behind the authority's", by.as_secs_f64()),
            Self::Ahead(by) => write!(f, "{:.1} s ahead of the authority's", by.as_secs_f64()),
        }
    }
}

/// The skew that an answer with the header `date` shows, to a request sent and answered at these moments.
pub(super) fn by_date(sent: SystemTime, received: SystemTime, date: SystemTime) -> Skew {
    between(sent, received, date, date + DATE_RESOLUTION)
}

/// The least skew that a certificate shows which has just been made.
pub(super) fn by_certificate(sent: SystemTime, received: SystemTime, validity: Validity) -> Skew {
    between(sent, received, validity.not_before, validity.not_after)
}

/// The authority's clock stood between `earliest` and `latest` at some moment between `sent` and `received`.
fn between(sent: SystemTime, received: SystemTime, earliest: SystemTime, latest: SystemTime) -> Skew {
    match (earliest.duration_since(received), sent.duration_since(latest)) {
        (Ok(behind), _) if !behind.is_zero() => Skew::Behind(behind),
        (_, Ok(ahead)) if !ahead.is_zero() => Skew::Ahead(ahead),
        _ => Skew::None,
    }
}

/// The moment in a `date` header (RFC 9110 section 5.6.7); `None` when it is none.
pub(super) fn parse_date(header: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(header, &Rfc2822).ok().map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
    }

    #[test]
    fn skew_by_date_is_what_resolution_and_travel_time_do_not_explain() {
        for (sent, received, date, expected) in [
            (10_000, 10_100, 10_000, Skew::None),
            (10_900, 10_950, 10_000, Skew::None),
            (10_000, 12_500, 12_000, Skew::None),
            (10_000, 10_500, 12_000, Skew::Behind(Duration::from_millis(1500))),
            (20_000, 20_500, 12_000, Skew::Ahead(Duration::from_secs(7))),
        ] {
            assert_eq!(by_date(at(sent), at(received), at(date)), expected, "{sent} {received} {date}");
        }
    }

    #[test]
    fn skew_by_certificate_is_shown_only_by_one_that_is_not_valid_as_it_arrives() {
        let validity = Validity { not_before: at(100_000), not_after: at(200_000) };
        let measured = |now| by_certificate(at(now), at(now + 10), validity);
        assert_eq!(measured(150_000), Skew::None);
        assert_eq!(measured(70_000), Skew::Behind(Duration::from_millis(29_990)));
        assert_eq!(measured(260_000), Skew::Ahead(Duration::from_secs(60)));
    }

    #[test]
    fn dates_are_read_as_http_writes_them() {
        assert_eq!(parse_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(at(784_111_777_000)));
        assert_eq!(parse_date("yesterday"), None);
    }

    #[test]
    fn skew_is_said_in_numbers() {
        assert_eq!(Skew::Behind(Duration::from_millis(90_500)).to_string(), "90.5 s behind the authority's");
        assert_eq!(Skew::Ahead(Duration::from_secs(7)).to_string(), "7.0 s ahead of the authority's");
    }
}
