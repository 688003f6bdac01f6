//! Text of strangers, made harmless for terminals, logs and people who read them.
//!
//! A control sequence in an error text can move the cursor, hide what follows or type into a
//! terminal; a character that turns the direction of writing can make an id look like another one.

use std::borrow::Cow;

/// Whether a character shows as itself: no control character, and none that turns or breaks a line.
pub fn is_printable(c: char) -> bool {
    // U+2028 and the like break lines, U+200E and the like and U+202A and the like turn them.
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !(c.is_control() || turns || c == '\u{feff}')
}

/// The text with every unprintable character spelled out as `\u{1b}`; lines and tabs stay.
pub fn neutral(text: &str) -> Cow<'_, str> {
    let harmless = |c| is_printable(c) || matches!(c, '\n' | '\t');
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut neutral = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if harmless(c) {
            neutral.push(c);
        } else {
            neutral.extend(c.escape_unicode());
        }
    }
    Cow::Owned(neutral)
}

/// [`neutral`] on one line: line breaks and tabs are spelled out as well, so that a text cannot look
/// like several.
pub fn one_line(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let text = neutral(text).replace('\n', "\\n").replace('\t', "\\t");
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_does_not_show_is_spelled_out() {
        assert_eq!(neutral("été\n\t√"), "été\n\t√");
        assert_eq!(neutral("a\u{1b}[2Jb\u{9b}c\r"), "a\\u{1b}[2Jb\\u{9b}c\\u{d}");
        assert_eq!(neutral("\u{202e}txt"), "\\u{202e}txt");
        assert_eq!(one_line("a\nb\t\u{1b}"), "a\\nb\\t\\u{1b}");
    }
}
