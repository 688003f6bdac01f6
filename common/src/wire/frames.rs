//! Makes AMQP frames from the broker safe to parse, in place and without changing their length.
//!
//! RabbitMQ passes most of what foreign clients publish through without validation. The client
//! library trusts it: text that is not UTF-8 ends the connection, and headers nested ten thousand
//! levels deep overflow the stack of the process, since its parser recurses without a limit. The
//! broker redelivers such a message, so it could stop every worker of a queue. Here every invalid
//! byte of text becomes a [`SUBSTITUTE`], which no validated name or id accepts, and values that
//! are nested too deeply become byte arrays. The message is then parsed, and refused like any other
//! malformed one.

/// Replaces a byte that is not UTF-8: the control character SUB.
pub const SUBSTITUTE: u8 = 0x1a;

/// Deepest nesting of headers. RabbitMQ's record of dead-lettering needs four levels: headers,
/// array, table, array.
const DEEPEST: u32 = 8;

const METHOD: u8 = 1;
const HEADER: u8 = 2;

/// The shapes of AMQP's basic properties, in the order of their flags from the highest bit.
const PROPERTIES: [Property; 14] = {
    use Property::{Fixed, Headers, Text};
    [
        Text,     // content_type
        Text,     // content_encoding
        Headers,  // headers
        Fixed(1), // delivery_mode
        Fixed(1), // priority
        Text,     // correlation_id
        Text,     // reply_to
        Text,     // expiration
        Text,     // message_id
        Fixed(8), // timestamp
        Text,     // type
        Text,     // user_id
        Text,     // app_id
        Text,     // cluster_id
    ]
};

#[derive(Clone, Copy)]
enum Property {
    Text,
    Headers,
    Fixed(usize),
}

/// Whether frames of this type contain anything to screen.
pub const fn is_screened(kind: u8) -> bool {
    matches!(kind, METHOD | HEADER)
}

/// Screens the payload of a frame of this type. Returns whether the payload could be followed to
/// its end.
///
/// A payload that cannot be followed does not come from a correct broker; the client library then
/// ends the connection.
pub fn screen(kind: u8, payload: &mut [u8]) -> bool {
    let payload = Rest(payload);
    match kind {
        METHOD => method(payload).is_some(),
        HEADER => header(payload).is_some(),
        _ => true,
    }
}

/// Screens the exchange and routing key of a delivery, which its sender has chosen.
fn method(mut rest: Rest<'_>) -> Option<()> {
    match (rest.number(2)?, rest.number(2)?) {
        // basic.return: code, text.
        (60, 50) => {
            rest.take(2)?;
            rest.text()?;
        }
        // basic.deliver: consumer, number, redelivered.
        (60, 60) => {
            rest.text()?;
            rest.take(9)?;
        }
        // basic.get-ok: number, redelivered.
        (60, 71) => {
            rest.take(9)?;
        }
        _ => return Some(()),
    }
    rest.text()?;
    rest.text()
}

fn header(mut rest: Rest<'_>) -> Option<()> {
    // Class, weight and the size of the body.
    rest.take(12)?;
    let flags = rest.number(2)?;
    for (place, property) in PROPERTIES.into_iter().enumerate() {
        if flags & (0x8000 >> place) == 0 {
            continue;
        }
        match property {
            Property::Text => rest.text()?,
            Property::Fixed(bytes) => drop(rest.take(bytes)?),
            Property::Headers => {
                let length = rest.number(4)?;
                table(rest.take(length)?, DEEPEST)?;
            }
        }
    }
    rest.0.is_empty().then_some(())
}

fn table(bytes: &mut [u8], depth: u32) -> Option<()> {
    let mut rest = Rest(bytes);
    while !rest.0.is_empty() {
        rest.text()?;
        value(&mut rest, depth)?;
    }
    Some(())
}

fn array(bytes: &mut [u8], depth: u32) -> Option<()> {
    let mut rest = Rest(bytes);
    while !rest.0.is_empty() {
        value(&mut rest, depth)?;
    }
    Some(())
}

fn value(rest: &mut Rest<'_>, depth: u32) -> Option<()> {
    let kind = rest.take(1)?.first_mut()?;
    let bytes = match *kind {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'U' | b'u' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'L' | b'l' | b'd' | b'T' => 8,
        b'S' | b'x' | b'A' | b'F' => rest.number(4)?,
        _ => return None,
    };
    let inside = rest.take(bytes)?;
    let followed = match *kind {
        b'A' => depth > 0 && array(inside, depth - 1).is_some(),
        b'F' => depth > 0 && table(inside, depth - 1).is_some(),
        _ => true,
    };
    if !followed {
        // A byte array has the same layout: a length, and that many bytes.
        *kind = b'x';
    }
    Some(())
}

/// The bytes that have not been screened yet.
struct Rest<'a>(&'a mut [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a mut [u8]> {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        let bytes = self.take(bytes)?;
        Some(bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// Makes a short string UTF-8.
    fn text(&mut self) -> Option<()> {
        let length = self.number(1)?;
        let text = self.take(length)?;
        while let Err(error) = std::str::from_utf8(text) {
            let (start, wrong) = (error.valid_up_to(), error.error_len());
            let end = wrong.map_or(text.len(), |length| start + length);
            text[start..end].fill(SUBSTITUTE);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A content header with a `type` and headers.
    fn content_header(kind: &[u8], headers: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x20, 0x20];
        bytes.extend(u32::try_from(headers.len()).unwrap().to_be_bytes());
        bytes.extend(headers);
        bytes.push(u8::try_from(kind.len()).unwrap());
        bytes.extend(kind);
        bytes
    }

    fn nested(levels: usize) -> Vec<u8> {
        let mut inside = vec![];
        for _ in 0..levels {
            let length = u32::try_from(inside.len()).unwrap().to_be_bytes();
            inside = [&b"A"[..], &length, &inside].concat();
        }
        [&b"\x04deep"[..], &inside].concat()
    }

    #[test]
    fn valid_frames_are_not_changed() {
        let headers = [&b"\x01n"[..], b"l\0\0\0\0\0\0\0\x07", &nested(4)].concat();
        let sound = content_header("täsk".as_bytes(), &headers);
        let mut screened = sound.clone();
        assert!(screen(HEADER, &mut screened));
        assert_eq!(screened, sound);
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_substituted() {
        let mut bytes = content_header(b"a\xff\xfeb", b"\x02\xc3\x28t\x01");
        assert!(screen(HEADER, &mut bytes));
        assert_eq!(bytes, content_header(b"a\x1a\x1ab", b"\x02\x1a\x28t\x01"));

        let mut deliver = b"\0\x3c\0\x3c\x01c\0\0\0\0\0\0\0\x01\0\x01e\x02\xff\xff".to_vec();
        assert!(screen(METHOD, &mut deliver));
        assert!(deliver.ends_with(b"\x02\x1a\x1a"));
    }

    #[test]
    fn values_that_are_nested_too_deeply_become_bytes() {
        let deep = content_header(b"a", &nested(20_000));
        let mut screened = deep.clone();
        assert!(screen(HEADER, &mut screened));
        let changed: Vec<_> = deep.iter().zip(&screened).filter(|(was, is)| was != is).collect();
        assert_eq!(changed, [(&b'A', &b'x')]);
    }

    proptest! {
        #[test]
        fn screening_does_not_panic_on_any_bytes(kind in 0..4_u8, mut bytes in any::<Vec<u8>>()) {
            screen(kind, &mut bytes);
        }
    }
}
