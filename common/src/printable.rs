//! Escapes unprintable characters in text that foreign clients may have written.
//!
//! A control sequence in an error text can move the cursor, hide other output or type into a
//! terminal; a character that changes the direction of writing can make an id look like another
//! one.

use std::borrow::Cow;

/// Whether a character is displayed as itself: no control character, and none that breaks a line or
/// changes the direction of writing.
pub fn is_printable(c: char) -> bool {
    // U+2028 and U+2029 break lines; the others change the direction of writing.
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !(c.is_control() || turns || c == '\u{feff}')
}

/// The text with every unprintable character escaped, such as `\u{1b}`. Line feeds and tabs are
/// kept.
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

/// [`neutral`] on one line: line feeds and tabs are escaped as well, so that one text cannot look
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
    fn only_unprintable_characters_are_escaped() {
        assert_eq!(neutral("été\n\t√"), "été\n\t√");
        assert_eq!(neutral("a\u{1b}[2Jb\u{9b}c\r"), "a\\u{1b}[2Jb\\u{9b}c\\u{d}");
        assert_eq!(neutral("\u{202e}txt"), "\\u{202e}txt");
        assert_eq!(one_line("a\nb\t\u{1b}"), "a\\nb\\t\\u{1b}");
    }
}
