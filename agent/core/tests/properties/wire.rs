//! Frames of the wire format `tacit/1` and the payload of OPEN.

use std::net::{IpAddr, SocketAddr};

use proptest::{collection::vec, prelude::*};
use tacit_core::wire::{
    frame::{
        Control, FrameError, FrameHeader, FrameType, HEADER_BYTES, PAYLOAD_MAX_BYTES, encode_header, header,
        only,
    },
    open::{OPEN_BYTES, Open, OptimisticMode, TraceId},
};

fn address() -> impl Strategy<Value = SocketAddr> {
    (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
}

fn open() -> impl Strategy<Value = Open> {
    let destination = address().prop_filter("a destination", |a| a.port() != 0 && !a.ip().is_unspecified());
    let optimistic_data = prop_oneof![Just(OptimisticMode::Off), Just(OptimisticMode::On)];
    (destination, address(), any::<[u8; 16]>(), optimistic_data).prop_map(
        |(destination, client, trace, optimistic_data)| Open {
            destination,
            client,
            trace: TraceId(trace),
            optimistic_data,
        },
    )
}

fn control() -> impl Strategy<Value = Control> {
    let deny = any::<u8>().prop_map(|code| {
        let deny = Control::decode(FrameType::Deny, &[code]);
        deny.expect("every reason is accepted").expect("the payload is complete")
    });
    prop_oneof![
        open().prop_map(Control::Open),
        deny,
        Just(Control::Accept),
        Just(Control::Fin),
        Just(Control::Reset),
        Just(Control::Done),
        any::<u8>().prop_map(Control::Urgent),
    ]
}

fn encoded(control: Control) -> Vec<u8> {
    let mut bytes = Vec::new();
    control.encode(&mut bytes);
    bytes
}

/// Random bytes that often begin like a frame.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let head = (0..11_u8, 0..3_u8, 0..3_u8, any::<u8>()).prop_map(|(kind, high, middle, low)| {
        let high = if high == 2 { 0xff } else { 0 };
        vec![kind, high, if middle == 2 { 0x40 } else { 0 }, low]
    });
    (head, vec(any::<u8>(), 0..100)).prop_map(|(head, rest)| [head, rest].concat())
}

proptest! {
    #![proptest_config(crate::config())]

    #[test]
    fn a_frame_decodes_to_itself_and_takes_exactly_its_bytes(
        control in control(),
        behind in vec(any::<u8>(), 0..64),
    ) {
        let frame = encoded(control);
        let input = [frame.as_slice(), &behind].concat();
        let head = header(&input).expect("a frame").expect("a whole header");
        prop_assert_eq!(head.kind, control.kind());
        prop_assert_eq!(HEADER_BYTES + head.payload_bytes, frame.len());
        prop_assert_eq!(Control::decode(head.kind, &frame[HEADER_BYTES..]), Ok(Some(control)));
        prop_assert_eq!(only(&frame), Ok(head));
        prop_assert_eq!(only(&input).is_ok(), behind.is_empty());
    }

    #[test]
    fn every_prefix_of_a_frame_is_incomplete_and_no_error(control in control(), cut in any::<prop::sample::Index>()) {
        let frame = encoded(control);
        let prefix = &frame[..cut.index(frame.len())];
        match header(prefix) {
            Ok(None) => prop_assert!(prefix.len() < HEADER_BYTES),
            Ok(Some(head)) => {
                prop_assert!(prefix.len() < HEADER_BYTES + head.payload_bytes);
                prop_assert_eq!(Control::decode(head.kind, &prefix[HEADER_BYTES..]), Ok(None));
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
        let refused = FrameError::NotOne { record_bytes: prefix.len() };
        prop_assert_eq!(only(prefix), Err(refused));
    }

    #[test]
    fn a_data_frame_has_1_byte_to_the_maximum(payload_bytes in prop_oneof![0..40_000_usize, 0..1_usize << 24]) {
        let head = FrameHeader { kind: FrameType::Data, payload_bytes };
        let read = header(&encode_header(FrameType::Data, payload_bytes));
        if (1..=PAYLOAD_MAX_BYTES).contains(&payload_bytes) {
            prop_assert_eq!(read, Ok(Some(head)));
        } else {
            prop_assert_eq!(read, Err(FrameError::Length { kind: FrameType::Data, payload_bytes }));
        }
    }

    #[test]
    fn no_bytes_claim_more_than_a_record_or_decode_to_another_frame(bytes in stream()) {
        let Ok(Some(head)) = header(&bytes) else { return Ok(()) };
        prop_assert!(head.payload_bytes <= PAYLOAD_MAX_BYTES);
        let payload = &bytes[HEADER_BYTES..];
        let Some(payload) = payload.get(..head.payload_bytes) else {
            prop_assert!(only(&bytes).is_err());
            return Ok(());
        };
        if let Ok(Some(control)) = Control::decode(head.kind, payload) {
            prop_assert_eq!(control.kind(), head.kind);
            prop_assert_eq!(encoded(control).len(), HEADER_BYTES + head.payload_bytes);
        }
    }

    #[test]
    fn any_payload_of_open_is_refused_or_read_to_the_last_byte(
        version in 0..4_u8,
        addresses in any::<[u8; 32]>(),
        trace in any::<[u8; 16]>(),
        ports in any::<[u8; 4]>(),
        optimistic in 0..4_u8,
    ) {
        let [a, b, c, d] = ports;
        let (destination, client) = addresses.split_at(16);
        let payload =
            [&[version], destination, &[a, b], client, &[c, d], trace.as_slice(), &[optimistic]].concat();
        prop_assert_eq!(payload.len(), OPEN_BYTES);
        let is_open = version == 1 && optimistic < 2 && [a, b] != [0, 0] && destination != [0; 16];
        match Control::decode(FrameType::Open, &payload) {
            Ok(Some(control)) => {
                prop_assert!(is_open);
                prop_assert_eq!(&encoded(control)[HEADER_BYTES..], &payload);
            }
            Ok(None) => prop_assert!(false, "a whole payload is incomplete"),
            Err(_) => prop_assert!(!is_open),
        }
    }
}
