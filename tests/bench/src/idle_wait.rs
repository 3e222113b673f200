//! A machine that others use as well: waiting for it to be quiet, within a limit for the whole run.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{machine, usage};

/// Part of the machine that others may use, 0 to 1: the background of a machine where nobody works.
pub(super) const LIMIT: f64 = 0.1;
/// Time for one look at the machine's idleness: some ticks on each core.
const LOOK: Duration = Duration::from_millis(400);

/// The remaining time for waiting and for measuring again.
pub(super) struct Patience {
    left: Duration,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { left: limit }
    }

    /// Waits until no other process uses the machine, or until the time is spent. The bench itself must be idle.
    pub(super) fn wait(&mut self) -> Result<()> {
        while !self.left.is_zero() {
            let (before, begin) = (usage::machine_busy()?, Instant::now());
            sleep(LOOK.min(self.left));
            let part =
                (usage::machine_busy()? - before) / (begin.elapsed().as_secs_f64() * machine::cores() as f64);
            if part <= LIMIT {
                return Ok(());
            }
            self.spend(begin.elapsed());
        }
        Ok(())
    }

    /// Returns true if a measurement with this disturbance and duration is to be repeated.
    pub(super) fn again(&mut self, noise: f64, took: Duration) -> bool {
        let again = noise > LIMIT && !self.left.is_zero();
        if again {
            self.spend(took);
        }
        again
    }

    /// Returns the remaining time.
    pub(super) fn left(&self) -> Duration {
        self.left
    }

    fn spend(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disturbed_measurements_are_repeated_while_there_is_patience() {
        let mut patience = Patience::new(Duration::from_secs(5));
        assert!(!patience.again(0.05, Duration::from_secs(3)));
        assert!(patience.again(0.5, Duration::from_secs(3)));
        assert!(patience.again(0.5, Duration::from_secs(3)));
        assert!(!patience.again(0.5, Duration::from_secs(3)));
        assert!(!Patience::new(Duration::ZERO).again(1.0, Duration::from_secs(1)));
    }
}
