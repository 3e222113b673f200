//! Durations of requests. All are kept, so percentiles are exact and not those of buckets.

/// Sorted durations of requests, in nanoseconds.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<u32>);

impl Times {
    /// Makes the list from durations in any order.
    pub(crate) fn new(mut times: Vec<u32>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// Returns the number of durations.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Returns the smallest duration that `per_mille` of 1000 requests did not exceed, in microseconds; `None` if empty.
    pub(crate) fn percentile(&self, per_mille: usize) -> Option<f64> {
        let rank = (self.0.len() * per_mille).div_ceil(1000).max(1);
        self.0.get(rank - 1).map(|&time| f64::from(time) / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times = Times::new((1..=1000).rev().map(|time| time * 1000).collect());
        assert_eq!(times.percentile(500), Some(500.0));
        assert_eq!(times.percentile(990), Some(990.0));
        assert_eq!(times.percentile(999), Some(999.0));
        assert_eq!(times.percentile(1000), Some(1000.0));
    }

    #[test]
    fn few_times_give_the_largest_for_high_percentiles() {
        let times = Times::new(vec![7000, 3000]);
        assert_eq!((times.percentile(500), times.percentile(999)), (Some(3.0), Some(7.0)));
        assert_eq!(Times::new(Vec::new()).percentile(500), None);
    }
}
