//! Tests of the pause between two looks.

use super::*;

#[test]
fn a_pod_that_waits_is_looked_at_again_after_half_as_long() {
    let ms = Duration::from_millis;
    for (waiting, expected) in [
        (&[][..], RESCAN),
        (&[0], ms(5)),
        (&[9], ms(5)),
        (&[40], ms(20)),
        (&[3_600_000], RESCAN),
        (&[3_600_000, 100], ms(50)),
    ] {
        assert_eq!(pause(waiting.iter().copied().map(ms)), expected, "{waiting:?}");
    }
}
