//! Limits how deeply JSON is nested.
//!
//! `serde_json` reads at most 128 levels, and whatever shows a stored value wraps it in a few more,
//! so arguments and outputs are limited to fewer.

use memchr::memchr2_iter;
use serde_json::value::RawValue;

/// Deepest nesting of arguments and outputs, in levels. Responses, lists and exports add fewer than
/// ten.
pub const MAX_DEPTH: usize = 100;

/// Whether bytes are JSON that every response can carry. Numbers may be of any size, since their
/// text is kept.
pub fn is_showable(json: &[u8]) -> bool {
    // A RawValue is read without recursion, so the depth is measured in valid JSON.
    serde_json::from_slice::<&RawValue>(json).is_ok() && !is_too_deep(json)
}

/// Whether valid JSON text is nested more deeply than [`MAX_DEPTH`].
pub fn is_too_deep(json: &[u8]) -> bool {
    // Searching for brackets is many times faster than following the text, and most long arguments,
    // long strings above all, have few.
    memchr2_iter(b'[', b'{', json).nth(MAX_DEPTH).is_some() && deeper_than(json, MAX_DEPTH)
}

/// The value of JSON that every response can carry; `None` for any other bytes, and for numbers
/// outside the range of floats.
pub fn showable(json: &[u8]) -> Option<serde_json::Value> {
    if is_showable(json) { serde_json::from_slice(json).ok() } else { None }
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
    fn the_limit_is_exact_and_brackets_in_strings_do_not_count() {
        assert!(!is_too_deep(&nested(MAX_DEPTH)) && is_too_deep(&nested(MAX_DEPTH + 1)));
        assert!(showable(&nested(MAX_DEPTH)).is_some());
        for depth in [MAX_DEPTH + 1, 126, 127, 128, 100_000] {
            assert_eq!(showable(&nested(depth)), None, "{depth}");
        }
        let text = format!("\"\\\"{}\"", "[".repeat(500));
        assert!(!is_too_deep(text.as_bytes()) && showable(text.as_bytes()).is_some());
    }

    #[test]
    fn invalid_json_is_not_shown() {
        assert_eq!(showable(b"[1,"), None);
        assert_eq!(showable(&[0xff]), None);
        assert!(!is_showable(b"[1,") && !is_showable(b"[1] 2"));
    }

    #[test]
    fn a_number_outside_the_range_of_floats_is_shown_as_text() {
        assert!(is_showable(b"[1e400]"));
        assert_eq!(showable(b"[1e400]"), None);
    }
}
