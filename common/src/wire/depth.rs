//! How deeply JSON is nested. `serde_json` reads 128 levels, and whatever shows a stored value wraps it in
//! some more, so arguments and outputs are held well below that.

use memchr::memchr2_iter;
use serde_json::value::RawValue;

use super::codec::{Codec, Payload};

/// The deepest nesting of arguments and outputs: answers, lists and exports add less than ten levels.
pub const MAX_DEPTH: usize = 100;

/// A payload of bytes that are JSON which every response can carry; `None` for anything else.
pub fn showable_payload(json: &[u8]) -> Option<Payload> {
    let bytes = json.to_vec().into();
    showable(json).map(|_| Payload { codec: Codec::Json, bytes })
}

/// Whether text that is JSON is nested more deeply than [`MAX_DEPTH`].
pub fn is_too_deep(json: &[u8]) -> bool {
    // To look for brackets is many times quicker than to follow the text, and most long arguments,
    // long strings above all, have few.
    memchr2_iter(b'[', b'{', json).nth(MAX_DEPTH).is_some() && deeper_than(json, MAX_DEPTH)
}

/// The value of bytes that are JSON which every answer can carry; `None` for anything else.
pub fn showable(json: &[u8]) -> Option<serde_json::Value> {
    // A RawValue is read without recursion, so depth is looked at in what is known to be JSON.
    serde_json::from_slice::<&RawValue>(json).ok()?;
    if is_too_deep(json) { None } else { serde_json::from_slice(json).ok() }
}

fn deeper_than(json: &[u8], most: usize) -> bool {
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in json {
        if in_text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_text = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_text = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > most {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> Vec<u8> {
        [vec![b'['; depth], vec![b']'; depth]].concat()
    }

    #[test]
    fn the_limit_is_exact_and_text_does_not_count() {
        assert!(!is_too_deep(&nested(MAX_DEPTH)) && is_too_deep(&nested(MAX_DEPTH + 1)));
        assert!(showable(&nested(MAX_DEPTH)).is_some());
        for depth in [MAX_DEPTH + 1, 126, 127, 128, 100_000] {
            assert_eq!(showable(&nested(depth)), None, "{depth}");
        }
        let text = format!("\"\\\"{}\"", "[".repeat(500));
        assert!(!is_too_deep(text.as_bytes()) && showable(text.as_bytes()).is_some());
    }

    #[test]
    fn what_is_no_json_is_not_shown() {
        assert_eq!(showable(b"[1,"), None);
        assert_eq!(showable(&[0xff]), None);
    }
}
