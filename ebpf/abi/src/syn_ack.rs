//! The SYN-ACKs that the kernel sends without a socket, as SYN cookies.
//!
//! A pod that forwards packets can send a cookie of the kernel again, with other bytes where neither the cookie nor this file
//! binds them. Of the TCP header these are 15 bytes: window (2), urgent pointer (2), segment size (2), timestamps (8) and window
//! scale (1). Of the IP header they are traffic class, hop limit, and identification or flow label.

/// Words of a TCP header without options.
const FIRST: u32 = 5;
/// Words of a TCP header with all options of a SYN-ACK.
const END: u32 = 10;
/// Words of timestamps behind the word with their kind.
const STAMPS: u32 = 2;

/// Returns true if a SYN-ACK has only options that the kernel writes into one: segment size, timestamps, selective
/// acknowledgements and window scale, each where the kernel puts it. `words` is the length of the TCP header. `word` returns a
/// word of the header by its index; `None` if the packet ends before it.
#[inline(always)]
pub fn has_options_of_kernel(words: u32, word: impl Fn(u32) -> Option<[u8; 4]>) -> bool {
    let mut stamps = 0;
    for index in FIRST..END {
        if index >= words {
            return true;
        }
        if stamps > 0 {
            stamps -= 1;
            continue;
        }
        let Some(option) = word(index) else { return false };
        match option {
            [2, 4, _, _] if index == FIRST => {}
            [4, 2, 8, 10] | [1, 1, 8, 10] => stamps = STAMPS,
            [1, 1, 4, 2] | [1, 3, 3, _] => {}
            _ => return false,
        }
    }
    words == END
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: [u8; 4] = [2, 4, 5, 0xb4];
    const STAMP: [u8; 4] = [0xde, 0xad, 0xbe, 0xef];
    const SCALE: [u8; 4] = [1, 3, 3, 7];

    fn is_kernels(options: &[[u8; 4]]) -> bool {
        let words = FIRST + u32::try_from(options.len()).expect("few");
        has_options_of_kernel(words, |index| options.get((index - FIRST) as usize).copied())
    }

    #[test]
    fn only_options_of_the_kernel_in_its_order_are_of_the_kernel() {
        let table: [(&[[u8; 4]], bool); 14] = [
            (&[], true),
            (&[SIZE], true),
            (&[SIZE, SCALE], true),
            (&[SIZE, [1, 1, 4, 2]], true),
            (&[SIZE, [1, 1, 4, 2], SCALE], true),
            (&[SIZE, [1, 1, 8, 10], STAMP, STAMP, SCALE], true),
            (&[SIZE, [4, 2, 8, 10], STAMP, STAMP, SCALE], true),
            (&[SCALE, SIZE], false),
            (&[SIZE, SIZE], false),
            (&[SIZE, STAMP], false),
            (&[SIZE, [1, 1, 1, 1]], false),
            (&[[253, 6, 1, 2]], false),
            (&[SIZE, [4, 2, 8, 10], STAMP, STAMP, STAMP], false),
            (&[SIZE, [4, 2, 8, 10], STAMP, STAMP, SCALE, SCALE], false),
        ];
        for (options, expected) in table {
            assert_eq!(is_kernels(options), expected, "{options:?}");
        }
    }

    #[test]
    fn a_header_that_ends_early_is_not_of_the_kernel() {
        assert!(!has_options_of_kernel(FIRST + 1, |_| None));
        assert!(has_options_of_kernel(FIRST, |_| None), "no options");
    }
}
